"""The plots of docs/figures: time over floor, ours and the baselines', per case, from the rows of the suite gpu."""

from __future__ import annotations

from pathlib import Path

from baselines import COMPILED, LOCAL, OURS, TORCH_SYNC
from gpu_tables import SMALL_MEGABYTES, Figures, short

FOLDER = Path(__file__).parent.parent / "docs" / "figures"
COLOURS = {TORCH_SYNC: "#d9b36c", LOCAL: "#b8b8b8", COMPILED: "#6f8fb3", OURS: "#c8553d"}


def plot(name: str, figures: Figures) -> None:
    import matplotlib

    matplotlib.use("Agg")
    # The same rows give the same file.
    matplotlib.rcParams["svg.hashsalt"] = name
    import matplotlib.pyplot as plt

    cases = [case for case in figures.found if case in figures.large]
    subjects = [subject for subject in COLOURS if any(subject in figures.found[case] for case in cases)]
    width = 0.84 / len(subjects)
    figure, axes = plt.subplots(figsize=(12, 5.5))
    for i, subject in enumerate(subjects):
        heights = [figures.found[case].get(subject, float("nan")) / figures.floors[case] for case in cases]
        places = [n + (i - (len(subjects) - 1) / 2) * width for n in range(len(cases))]
        axes.bar(places, heights, 0.93 * width, label=subject, color=COLOURS[subject])
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(cases)), [short(case) for case in cases], rotation=60, ha="right", fontsize=8)
    axes.set_ylabel("time / floor (8 tensors at the copy bandwidth)")
    axes.set_yscale("log")
    axes.set_yticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    axes.minorticks_off()
    row = figures.rows[0]
    many = "one replica" if row["replicas"] == 1 else f"{row['replicas']} replicas, {row['details']['transport']}"
    axes.set_title(f"Forward + backward in a CUDA graph, {many}, {row['device']}; cases over {SMALL_MEGABYTES} MB")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    FOLDER.mkdir(parents=True, exist_ok=True)
    figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})
    figure.savefig(FOLDER / f"{name}.png", dpi=110)


def write_all() -> None:
    plot("gpu", Figures(1))
    plot("gpu-x2", Figures(2))
