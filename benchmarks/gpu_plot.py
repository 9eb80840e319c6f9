"""Plots time over floor, ours and peers, per case, from the rows of benchmarks/gpu.py: `python benchmarks/gpu_plot.py`."""

from __future__ import annotations

import json
import sys
from math import exp, log
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
FLOOR_BANDWIDTH = 4.24e12
PEERS = {"BatchNorm2d": "#b8b8b8", "BatchNorm2d, compiled": "#6f8fb3", "syncbn": "#c8553d"}


def geometric_mean(values):
    values = list(values)
    return exp(sum(map(log, values)) / len(values))


def table(rows):
    """{case: {peer: µs}} in the order of the rows, and each case's floor in µs."""
    found, floors = {}, {}
    for row in rows:
        if row["what"] == "graph":
            found.setdefault(row["case"], {})[row["peer"]] = row["us"]
            floors[row["case"]] = 8 * row["megabytes"] * 1e12 / FLOOR_BANDWIDTH
    return found, floors


def summary(rows):
    """Lines that say how far the goals are reached."""
    found, floors = table(rows)
    large = {c for c in found if floors[c] > 8 * 5e12 / FLOOR_BANDWIDTH}
    lines = []
    for peer in ("BatchNorm2d", "BatchNorm2d, compiled"):
        ratios = {c: t[peer] / t["syncbn"] for c, t in found.items()}
        worst = min(large, key=ratios.get)
        more = max(t["syncbn"] - t[peer] for c, t in found.items() if c not in large)
        lines.append(
            f"{peer} / syncbn: geometric mean {geometric_mean(ratios.values()):.2f}; worst over 5 MB {ratios[worst]:.2f} ({worst}); "
            f"below 5 MB at most {more:+.1f} µs"
        )
    heavy = [t["syncbn"] / floors[c] for c, t in found.items() if floors[c] > 40]
    lines.append(f"syncbn / floor where it is over 40 µs: {geometric_mean(heavy):.2f}")
    for a, b in (
        ("BatchNorm2d, compiled", "syncbn, compiled"),
        ("BatchNorm2d, then add and ReLU, compiled", "syncbn, then add and ReLU, compiled"),
        ("syncbn, then add and ReLU", "syncbn, then add and ReLU inside"),
    ):
        both = [t[a] / t[b] for t in found.values() if a in t and b in t]
        if both:
            lines.append(f"{a} / {b}: geometric mean {geometric_mean(both):.2f}, worst {min(both):.2f}, {len(both)} cases")
    return lines


def main():
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results" / "gpu.jsonl"
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    print("\n".join(summary(rows)))
    found, floors = table(rows)
    figure, axes = plt.subplots(figsize=(12, 5.5))
    cases = [c for c in found if floors[c] > 3]
    for i, (peer, colour) in enumerate(PEERS.items()):
        axes.bar(
            [n + (i - 1) * 0.27 for n in range(len(cases))],
            [found[c][peer] / floors[c] for c in cases],
            0.25,
            label=peer,
            color=colour,
        )
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(
        range(len(cases)),
        [c.replace("bfloat16", "bf16").replace("float32", "fp32") for c in cases],
        rotation=60,
        ha="right",
        fontsize=8,
    )
    axes.set_ylabel("time / floor (8 tensors at the copy bandwidth)")
    axes.set_yscale("log")
    axes.set_yticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    axes.set_title(f"Forward + backward in a CUDA graph, one replica, {rows[0]['device']}; cases over 5 MB")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    folder = HERE.parent / "docs" / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "gpu.svg")
    figure.savefig(folder / "gpu.png", dpi=110)


if __name__ == "__main__":
    main()
