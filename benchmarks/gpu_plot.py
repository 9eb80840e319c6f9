"""Plots time over floor, ours and peers, per case, from the rows of benchmarks/gpu.py: `python benchmarks/gpu_plot.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from gpu_cases import COPY_BANDWIDTH
from readme import geometric_mean
from rows import read

FIGURES = Path(__file__).parent.parent / "docs" / "figures"
COLOURS = {
    "torch SyncBatchNorm": "#d9b36c",
    "BatchNorm2d": "#b8b8b8",
    "BatchNorm2d, compiled": "#6f8fb3",
    "syncbn": "#c8553d",
}
SMALL_MEGABYTES = 5


def table(rows: list[dict[str, Any]]) -> tuple[dict[str, dict[str, float]], dict[str, float], set[str]]:
    """{case: {peer: µs}} in the order of the rows, each case's floor in µs, and the cases over 5 MB."""
    found: dict[str, dict[str, float]] = {}
    floors, large = {}, set()
    for row in rows:
        if row["what"] == "graph":
            found.setdefault(row["case"], {})[row["peer"]] = row["us"]
            # Rows of an H200 from before floors were kept.
            floors[row["case"]] = row.get("floor") or 8e12 * row["megabytes"] / COPY_BANDWIDTH
            if row["megabytes"] > SMALL_MEGABYTES:
                large.add(row["case"])
    return found, floors, large


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """Lines that say how far the goals are reached."""
    found, floors, large = table(rows)
    lines = []
    for peer in ("torch SyncBatchNorm", "BatchNorm2d", "BatchNorm2d, compiled"):
        ratios = {c: t[peer] / t["syncbn"] for c, t in found.items() if peer in t}
        if ratios:
            worst = min(large & set(ratios), key=lambda case: ratios[case])
            more = max(t["syncbn"] - t[peer] for c, t in found.items() if c not in large)
            lines.append(
                f"{peer} / syncbn: geometric mean {geometric_mean(ratios.values()):.2f} of {len(ratios)}; worst over 5 MB "
                f"{ratios[worst]:.2f} ({worst}); below 5 MB at most {more:+.1f} µs"
            )
    heavy = [t["syncbn"] / floors[c] for c, t in found.items() if floors[c] > 40]
    lines.append(f"syncbn / floor where it is over 40 µs: {geometric_mean(heavy):.2f}")
    for a, b in (
        ("BatchNorm2d, compiled", "syncbn, compiled"),
        ("BatchNorm2d, then add and ReLU, compiled", "syncbn, then add and ReLU, compiled"),
        ("syncbn, then add and ReLU", "syncbn, then add and ReLU inside"),
        ("syncbn, then add and ReLU inside", "syncbn, then add and ReLU, compiled"),
    ):
        both = [t[a] / t[b] for t in found.values() if a in t and b in t]
        if both:
            lines.append(f"{a} / {b}: geometric mean {geometric_mean(both):.2f}, worst {min(both):.2f}, {len(both)} cases")
    with_, without = (
        {row["case"]: row["us"] for row in rows if row["what"] == "virtual replicas" and row["peer"] == which}
        for which in ("with the exchange", "without")
    )
    if with_:
        more_ = {case: with_[case] - without[case] for case in with_}
        lines.append("two virtual replicas, the exchange's µs: " + ", ".join(f"{c} {us:.1f}" for c, us in more_.items()))
    return lines


def plot(name: str, rows: list[dict[str, Any]]) -> None:
    found, floors, large = table(rows)
    cases = [case for case in found if case in large]
    peers = [peer for peer in COLOURS if any(peer in found[case] for case in cases)]
    width = 0.84 / len(peers)
    figure, axes = plt.subplots(figsize=(12, 5.5))
    for i, peer in enumerate(peers):
        heights = [found[case].get(peer, float("nan")) / floors[case] for case in cases]
        places = [n + (i - (len(peers) - 1) / 2) * width for n in range(len(cases))]
        axes.bar(places, heights, 0.93 * width, label=peer, color=COLOURS[peer])
    axes.axhline(1, color="black", linewidth=0.8)
    names = [case.replace("bfloat16", "bf16").replace("float32", "fp32") for case in cases]
    axes.set_xticks(range(len(cases)), names, rotation=60, ha="right", fontsize=8)
    axes.set_ylabel("time / floor (8 tensors at the copy bandwidth)")
    axes.set_yscale("log")
    axes.set_yticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    axes.minorticks_off()
    replicas = rows[0].get("replicas", 1)
    many = "one replica" if replicas == 1 else f"{replicas} replicas, {rows[0]['transport']}"
    axes.set_title(f"Forward + backward in a CUDA graph, {many}, {rows[0]['device']}; cases over {SMALL_MEGABYTES} MB")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    FIGURES.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURES / f"{name}.svg")
    figure.savefig(FIGURES / f"{name}.png", dpi=110)


def main() -> None:
    for name in ("gpu", "gpu-x2"):
        rows = read(name)
        print(f"{name}: {rows[0]['device']}, commit {rows[0]['commit']}", *summary(rows), "", sep="\n")
        plot(name, rows)


if __name__ == "__main__":
    main()
