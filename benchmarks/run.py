"""The runner: `python benchmarks/run.py tensorflow-cpu` measures, prints the ratios and writes the rows."""

from __future__ import annotations

import os
import sys
from math import exp, log
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rows import provenance, read, write

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
app = typer.Typer(add_completion=False)


@app.callback()
def main() -> None:
    """Ours beside its peers, in one run."""


@app.command()
def tensorflow_cpu(
    rounds: Annotated[int, typer.Option(min=3, help="Rounds per shape; the peers take turns in each.")] = 15,
    memory: Annotated[bool, typer.Option(help="Measure peak memory too, a process per layer.")] = True,
) -> None:
    """TensorFlow, 4 replicas on logical CPU devices, forward + backward."""
    import tensorflow_cpu as cpu

    strategy = cpu.strategy_of(cpu.REPLICAS)
    rows = cpu.times(strategy, rounds) + cpu.accuracy(strategy) + (cpu.memory() if memory else [])
    where = provenance("tensorflow-cpu", "keras", "numpy")
    path = write("tensorflow-cpu", [{"benchmark": "tensorflow-cpu", **row, **where} for row in rows])
    show(rows, "syncbn", sys.stdout.isatty())
    print(f"{len(rows)} rows in {path}")


@app.command()
def jax_cpu(
    rounds: Annotated[int, typer.Option(min=3, help="Rounds per shape; the peers take turns in each.")] = 9,
    program: Annotated[str, typer.Option(help="scan, convolutions or bare: only these rows are measured again.")] = "",
) -> None:
    """JAX, 4 host devices, forward + backward of 10 and 20 layers in one jit."""
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    import jax_cpu as cpu

    chosen = [name for name in cpu.PROGRAMS if program in name]
    where = provenance("jax", "flax", "numpy")
    rows = [{"benchmark": "jax-cpu", **row, **where} for row in cpu.times(rounds, chosen)]
    for quantity in dict.fromkeys(row["quantity"] for row in rows):
        print(quantity)
        show([row for row in rows if row["quantity"] == quantity], "syncbn", sys.stdout.isatty())
    measured = {row["quantity"] for row in rows}
    kept = [row for row in read("jax-cpu") if row["quantity"] not in measured]
    path = write("jax-cpu", kept + rows)
    print(f"{len(rows)} rows in {path}")


@app.command()
def torch_cpu(
    rounds: Annotated[int, typer.Option(min=3, help="Rounds per shape; the peers take turns in each.")] = 15,
) -> None:
    """PyTorch, one process and two over gloo, forward + backward; and host time a layer."""
    import torch_cpu as cpu

    rows = cpu.times(rounds) + cpu.host_microseconds()
    where = provenance("torch", "numpy")
    path = write("torch-cpu", [{"benchmark": "torch-cpu", **row, **where} for row in rows])
    for quantity, replicas in dict.fromkeys((row["quantity"], row["replicas"]) for row in rows):
        print(f"{replicas} processes, {quantity}")
        table = [row for row in rows if (row["quantity"], row["replicas"]) == (quantity, replicas)]
        show([{**row, "quantity": "seconds"} for row in table], "syncbn", sys.stdout.isatty())
    print(f"{len(rows)} rows in {path}")


def show(rows: list[dict[str, Any]], ours: str, tty: bool) -> None:
    """Medians, and ours over each peer's where the quantity is a time or a size."""
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    others = [peer for peer in peers if peer != ours]
    table = Table("", "shape", *peers, *[f"{ours} / {peer}" for peer in others])
    ratios: dict[str, list[float]] = {peer: [] for peer in others}
    for quantity, shape in dict.fromkeys((row["quantity"], tuple(row["shape"])) for row in rows):
        of = {row["peer"]: row["median"] for row in rows if row["quantity"] == quantity and tuple(row["shape"]) == shape}
        timed, compared = quantity.startswith("seconds"), "error" not in quantity
        cells = [(f"{of[peer] * 1e3:.2f} ms" if timed else f"{of[peer]:.2g}") if peer in of else "" for peer in peers]
        for peer in others:
            if timed:
                ratios[peer].append(of[ours] / of[peer])
            cells.append(f"{of[ours] / of[peer]:.2f}" if compared else "")
        table.add_row("time" if timed else quantity, "×".join(map(str, shape)), *cells)
    means = [f"{exp(sum(map(log, ratios[peer])) / len(ratios[peer])):.2f}" for peer in others]
    table.add_row("geometric mean", "", *[""] * len(peers), *means)
    Console(width=None if tty else 160).print(table)


if __name__ == "__main__":
    app()
