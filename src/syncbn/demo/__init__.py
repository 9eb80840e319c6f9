"""The demo: one small network on real handwritten digits, with three batch norms, over several replicas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

# The three batch norms: the framework's own, ours, and ours with batch renormalization.
LOCAL, SYNCED, RENORM = NORMS = ("local", "syncbn", "syncbn + renorm")
TRAIN_IMAGES = 1437


@dataclass(frozen=True)
class Task:
    """One training run.

    norm: one of NORMS.
    batch: images per replica and step.
    steps: number of steps of an epoch. The test images are classified after each epoch.
    compare: whether one batch is compared, before training, with one replica that sees the whole batch.
    """

    norm: str
    batch: int
    steps: int
    epochs: int
    seed: int
    compare: bool = False


@dataclass
class Run:
    """What one training run showed.

    accuracies: on the test images, after each epoch.
    statistics_apart: the largest difference of any moving statistic between two replicas, after training.
    output_error, gradient_error: before training, on one batch, the largest difference of the first batch norm's output, and of
        its input gradient, from the same layer on one replica that sees the whole batch. NaN where `compare` is False.
    """

    task: Task
    accuracies: list[float]
    seconds_per_step: float
    statistics_apart: float
    output_error: float = float("nan")
    gradient_error: float = float("nan")


class Watch(Protocol):
    """What trainers call while they train."""

    def step(self, task: Task) -> None:
        """One step is done."""

    def epoch(self, task: Task, epoch: int, accuracy: float) -> None:
        """One epoch is done; epochs count from 1."""


def refuses(backend: str, norm: str, batch: int) -> bool:
    """Whether the framework's own layer raises: torch's does for one value per channel, after the dense layer."""
    return backend == "torch" and norm == LOCAL and batch == 1


def demo_tasks(replicas: int, batch: int, epochs: int, seed: int) -> list[Task]:
    """One run for each batch norm, over all training images in each epoch."""
    return [Task(norm, batch, TRAIN_IMAGES // (replicas * batch), epochs, seed, compare=True) for norm in NORMS]
