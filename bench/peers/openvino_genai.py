"""Measures OpenVINO GenAI as installed by install_openvino.sh; prints a JSON line for every load.

    FOLDER/venv/bin/python bench/peers/openvino_genai.py FOLDER --runs 3 --set avx2 --loads pp512,pp2048,tg128

Loads:
    ppN          a prompt of N random tokens, to its first output token: tokens/s
    tgN          N tokens after the first, one sequence, prompt of one token: tokens/s
    tgT@CxN      T tokens of each of N sequences at C tokens of context, all together: tokens/s. The prompts
                 are computed before and come back from the prefix cache, so that all start in one step.
    serveNxI/O   N requests that are there at once, I tokens in, O out: output tokens/s

Its pipeline is stepped here, which LLMPipeline does inside: both take the same time. Every prompt is drawn
anew, as prefixes are cached. Keys and values are bytes, its default, unless --cache says otherwise.
"""

import argparse
import os
import random
import re
import sys
import time
from pathlib import Path

import shared

# This file has the name of the module it measures, which must not be looked for in this folder.
sys.path.pop(0)

DEFAULT = "pp512,pp2048,tg128,tg48@512x32,tg48@1024x32,serve64x512/128,serve64x128/512"
VOCABULARY = 49152

ONEDNN = {
    "baseline": "SSE41",
    "avx2": "AVX2",
    "avx-vnni": "AVX2_VNNI",
    "avx512": "AVX512_CORE",
    "avx512-vnni": "AVX512_CORE_VNNI",
    "avx512-icl": "AVX512_CORE_VNNI",
    "avx512-bf16": "AVX512_CORE_BF16",
    "amx": "AVX512_CORE_AMX",
}
"""oneDNN's names of the sets. It ignores a name that it does not know."""

# What OpenVINO chooses by the processor and not by oneDNN's set, and what it would choose on a processor with
# that set. As it is, it asks oneDNN for kernels that the set does not have, and fails.
NO_BF16 = {"INFERENCE_PRECISION_HINT": "f32"}
NO_VNNI = {**NO_BF16, "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
PROPERTIES = {
    "baseline": NO_VNNI,
    "avx2": NO_VNNI,
    "avx512": NO_VNNI,
    "avx-vnni": NO_BF16,
    "avx512-vnni": NO_BF16,
    "avx512-icl": NO_BF16,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where install_openvino.sh put it")
    parser.add_argument("--model", type=Path, help="a GGUF file; FOLDER/weights/Q4_1.gguf if none")
    parser.add_argument("--loads", default=DEFAULT)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--set", default="native", choices=["native", *ONEDNN], dest="isa")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", help="type of keys and values: u8 (its default), f16, bf16, f32")
    parser.add_argument("--cache-size", type=int, default=3, help="GB of an ample cache")
    args = parser.parse_args()
    shared.require(args.isa)
    if args.isa != "native":
        # Before the library is loaded, which reads it once.
        os.environ["ONEDNN_MAX_CPU_ISA"] = ONEDNN[args.isa]
    engine = Stepper(args)
    loads = args.loads.split(",")
    # Interleaved, after a round that warms up shapes; a drifting machine slows all alike.
    runs: dict[str, list[float]] = {load: [] for load in loads}
    for turn in range(args.runs + 1):
        for load in loads:
            # The long loads warm up by themselves.
            if turn > 0 or not load.startswith("serve"):
                value = run(engine, load)
                if turn > 0:
                    runs[load].append(value)
    peer = f"openvino-genai, {args.cache} cache" if args.cache else "openvino-genai"
    for load, values in runs.items():
        unit = "output tokens/s" if load.startswith("serve") else "tokens/s"
        shared.report(peer, engine.weights, load, unit, values, args.isa)


def run(engine: "Stepper", load: str) -> float:
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
            sys.exit(f"{load}: sequences did not start in one step; a larger --cache-size may help")
        return length * count / (times.end - times.first_all)
    if found := re.fullmatch(r"serve(\d+)x(\d+)/(\d+)", load):
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
    """A pipeline driven a step at a time."""

    def __init__(self, args: argparse.Namespace) -> None:
        import openvino_genai

        model = args.model or args.folder / "weights/Q4_1.gguf"
        self.weights = model.name.removesuffix(".gguf").rpartition(".")[2]
        self.random = random.Random()
        self.count = 0
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = True
        scheduler.cache_size = args.cache_size
        # A prompt in one step, as LLMPipeline has it.
        scheduler.max_num_batched_tokens = 4096
        properties = {"INFERENCE_NUM_THREADS": args.threads, **PROPERTIES.get(args.isa, {})}
        if args.cache:
            properties["KV_CACHE_PRECISION"] = args.cache
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(
            str(model), scheduler, "CPU", properties
        )

    def tokens(self, length: int) -> list[int]:
        return [self.random.randrange(VOCABULARY) for _ in range(length)]

    def generate(self, prompts: list[list[int]], output: int) -> Times:
        """Runs the prompts to `output` tokens each."""
        import numpy
        import openvino
        import openvino_genai

        config = openvino_genai.GenerationConfig(
            max_new_tokens=output, ignore_eos=True, do_sample=False
        )
        handles = []
        times = Times(time.perf_counter())
        for prompt in prompts:
            self.count += 1
            tensor = openvino.Tensor(numpy.array([prompt], dtype=numpy.int64))
            handles.append(self.pipeline.add_request(self.count, tensor, config))
        lengths = [0] * len(handles)
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            now = time.perf_counter()
            for i, handle in enumerate(handles):
                while handle.can_read():
                    lengths[i] += sum(len(made.generated_ids) for made in handle.read().values())
            if not times.first_all and all(lengths):
                times.first_all = now
                times.generated_before_all = sum(lengths)
        times.end = time.perf_counter()
        if set(lengths) != {output}:
            sys.exit(f"asked for {output} tokens each, got {sorted(set(lengths))}")
        return times


if __name__ == "__main__":
    main()
