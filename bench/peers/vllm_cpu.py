"""Measures vLLM on CPUs as installed by install_vllm.sh; prints a JSON line for every load.

    FOLDER/venv/bin/python bench/peers/vllm_cpu.py FOLDER --runs 3 --loads pp512,pp2048,tg128

Loads:
    ppN          a prompt of N random tokens, to its first output token: tokens/s
    tgN          N tokens after the first, one sequence, prompt of one token: tokens/s
    tgT@CxN      T tokens of each of N sequences at C tokens of context, all together: tokens/s. The prompts
                 are computed before and come back from the prefix cache, so that all start in one step.
    serveNxI/O   N requests that are there at once, I tokens in, O out: output tokens/s
    serveNxI/O@K the same with a cache of K tokens (a multiple of 128)

Threads are bound to --cpus. The engine is stepped in this process, so that no time goes into processes that
talk to each other.
"""

import argparse
import glob
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import shared

DEFAULT = (
    "pp512,pp2048,tg128,"
    "tg48@512x8,tg48@512x32,tg48@512x64,tg48@1024x8,tg48@1024x32,tg48@1024x64,"
    "serve64x512/128,serve64x128/512,serve64x512/128@11264,serve64x128/512@11264"
)
BLOCK = 128


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where install_vllm.sh put it")
    parser.add_argument("--loads", default=DEFAULT)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpus", default="0-1", help="cores to bind threads to")
    parser.add_argument("--kv-space", type=int, default=3, help="GiB of an ample cache")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    # Ended from outside, it ends what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if args.child is not None:
        measure(args)
        return
    # One process for each size of the cache, which is fixed when an engine starts.
    by_cache: dict[str, list[str]] = {}
    for load in args.loads.split(","):
        by_cache.setdefault(load.partition("/")[2].partition("@")[2], []).append(load)
    for cache, loads in by_cache.items():
        command = [sys.executable, __file__, *sys.argv[1:], "--loads", ",".join(loads)]
        subprocess.run([*command, "--child", cache], env=environment(args), check=True)


def environment(args: argparse.Namespace) -> dict[str, str]:
    """What must be set before Python starts."""
    found = [
        *glob.glob(f"{args.folder}/venv/lib/libiomp5.so"),
        *glob.glob(f"{args.folder}/tcmalloc/usr/lib/*/libtcmalloc_minimal.so.4"),
    ]
    if len(found) < 2:
        print(f"preloading only {found}: slower than it could be", file=sys.stderr)
    return {
        **os.environ,
        "LD_PRELOAD": ":".join(str(Path(path).resolve()) for path in found),
        "VLLM_CPU_KVCACHE_SPACE": str(args.kv_space),
        "VLLM_CPU_OMP_THREADS_BIND": args.cpus,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{args.folder.resolve()}/venv/bin:{os.environ['PATH']}",
    }


def measure(args: argparse.Namespace) -> None:
    from vllm import LLM

    loads = args.loads.split(",")
    ample = not args.child
    begin = time.perf_counter()
    llm = LLM(
        model=str(args.folder / "weights"),
        dtype="bfloat16",
        max_model_len=4096,
        block_size=BLOCK,
        max_num_seqs=128,
        enable_prefix_caching=True,
        num_gpu_blocks_override=None if ample else int(args.child) // BLOCK,
        disable_log_stats=True,
    )
    engine = Stepper(llm.llm_engine, args.seed)
    engine.generate([engine.tokens(8)], 2)
    started = time.perf_counter() - begin
    report(f"start{'' if ample else '@' + args.child}", [started], "s")
    # Interleaved, after a round that warms up shapes and caches; a drifting machine slows all alike.
    runs: dict[str, list[float]] = {load: [] for load in loads}
    for turn in range(args.runs + 1):
        for load in loads:
            # The long loads warm up by themselves.
            if turn > 0 or not load.startswith("serve"):
                value = run(engine, load)
                if turn > 0:
                    runs[load].append(value)
    for load, values in runs.items():
        report(load, values, "output tokens/s" if load.startswith("serve") else "tokens/s")


def run(engine: "Stepper", load: str) -> float:
    engine.forget()
    if found := re.fullmatch(r"pp(\d+)", load):
        length = int(found[1])
        times = engine.generate([engine.tokens(length)], 1)
        return length / (times.first_all - times.start)
    if found := re.fullmatch(r"tg(\d+)", load):
        length = int(found[1])
        times = engine.generate([engine.tokens(1)], length + 1)
        return length / (times.end - times.first_all)
    if found := re.fullmatch(r"tg(\d+)@(\d+)x(\d+)", load):
        length, context, count = (int(n) for n in found.groups())
        # One token more than whole blocks: it is all that is left to compute.
        prompts = [engine.tokens(context + 1) for _ in range(count)]
        for prompt in prompts:
            engine.generate([prompt], 1)
        times = engine.generate(prompts, length + 1)
        if times.generated_before_all != count:
            sys.exit(f"{load}: sequences did not start in one step; a larger --kv-space may help")
        return length * count / (times.end - times.first_all)
    if found := re.fullmatch(r"serve(\d+)x(\d+)/(\d+)(?:@\d+)?", load):
        count, length, output = (int(n) for n in found.groups())
        times = engine.generate([engine.tokens(length) for _ in range(count)], output)
        return count * output / (times.end - times.start)
    sys.exit(f"no such load: {load}")


class Times:
    """When a batch started, when all had their first token, when it ended."""

    def __init__(self, start: float) -> None:
        self.start = start
        self.first_all = 0.0
        self.generated_before_all = 0
        self.end = 0.0


class Stepper:
    """An engine driven a step at a time."""

    def __init__(self, engine, seed: int) -> None:
        self.engine = engine
        self.random = random.Random(seed)
        self.vocabulary = engine.model_config.get_vocab_size()
        self.count = 0

    def tokens(self, length: int) -> list[int]:
        return [self.random.randrange(self.vocabulary) for _ in range(length)]

    def forget(self) -> None:
        """Empties the prefix cache."""
        self.engine.reset_prefix_cache()

    def generate(self, prompts: list[list[int]], output: int) -> Times:
        """Runs the prompts to `output` tokens each."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0.0,
            max_tokens=output,
            min_tokens=0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.CUMULATIVE,
        )
        lengths = {}
        times = Times(time.perf_counter())
        for prompt in prompts:
            self.count += 1
            lengths[str(self.count)] = 0
            self.engine.add_request(str(self.count), {"prompt_token_ids": prompt}, params)
        while self.engine.has_unfinished_requests():
            for done in self.engine.step():
                lengths[done.request_id] = len(done.outputs[0].token_ids)
            if not times.first_all and all(lengths.values()):
                times.first_all = time.perf_counter()
                times.generated_before_all = sum(lengths.values())
        times.end = time.perf_counter()
        if any(length != output for length in lengths.values()):
            sys.exit(f"asked for {output} tokens each, got {sorted(set(lengths.values()))}")
        return times


def report(load: str, runs: list[float], unit: str) -> None:
    shared.report("vllm-cpu", "BF16", load, unit, runs, "native")


if __name__ == "__main__":
    main()
