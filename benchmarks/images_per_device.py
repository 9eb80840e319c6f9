"""Test accuracy against images per device: the sweep of `syncbn demo`, on JAX and 4 host devices. It compares no times."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from itertools import groupby
from typing import Any

REPLICAS, BACKEND = 4, "jax"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=500, help="of each run; default: 500")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each kind; default: 5")


def measure(given: argparse.Namespace, record: Callable[..., Any]) -> None:
    """The share of the test images that is right, after training: the median of the seeds, and each."""
    from syncbn.demo import jax, report, sweep

    kind = lambda task: (task.norm, task.batch)  # noqa: E731
    tasks = sorted(sweep.tasks(BACKEND, given.seeds, given.steps), key=kind)
    with report.watching(tasks) as watch:
        for (norm, batch), runs in groupby(jax.train(REPLICAS, tasks, watch), key=lambda run: kind(run.task)):
            found = [round(run.accuracies[-1], 4) for run in runs]
            record(
                subject=norm,
                case=f"{batch} images per device",
                measure="test accuracy",
                unit="1",
                values={"median": statistics.median(found), "each": found},
                replicas=REPLICAS,
                versions=("jax", "keras", "scikit-learn"),
                images_per_device=batch,
                steps=given.steps,
                backend=BACKEND,
            )
