"""The plots of docs/figures, from rows: times over the floor, accuracy at large means and of training, a ResNet-50's images/s."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accuracy as suite
from baselines import COMPILED, KERAS_SYNC, LOCAL, OURS, TORCH_SYNC
from gpu_tables import SMALL_MEGABYTES, Figures, short
from rows import read

FOLDER = Path(__file__).parent.parent / "docs" / "figures"
COLOURS = {TORCH_SYNC: "#d9b36c", LOCAL: "#b8b8b8", COMPILED: "#6f8fb3", OURS: "#c8553d"}


# What a line of the figure of accuracy says, by framework and subject, and its colour and marker.
LINES = {
    ("jax", suite.FLAX): ("Flax, axis_name", "#6f8fb3", "s-"),
    ("tensorflow", KERAS_SYNC): ("Keras, synchronized=True", "#d9b36c", "o-"),
    ("torch", suite.TORCH): ("torch.nn.BatchNorm1d, one process", "#808080", "^-"),
    ("tensorflow", OURS): ("syncbn: TensorFlow", "#c8553d", "o--"),
    ("torch", OURS): ("syncbn: PyTorch", "#c8553d", "^-"),
    ("jax", OURS): ("syncbn: JAX", "#c8553d", "s:"),
}


def canvas(name: str, width: float, height: float) -> tuple[Any, Any]:
    """A figure and its axes; the same rows give the same file."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = name
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(width, height))
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Any, name: str) -> None:
    figure.tight_layout()
    FOLDER.mkdir(parents=True, exist_ok=True)
    figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})
    figure.savefig(FOLDER / f"{name}.png", dpi=110)


def accuracy(name: str = "accuracy-at-large-means") -> None:
    """The variance's relative error against mean/std, both logarithmic."""
    figure, axes = canvas(name, 8, 4.6)
    found: dict[tuple[str, str], dict[float, float]] = {}
    for row in read("accuracy"):
        of = found.setdefault((row["details"]["framework"], row["subject"]), {})
        of[row["details"]["mean"]] = row["values"]["median"]
    for of, (label, colour, style) in LINES.items():
        axes.loglog(list(found[of]), list(found[of].values()), style, color=colour, label=label, markersize=5)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.annotate("the error is as large as the variance", (1, 1.6), fontsize=9)
    axes.set_xlabel("mean / standard deviation of a channel, float32")
    axes.set_ylabel("relative error of the variance")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, name)


def resnet(name: str = "resnet-images-per-second") -> None:
    """Images/s of two GPUs, by the number of images on each."""
    rows = [row for row in read("gpu-resnet") if row["replicas"] == 2]
    figure, axes = canvas(name, 8, 4)
    cases = list(dict.fromkeys(row["details"]["images"] for row in rows))
    labels = {LOCAL: "BatchNorm2d, not synchronised", TORCH_SYNC: "torch.nn.SyncBatchNorm", OURS: "syncbn"}
    for i, (subject, label) in enumerate(labels.items()):
        rate = {row["details"]["images"]: row["values"]["median"] for row in rows if row["subject"] == subject}
        bars = axes.bar([n + (i - 1) * 0.27 for n in range(len(cases))], [rate[n] for n in cases], 0.25, label=label,
                        color=COLOURS[subject])  # fmt: skip
        axes.bar_label(bars, [f"{rate[n]:,.0f}" for n in cases], fontsize=9, padding=2)
    axes.set_xticks(range(len(cases)), [f"{n} images per GPU" for n in cases])
    axes.set_ylabel("images/s of both GPUs")
    gpu = rows[0]["device"].removeprefix("NVIDIA ").split()[0]
    axes.set_title(f"Training a ResNet-50 on 2 × {gpu}, bfloat16 autocast, channels last", fontsize=11)
    axes.legend(frameon=False, loc="upper left")
    save(figure, name)


def plot(name: str, figures: Figures) -> None:
    cases = [case for case in figures.found if case in figures.large]
    subjects = [subject for subject in COLOURS if any(subject in figures.found[case] for case in cases)]
    width = 0.84 / len(subjects)
    figure, axes = canvas(name, 12, 5.5)
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
    save(figure, name)


def training() -> None:
    """Test accuracy against images per device: the figure that `syncbn demo --sweep` draws."""
    from syncbn.demo import plots

    found = []
    for row in read("images-per-device"):
        details = {name: row["details"][name] for name in ("images_per_device", "steps")}
        shared = {"norm": row["subject"], "devices": row["replicas"], **details}
        found += [{**shared, "seed": seed, "accuracy": value} for seed, value in enumerate(row["values"]["each"])]
    plots.sweep(found, FOLDER)


def write_all() -> None:
    training()
    accuracy()
    resnet()
    plot("gpu", Figures(1, device="H200"))
    plot("gpu-x2", Figures(2))
