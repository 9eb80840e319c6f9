"""The table of cases that every engine must satisfy, and the one table of tolerances."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

# (dtype, quantity) -> largest error. Moments: relative to the oracle's variance (mean: to its standard deviation); outputs and
# gradients: relative to the largest value of the oracle's. Half precision rounds its result once, to 11 or 8 bits.
TOLERANCE = {
    ("float64", "mean"): 1e-12,
    ("float64", "variance"): 1e-12,
    ("float64", "output"): 1e-12,
    ("float64", "gradient"): 1e-12,
    ("float64", "second"): 1e-7,  # the oracle's central differences
    ("float32", "mean"): 2e-6,
    ("float32", "variance"): 1e-5,
    ("float32", "output"): 2e-6,
    ("float32", "gradient"): 2e-6,
    ("float16", "mean"): 2e-6,
    ("float16", "variance"): 1e-5,
    ("float16", "output"): 1e-3,
    ("float16", "gradient"): 1e-3,
    ("bfloat16", "mean"): 2e-6,
    ("bfloat16", "variance"): 1e-5,
    ("bfloat16", "output"): 8e-3,
    ("bfloat16", "gradient"): 8e-3,
    # At mean/std = 1e4, where float64 sums of squares lose (mean/std)²·2⁻⁵³ and a float32 input has 10 bits of its std left.
    ("float64", "large mean"): 1e-7,
    ("float32", "large mean"): 1e-5,
}


@dataclass(frozen=True)
class Case:
    """Inputs of replicas: the batch size of each (a fifth one's is the first's again), and the rest of the shape."""

    name: str
    batches: tuple[int, int, int, int] = (3, 3, 3, 3)
    rest: tuple[int, ...] = (4, 5, 3)
    axes: tuple[int, ...] = (-1,)
    dtype: str = "float32"
    mask: str | None = None  # "rows", "padding", "broadcast", "one replica": see `masks`
    mean: float = 1.0
    apart: float = 1.0  # how far replicas' means lie from each other, in standard deviations
    scales_differ: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    def _rng(self, salt: str) -> np.random.Generator:
        return np.random.default_rng([*map(ord, self.name + salt)])

    def shape(self, replica: int) -> tuple[int, ...]:
        return (self.batches[replica % 4], *self.rest)

    def channel_axes(self) -> tuple[int, ...]:
        return tuple(sorted(a % (1 + len(self.rest)) for a in self.axes))

    def channels(self) -> int:
        return int(np.prod([self.shape(0)[a] for a in self.channel_axes()]))

    def inputs(self, replicas: int) -> list[np.ndarray]:
        rng = self._rng("inputs")
        return [
            _as(self.mean + self.apart * i + rng.normal(size=self.shape(i)) * rng.uniform(0.5, 2), self.dtype)
            for i in range(replicas)
        ]

    def cotangents(self, replicas: int, salt: str = "cotangents") -> list[np.ndarray]:
        rng = self._rng(salt)
        return [_as(rng.normal(size=self.shape(i)), self.dtype) for i in range(replicas)]

    def parameters(self, replicas: int) -> tuple[np.ndarray, np.ndarray]:
        """scale and offset, [replicas, C], in the arithmetic's dtype; scale has a 0 and both signs."""
        rng = self._rng("parameters")
        dtype = "float64" if self.dtype == "float64" else "float32"
        shape = (replicas if self.scales_differ else 1, self.channels())
        scale, offset = rng.normal(size=shape), rng.normal(size=shape)
        scale[:, 0] = 0 if self.channels() > 1 else 1.5
        full = (replicas, self.channels())
        return np.broadcast_to(scale, full).astype(dtype), np.broadcast_to(offset, full).astype(dtype)

    def masks(self, replicas: int) -> list[np.ndarray] | None:
        """bool, of the input's rank, 1 on the channel axes."""
        if self.mask is None:
            return None
        rng, axes, out = self._rng("mask"), self.channel_axes(), []
        for i in range(replicas):
            shape = [1 if a in axes else n for a, n in enumerate(self.shape(i))]
            if self.mask == "broadcast":
                shape = [n if a == 0 else 1 for a, n in enumerate(shape)]
            mask = rng.random(shape) < 0.6
            if self.mask == "one replica" and i == 1:
                mask[:] = False
            out.append(mask)
        return out


def _as(x: np.ndarray, dtype: str) -> np.ndarray:
    """Rounded to the dtype; bfloat16, which numpy lacks, as float32 values that bfloat16 holds."""
    if dtype != "bfloat16":
        return x.astype(dtype)
    bits = x.astype(np.float32).view(np.uint32)
    return (((bits + 0x8000) >> 16) << 16).astype(np.uint32).view(np.float32)


RAGGED = (3, 1, 5, 2)
CASES = [
    Case("equal"),
    Case("ragged", RAGGED),
    Case("an empty replica", (3, 0, 2, 1)),
    Case("first replica empty", (0, 2, 1, 3)),
    Case("one sample in all", (0, 1, 0, 0), (4,)),
    Case("rank 2", (4, 1, 0, 7), (6,)),
    Case("rank 3", RAGGED, (5, 3)),
    Case("rank 5", (2, 1, 0, 1), (2, 3, 2, 4)),
    Case("channels first", RAGGED, (3, 4, 5), (1,)),
    Case("channels first, negative", (2, 0, 1, 3), (3, 4, 5), (-3,)),
    Case("two axes apart", RAGGED, (3, 4, 5), (1, 3)),
    Case("two last axes", RAGGED, (3, 4, 5), (-1, 2)),
    Case("one channel", RAGGED, (4, 5, 1)),
    Case("many channels", RAGGED, (2, 2, 515)),
    Case("masked", RAGGED, mask="rows"),
    Case("masked by sample", RAGGED, mask="broadcast"),
    Case("masked, channels first", RAGGED, (3, 4, 5), (1,), mask="rows"),
    Case("masked, two axes apart", RAGGED, (3, 4, 5), (1, 3), mask="rows"),
    Case("a fully masked replica", RAGGED, mask="one replica"),
    Case("masked, float64", RAGGED, dtype="float64", mask="one replica"),
    Case("scales differ", RAGGED, scales_differ=True),
    Case("scales differ, masked, float64", RAGGED, dtype="float64", mask="rows", scales_differ=True),
    Case("float64", (3, 0, 2, 1), dtype="float64"),
    Case("float64, channels first", RAGGED, (3, 4, 5), (1,), "float64"),
    Case("float16", (3, 0, 2, 1), dtype="float16"),
    Case("bfloat16", RAGGED, dtype="bfloat16"),
    Case("float16, channels first, masked", RAGGED, (3, 4, 5), (1,), "float16", "rows"),
]
LARGE_MEAN = [
    Case("large mean", (60, 20, 0, 30), (8, 3), mean=1e4),
    Case("large mean, rank 2", (600, 200, 0, 300), (3,), mean=1e4),
    Case("large mean, channels first", (60, 20, 0, 30), (3, 8), (1,), mean=1e4),
    Case("large mean, masked", (60, 20, 10, 30), (8, 3), mean=1e4, mask="rows"),
    Case("large mean, float64", (60, 20, 0, 30), (8, 3), mean=1e4, dtype="float64"),
]
