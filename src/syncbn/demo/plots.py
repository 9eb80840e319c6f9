"""The demo's figures: accuracy after each epoch, and accuracy against images per device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator, NullLocator

from syncbn.demo import LOCAL, NORMS, RENORM, SYNCED, Run

COLOURS = {LOCAL: "#777777", SYNCED: "#1f6fb4", RENORM: "#d9661f"}
# Labels closer than this, in percent of accuracy, would overlap.
LABEL_GAP = 5.0


def label_heights(values: Sequence[float], gap: float = LABEL_GAP, top: float = 100.0) -> list[float]:
    """Heights for labels of lines that end at these values: in the same order, at least `gap` apart, none above `top`."""
    order = np.argsort(values, kind="stable")[::-1]
    heights, limit = [0.0] * len(values), top
    for i in order:
        heights[i] = min(values[i], limit)
        limit = heights[i] - gap
    return heights


def _frame(ticks_low: float) -> tuple[Any, Any]:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.set_ylabel("test accuracy (%)")
    axes.set_ylim(ticks_low, 100)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _label(axes: Any, x: float, ends: dict[str, float]) -> None:
    """Writes each line's name to the right of its last point, in its colour."""
    low, high = axes.get_ylim()
    heights = label_heights(list(ends.values()), LABEL_GAP * (high - low) / 100)
    for name, height in zip(ends, heights, strict=True):
        place: dict[str, Any] = {"xytext": (10, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
        axes.annotate(name, (x, height), color=COLOURS[name], **place)


def _save(figure: Any, folder: Path, name: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{kind}" for kind in ("png", "svg")]
    # Without the date the same rows give the same file.
    figure.savefig(paths[0], dpi=150)
    with matplotlib.rc_context({"svg.hashsalt": "syncbn"}):
        figure.savefig(paths[1], metadata={"Date": None})
    plt.close(figure)
    return paths


def curves(runs: Sequence[Run], replicas: int, folder: Path) -> list[Path]:
    """Accuracy after each epoch; gives the paths of a PNG and an SVG."""
    lowest = min(min(run.accuracies) for run in runs)
    figure, axes = _frame(10 * int(10 * lowest))
    epochs = len(runs[0].accuracies)
    for run in runs:
        axes.plot(range(1, epochs + 1), [100 * a for a in run.accuracies], "o-", color=COLOURS[run.task.norm], clip_on=False)
    axes.set_xlabel("epoch")
    axes.set_title(f"Handwritten digits, {replicas} replicas × {runs[0].task.batch} images")
    # One epoch is a point in the middle.
    axes.set_xlim(*((0.5, 1.5) if epochs == 1 else (1 - 0.03 * epochs, epochs)))
    axes.set_xticks([1]) if epochs == 1 else axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _label(axes, epochs, {run.task.norm: 100 * run.accuracies[-1] for run in runs})
    return _save(figure, folder, "accuracy")


def sweep(rows: Iterable[dict[str, Any]], folder: Path) -> list[Path]:
    """Accuracy against images per device: the mean of the seeds, and a band from the worst to the best of them."""
    rows = list(rows)
    figure, axes = _frame(0)
    axes.set_xscale("log", base=2)
    batches, ends = sorted({row["images_per_device"] for row in rows}), {}
    for norm in NORMS:
        mine = [row for row in rows if row["norm"] == norm]
        sizes = sorted({row["images_per_device"] for row in mine})
        seeds = [[100 * row["accuracy"] for row in mine if row["images_per_device"] == size] for size in sizes]
        means = [float(np.mean(s)) for s in seeds]
        axes.plot(sizes, means, "o-", color=COLOURS[norm], clip_on=False)
        axes.fill_between(sizes, list(map(min, seeds)), list(map(max, seeds)), color=COLOURS[norm], alpha=0.2, linewidth=0)
        ends[norm] = means[-1]
    axes.set_xticks(batches, [str(size) for size in batches])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("images per device")
    first, count = rows[0], len({row["seed"] for row in rows})
    axes.set_title(
        f"{first['devices']} devices, {first['steps']} steps each; mean and range of {count} seed{'s' * (count > 1)}", fontsize=11
    )
    _label(axes, batches[-1], ends)
    return _save(figure, folder, "images-per-device")
