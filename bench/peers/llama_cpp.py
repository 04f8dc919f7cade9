"""Measures llama.cpp as installed by install_llama_cpp.sh; prints a JSON line for every load and weight format.

    python3 bench/peers/llama_cpp.py FOLDER --weights Q4_1,Q4_0,BF16 --loads pp512,pp2048,tg128
    python3 bench/peers/llama_cpp.py FOLDER --set avx2

Loads:
    ppN, tgN     a prompt of N tokens, N tokens after an empty one: llama-bench
    tgT@CxN      T tokens of each of N sequences at C tokens of context, all together: llama-batched-bench
    serveNxI/O   N requests that are there at once, I tokens in, O out: llama-server with a slot for each
    serveNxI/O@K the same with a cache of K tokens: as many slots as hold I + O tokens each

Values are tokens/s; of serve loads output tokens/s. Caches are f16 unless --cache says otherwise.
"""

import argparse
import json
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import shared

DEFAULT = (
    "pp512,pp2048,tg128,"
    "tg48@512x8,tg48@512x32,tg48@512x64,tg48@1024x8,tg48@1024x32,tg48@1024x64,"
    "serve64x512/128,serve64x128/512,serve64x512/128@11264,serve64x128/512@11264"
)
VOCABULARY = 49152
DECODE = re.compile(r"tg(\d+)@(\d+)x(\d+)")
SERVE = re.compile(r"serve(\d+)x(\d+)/(\d+)(?:@(\d+))?")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where install_llama_cpp.sh put it")
    parser.add_argument("--weights", default="Q4_1,Q4_0,BF16")
    parser.add_argument("--loads", default=DEFAULT)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", default="f16", help="type of keys and values: f16, q8_0, q4_0")
    parser.add_argument("--set", default="native", choices=["native", *shared.SETS], dest="isa")
    args = parser.parse_args()
    shared.require(args.isa)
    # Ended from outside, it ends what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for weights in args.weights.split(","):
        if not model(args, weights).is_file():
            sys.exit(f"{model(args, weights)} is not there; run install_llama_cpp.sh with a model")
        for load in args.loads.split(","):
            runs = [run(args, weights, load, turn) for turn in range(args.runs)]
            peer = "llama.cpp" if args.cache == "f16" else f"llama.cpp, {args.cache} cache"
            unit = "output tokens/s" if load.startswith("serve") else "tokens/s"
            shared.report(peer, weights, load, unit, runs, args.isa)


def model(args: argparse.Namespace, weights: str) -> Path:
    return args.folder / "weights" / f"{weights}.gguf"


def program(args: argparse.Namespace, name: str) -> str:
    build = "build" if args.isa == "native" else f"build-{args.isa}"
    path = args.folder / build / "bin" / name
    if not path.is_file():
        sys.exit(f"{path} is not there; run install_llama_cpp.sh with the set {args.isa}")
    return str(path)


def run(args: argparse.Namespace, weights: str, load: str, turn: int) -> float:
    common = ["-m", str(model(args, weights)), "-t", str(args.threads)]
    common += ["-ctk", args.cache, "-ctv", args.cache]
    if found := re.fullmatch(r"(pp|tg)(\d+)", load):
        lengths = ["-p", found[2], "-n", "0"] if found[1] == "pp" else ["-p", "0", "-n", found[2]]
        # ik_llama.cpp, an offspring, has no lines of JSON here.
        rows = printed(args, "llama-bench", [*common, *lengths, "-r", "1", "-o", "json"], "[")
        return rows[0]["avg_ts"]
    if found := DECODE.fullmatch(load):
        tokens, context, count = (int(n) for n in found.groups())
        shape = ["-npp", str(context), "-ntg", str(tokens), "-npl", str(count)]
        shape += ["-c", str(count * (context + tokens))]
        options = [*common, *shape, "--output-format", "jsonl"]
        return printed(args, "llama-batched-bench", options, "{")["speed_tg"]
    if found := SERVE.fullmatch(load):
        count, length, output = (int(n) for n in found.groups()[:3])
        slots = min(count, int(found[4]) // (length + output)) if found[4] else count
        return serve(args, common, slots, count, length, output, args.seed + turn)
    sys.exit(f"no such load: {load}")


def printed(args: argparse.Namespace, name: str, options: list[str], begin: str):
    """Runs a program of llama.cpp and reads the first JSON value among what it prints, which begins so."""
    command = [program(args, name), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    at = done.stdout.find(begin)
    if done.returncode != 0 or at < 0:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.JSONDecoder().raw_decode(done.stdout[at:])[0]


def serve(args, common, slots, count, length, output, seed) -> float:
    """Output tokens/s of `count` requests that come at once to a server with `slots` slots."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [program(args, "llama-server"), *common]
    command += ["--port", str(port), "-np", str(slots), "-c", str(slots * (length + output))]
    command += ["--no-webui", "--no-cache-prompt", "--cache-ram", "0"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        await_health(server, url)
        numbers = random.Random(seed)
        prompts = [[numbers.randrange(VOCABULARY) for _ in range(length)] for _ in range(count)]
        complete(url, prompts[0][:8], 2)
        begin = time.perf_counter()
        with ThreadPoolExecutor(count) as pool:
            try:
                made = list(pool.map(lambda prompt: complete(url, prompt, output), prompts))
            except BaseException:
                # Threads end when their answers do.
                server.kill()
                raise
        seconds = time.perf_counter() - begin
    finally:
        server.terminate()
        server.wait()
    if set(made) != {output}:
        sys.exit(f"asked for {output} tokens each, got {sorted(set(made))}")
    return count * output / seconds


def await_health(server: subprocess.Popen, url: str) -> None:
    while server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health"):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    sys.exit("llama-server ended early")


def complete(url: str, prompt: list[int], output: int) -> int:
    """Asks for a completion; returns how many tokens came."""
    body = {"prompt": prompt, "n_predict": output, "ignore_eos": True, "temperature": 0.0}
    request = urllib.request.Request(
        f"{url}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        return json.load(response)["tokens_predicted"]


if __name__ == "__main__":
    main()
