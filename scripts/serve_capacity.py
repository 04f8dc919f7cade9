#!/usr/bin/env python3
"""How many requests a running server holds at once: sends N requests together and watches /metrics.

Example:
  kvasir serve --kv-cache joint3 --kv-cache-memory 180MiB --no-enable-prefix-caching --port 8190
  scripts/serve_capacity.py --url http://127.0.0.1:8190 --requests 64 --input 512 --output 256
"""

import argparse
import json
import random
import threading
import time
import urllib.request


def metric(text, name):
    """Sum of a metric over its labels."""
    lines = (l for l in text.splitlines() if not l.startswith("#"))
    return sum(float(l.rsplit(" ", 1)[1]) for l in lines if l.split("{")[0].split(" ")[0] == name)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--requests", type=int, default=64, help="sent at once")
    parser.add_argument("--input", type=int, default=512, help="prompt tokens")
    parser.add_argument("--output", type=int, default=256, help="tokens generated, end tokens ignored")
    parser.add_argument("--kv-cache", help="recipe asked for in every request")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()

    draw = random.Random(args.seed)
    failures, done = [], []

    def post(prompt):
        body = {"prompt": prompt, "max_tokens": args.output, "ignore_eos": True, "temperature": 0}
        if args.kv_cache:
            body["kv_cache"] = args.kv_cache
        request = urllib.request.Request(
            args.url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=3600) as response:
                usage = json.load(response)["usage"]
            if usage["completion_tokens"] != args.output:
                failures.append(f"{usage['completion_tokens']} tokens")
            done.append(usage)
        except Exception as error:  # every kind of failure counts
            failures.append(repr(error))

    prompts = [[draw.randrange(1000, 40000) for _ in range(args.input)] for _ in range(args.requests)]
    threads = [threading.Thread(target=post, args=(p,)) for p in prompts]
    start = time.time()
    for thread in threads:
        thread.start()
    most, peak, preemptions = 0, 0, 0
    while any(t.is_alive() for t in threads):
        with urllib.request.urlopen(args.url + "/metrics", timeout=60) as response:
            text = response.read().decode()
        most = max(most, int(metric(text, "vllm:num_requests_running")))
        peak = int(metric(text, "kvasir_kv_peak_physical_bytes"))
        preemptions = int(metric(text, "vllm:num_preemptions_total"))
        time.sleep(0.2)
    seconds = time.time() - start
    result = {
        "requests": args.requests, "failed": len(failures), "max_running": most,
        "preemptions": preemptions, "peak_kv_physical_bytes": peak, "seconds": round(seconds, 1),
        "output_tokens_per_second": round(len(done) * args.output / seconds, 1),
    }
    print(json.dumps(result) if args.json else "\n".join(f"{k:26}{v}" for k, v in result.items()))
    for failure in failures[:5]:
        print(failure)
    raise SystemExit(1 if failures else 0)


if __name__ == "__main__":
    main()
