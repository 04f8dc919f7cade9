"""Memory and start of a server: Kvasir's, and llama.cpp's where it is installed. Prints a JSON line for each model and engine.

    python3 bench/peers/resident.py target/release/kvasir model.gguf other.gguf --llama-cpp /opt/peers/llama_cpp

Sizes are the operating system's (VmRSS, VmHWM), in MiB: `idle` a second after the first token of a request, `peak` the most since the
start. `ready` and `first_token` are seconds from the start of the process. The file is read once before, so that it is in the page cache; both
have room for 4,096 tokens of KV cache in f16, of which one prompt's are in use. Linux only.
"""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import shared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary", help="the kvasir to run")
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--llama-cpp", type=Path, help="where install_llama_cpp.sh put it")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    for model in args.models:
        size = subprocess.run([args.binary, "inspect", model, "--json"], capture_output=True, check=True)
        inspected = json.loads(size.stdout)
        cache = 4096 * inspected["kv_cache"]["bytes_per_token_f16"]
        commands = {"kvasir": [args.binary, "serve", "--model", model, "--kv-cache-memory", f"{cache}", "--threads", "2", "--port"]}
        if args.llama_cpp:
            server = args.llama_cpp / "build/bin/llama-server"
            commands["llama.cpp"] = [server, "-m", model, "-t", "2", "-c", "4096", "-np", "1", "--port"]
        for engine, command in commands.items():
            with open(model, "rb") as file:
                while file.read(1 << 24):
                    pass
            runs = [start([str(part) for part in command]) for _ in range(args.runs)]
            line = {"engine": engine, "model": model.name, "file_mib": round(model.stat().st_size / 2**20, 1)}
            # Of several starts the best: others are what the machine was doing.
            line |= {name: min(run[name] for run in runs) for name in runs[0]}
            if engine == "kvasir":
                line |= {name: round(inspected["memory"][f"{name}_bytes"] / 2**20, 1) for name in ("weight", "tokenizer")}
            line["cpu"] = shared.cpu()
            print(json.dumps(line), flush=True)


def start(command: list[str]) -> dict:
    """Starts a server, asks it for a token, and ends it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begin = time.monotonic()
    server = subprocess.Popen([*command, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not healthy(port):
            if server.poll() is not None or time.monotonic() - begin > 300:
                sys.exit(f"{' '.join(command)}: no server ({server.poll()})")
            time.sleep(0.005)
        ready = time.monotonic() - begin
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            data=json.dumps({"prompt": "Hello", "max_tokens": 1}).encode(),
            headers={"Content-Type": "application/json"},
        )
        urllib.request.urlopen(request, timeout=300).read()
        first = time.monotonic() - begin
        time.sleep(1)
        status = Path(f"/proc/{server.pid}/status").read_text()
        size = {key: int(value) / 1024 for key, value in re.findall(r"(VmRSS|VmHWM):\s+(\d+) kB", status)}
        return {
            "ready": round(ready, 2),
            "first_token": round(first, 2),
            "idle": round(size["VmRSS"], 1),
            "peak": round(size["VmHWM"], 1),
        }
    finally:
        server.terminate()
        server.wait()


def healthy(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


if __name__ == "__main__":
    main()
