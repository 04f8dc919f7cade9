#!/usr/bin/env python3
"""Writes the tiny models and golden logits of crates/model/tests/architectures.rs.

Needs the packages `torch`, `transformers`, `safetensors`, `gguf` and `numpy` (torch 2.15.0,
transformers 5.23.0, safetensors 0.8.0, gguf 0.19.0 and numpy 2.4.6 made the committed files):

    python scripts/make_arch_goldens.py crates/model/tests/fixtures/arch

Each case is a folder with config.json, tokenizer.json, model.safetensors, expected.json and, where
llama.cpp can express the model, model.gguf. Weights are random with a fixed seed and exact in f16;
matrices are stored as f16, vectors as f32. The logits are those of transformers in f32 (eager
attention, no cache) on the model that it loads from the written config.json. The GGUF file is
written with the `gguf` package under the names, keys and weight changes of llama.cpp's converter:
query and key rows of Llama permuted, 1 added to Gemma's norms, Llama 3's rule as `rope_freqs`.

llama.cpp itself (run once through the package xllamacpp 2026.10.11549) gives the logits of these
files within 0.03, for it rounds activations to f16; but it has no sliding window for Llama
(mistral_window), and for Llama does not read YaRN's `yarn_attn_factor` and `yarn_beta_*`, which
its converter writes (llama_yarn). There the files mean what transformers computes.

Before a case is written, each of its `matters` (changes to config.json) must move some stored logit
by far more than the test's tolerance: otherwise the golden values would not see the feature.
"""

import copy
import json
import math
import shutil
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

SEED = 20251120
NUM_TOKENS = 64  # of the tokenizer
SEQUENCE = 72
POSITIONS = [0, 1, 7, 15, 16, 17, 31, 32, 47, 63, 70, 71]
TOLERANCE = 1e-4

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 62,
    "eos_token_id": 63,
    "dtype": "float16",
}
GEMMA = {
    **COMMON,
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "hidden_activation": "gelu_pytorch_tanh",
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 16,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-6,
    "sliding_window": 12,
}
LLAMA = {**COMMON, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
QWEN2 = {**COMMON, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu"}


def llama3(factor: float) -> dict:
    return {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }


# name: (config.json, whether there is a GGUF file, changes that must show)
CASES = {
    # transformers 5: RoPE under `rope_parameters`; more embedding rows than tokens.
    "llama3": (
        {
            **LLAMA,
            "vocab_size": 72,
            "head_dim": 16,
            "tie_word_embeddings": False,
            "rope_parameters": llama3(8.0),
        },
        True,
        [{"rope_parameters": llama3(4.0)}, {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}],
    ),
    # transformers 4: `rope_theta` beside `rope_scaling`; every bias; head size from the width.
    "llama_linear_biases": (
        {
            **LLAMA,
            "head_dim": None,
            "num_key_value_heads": 4,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "rope_theta": 1000.0,
            "rope_scaling": {"type": "linear", "factor": 2.5},
        },
        True,
        [{"rope_scaling": None}, {"rope_theta": 10000.0}],
    ),
    "llama_yarn": (
        {
            **LLAMA,
            "head_dim": 16,
            "tie_word_embeddings": False,
            "rope_theta": 1000.0,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "attention_factor": 1.5,
                "beta_fast": 8.0,
                "beta_slow": 0.5,
            },
        },
        True,
        [
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
                              "attention_factor": 1.5}},
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
                              "beta_fast": 8.0, "beta_slow": 0.5}},
        ],
    ),
    "mistral_window": (
        {
            **COMMON,
            "model_type": "mistral",
            "architectures": ["MistralForCausalLM"],
            "hidden_act": "silu",
            "head_dim": 24,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "tie_word_embeddings": False,
            "rope_theta": 10000.0,
            "sliding_window": 16,
        },
        True,
        [{"sliding_window": None}, {"sliding_window": 15}, {"sliding_window": 17}],
    ),
    # Qwen's way to long contexts: YaRN with everything at its default.
    "qwen2_yarn": (
        {
            **QWEN2,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "sliding_window": 16,
            "max_window_layers": 0,
            "rope_theta": 1000.0,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        },
        True,
        [{"rope_scaling": None}, {"use_sliding_window": True}],
    ),
    "qwen2_window": (
        {
            **QWEN2,
            "num_hidden_layers": 3,
            "tie_word_embeddings": False,
            "use_sliding_window": True,
            "sliding_window": 16,
            "max_window_layers": 1,
            "rope_theta": 10000.0,
        },
        False,
        [{"use_sliding_window": False}, {"max_window_layers": 2}, {"max_window_layers": 0}],
    ),
    "qwen3": (
        {
            **COMMON,
            "model_type": "qwen3",
            "architectures": ["Qwen3ForCausalLM"],
            "hidden_act": "silu",
            "head_dim": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        True,
        [{"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}],
    ),
    # transformers 5: parameters by layer type. One global layer after five local ones, then a local.
    "gemma3": (
        {
            **GEMMA,
            "hidden_size": 24,
            "num_hidden_layers": 7,
            "query_pre_attn_scalar": 16,
            "final_logit_softcapping": 8.0,
            "layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 20000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        },
        True,
        [
            {"final_logit_softcapping": None},
            {"layer_types": ["sliding_attention"] * 7},
            {"rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 20000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
            }},
            {"rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 20000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            }},
        ],
    ),
    # transformers 4. A cap of attention scores may stand there; Gemma 3 does not use it.
    "gemma3_pattern": (
        {
            **GEMMA,
            "num_hidden_layers": 4,
            "intermediate_size": 40,
            "query_pre_attn_scalar": 40,
            "attn_logit_softcapping": 1.0,
            "attention_bias": True,
            "sliding_window_pattern": 2,
            "rope_theta": 20000.0,
            "rope_local_base_freq": 500.0,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        },
        False,
        [
            {"query_pre_attn_scalar": 16},
            {"sliding_window_pattern": 3},
            {"rope_scaling": None},
            {"rope_theta": 500.0},
            {"rope_local_base_freq": 20000.0},
        ],
    ),
}


def load_config(config: dict):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        return AutoConfig.from_pretrained(folder)


def build(config: dict, state: dict | None, seed: int):
    """The model of a config.json, with the weights `state` or random ones."""
    torch.manual_seed(seed)
    hf = load_config(config)
    model = AutoModelForCausalLM.from_config(hf, attn_implementation="eager", dtype=torch.float32)
    model.eval()
    if state is not None:
        model.load_state_dict(state)
        return model
    gemma = config["model_type"] == "gemma3_text"
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                # Gemma stores weight - 1.
                value = torch.randn(weight.shape) * 0.2 + (0.0 if gemma else 1.0)
            elif weight.dim() == 1:
                value = torch.randn(weight.shape) * 0.3
            elif "embed" in name or "lm_head" in name:
                value = torch.randn(weight.shape) * 0.5
            else:
                # Outputs of unit size, and twice that for queries and keys: scores that choose.
                gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
                value = torch.randn(weight.shape) * gain / math.sqrt(weight.shape[-1])
            weight.copy_(value.half().float())
    return model


def run(model, tokens: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()


def tokens_of_vocabulary() -> list[str]:
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ012345678"
    return [*letters, "ab", "<bos>", "<eos>"]


def tokenizer_json() -> dict:
    tokens = tokens_of_vocabulary()
    added = [
        {"id": i, "content": tokens[i], "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for i in (62, 63)
    ]  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "vocab": {t: i for i, t in enumerate(tokens[:62])}, "merges": ["a b"]},
    }  # fmt: skip


def stored(state: dict, tied: bool) -> dict:
    """As a checkpoint stores it: matrices f16, no head where it is tied."""
    return {
        name: (value.half() if value.dim() > 1 else value.float()).contiguous()
        for name, value in state.items()
        if not (tied and name == "lm_head.weight")
    }


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Llama's query and key rows from split pairs to adjacent ones."""
    split = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(weight.shape))


def rope_freqs(rope: dict, head_dim: int) -> np.ndarray:
    """Divisors of Llama 3's rule."""
    low_wavelength = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    high_wavelength = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / head_dim)
        if wavelength < high_wavelength:
            factors.append(1.0)
        elif wavelength > low_wavelength:
            factors.append(rope["factor"])
        else:
            smooth = (rope["original_max_position_embeddings"] / wavelength - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


def write_gguf(path: Path, config: dict, hf, tensors: dict) -> None:
    name = {"llama": "llama", "mistral": "llama", "gemma3_text": "gemma3"}.get(
        config["model_type"], config["model_type"]
    )
    arch = next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == name)
    writer = gguf.GGUFWriter(path, name)
    layers = hf.num_hidden_layers
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    writer.add_name(path.parent.name)
    writer.add_block_count(layers)
    writer.add_context_length(hf.max_position_embeddings)
    writer.add_embedding_length(hf.hidden_size)
    writer.add_feed_forward_length(hf.intermediate_size)
    writer.add_head_count(hf.num_attention_heads)
    writer.add_head_count_kv(hf.num_key_value_heads)
    writer.add_layer_norm_rms_eps(hf.rms_norm_eps)
    if config.get("head_dim"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    rope = hf.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    if name == "llama":
        writer.add_vocab_size(hf.vocab_size)
        writer.add_rope_dimension_count(head_dim)
    if name == "gemma3":
        writer.add_rope_freq_base_swa(hf.rope_parameters["sliding_attention"]["rope_theta"])
        writer.add_final_logit_softcapping(hf.final_logit_softcapping)
        assert hf.query_pre_attn_scalar == head_dim and hf.attn_logit_softcapping is None
    if name == "gemma3" or config["model_type"] == "mistral":
        writer.add_sliding_window(hf.sliding_window)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if "attention_factor" in rope:
            writer.add_rope_scaling_yarn_attn_factor(rope["attention_factor"])
        if "beta_fast" in rope:
            writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        if "beta_slow" in rope:
            writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])

    tokens = tokens_of_vocabulary()
    tokens += [f"[PAD{i}]" for i in range(len(tokens), hf.vocab_size)]
    kinds = [gguf.TokenType.NORMAL] * 62 + [gguf.TokenType.CONTROL] * 2
    kinds += [gguf.TokenType.UNUSED] * (len(tokens) - len(kinds))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(62)
    writer.add_eos_token_id(63)

    names = gguf.get_tensor_name_map(arch, layers)
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", rope_freqs(rope, head_dim))
    for hf_name, tensor in tensors.items():
        value = tensor.numpy()
        if name == "llama" and ".q_proj." in hf_name:
            value = permute(value, hf.num_attention_heads)
        if name == "llama" and ".k_proj." in hf_name:
            value = permute(value, hf.num_key_value_heads)
        if name == "gemma3" and hf_name.endswith("norm.weight"):
            value = value + np.float32(1)
        writer.add_tensor(names.get_name(hf_name, try_suffixes=(".weight", ".bias")), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_case(folder: Path, index: int, config: dict, has_gguf: bool, matters: list[dict]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = build(config, None, SEED + index)
    state = copy.deepcopy(model.state_dict())
    rng = np.random.default_rng(SEED + index)
    tokens = rng.integers(0, NUM_TOKENS, SEQUENCE).tolist()
    logits = run(model, tokens)[POSITIONS]
    for change in matters:
        moved = np.abs(run(build({**config, **change}, state, 0), tokens)[POSITIONS] - logits).max()
        assert moved > 100 * TOLERANCE, f"{folder.name}: {change} moves logits by {moved} only"
        print(f"{folder.name}: {json.dumps(change)} moves logits by {moved:.3f}")

    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()) + "\n")
    tensors = stored(state, model.config.tie_word_embeddings)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    expected = {
        "tokens": tokens,
        "positions": POSITIONS,
        "logits": [[round(float(v), 6) for v in row] for row in logits],
    }
    (folder / "expected.json").write_text(json.dumps(expected) + "\n")
    if has_gguf:
        write_gguf(folder / "model.gguf", config, model.config, tensors)
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"{folder.name}: {size} bytes, logits up to {np.abs(logits).max():.2f}")
    assert size < 150_000, "the fixture is too large"


def main() -> None:
    root = Path(sys.argv[1])
    torch.set_num_threads(1)
    for index, (name, case) in enumerate(CASES.items()):
        write_case(root / name, index, *case)


if __name__ == "__main__":
    main()
