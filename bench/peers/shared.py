"""What the scripts here share: the sets of instructions, and the JSON line that each prints for a load."""

import json
import statistics
import sys
from pathlib import Path

SETS = {
    "baseline": "sse2",
    "avx2": "avx2",
    "avx-vnni": "avx_vnni",
    "avx512": "avx512bw",
    "avx512-vnni": "avx512_vnni",
    "avx512-icl": "avx512vbmi",
    "avx512-bf16": "avx512_bf16",
    "amx": "amx_int8",
}
"""Kvasir's sets, and the flag of /proc/cpuinfo that a processor with the set has."""


def cpuinfo() -> dict[str, str]:
    """The first processor in /proc/cpuinfo."""
    text = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    pairs = (line.partition(":") for line in text.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def cpu() -> str:
    """The processor's name. Virtual machines hide it ("AMD EPYC" is Zen 4 and Zen 5), so its family and
    model go with it."""
    info = cpuinfo()
    return f"{info['model name']} (family {info['cpu family']}, model {info['model']})"


def require(isa: str) -> None:
    """Ends the program where the processor lacks the set: a peer would crash, or run with less and not say so."""
    flags = cpuinfo()["flags"].split()
    has = [name for name, flag in SETS.items() if flag in flags]
    if isa != "native" and isa not in has:
        sys.exit(f"{isa}: this processor has {', '.join(has)}")


def report(peer: str, weights: str, load: str, unit: str, runs: list[float], isa: str) -> None:
    """Prints the line of a load; its value is the median of the runs."""
    line = {"peer": peer, "weights": weights, "load": load, "value": statistics.median(runs)}
    line |= {"unit": unit, "runs": runs, "isa": isa, "cpu": cpu()}
    print(json.dumps(line), flush=True)
