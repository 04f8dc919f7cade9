#!/usr/bin/env python3
"""Counts the instructions of kernels under callgrind and compares them with docs/instructions.json.

Examples:
  python scripts/instructions.py             # compares; exit code 1 if one grew by more than 2 %
  python scripts/instructions.py --update    # writes what it found

Counts do not depend on the clock or on what else the machine does, so that a change of 2 % is one. Needs
valgrind, which has no AVX-512: the AVX2 paths are counted. Another compiler gives other counts.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docs" / "instructions.json"
CALLS = 10


def count(binary, name, times):
    """Instructions of the whole process with so many calls."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={folder}/out", binary]
        done = subprocess.run([*command, name, str(times)], capture_output=True, text=True)
    found = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode != 0 or not found:
        sys.exit(f"{name}: {done.stderr.strip()[-400:]}")
    return int(found.group(1))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--update", action="store_true", help="write docs/instructions.json")
    parser.add_argument("--tolerance", type=float, default=0.02)
    args = parser.parse_args()
    build = ["cargo", "build", "--release", "-p", "kvasir-kernels", "--example", "instructions"]
    done = subprocess.run(
        [*build, "--message-format=json"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    lines = map(json.loads, done.stdout.splitlines())
    binary = [line["executable"] for line in lines if line.get("executable")][-1]
    names = subprocess.run([binary, "list"], check=True, capture_output=True, text=True)
    found = {}
    for name in names.stdout.splitlines():
        # One call more than once, so that what the first one sets up is not counted.
        found[name] = round((count(binary, name, 1 + CALLS) - count(binary, name, 1)) / CALLS)
    if args.update:
        FILE.write_text(json.dumps(found, indent=2) + "\n")
        print(f"{len(found)} kernels written to {FILE.relative_to(ROOT)}")
        return
    known = json.loads(FILE.read_text())
    grown = []
    for name, instructions in found.items():
        before = known.get(name)
        change = instructions / before - 1 if before else 0.0
        print(f"{name:24} {instructions:>12,} {change:+8.1%}" + ("" if before else "  (new)"))
        if change > args.tolerance:
            grown.append(name)
    if grown:
        sys.exit(f"more instructions than before: {', '.join(grown)}")


if __name__ == "__main__":
    main()
