"""Writes the figures of the README and of docs/kernels.md from the rows: `python benchmarks/readme.py`; `--check` compares."""

from __future__ import annotations

import sys
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

from gpu_figures import one_gpu, two_gpus
from rows import geometric_mean, read

ROOT = Path(__file__).parent.parent
START, END = "<!-- from benchmarks/results, by benchmarks/readme.py -->\n", "<!-- end -->\n"


def ratios(name: str, peer: str, only: Callable[[dict[str, Any]], bool]) -> list[float]:
    """Ours over the peer's, of each shape or case, in the order of the rows."""
    rows = [row for row in read(name) if only(row)]
    value, what = ("us", "case") if "us" in rows[0] else ("median", "shape")
    of = {(row["peer"], str(row.get("dtype")), str(row[what])): row[value] for row in rows if what in row}
    return [
        us / of[peer, dtype, shape] for (who, dtype, shape), us in of.items() if who == "syncbn" and (peer, dtype, shape) in of
    ]


def training(replicas: int, peer: str) -> list[float]:
    """Ours over the peer's time for a step of ResNet-50, by the number of images."""
    rows = [row for row in read("gpu-resnet") if row["replicas"] == replicas]
    rate = {(row["peer"], row["images"]): row["median"] for row in rows}
    return [rate[peer, images] / rate["syncbn", images] for images in dict.fromkeys(row["images"] for row in rows)]


def line(where: str, peer: str, found: list[float]) -> str:
    each = " ".join(f"{r:.2f}" for r in found) if len(found) <= 5 else f"{min(found):.2f} to {max(found):.2f}"
    return f"| {where} | {peer} | {geometric_mean(found):.2f} | {each} |"


def timed(quantity: str, replicas: int | None = None) -> Callable[[dict[str, Any]], bool]:
    return lambda row: (row.get("quantity") or row.get("what")) == quantity and replicas in (None, row.get("replicas"))


def gpus(name: str) -> str:
    """How many GPUs of which kind a run had."""
    row = read(name)[0]
    return f"{row['replicas']} × {row['device'].removeprefix('NVIDIA ').split()[0]}"


def table() -> str:
    step, graph = timed("seconds per step"), timed("graph")
    large = lambda row: step(row) and prod(row["shape"]) > 100_000  # noqa: E731
    lines = [
        "| forward + backward | against | time, ours / theirs | each shape |",
        "|---|---|---|---|",
        line("TensorFlow, CPU, 4 replicas", "Keras `synchronized=True`", ratios("tensorflow-cpu", "keras synchronized", step)),
        line("— inputs over 100,000 elements", "Keras, unsynchronised", ratios("tensorflow-cpu", "keras unsynchronised", large)),
        line("PyTorch, CPU, one process", "`nn.BatchNorm`", ratios("torch-cpu", "torch local", timed("seconds per step", 1))),
        line(
            "PyTorch, CPU, 2 processes, gloo",
            "`nn.BatchNorm` and two bare all-reduces",
            ratios("torch-cpu", "torch local + 2 bare all_reduces", timed("seconds per step", 2)),
        ),
        line(f"PyTorch, {gpus('gpu')}, in a graph", "`nn.BatchNorm2d`", ratios("gpu", "BatchNorm2d", graph)),
        line("— the same", "`nn.BatchNorm2d`, compiled", ratios("gpu", "BatchNorm2d, compiled", graph)),
        line(f"PyTorch, {gpus('gpu-x2')}, in a graph", "`nn.SyncBatchNorm`", ratios("gpu-x2", "torch SyncBatchNorm", graph)),
        line("— the same", "`nn.BatchNorm2d`, unsynchronised", ratios("gpu-x2", "BatchNorm2d", graph)),
        line(f"ResNet-50, {gpus('gpu-x2')}, 8, 32 and 128 images each", "`nn.SyncBatchNorm`", training(2, "torch SyncBatchNorm")),
        line("— the same", "`nn.BatchNorm2d`, unsynchronised", training(2, "BatchNorm2d")),
        line(f"ResNet-50, {gpus('gpu')}, 8, 32 and 128 images", "`nn.BatchNorm2d`", training(1, "BatchNorm2d")),
    ]
    for program in ("20 in a scan", "10 with 1×1 convolutions between", "20 bare, unrolled"):
        found = ratios("jax-cpu", "flax axis_name", timed(f"seconds per step, {program}"))
        lines.append(line(f"JAX, CPU, 4 devices: {program}", "Flax `axis_name`", found))
    layer = timed("seconds per layer")
    lines.append(line(f"JAX, {gpus('jax-gpu')}", "Flax, unsynchronised", ratios("jax-gpu", "flax", layer)))
    half = lambda row: layer(row) and row["dtype"] == "bfloat16"  # noqa: E731
    lines.append(line(f"JAX, {gpus('jax-gpu-x2')}", "Flax `axis_name`", ratios("jax-gpu-x2", "flax axis_name", layer)))
    lines.append(line("— in bfloat16", "Flax `axis_name`", ratios("jax-gpu-x2", "flax axis_name", half)))
    errors = {
        (r["peer"], r["quantity"]): r["median"] for r in read("tensorflow-cpu") if r["quantity"].startswith("variance error")
    }
    lines += ["", "| variance's relative error, float32, mean/std | syncbn | Keras `synchronized=True` |", "|---|---|---|"]
    for quantity in dict.fromkeys(q for _, q in errors):
        ours, theirs = errors["syncbn", quantity], errors["keras synchronized", quantity]
        lines.append(f"| {float(quantity.split()[-1]):,.0f} | {ours:.0e} | {theirs:.1g} |")
    return "\n".join(lines) + "\n"


# What each document takes from the rows, in its order.
TABLES: dict[str, list[Callable[[], str]]] = {"README.md": [table], "docs/kernels.md": [two_gpus, one_gpu]}


def written(text: str, tables: list[Callable[[], str]]) -> str:
    """The text with its tables made anew."""
    head, *parts = text.split(START)
    if len(parts) != len(tables):
        raise SystemExit(f"There must be {len(tables)} places for tables. Received: {len(parts)}.")
    for part, make in zip(parts, tables, strict=True):
        head += START + "\n" + make() + "\n" + END + part.split(END)[1]
    return head


def main() -> None:
    for name, tables in TABLES.items():
        text = (ROOT / name).read_text()
        new = written(text, tables)
        if "--check" not in sys.argv:
            (ROOT / name).write_text(new)
        elif new != text:
            sys.exit(f"{name} does not say what the rows say: run benchmarks/readme.py")


if __name__ == "__main__":
    main()
