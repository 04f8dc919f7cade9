#!/usr/bin/env python3
"""Writes the selection fixture of crates/cache: which tokens or channels kvpress keeps.

Needs the package `kvpress` with its dependencies (kvpress 0.5.5, torch 2.15.0, transformers 5.2.0
and numpy 2.4.6 under Python 3.11 made the committed file; a CPU is enough):

    python3 -m venv VENV && VENV/bin/pip install kvpress==0.5.5
    VENV/bin/python scripts/make_press_fixtures.py crates/cache/tests/fixtures/press.json

kvpress runs unmodified on a stand-in for an attention layer. Inputs are not stored: a generator
makes them that any language repeats bit for bit (`Generator`, and ABOUT below, which is also the
file's text). H2O and DBudgetKV are not in kvpress; for them dense numpy in f64 does what their
papers say.

Scores must leave no doubt about who is kept. For every input, seeds are tried until each cut has
a margin of MARGIN (see `margin`), and until kvpress keeps the same when RoPE's angles and
everything that it does not itself cast to f32 are f64. The smallest margin of each case is printed
and stored.
"""

import contextlib
import itertools
import json
import math
import sys
from dataclasses import dataclass
from importlib.metadata import version
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from kvpress import (
    ChunkKVPress,
    CompactorPress,
    LeverageScorePress,
    NonCausalAttnPress,
    ObservedAttentionPress,
    SnapKVPress,
    StreamingLLMPress,
    ThinKPress,
)
from transformers.models.llama.modeling_llama import repeat_kv, rotate_half

MARGIN = 3e-4
ROPE_BASE = 10000.0
PHI_SEED = 7
RATIOS = [0.25, 0.5, 0.75]
THRESHOLDS = [0.01, 0.05]  # of DBudgetKV
MOST_BYTES = 150_000

ABOUT = """\
Made by scripts/make_press_fixtures.py. `deviations` says where kvpress differs from the papers.

GENERATOR: state = (seed * 0x9E3779B97F4A7C15) | 1; each draw: state = state * 6364136223846793005
+ 1442695040888963407 (all wrapping in u64), x = state >> 33, value = (x as f32) / 2^30 - 1.0 in
f32: from -1 to 1.

INPUTS: one generator with the input's seed draws, in this order and each row-major, queries
[tokens, query_heads, head_dim], keys [tokens, kv_heads, head_dim], values [tokens, kv_heads,
head_dim]. Keys are then multiplied by key_factor (a power of two: exact). These are the tensors
before RoPE.

ROPE: positions p = 0..tokens-1, pairs (i, i + head_dim/2), angle = p * 10000^(-2i/head_dim) in
f32: (a, b) becomes (a cos - b sin, b cos + a sin). Queries and keys are rotated. Query head h
belongs to KV head h / (query_heads / kv_heads).

CASES: `input` is an index into inputs; `ratio` the share that is removed; `kept` and `pruned` are
ascending lists, one a KV head. Scores have one row a KV head: of the positions in `at` if there
is that list, else of all. `margin` is the lowest kept score minus the highest dropped one, the
smallest over heads: divided by the lowest kept score, but for z-scores (leverage, non_causal,
compactor) as it is. For dbudget it is the distance from the threshold, of the counts `count` and
`count` - 1.

SNAPKV: `window`, `kernel`. Scores end before the window.

CHUNKKV: `chunk`, and the snapkv press that scores tokens. `chunks` are the kept ones.

LEVERAGE: `sketch`, `phi_seed`. `raw` before and `scores` after z-scoring. Phi is the values of a
generator seeded with phi_seed, row-major [head_dim, sketch] and the same for every KV head, times
1/sqrt(sketch) in f32. (kvpress draws normal values, for every head its own.)

NON_CAUSAL: `chunk`. `raw` are column sums, the mean over the query heads of a KV head;
`raw_unpadded` the same if the partial last chunk is not padded but computed at its own size;
`scores` of the padded ones, after values' norms, pooling and z-scoring.

COMPACTOR: `chunk`, `sketch`, `phi_seed`, `blending`; the `first` and `last` tokens are protected.
Scores are of the tokens between them.

THINK: `window`, `pruned_ratio`. Scores of all channels, in f64 (kvpress does not return them).

STREAMING: `sinks`.

OBSERVED: dense causal attention. Scores are given for the first ratio, and are the same for the
others.

H2O: `heavy`, `recent`. Not kvpress. Scores are column sums of the dense causal attention, added
over the query heads of a KV head; given for the first case of an input.

DBUDGET: `threshold`, `denominator`. Not kvpress. The last token's attention in all query heads;
`count` ranked positions stay (the first 4, then from the last one down). `paper`: norms are over
all positions. `apart`: the first 4 stay whatever comes; norms are over the others; `count`
includes the first 4.
"""

DEVIATIONS = """\
All: max(1, floor(tokens * (1 - ratio))) stay per KV head, by torch.topk: which of equal scores
stay is not defined.

SnapKV: a ratio instead of a capacity; default window 64 (paper's code: 32). Mean instead of sum
over the window's queries (the same ranking); pooled by query head, then the mean over the query
heads of a KV head (paper's code repeats keys and chooses by query head). The pool ends before the
window and counts zeros beyond both ends. All positions of the window get the highest score of the
layer + 1: if fewer stay than the window has, which of it is not defined. Needs more tokens than
the window.

ChunkKV: token scores are the press' own, so with SnapKV's pool and with highest + 1 in the
window; added over KV heads, mean in a chunk. max(1, floor(chunks * (1 - ratio))) chunks stay, a
partial last one counted as one, so that the share of tokens is not 1 - ratio. Chunks inside the
window tie. No reuse between layers. Batch element 0 decides for the whole batch.

Leverage: Cholesky of the Gram matrix + 0.01 I where the paper has an SVD. A failed factorisation
is tried again with 0.1, 1, 10 and 100, for all heads. Clamped at 0. z-scores are over all KV
heads (and the batch) together, with the unbiased deviation, at least 1e-6. The default sketch of
48 may be wider than the heads.

NonCausalAttn: logits are not divided by sqrt(head_dim). A partial last chunk is padded with
zeros: padded keys are masked with -1e-9 instead of -inf, so that each takes weight exp(0) from
every query of the chunk; padded queries, whose rows are uniform, are summed too and add padding /
chunk to every column of the chunk. Multiplied by values' L2 norms; averaged over 3 neighbours,
across borders of chunks, counting zeros beyond the ends. A comment says that z-scores are by
head: they are as Leverage's.

Compactor: both parts see only the tokens between the protected ends (8 and 4): so do the key
mean, the borders of chunks, and the z-scores. Blending is the ratio by default (paper: 0.3). The
ends get the highest score and tie with the best token: if fewer than 13 stay, which is not
defined. The number kept is rounded down (paper: up), by KV head (engine: the best of all tokens
and heads).

ThinK: squares of queries are averaged over the query heads of a KV head (paper's code: each query
head has its channels); squares of keys over all tokens. floor(head_dim * ratio) channels are
zeroed in all tokens, the newest 32 too.

StreamingLLM: tokens keep their positions (paper: positions in the cache). How many go is computed
without the clamp to one that stays.

ObservedAttention: column sums are divided by the number of queries that see the position, and
averaged over the query heads of a KV head; nothing recent is protected. H2O's are not divided,
and the recent ones stay.
"""


def paragraphs(text: str) -> list[str]:
    return [" ".join(part.split("\n")) for part in text.strip().split("\n\n")]


class Generator:
    """A 64-bit linear congruential generator; see ABOUT."""

    def __init__(self, seed: int):
        self.state = (seed * 0x9E3779B97F4A7C15) % 2**64 | 1

    def values(self, *shape: int) -> np.ndarray:
        """f32 values from -1 to 1."""
        drawn = np.empty(math.prod(shape), np.int64)
        for i in range(drawn.size):
            self.state = (self.state * 6364136223846793005 + 1442695040888963407) % 2**64
            drawn[i] = self.state >> 33
        values = drawn.astype(np.float32) / np.float32(2**30) - np.float32(1)
        return values.reshape(shape)


@dataclass
class Shape:
    """An input and the cases that are made of it."""

    query_heads: int
    kv_heads: int
    head_dim: int
    tokens: int
    key_factor: int
    seed: int  # the first that is tried
    windows: list  # of SnapKV: (window, ratios)
    chunks: list  # of ChunkKV: (chunk, window, kernel, ratios)
    blocks: list  # chunk sizes of the non-causal attention
    compactor: list  # (chunk, sketch)
    sketches: list
    h2o: list  # (heavy, recent)
    scores: bool = False  # stores all scores

    def shown(self, end: int | None = None, **scores) -> dict:
        """Fields of a case: scores of all positions before `end`, or of a few of them."""
        end = end or self.tokens
        if self.scores:
            return {name: rows(score[:, :end]) for name, score in scores.items()}
        n = self.tokens
        some = {0, 1, 2, 3, 5, n // 4, n // 3, n // 2, n // 2 + 1, end - 2, end - 1}
        at = sorted(p for p in some if p < end)
        return {"at": at} | {name: rows(score[:, at]) for name, score in scores.items()}


SHAPES = [
    Shape(
        4, 2, 16, 70, 2, 1,
        windows=[(16, RATIOS), (64, [0.05])],
        # 7 chunks of 10; 3 of 20 and a partial one.
        chunks=[(20, 16, 5, [0.25, 0.5]), (10, 16, 5, RATIOS), (10, 16, 1, [0.5])],
        blocks=[256, 32, 35],
        # 58 tokens between the ends: a chunk of 29 needs no padding.
        compactor=[(256, 48), (32, 8), (29, 8)],
        sketches=[48, 8],
        h2o=[(7, 7), (20, 15)],
        scores=True,
    ),
    Shape(
        3, 3, 32, 129, 4, 7,
        windows=[(16, RATIOS), (64, [0.25, 0.5])],
        chunks=[(20, 16, 5, RATIOS), (10, 64, 5, [0.25]), (20, 16, 1, [0.5])],
        blocks=[256, 32, 43],
        compactor=[(256, 48), (32, 24), (39, 24)],
        sketches=[48, 24],
        h2o=[(12, 12), (30, 20)],
    ),
    Shape(
        6, 2, 32, 300, 4, 330,
        windows=[(16, RATIOS), (64, RATIOS)],
        chunks=[(20, 64, 5, RATIOS), (10, 16, 5, [0.5]), (7, 16, 1, [0.25, 0.5])],
        blocks=[256, 32, 100],
        compactor=[(256, 48), (32, 24)],
        sketches=[48, 24],
        h2o=[(30, 30), (60, 90)],
    ),
    # Peaked attention for DBudgetKV alone.
    Shape(4, 2, 16, 97, 16, 402, [], [], [], [], [], []),
    Shape(2, 1, 8, 40, 32, 85, [], [], [], [], [], []),
]  # fmt: skip


class Unclear(Exception):
    """A cut is too close."""


class Input:
    """Tensors of a layer as kvpress sees them. `dtype` is that of RoPE and of the tensors."""

    def __init__(self, shape: Shape, seed: int, dtype: torch.dtype):
        self.shape, self.seed, self.dtype = shape, seed, dtype
        draw = Generator(seed)
        n, dim = shape.tokens, shape.head_dim
        queries = draw.values(n, shape.query_heads * dim)
        keys = draw.values(n, shape.kv_heads * dim) * np.float32(shape.key_factor)
        values = draw.values(n, shape.kv_heads * dim)
        # The layer's projections take the pre-RoPE queries and keys out of the hidden states.
        self.hidden = torch.tensor(np.concatenate([queries, keys], 1))[None].to(dtype)
        split = shape.query_heads * dim
        self.module = SimpleNamespace(
            config=SimpleNamespace(
                num_attention_heads=shape.query_heads, num_key_value_heads=shape.kv_heads
            ),
            head_dim=dim,
            q_proj=lambda hidden: hidden[..., :split],
            k_proj=lambda hidden: hidden[..., split:],
        )
        # As LlamaRotaryEmbedding.
        frequencies = 1.0 / (ROPE_BASE ** (torch.arange(0, dim, 2, dtype=dtype) / dim))
        angles = torch.arange(n, dtype=dtype)[:, None] * frequencies
        angles = torch.cat([angles, angles], -1)[None]
        self.rope = angles.cos(), angles.sin()
        self.queries = self.rotate(self.heads(self.module.q_proj))
        self.keys = self.rotate(self.heads(self.module.k_proj))
        values = torch.tensor(values).to(dtype)
        self.values = values.view(1, n, -1, dim).transpose(1, 2).contiguous()

    def heads(self, projection) -> torch.Tensor:
        """Queries or keys before RoPE, [1, heads, tokens, head_dim]."""
        shape = 1, self.shape.tokens, -1, self.shape.head_dim
        return projection(self.hidden).view(shape).transpose(1, 2)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        cos, sin = self.rope
        return x * cos[:, None] + rotate_half(x) * sin[:, None]

    def arguments(self, attentions: torch.Tensor | None = None) -> dict:
        """Those of a press' `score` and `compress`."""
        return {
            "module": self.module,
            "hidden_states": self.hidden,
            "keys": self.keys.clone(),
            "values": self.values.clone(),
            "attentions": attentions,
            "kwargs": {"position_embeddings": self.rope, "hidden_states": self.hidden},
        }

    def attention(self) -> torch.Tensor:
        """Dense causal attention, [1, query_heads, tokens, tokens]."""
        keys = repeat_kv(self.keys, self.shape.query_heads // self.shape.kv_heads)
        logits = self.queries @ keys.transpose(2, 3) / math.sqrt(self.shape.head_dim)
        future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
        return logits.masked_fill(future, -math.inf).softmax(-1)

    def attention_f64(self) -> np.ndarray:
        """The same in numpy and f64, from the rotated queries and keys."""
        queries = self.queries[0].numpy().astype(np.float64)
        keys = self.keys[0].numpy().astype(np.float64)
        keys = keys.repeat(self.shape.query_heads // self.shape.kv_heads, 0)
        logits = queries @ keys.transpose(0, 2, 1) / math.sqrt(self.shape.head_dim)
        logits[:, np.triu(np.ones(logits.shape[1:], bool), 1)] = -np.inf
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True)


@contextlib.contextmanager
def known_phi(seed: int):
    """Lets the sketch matrix come from the generator, the same for every head."""

    def randn(batch, heads, dim, sketch, *, device, dtype):
        phi = torch.tensor(Generator(seed).values(dim, sketch), device=device).to(dtype)
        return phi.expand(batch, heads, dim, sketch)

    with mock.patch("torch.randn", randn):
        yield


def kept_positions(press, given: Input, attentions: torch.Tensor | None = None) -> list[list[int]]:
    """What a press keeps, found by the kept keys themselves (no two are alike)."""
    keys, values = press.compress(**given.arguments(attentions))
    heads = []
    for head in range(given.shape.kv_heads):
        same = (keys[0, head][:, None] == given.keys[0, head][None]).all(-1)
        assert (same.sum(1) == 1).all()
        positions = same.int().argmax(1)
        assert torch.equal(values[0, head], given.values[0, head][positions])
        heads.append(sorted(positions.tolist()))
    return heads


def margin(scores, count: int, relative: bool) -> float:
    """The smallest distance over heads (rows) between the worst kept and the best dropped score."""
    ordered = -np.sort(-np.asarray(scores, np.float64), axis=-1)
    if not 0 < count < ordered.shape[-1]:
        return math.inf
    kept, dropped = ordered[..., count - 1], ordered[..., count]
    return float(((kept - dropped) / (np.abs(kept) if relative else 1)).min())


def rows(scores) -> list[list[float]]:
    """For the file: six digits."""
    return [[float(f"{x:.6g}") for x in row] for row in np.asarray(scores, np.float64)]


def snapkv(given: Input):
    for window, ratios in given.shape.windows:
        for ratio in ratios:
            press = SnapKVPress(ratio, window_size=window, kernel_size=5)
            scores = press.score(**given.arguments())[0]
            kept = kept_positions(press, given)
            # With attention weights at hand kvpress takes the window's rows of them.
            assert kept == kept_positions(press, given, given.attention())
            case = {"press": "snapkv", "window": window, "kernel": 5, "ratio": ratio}
            case |= given.shape.shown(given.shape.tokens - window, scores=scores)
            yield case | {"kept": kept}, margin(scores, len(kept[0]), True)


def chunkkv(given: Input):
    for chunk, window, kernel, ratios in given.shape.chunks:
        for ratio in ratios:
            inner = SnapKVPress(ratio, window_size=window, kernel_size=kernel)
            kept = kept_positions(ChunkKVPress(inner, chunk_length=chunk), given)
            assert all(head == kept[0] for head in kept)
            chunks = sorted({p // chunk for p in kept[0]})
            scores = inner.score(**given.arguments())[0].sum(0)
            means = [float(part.mean()) for part in scores.split(chunk)]
            assert set(chunks) == set(np.argsort(means)[-len(chunks) :].tolist())
            case = {"press": "chunkkv", "chunk": chunk, "window": window, "kernel": kernel}
            case |= {"ratio": ratio, "chunks": chunks, "kept": kept}
            yield case, margin(means, len(chunks), True)


def leverage(given: Input):
    for sketch in given.shape.sketches:
        press = LeverageScorePress(0.5, sketch_dimension=sketch)
        with known_phi(PHI_SEED):
            scores = press.score(**given.arguments())[0]
            kept = kept_positions(press, given)
            raw = press.compute_leverage_scores(given.heads(given.module.k_proj), sketch)[0]
        case = {"press": "leverage", "sketch": sketch, "phi_seed": PHI_SEED, "ratio": 0.5}
        case |= given.shape.shown(raw=raw, scores=scores)
        yield case | {"kept": kept}, margin(scores, len(kept[0]), False)


def non_causal(given: Input):
    shape = given.shape
    keys = repeat_kv(given.keys, shape.query_heads // shape.kv_heads)

    def columns(begin: int, end: int, chunk: int) -> torch.Tensor:
        part = given.queries[:, :, begin:end], keys[:, :, begin:end]
        sums = NonCausalAttnPress.non_causal_chunked_attn(*part, chunk)[0]
        return sums.view(shape.kv_heads, -1, end - begin).mean(1)

    for chunk in shape.blocks:
        press = NonCausalAttnPress(0.5, chunk_size=chunk)
        scores = press.score(**given.arguments())[0]
        kept = kept_positions(press, given)
        shown = {"raw": columns(0, shape.tokens, chunk), "scores": scores}
        whole = shape.tokens // chunk * chunk
        if whole < shape.tokens:
            unpadded = [columns(whole, shape.tokens, shape.tokens - whole)]
            if whole > 0:
                unpadded.insert(0, columns(0, whole, chunk))
            shown["raw_unpadded"] = torch.cat(unpadded, -1)
        case = {"press": "non_causal", "chunk": chunk, "ratio": 0.5} | shape.shown(**shown)
        yield case | {"kept": kept}, margin(scores, len(kept[0]), False)


def compactor(given: Input):
    for chunk, sketch in given.shape.compactor:
        for ratio in RATIOS:
            press = CompactorPress(ratio, chunk_size=chunk, sketch_dimension=sketch)
            with known_phi(PHI_SEED):
                scores = press.score(**given.arguments())[0]
                kept = kept_positions(press, given)
            first, last = press.sink_size_start, press.sink_size_end
            case = {"press": "compactor", "chunk": chunk, "sketch": sketch, "phi_seed": PHI_SEED}
            case |= {"first": first, "last": last, "blending": ratio, "ratio": ratio}
            if given.shape.scores and ratio == 0.5:
                case["scores"] = rows(scores[:, first:-last])
            yield case | {"kept": kept}, margin(scores, len(kept[0]), False)


def think(given: Input):
    shape, window = given.shape, 32
    for ratio in [0.4, 0.5]:
        press = ThinKPress(key_channel_compression_ratio=ratio, window_size=window)
        keys, _ = press.compress(**given.arguments())
        pruned = [np.flatnonzero((head == 0).all(0)).tolist() for head in keys[0]]
        queries = given.queries[0, :, -window:].double().square().mean(1)
        queries = queries.view(shape.kv_heads, -1, shape.head_dim).mean(1)
        scores = queries * given.keys[0].double().square().mean(1)
        count = len(pruned[0])
        assert pruned == scores.topk(count, largest=False).indices.sort().values.tolist()
        case = {"press": "think", "window": window, "pruned_ratio": ratio}
        case |= {"scores": rows(scores), "pruned": pruned}
        yield case, margin(scores, shape.head_dim - count, True)


def streaming(given: Input):
    for ratio in RATIOS:
        press = StreamingLLMPress(ratio, n_sink=4)
        kept = kept_positions(press, given)
        scores = press.score(**given.arguments())[0]
        case = {"press": "streaming", "sinks": 4, "ratio": ratio, "kept": kept}
        yield case, margin(scores, len(kept[0]), True)


def observed(given: Input):
    attentions = given.attention()
    for ratio in RATIOS:
        press = ObservedAttentionPress(ratio)
        scores = press.score(**given.arguments(attentions))[0]
        kept = kept_positions(press, given, attentions)
        case = {"press": "observed", "ratio": ratio}
        if ratio == RATIOS[0]:
            case |= given.shape.shown(scores=scores)
        yield case | {"kept": kept}, margin(scores, len(kept[0]), True)


def h2o(given: Input):
    shape = given.shape
    sums = given.attention_f64().sum(1).reshape(shape.kv_heads, -1, shape.tokens).sum(1)
    for heavy, recent in shape.h2o:
        older = shape.tokens - recent
        best = np.argsort(-sums[:, :older], -1)[:, :heavy]
        kept = [sorted([*head, *range(older, shape.tokens)]) for head in best.tolist()]
        case = {"press": "h2o", "heavy": heavy, "recent": recent}
        if (heavy, recent) == shape.h2o[0]:
            case |= shape.shown(scores=sums)
        yield case | {"kept": kept}, margin(sums[:, :older], heavy, True)


def dbudget(given: Input):
    tokens, sinks = given.shape.tokens, 4
    last = given.attention_f64()[:, -1]
    ranked = [*range(sinks), *range(tokens - 1, sinks - 1, -1)]
    for threshold in THRESHOLDS:
        for denominator, skipped in [("paper", 0), ("apart", sinks)]:
            # As slowly as the definition reads.
            def mean_norm(t: int, skipped: int = skipped) -> float:
                return float(np.mean([np.linalg.norm(a[ranked[skipped:t]]) for a in last]))

            whole = mean_norm(tokens)
            lost = {t: 1 - mean_norm(t) / whole for t in range(skipped, tokens + 1)}
            count = next(t for t in range(skipped + 1, tokens + 1) if lost[t] <= threshold)
            clear = min(threshold - lost[count], lost[count - 1] - threshold)
            case = {"press": "dbudget", "threshold": threshold, "denominator": denominator}
            yield case | {"count": count}, clear


MAKERS = [
    snapkv, chunkkv, leverage, non_causal, compactor, think, streaming, observed, h2o, dbudget,
]  # fmt: skip
DECISIONS = ("kept", "pruned", "count")
SIZES = ["query_heads", "kv_heads", "head_dim", "tokens", "key_factor"]


def cases_of(shape: Shape, seed: int) -> list[dict]:
    """All cases of an input. Raises `Unclear` if a cut is too close."""
    single, double = Input(shape, seed, torch.float32), Input(shape, seed, torch.float64)
    only_dbudget = not shape.windows
    cases = []
    for maker in [dbudget] if only_dbudget else MAKERS:
        for (case, clear), (again, _) in zip(maker(single), maker(double), strict=True):
            if clear < MARGIN or any(case.get(d) != again.get(d) for d in DECISIONS):
                raise Unclear(f"{case['press']}: {clear:.1e}")
            case["margin"] = float(f"{clear:.2g}")
            cases.append(case)
    if only_dbudget:
        # The two denominators must differ, and something must go.
        counts = [case["count"] for case in cases]
        if counts[0] == counts[1] or counts[2] == counts[3] or max(counts) == shape.tokens:
            raise Unclear("counts are alike")
    return cases


def main() -> None:
    (path,) = sys.argv[1:]
    torch.set_num_threads(1)
    inputs, cases = [], []
    for number, shape in enumerate(SHAPES):
        for seed in itertools.count(shape.seed):
            try:
                made = cases_of(shape, seed)
                break
            except Unclear as why:
                print(f"input {number}: seed {seed} is unclear: {why}")
        sizes = {name: getattr(shape, name) for name in SIZES}
        inputs.append({"seed": seed, **sizes})
        print(f"input {number}: seed {seed}, {sizes}")
        for case in made:
            said = {k: v for k, v in case.items() if not isinstance(v, list)}
            print("   ", *[f"{k}={v}" for k, v in said.items()])
            press = case.pop("press")
            cases.append({"press": press, "input": number, **case})
    packages = ["kvpress", "torch", "transformers", "numpy"]
    head = {
        "about": paragraphs(ABOUT),
        "versions": {name: version(name) for name in packages},
        "deviations": paragraphs(DEVIATIONS),
    }
    # A line a case.
    text = json.dumps(head, indent=1)[:-2]
    for name, items in [("inputs", inputs), ("cases", cases)]:
        lines = [json.dumps(item, separators=(",", ":")) for item in items]
        text += f',\n "{name}": [\n' + ",\n".join(lines) + "\n ]"
    text += "\n}\n"
    json.loads(text)
    if len(text) > MOST_BYTES:
        sys.exit(f"{len(text)} bytes are too many")
    with open(path, "w") as file:
        file.write(text)
    print(f"{path}: {len(cases)} cases, {len(text)} bytes")


if __name__ == "__main__":
    main()
