"""The demo: one small network on real handwritten digits, with three batch norms, over several replicas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """What a person chooses."""

    replicas: int
    batch: int
    epochs: int
    seed: int


@dataclass
class Run:
    """What one training run showed.

    accuracies: on the test images, after each epoch.
    statistics_apart: the largest difference of any moving statistic between two replicas, after training.
    output_off, gradient_off: before training, on one batch, the largest difference of the first batch norm's output, and of
        its input gradient, from the same layer on one replica that sees the whole batch.
    """

    name: str
    accuracies: list[float]
    seconds_per_step: float
    statistics_apart: float
    output_off: float
    gradient_off: float


# Called after each step: the run's name, steps done, steps in all.
OnStep = Callable[[str, int, int], None]
