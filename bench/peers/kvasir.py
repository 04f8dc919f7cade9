"""Measures Kvasir with the loads of the other scripts here; prints a JSON line for every load.

    python3 bench/peers/kvasir.py target/release/kvasir --runs 5 --kv-cache f16 --loads pp512,tg128

Loads are named as in vllm_cpu.py; `start` is the start of the process to its first token. KVASIR_ISA forces a
set of instructions; lines name it, or `best` where it is not set.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time

import shared

DEFAULT = (
    "start,pp512,pp2048,tg128,"
    "tg48@512x8,tg48@512x32,tg48@512x64,tg48@1024x8,tg48@1024x32,tg48@1024x64,"
    "serve64x512/128,serve64x128/512,serve64x512/128@11264,serve64x128/512@11264"
)
F16_BYTES_PER_TOKEN = 23040
"""SmolLM2-135M: 30 layers of 3 KV heads of 64 channels."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("binary", help="the kvasir to run")
    parser.add_argument("--loads", default=DEFAULT)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--kv-cache", default="f16")
    parser.add_argument("--model", default="smollm2", help="a known name or a .gguf file")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    common = ["--kv-cache", args.kv_cache, "--threads", str(args.threads), "--model", args.model]
    for load in args.loads.split(","):
        runs = measure(args, load, common)
        name = "kvasir" if args.kv_cache == "f16" else f"kvasir {args.kv_cache}"
        unit = "s" if load == "start" else "tokens/s"
        weights = "Q4_1" if args.model == "smollm2" else args.model
        shared.report(name, weights, load, unit, runs, os.environ.get("KVASIR_ISA") or "best")


def measure(args: argparse.Namespace, load: str, common: list[str]) -> list[float]:
    """Every run of a load."""
    if load == "start":
        return [start(args.binary, common) for _ in range(args.runs)]
    serve = re.fullmatch(r"serve(\d+)x(\d+)/(\d+)(?:@(\d+))?", load)
    if not serve:
        command = ["bench", "latency", "--test", load, "--repetitions", str(args.runs), "--json"]
        return run(args.binary, [*command, *common])["tests"][0]["runs"]
    requests, inputs, outputs, tokens = serve.groups()
    room = int(tokens or int(requests) * (int(inputs) + int(outputs) + 64)) * F16_BYTES_PER_TOKEN
    command = ["bench", "throughput", "--num-prompts", requests, "--input-len", inputs]
    command += ["--output-len", outputs, "--kv-cache-memory", str(room), "--json", *common]
    found = [run(args.binary, [*command, "--seed", str(seed)]) for seed in range(args.runs)]
    return [one["output_tokens_per_second"] for one in found]


def start(binary: str, common: list[str]) -> float:
    """Seconds from the start of a process to its end after one token."""
    clock = time.monotonic()
    command = [binary, "run", "--temperature", "0", "--max-tokens", "1", *common, "hello"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.monotonic() - clock


def run(binary: str, command: list[str]) -> dict:
    """What a command prints."""
    done = subprocess.run([binary, *command], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip()}")
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
