"""Plots time over floor, ours and peers, per case, from the rows of benchmarks/gpu.py: `python benchmarks/gpu_plot.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from gpu_figures import SMALL_MEGABYTES, by_case
from rows import read

FIGURES = Path(__file__).parent.parent / "docs" / "figures"
COLOURS = {
    "torch SyncBatchNorm": "#d9b36c",
    "BatchNorm2d": "#b8b8b8",
    "BatchNorm2d, compiled": "#6f8fb3",
    "syncbn": "#c8553d",
}


def plot(name: str, rows: list[dict[str, Any]]) -> None:
    found, floors, large = by_case(rows)
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
        plot(name, rows)


if __name__ == "__main__":
    main()
