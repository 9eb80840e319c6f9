"""The command `syncbn`."""

from __future__ import annotations

import importlib
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True)


class Backend(StrEnum):
    """The frameworks that the demo runs on, each a module of `syncbn.demo`."""

    tensorflow = "tensorflow"
    jax = "jax"
    torch = "torch"


@app.callback()
def main() -> None:
    """Batch normalization whose statistics come from all replicas that train a model."""


@app.command()
def demo(
    backend: Annotated[Backend, typer.Option(help="The framework that trains.")] = Backend.tensorflow,
    replicas: Annotated[
        int, typer.Option(min=1, max=64, help="Replicas: GPUs where there are any, else logical CPU devices or processes.")
    ] = 4,
    batch: Annotated[int, typer.Option(min=1, max=64, help="Images per replica and step.")] = 2,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 5,
    output: Annotated[Path, typer.Option(help="Folder for the plot, as PNG and SVG.")] = Path("demo-results"),
    seed: Annotated[int, typer.Option(min=0, help="Of weights and order of images; the same seed gives the same table.")] = 0,
) -> None:
    """Trains a small network on handwritten digits with and without synchronised batch normalization."""
    from syncbn.demo import Settings, report

    settings = Settings(replicas, batch, epochs, seed)
    trainer = importlib.import_module(f"syncbn.demo.{backend}")
    with report.progress() as on_step:
        runs = trainer.train(settings, on_step)
    report.table(runs, settings, backend)
    for path in report.plot(runs, settings, output):
        print(path)


if __name__ == "__main__":
    app()
