"""What a person sees of the demo: progress, a table and a last sentence."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from syncbn.demo import LOCAL, NORMS, Run, Task, Watch

# Where no terminal says how wide it is.
PLAIN_WIDTH = 80
# What the demo's names stand for.
LAYERS = {
    "tensorflow": ("keras.layers.BatchNormalization", "syncbn.SyncBatchNormalization"),
    "jax": ("keras.layers.BatchNormalization", "syncbn.SyncBatchNormalization"),
    "torch": ("torch.nn.BatchNorm2d", "syncbn.SyncBatchNorm"),
}


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(width=PLAIN_WIDTH, highlight=False)


class _Lines:
    """A line for each epoch, for a file or a pipe."""

    def __init__(self, many_tasks: bool):
        self.many_tasks = many_tasks

    def step(self, task: Task) -> None:
        pass

    def epoch(self, task: Task, epoch: int, accuracy: float) -> None:
        which = f"{task.batch} images per device, seed {task.seed}" if self.many_tasks else f"epoch {epoch} of {task.epochs}"
        print(f"{task.norm}, {which}: {percent(accuracy)} of the test images right", flush=True)


class _Bars:
    """A bar for each batch norm, in a terminal."""

    def __init__(self, bars: Progress, tasks: Sequence[Task]):
        self.bars = bars
        self.names: dict[str, TaskID] = {}
        self.totals = {norm: sum(t.steps * t.epochs for t in tasks if t.norm == norm) for norm in NORMS}

    def step(self, task: Task) -> None:
        if task.norm not in self.names:
            self.names[task.norm] = self.bars.add_task(task.norm, total=self.totals[task.norm])
        self.bars.advance(self.names[task.norm])

    def epoch(self, task: Task, epoch: int, accuracy: float) -> None:
        pass


@contextmanager
def watching(tasks: Sequence[Task]) -> Iterator[Watch]:
    """Yields what trainers call: bars in a terminal, a line for each epoch elsewhere."""
    console = _console()
    if not console.is_terminal:
        yield _Lines(many_tasks=len(tasks) > len(NORMS))
        return
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TextColumn("steps"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bars:
        yield _Bars(bars, tasks)


def percent(share: float) -> str:
    """0.975 as "97.5 %"."""
    return f"{100 * share:.1f} %"


def plain(value: float) -> str:
    """Two digits, without an exponent where a person reads it faster so: 5.4, 0.061, 4e-7."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) < 1e-3:
        digits, exponent = f"{value:.0e}".split("e")
        return f"{digits}e{int(exponent)}"
    return f"{value:.{max(0, 1 - math.floor(math.log10(abs(value))))}f}"


def table(runs: Sequence[Run], backend: str) -> None:
    """Prints a row for each run, the best one bold, and what the columns mean."""
    columns = Table()
    for heading in ("", "test\naccuracy", "ms per\nstep", "statistics\ndiffer by", "error of\noutput", "error of\ngradient"):
        columns.add_column(heading, justify="right" if heading else "left")
    best = max(run.accuracies[-1] for run in runs)
    for run in runs:
        numbers = (1e3 * run.seconds_per_step, run.statistics_apart, run.output_error, run.gradient_error)
        style = "bold" if run.accuracies[-1] == best else None
        columns.add_row(run.task.norm, percent(run.accuracies[-1]), *map(plain, numbers), style=style)
    console = _console()
    console.print(columns)
    local, synced = LAYERS[backend]
    console.print(f"local: {local}. syncbn: {synced}.")
    if backend == "jax":
        console.print("Both are Keras layers. Flax and plain JAX call sync_batch_norm: see docs/jax.md.")
    console.print("statistics differ by: largest difference between two devices, after training.")
    console.print("error: largest difference from one device that has the whole batch.")


def verdict(runs: Sequence[Run]) -> str:
    """The last sentence: the better of our two runs, by its name, and the local one."""
    local = next(run for run in runs if run.task.norm == LOCAL)
    ours = max((run for run in runs if run.task.norm != LOCAL), key=lambda run: run.accuracies[-1])
    return f"{ours.task.norm}: {percent(ours.accuracies[-1])} of the test images right; local: {percent(local.accuracies[-1])}."
