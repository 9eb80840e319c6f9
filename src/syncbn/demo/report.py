"""What a person sees of the demo: a progress bar, a table and a plot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from syncbn.demo import OnStep, Run, Settings

# Wide enough for the table where no terminal says how wide it is.
PLAIN_WIDTH = 120


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=PLAIN_WIDTH)


@contextmanager
def progress() -> Iterator[OnStep]:
    """A bar a run; yields what trainers call after each step."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_console()) as bars:
        tasks: dict[str, TaskID] = {}

        def on_step(name: str, done: int, steps: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=steps)
            bars.update(tasks[name], completed=done)

        yield on_step


def table(runs: Sequence[Run], settings: Settings, backend: str) -> None:
    """Prints one row a run."""
    title = f"Handwritten digits on {backend}: {settings.replicas} replicas × {settings.batch} images, {settings.epochs} epochs"
    columns = Table(title=title, caption="off = largest difference from one replica that sees the whole batch, before training")
    for name in ("", "test accuracy", "ms / step", "statistics apart", "output off", "gradient off"):
        columns.add_column(name, justify="right" if name else "left")
    for run in runs:
        differences = (run.statistics_apart, run.output_off, run.gradient_off)
        row = f"{run.accuracies[-1]:.1%}", f"{run.seconds_per_step * 1e3:.1f}", *(f"{d:.1e}" if d else "0" for d in differences)
        columns.add_row(run.name, *row)
    _console().print(columns)


def plot(runs: Sequence[Run], settings: Settings, folder: Path) -> list[Path]:
    """Saves the accuracy curves as PNG and SVG; gives their paths."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for run, style in zip(runs, ("C7--", "C0-", "C1-"), strict=False):
        axes.plot(range(1, len(run.accuracies) + 1), [100 * a for a in run.accuracies], style, marker="o", label=run.name)
    axes.set_xlabel("epoch")
    axes.set_ylabel("test accuracy (%)")
    axes.set_title(f"Handwritten digits, {settings.replicas} replicas × {settings.batch} images")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(loc="best")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"accuracy.{kind}" for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=150)
    plt.close(figure)
    return paths
