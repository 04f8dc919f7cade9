"""Runs pairs of two shell commands, ours and a peer's, in turn, and prints how many times as fast ours is: the
median of the pairs' ratios with a 95 % bootstrap interval.

    python3 bench/peers/pairs.py --pairs 11 \\
        "KVASIR_ISA=avx2 python3 bench/peers/kvasir.py target/release/kvasir --runs 1 --loads pp512" \\
        "python3 bench/peers/llama_cpp.py /opt/peers/llama_cpp --set avx2 --runs 1 --loads pp512 --weights Q4_1"

Each command prints one JSON line with `value`, as the scripts here do for one load. Pairs begin with ours and
with the peer in turn, so that a machine that slows down slows both alike. The first pair is a warm-up.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ours")
    parser.add_argument("peer")
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--no-warm-up", action="store_true", help="count the first pair too")
    args = parser.parse_args()
    check()
    pairs = []
    for turn in range(0 if args.no_warm_up else -1, args.pairs):
        order = [args.ours, args.peer] if turn % 2 == 0 else [args.peer, args.ours]
        found = {command: measure(command) for command in order}
        pair = found[args.ours], found[args.peer]
        for same in ("load", "cpu"):
            if pair[0].get(same) != pair[1].get(same):
                sys.exit(f"not to be compared: {pair[0].get(same)} and {pair[1].get(same)}")
        if turn >= 0:
            pairs.append(pair)
            print(f"{turn + 1}: {pair[0]['value']:.4g} ÷ {pair[1]['value']:.4g}", file=sys.stderr)
    ratios = [ratio(ours, peer) for ours, peer in pairs]
    low, high = interval(ratios)
    first = pairs[0]
    line = {"load": first[0].get("load"), "ratio": statistics.median(ratios), "low": low, "high": high}
    for side, name in enumerate(("ours", "peer")):
        line[name] = first[side].get("peer")
        line[f"{name}_isa"] = first[side].get("isa")
        line[f"{name}_median"] = statistics.median(pair[side]["value"] for pair in pairs)
    line |= {"unit": first[0].get("unit"), "pairs": len(pairs), "cpu": first[0].get("cpu")}
    print(json.dumps(line), flush=True)


def measure(command: str) -> dict:
    """The one JSON line that a command prints."""
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 or len(rows) != 1:
        sys.exit(f"{command}: exit {done.returncode}, {len(rows)} lines\n{done.stderr[-2000:]}")
    return rows[0]


def ratio(ours: dict, peer: dict) -> float:
    """How many times as fast ours is; of times, the shorter is the faster."""
    if ours.get("unit") == "s":
        ours, peer = peer, ours
    return ours["value"] / peer["value"]


def interval(values: list[float], draws: int = 10_000) -> tuple[float, float]:
    """The middle 95 % of medians of values drawn anew from these, the same every time."""
    numbers = random.Random(0)
    medians = sorted(statistics.median(numbers.choices(values, k=len(values))) for _ in range(draws))
    return medians[draws * 25 // 1000], medians[draws * 975 // 1000 - 1]


def check() -> None:
    """That the arithmetic is right; it takes no time that counts."""
    assert interval([2.0] * 5, 100) == (2.0, 2.0)
    low, high = interval([1.0, 2.0, 3.0, 4.0, 5.0], 1000)
    assert 1.0 <= low < 3.0 < high <= 5.0
    assert ratio({"value": 6.0, "unit": "tokens/s"}, {"value": 3.0}) == 2.0
    assert ratio({"value": 3.0, "unit": "s"}, {"value": 6.0}) == 2.0


if __name__ == "__main__":
    main()
