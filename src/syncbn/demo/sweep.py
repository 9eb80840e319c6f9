"""Test accuracy against images per device: rows in a file, one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from syncbn.demo import NORMS, Run, Task, refuses

IMAGES_PER_DEVICE = (1, 2, 4, 8, 16)


def tasks(backend: str, seeds: int, steps: int) -> list[Task]:
    """Each batch norm with each number of images per device and each seed, all with the same number of steps."""
    cases = [(norm, batch) for batch in IMAGES_PER_DEVICE for norm in NORMS if not refuses(backend, norm, batch)]
    return [Task(norm, batch, steps, 1, seed) for seed in range(seeds) for norm, batch in cases]


def write(runs: Iterable[Run], path: Path, **shared: Any) -> Iterator[dict[str, Any]]:
    """Writes a row as soon as its run is done, and yields it. `shared` is in every row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for run in runs:
            task = run.task
            row = {
                "norm": task.norm,
                "images_per_device": task.batch,
                "steps": task.steps,
                "seed": task.seed,
                "accuracy": round(run.accuracies[-1], 4),
                **shared,
            }
            file.write(json.dumps(row) + "\n")
            file.flush()
            yield row


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that `write` wrote.

    Raises:
        SystemExit: a file that is not there, is empty, or holds something else.
    """
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        whole = all({"norm", "images_per_device", "steps", "seed", "accuracy", "devices"} <= row.keys() for row in rows)
    except (OSError, ValueError, AttributeError) as error:
        raise SystemExit(f"--rows must name a file that `syncbn demo --sweep` wrote. Received: {path} ({error}).") from None
    if not rows or not whole:
        raise SystemExit(f"--rows must name a file that `syncbn demo --sweep` wrote. Received: {path}, without such rows.")
    return rows


def summary(rows: Iterable[dict[str, Any]]) -> str:
    """A line for each number of images: the means of the three batch norms."""
    rows = list(rows)
    lines = []
    for size in sorted({row["images_per_device"] for row in rows}):
        found = []
        for norm in NORMS:
            each = [row["accuracy"] for row in rows if row["norm"] == norm and row["images_per_device"] == size]
            found.append(f"{norm} {100 * sum(each) / len(each):.1f} %" if each else f"{norm} not run")
        lines.append(f"{size:>3} images per device: {', '.join(found)}")
    return "\n".join(lines)
