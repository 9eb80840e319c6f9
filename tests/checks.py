"""What every engine's results are held against: the oracle, within the one table of tolerances."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
from cases import TOLERANCE, Case

EPSILON = 1e-3


def arguments(case: Case, replicas: int) -> tuple[Any, ...]:
    """(xs, dys, scales, offsets, masks), each one array a replica; masks may be None."""
    scale, offset = case.parameters(replicas)
    return case.inputs(replicas), case.cotangents(replicas), list(scale), list(offset), case.masks(replicas)


def close(got: list[np.ndarray], expected: list[np.ndarray], case: Case, quantity: str) -> None:
    """Every replica's arrays against the oracle's, relative to the largest value of all."""
    size = max([np.abs(e).max() for e in expected if e.size], default=1) or 1
    for g, e in zip(got, expected, strict=True):
        assert g.shape == e.shape
        assert np.isfinite(g).all()
        assert np.abs(g - e).max(initial=0) <= TOLERANCE[case.dtype, quantity] * size, (case.name, quantity)


def equals_oracle(got: list[dict[str, Any]], case: Case, args: tuple[Any, ...], group: int | None = None) -> oracle.BatchNorm:
    """One step of every replica: {"moments": (count, mean, variance), "y": …, "gradients": (dx, dscale, doffset)}."""
    xs, dys, scale, offset, masks = args
    truth = oracle.BatchNorm(xs, axes=case.axes, masks=masks, epsilon=EPSILON, group_size=group)
    large = case.mean > 1e3
    for r, out in enumerate(got):
        n, mean, variance = truth.moments[r // truth.size]
        count, got_mean, got_variance = out["moments"]
        assert count == n
        std = np.sqrt(variance + EPSILON)
        assert (np.abs(got_mean - mean) / std).max() <= TOLERANCE[case.dtype, "large mean" if large else "mean"]
        limit = TOLERANCE[case.dtype, "large mean" if large else "variance"]
        assert (np.abs(got_variance - variance) <= limit * variance).all()
        first = got[r - r % truth.size]["moments"]
        assert all(np.array_equal(a, b) for a, b in zip(out["moments"], first, strict=True)), "bits differ between replicas"
    quantity = ["large mean"] * 2 if large else ["output", "gradient"]
    close([out["y"] for out in got], truth.forward(scale, offset), case, quantity[0])
    for i, expected in enumerate(truth.backward(dys, scale)):
        close([out["gradients"][i] for out in got], expected, case, quantity[1])
    return truth
