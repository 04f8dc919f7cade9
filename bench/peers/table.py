"""Joins the JSON lines of the scripts here into a Markdown table, and a plot of ratios to the best peer.

    python3 bench/peers/table.py docs/speed.jsonl --plot docs/speed.svg

Lines of one peer, weights and load from several rounds are joined: the value is the median of all runs. Each
processor and set of instructions has a table of its own.
"""

import argparse
import json
import math
import statistics
from pathlib import Path

ROW, LABEL, WIDTH = 26, 190, 420

Runs = dict[str, dict[str, list[float]]]
"""Of a load, of a peer."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--plot", type=Path, help="where to write the SVG")
    args = parser.parse_args()
    # By processor and set: figures of two never share a row, nor a ratio.
    groups: dict[tuple[str, str], Runs] = {}
    for line in (line for file in args.files for line in file.read_text().splitlines()):
        if not line.startswith("{"):
            continue
        found = json.loads(line)
        ours = found["peer"].startswith("kvasir")
        name = found["peer"] if ours else f"{found['peer']} {found['weights']}"
        isa = found.get("isa", "")
        # What a peer built for this processor is called, and what Kvasir chooses there, are the same set.
        machine = found.get("cpu", ""), "best" if isa == "native" else isa
        runs = groups.setdefault(machine, {})
        runs.setdefault(found["load"], {}).setdefault(name, []).extend(found["runs"])
    ratios = []
    for i, ((cpu, isa), runs) in enumerate(groups.items()):
        if cpu:
            print("\n" * (i > 0) + f"{cpu}, {isa}:\n")
        label = f" {isa}" if len(groups) > 1 else ""
        ratios += [(load + label, ratio) for load, ratio in table(runs)]
    if args.plot:
        args.plot.write_text(plot(ratios))


def table(runs: Runs) -> list[tuple[str, float]]:
    """Prints a table; returns the loads that have a ratio to the best peer."""
    medians = {
        load: {name: statistics.median(values) for name, values in by_name.items()}
        for load, by_name in runs.items()
    }
    names = sorted({name for by_name in medians.values() for name in by_name}, key=order)
    print("| load | " + " | ".join(names) + " | ours ÷ best peer |")
    print("|---" * (len(names) + 2) + "|")
    ratios = []
    for load, by_name in medians.items():
        cells = [number(by_name.get(name)) for name in names]
        ratio = best_ratio(load, by_name)
        print(f"| {load} | " + " | ".join(cells) + f" | {ratio:.2f} |" if ratio else
              f"| {load} | " + " | ".join(cells) + " | |")
        if ratio:
            ratios.append((load, ratio))
    return ratios


def order(name: str) -> tuple[bool, str]:
    return (not name.startswith("kvasir"), name)


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def best_ratio(load: str, by_name: dict[str, float]) -> float | None:
    """Our f16 cache against the best peer; for times, the shorter is the better."""
    peers = [value for name, value in by_name.items() if not name.startswith("kvasir")]
    if "kvasir" not in by_name or not peers:
        return None
    return min(peers) / by_name["kvasir"] if load == "start" else by_name["kvasir"] / max(peers)


def plot(ratios: list[tuple[str, float]]) -> str:
    """Bars on a logarithmic scale from ½ to 8; longer ones are cut and say their number."""
    low, high = math.log2(0.5), math.log2(8)
    x = lambda ratio: LABEL + WIDTH * (math.log2(min(ratio, 8)) - low) / (high - low)
    height = ROW * len(ratios) + 60
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LABEL + WIDTH + 70} {height}" '
        'font-family="system-ui, sans-serif" font-size="12" role="img" '
        'aria-label="Speed against the best peer">',
        "<style>text { fill: #343a40 } .grid { stroke: #ced4da } "
        "@media (prefers-color-scheme: dark) { text { fill: #dee2e6 } .grid { stroke: #495057 } }"
        "</style>",
        f'<text x="{LABEL}" y="18" font-weight="bold">f16 cache ÷ best peer (1 = equal)</text>',
    ]
    for ratio in (0.5, 1, 2, 4, 8):
        out.append(f'<path class="grid" d="M{x(ratio):.1f} 28V{height - 24}"/>')
        out.append(f'<text x="{x(ratio):.1f}" y="{height - 8}" text-anchor="middle">{ratio:g}×</text>')
    for i, (load, ratio) in enumerate(ratios):
        y = 34 + ROW * i
        left, right = sorted((x(1), x(ratio)))
        colour = "#2a7de1" if ratio >= 1 else "#d9480f"
        out.append(f'<text x="{LABEL - 8}" y="{y + 14}" text-anchor="end">{load}</text>')
        out.append(f'<rect x="{left:.1f}" y="{y}" width="{right - left:.1f}" height="18" fill="{colour}"/>')
        out.append(f'<text x="{right + 6:.1f}" y="{y + 14}">{ratio:.2f}</text>')
    return "\n".join([*out, "</svg>", ""])


if __name__ == "__main__":
    main()
