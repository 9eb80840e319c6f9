"""Writes what the rows say: the tables of README.md and of pages of docs, and the plots of docs/figures.

`python benchmarks/figures.py`; with `--check` it writes nothing and fails if a table differs from the rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

from accuracy import FLAX, TORCH
from baselines import KERAS_LOCAL, KERAS_SYNC, LOCAL, OURS, TORCH_SYNC
from gpu_tables import one_gpu, training, two_gpus
from rows import geometric_mean, read
from tensorflow_tables import COMPILED, KERAS_SYNC_IN_STEP, TRAINING_COMPILED, exchange, layers, resnet

ROOT = Path(__file__).parent.parent
START, END = "<!-- from benchmarks/results, by benchmarks/figures.py -->\n", "<!-- end -->\n"


def ratios(suite: str, baseline: str, only: Callable[[dict[str, Any]], bool] = lambda row: True, **keys: Any) -> list[float]:
    """Ours over the baseline's, of each case, in the order of the rows; of rows with these keys, and where `only` is true."""
    rows = [row for row in read(suite) if keys.items() <= row.items() and only(row)]
    of = {(row["subject"], row["case"]): row["values"]["median"] for row in rows}
    return [ours / of[baseline, case] for (subject, case), ours in of.items() if subject == OURS and (baseline, case) in of]


def line(where: str, baseline: str, found: list[float]) -> str:
    each = " ".join(f"{r:.2f}" for r in found) if len(found) <= 5 else f"{min(found):.2f} to {max(found):.2f}"
    return f"| {where} | {baseline} | {geometric_mean(found):.2f} | {each} |"


def gpus(suite: str, replicas: int) -> str:
    """How many GPUs of which kind the latest run had, whose rows come last."""
    row = next(row for row in reversed(read(suite)) if row["replicas"] == replicas)
    return f"{replicas} × {row['device'].removeprefix('NVIDIA ').split()[0]}"


def cpu_lines() -> list[str]:
    step = {"measure": "step"}
    large = lambda row: prod(row["details"]["shape"]) > 100_000  # noqa: E731
    bare = ratios("torch-cpu", "torch local + 2 bare all_reduces", replicas=2, **step)
    return [
        line("TensorFlow, CPU, 4 replicas", "Keras `synchronized=True`", ratios("tensorflow-cpu", KERAS_SYNC, **step)),
        line(
            "— inputs over 100,000 elements",
            "Keras, unsynchronised",
            ratios("tensorflow-cpu", KERAS_LOCAL, large, **step),
        ),
        line("PyTorch, CPU, one process", "`nn.BatchNorm1d`, `2d`", ratios("torch-cpu", "torch local", replicas=1, **step)),
        line("PyTorch, CPU, 2 processes, gloo", "the same, and two bare all-reduces", bare),
    ]


def tensorflow_gpu_lines() -> list[str]:
    sync, local = "Keras `synchronized=True`", "Keras, unsynchronised"
    layer, whole = {"measure": "layer"}, TRAINING_COMPILED
    one, two = gpus("tensorflow-gpu", 1), gpus("tensorflow-gpu", 2)

    def images(baseline: str, measure: str = "training") -> list[float]:
        return [1 / rate for rate in ratios("tensorflow-gpu", baseline, replicas=2, measure=measure)]

    return [
        line(f"TensorFlow, {two}", sync, ratios("tensorflow-gpu", KERAS_SYNC, replicas=2, **layer)),
        line(f"TensorFlow, {one}", local, ratios("tensorflow-gpu", KERAS_LOCAL, replicas=1, **layer)),
        line(f"ResNet-50 on TensorFlow, {two}, 32 and 8 images each", sync, images(KERAS_SYNC)),
        line("— the same", local, images(KERAS_LOCAL)),
        line(f"TensorFlow, {two}, `syncbn.compiled_step`", f"{sync}, compiled by TensorFlow", compiled_layers(KERAS_SYNC)),
        line("— the same", f"{sync}, `compiled_step` too", compiled_layers(KERAS_SYNC_IN_STEP)),
        line(
            f"ResNet-50 on TensorFlow, {two}, `compiled_step`, 32 images each",
            f"{sync}, compiled by TensorFlow",
            images(KERAS_SYNC, whole),
        ),
        line("— the same", f"{sync}, `compiled_step` too", images(KERAS_SYNC_IN_STEP, whole)),
        line("— the same", local, images(KERAS_LOCAL, whole)),
    ]


def compiled_layers(baseline: str) -> list[float]:
    """Time of layers in a step that XLA compiles, on two GPUs, over a baseline's."""
    return ratios("tensorflow-gpu", baseline, replicas=2, measure=COMPILED)


def gpu_lines() -> list[str]:
    graph = {"measure": "step in a CUDA graph"}
    by_memory = lambda row: row["details"]["transport"] == "peer memory"  # noqa: E731
    one, two, local = gpus("gpu", 1), gpus("gpu", 2), "`nn.BatchNorm2d`, unsynchronised"
    images = "8, 32 and 128 images"
    inverse = lambda replicas, baseline: [1 / rate for rate in training(replicas, baseline)]  # noqa: E731
    return [
        line(f"PyTorch, {one}, in a graph", "`nn.BatchNorm2d`", ratios("gpu", LOCAL, replicas=1, **graph)),
        line(f"PyTorch, {two}, in a graph", "`nn.SyncBatchNorm`", ratios("gpu", TORCH_SYNC, by_memory, replicas=2, **graph)),
        line("— the same", local, ratios("gpu", LOCAL, by_memory, replicas=2, **graph)),
        line(f"ResNet-50, {two}, {images} each", "`nn.SyncBatchNorm`", inverse(2, TORCH_SYNC)),
        line("— the same", local, inverse(2, LOCAL)),
        line(f"ResNet-50, {gpus('gpu-resnet', 1)}, {images}", "`nn.BatchNorm2d`", inverse(1, LOCAL)),
    ]


def jax_lines() -> list[str]:
    half = lambda row: row["details"]["dtype"] == "bfloat16"  # noqa: E731
    lines = []
    for program in ("20 in a scan", "10 with 1×1 convolutions between", "20 bare, unrolled"):
        found = ratios("jax-cpu", "flax axis_name", lambda row, program=program: row["case"].startswith(program))
        lines.append(line(f"JAX, CPU, 4 devices: {program}", "Flax `axis_name`", found))
    return [
        *lines,
        line(f"JAX, {gpus('jax-gpu', 1)}", "Flax, unsynchronised", ratios("jax-gpu", "flax", replicas=1)),
        line(f"JAX, {gpus('jax-gpu', 2)}", "Flax `axis_name`", ratios("jax-gpu", "flax axis_name", replicas=2)),
        line("— in bfloat16", "Flax `axis_name`", ratios("jax-gpu", "flax axis_name", half, replicas=2)),
    ]


def all_ratios() -> str:
    """Every comparison."""
    lines = ["| forward + backward | against | time, ours / theirs | each shape |", "|---|---|---|---|"]
    return "\n".join([*lines, *cpu_lines(), *tensorflow_gpu_lines(), *gpu_lines(), *jax_lines()]) + "\n"


def large_means() -> str:
    """The variance's error of every framework's layer, and ours."""
    rows = {}
    for row in read("accuracy"):
        rows[row["details"]["framework"], row["subject"], row["details"]["mean"]] = row["values"]["median"]
    heads = ["mean/std", "syncbn, the worst of three", "Keras `synchronized=True`", "Flax `axis_name`"]
    lines = [f"| {' | '.join(heads)} | `torch.nn.BatchNorm1d`, one process |", "|---|---|---|---|---|"]
    for mean in dict.fromkeys(mean for _, _, mean in rows):
        ours = max(value for (_, subject, at), value in rows.items() if (subject, at) == (OURS, mean))
        theirs = (rows["tensorflow", KERAS_SYNC, mean], rows["jax", FLAX, mean], rows["torch", TORCH, mean])
        lines.append(f"| {mean:,.0f} | {ours:.0e} | {' | '.join(f'{value:.0e}' for value in theirs)} |")
    return "\n".join(lines) + "\n"


def speed_ups() -> str:
    """README's lines: their time over ours."""
    graph, layer = {"measure": "step in a CUDA graph"}, {"measure": "layer"}
    by_memory = lambda row: row["details"]["transport"] == "peer memory"  # noqa: E731
    two, two_tf, two_jax = gpus("gpu", 2), gpus("tensorflow-gpu", 2), gpus("jax-gpu", 2)
    found = [
        (f"PyTorch layer, {two}", "`torch.nn.SyncBatchNorm`", ratios("gpu", TORCH_SYNC, by_memory, replicas=2, **graph)),
        (f"PyTorch layer, {two}", "`BatchNorm2d`, not synchronised", ratios("gpu", LOCAL, by_memory, replicas=2, **graph)),
        (f"Keras layer on TensorFlow, {two_tf}", "Keras `synchronized=True`",
         ratios("tensorflow-gpu", KERAS_SYNC, replicas=2, **layer)),
        ("— in a step compiled by `syncbn.compiled_step`", "the same, compiled by TensorFlow", compiled_layers(KERAS_SYNC)),
        (f"`sync_batch_norm` on JAX, {two_jax}", "Flax `axis_name`", ratios("jax-gpu", "flax axis_name", replicas=2)),
        ("Keras layer on TensorFlow, CPU, 4 replicas", "Keras `synchronized=True`",
         ratios("tensorflow-cpu", KERAS_SYNC, measure="step")),
        ("PyTorch layer, CPU, one process", "`torch.nn.BatchNorm1d`, `BatchNorm2d`",
         ratios("torch-cpu", "torch local", replicas=1, measure="step")),
    ]  # fmt: skip
    lines = ["| forward + backward | against | speed-up, geometric mean | worst and best shape |", "|---|---|---|---|"]
    for where, baseline, times in found:
        mean, worst, best = 1 / geometric_mean(times), 1 / max(times), 1 / min(times)
        lines.append(f"| {where} | {baseline} | {mean:.2f} | {worst:.2f} to {best:.2f} |")
    return "\n".join(lines) + "\n"


# What each document takes from the rows, in its order.
TABLES: dict[str, list[Callable[[], str]]] = {
    "README.md": [speed_ups],
    "docs/performance.md": [large_means, all_ratios],
    "docs/kernels.md": [two_gpus, one_gpu],
    "docs/tensorflow.md": [exchange, layers, resnet],
}


def written(text: str, tables: list[Callable[[], str]]) -> str:
    """The text with its tables made anew."""
    head, *parts = text.split(START)
    if len(parts) != len(tables):
        raise SystemExit(f"There must be {len(tables)} places for tables. Received: {len(parts)}.")
    for part, make in zip(parts, tables, strict=True):
        head += START + "\n" + make() + "\n" + END + part.split(END)[1]
    return head


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with an error if a table differs")
    check = parser.parse_args().check
    for name, tables in TABLES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        new = written(text, tables)
        if not check:
            (ROOT / name).write_text(new, encoding="utf-8")
        elif new != text:
            sys.exit(f"{name} must say what the rows say. Received: another table. Run benchmarks/figures.py.")
    if not check:
        import plots

        plots.write_all()


if __name__ == "__main__":
    main()
