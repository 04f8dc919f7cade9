#!/usr/bin/env python3
"""Draws what each recipe costs and saves, from the tables of docs/measurements.md, into docs/quality.svg.

Example:
  python scripts/plot_quality.py

Needs the Python standard library only. Run it after the tables under "Quality of recipes" changed.
"""

import argparse
import math
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = [("joint", "#2a7de1", "joint (ours)"), ("kivi", "#d9480f", "KIVI"),
            ("rotation", "#868e96", "rotation, no statistics"), ("int8", "#2b8a3e", "int8")]
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, GAP = 360, 300, 64, 40, 46, 50
LABELS = {"kivi": (8, 2, "start"), "rotation": (-7, -5, "end")}
RATIO, LOSS = (1.5, 10.0), (1e-4, 0.3)


def tables(text):
    """Model name -> [(recipe, ratio of sealed blocks, mean divergence)]; the first table of each."""
    found, model = {}, None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("| \n").split("|")]
        if len(cells) > 4 and cells[1] == "ratio sealed" and cells[-1] == "worst context":
            model = cells[0] if cells[0] not in found else None
            if model:
                found[model] = []
        elif not line.startswith("|"):
            model = None
        elif model and not cells[0].startswith("---"):
            found[model].append((cells[0].split(" ")[0], float(cells[1]), float(cells[3])))
    return found


def panel(model, rows, left):
    """One model's plot; `left`: where it begins."""
    low, high = (math.log10(loss) for loss in LOSS)
    x = lambda ratio: left + (math.log(ratio / RATIO[0]) / math.log(RATIO[1] / RATIO[0])) * WIDTH
    y = lambda loss: TOP + HEIGHT * (high - math.log10(loss)) / (high - low)
    out = [f'<text x="{left}" y="{TOP - 14}" font-weight="bold">{model}</text>']
    for ratio in (2, 3, 4, 5, 6, 8, 10):
        out.append(f'<path class="grid" d="M{x(ratio):.1f} {TOP}V{TOP + HEIGHT}"/>')
        out.append(f'<text x="{x(ratio):.1f}" y="{TOP + HEIGHT + 16}" text-anchor="middle">{ratio}×</text>')
    for loss in (1e-4, 1e-3, 1e-2, 1e-1):
        out.append(f'<path class="grid" d="M{left} {y(loss):.1f}H{left + WIDTH}"/>')
        out.append(f'<text x="{left - 6}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss:g}</text>')
    for family, colour, _ in FAMILIES:
        points = sorted((ratio, loss, name) for name, ratio, loss in rows if name.startswith(family))
        line = " ".join(f"{x(ratio):.1f},{y(loss):.1f}" for ratio, loss, _ in points)
        out.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        for ratio, loss, name in points:
            px, py = x(ratio), y(loss)
            out.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4" fill="{colour}"/>')
            dx, dy, anchor = LABELS.get(family, (7, 12, "start"))
            if px + dx + 6.5 * len(name) > left + WIDTH:
                dx, dy, anchor = -7, -6, "end"
            out.append(f'<text x="{px + dx:.1f}" y="{py + dy:.1f}" text-anchor="{anchor}">{name}</text>')
    return out


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/quality.svg")
    args = parser.parse_args()
    found = tables((ROOT / "docs/measurements.md").read_text(encoding="utf-8"))
    body, left = [], LEFT
    for model, rows in found.items():
        body += panel(model, rows, left)
        left += WIDTH + LEFT + GAP - 30
    total = left - GAP + 20
    y = TOP + HEIGHT + 38
    body.append(f'<text x="{LEFT}" y="{y}">ratio of sealed blocks → · KL divergence from the f16 cache ↑</text>')
    at = total - 20
    for _, colour, label in reversed(FAMILIES):
        at -= 6 * len(label) + 30
        body.append(f'<circle cx="{at}" cy="{y - 4}" r="4" fill="{colour}"/>')
        body.append(f'<text x="{at + 8}" y="{y}">{label}</text>')
    svg = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {TOP + HEIGHT + BOTTOM}" '
           'font-family="system-ui, sans-serif" font-size="12">\n'
           '<style>text{fill:#333}.grid{stroke:#9996;stroke-width:1}'
           '@media (prefers-color-scheme:dark){text{fill:#ddd}}</style>\n'
           + "\n".join(body) + "\n</svg>\n")
    args.out.write_text(svg, encoding="utf-8")
    print(f"{args.out}: {', '.join(f'{model} with {len(rows)} recipes' for model, rows in found.items())}")


if __name__ == "__main__":
    main()
