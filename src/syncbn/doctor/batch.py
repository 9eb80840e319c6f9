"""A known batch for several replicas, and what plain batch norm in float64 makes of the whole of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

EPSILON = 1e-3


class Known(NamedTuple):
    """x and the output's gradient dy, float32 [replicas, N, H, W, C], for scale 1 and offset 0."""

    x: np.ndarray
    dy: np.ndarray


def known(replicas: int) -> Known:
    """Replicas differ in mean and spread."""
    rng = np.random.default_rng(0)
    shape = (replicas, 3, 5, 5, 8)
    which = np.arange(replicas).reshape(-1, 1, 1, 1, 1)
    x = rng.normal(size=shape) * (1 + which) + 3 * which
    return Known(x.astype("float32"), rng.normal(size=shape).astype("float32"))


def errors(batch: Known, mean: Any, variance: Any, y: Any, dx: Any) -> dict[str, float]:
    """The largest error of each quantity, relative to the largest value. mean, variance: [replicas, C]; y, dx: as x."""
    x, dy = batch.x.astype("float64"), batch.dy.astype("float64")
    axes = tuple(range(x.ndim - 1))
    right_mean, right_variance = x.mean(axes), x.var(axes)
    rstd = 1 / np.sqrt(right_variance + EPSILON)
    right_y = (x - right_mean) * rstd
    right_dx = rstd * (dy - dy.mean(axes) - right_y * (dy * right_y).mean(axes))
    pairs = {
        "mean": (mean, right_mean),
        "variance": (variance, right_variance),
        "output": (np.asarray(y), right_y),
        "input gradient": (np.asarray(dx), right_dx),
    }
    return {name: float(np.abs(np.asarray(got) - right).max() / np.abs(right).max()) for name, (got, right) in pairs.items()}
