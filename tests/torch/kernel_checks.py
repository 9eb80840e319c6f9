"""What the Triton kernels' results are held against, on the CPU under Triton's interpreter and on a GPU: the oracle."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import oracle
import torch
from cases import TOLERANCE

from syncbn.contract import Statistics
from syncbn.groups import Activation
from syncbn.torch.triton import ops, tiling
from syncbn.torch.triton.plan import Plan, PlanOptions

EPSILON = 1e-3
SLOPE = 0.01


@dataclass(frozen=True)
class KernelCase:
    """One input of one replica, [N, C, …], and what is fused into its passes."""

    shape: tuple[int, ...]
    last: bool = False  # channels last in memory
    dtype: str = "float32"
    activation: str | None = None
    residual: bool = False
    mask: bool = False
    mean: float = 1.0
    affine: bool = True
    parameters: str = "float32"

    @property
    def name(self):
        words = [self.dtype, "×".join(map(str, self.shape)), "last" if self.last else "first", self.activation or ""]
        words += [
            w
            for w, on in (
                ("residual", self.residual),
                ("mask", self.mask),
                ("large mean", self.mean > 1e3),
                ("plain", not self.affine),
            )
            if on
        ]
        return " ".join(w for w in words if w)

    def tensor(self, rng, mean=0.0):
        t = torch.tensor(rng.normal(size=self.shape) + mean).to(getattr(torch, self.dtype))
        return t.movedim(1, -1).contiguous().movedim(-1, 1) if self.last else t


MATRIX = [
    KernelCase((4, 6, 5, 7)),
    KernelCase((4, 6, 5, 7), last=True),
    KernelCase((3, 70, 4)),
    KernelCase((3, 70, 4), last=True),
    KernelCase((2, 3, 30, 41)),
    KernelCase((2, 3, 30, 41), last=True),
    KernelCase((9, 5)),
    KernelCase((2, 1, 3, 3, 3)),
    KernelCase((6, 2, 1, 1)),
    KernelCase((1, 130, 7, 7)),
    KernelCase((6, 4, 3, 3), mean=1e4),
    KernelCase((60, 4, 3, 3), last=True, mean=1e4),
    KernelCase((6, 4, 5, 5), mask=True),
    KernelCase((6, 4, 5, 5), last=True, mask=True, mean=1e4),
    KernelCase((6, 4, 5, 5), dtype="float16", mask=True),
    KernelCase((6, 4, 5, 5), dtype="bfloat16"),
    KernelCase((6, 4, 5, 5), last=True, dtype="bfloat16", parameters="bfloat16"),
    KernelCase((6, 4, 5, 5), affine=False),
    *[KernelCase((3, 5, 4, 4), activation=a, residual=r, last=r) for a in ("relu", "leaky_relu", "silu") for r in (False, True)],
    KernelCase((3, 5, 4, 4), residual=True),
    KernelCase((3, 5, 4, 4), dtype="bfloat16", activation="relu", residual=True),
    KernelCase((3, 5, 4, 4), activation="relu", residual=True, mask=True),
]


# How a step goes: moments merged within the kernel; by messages, as of one replica; in one launch each way.
WAYS = ("within", "partial sums", "single launch")


def each_way(cases):
    """(case, way) for all that can be: registers do not hold every case."""
    return [(case, way) for case in cases for way in WAYS if way != "single launch" or fits_registers(case)]


def fits_registers(case):
    x = case.tensor(np.random.default_rng(0))
    view, machine = tiling.channel_view(x), tiling.Machine(132, 227 << 10, True)
    return all(tiling.single_launch_tile(way, view, x.element_size(), 8, machine) for way in ("forward", "backward"))


def slopes(z, activation):
    """activation'(z) in numpy."""
    if activation is None:
        return np.ones_like(z)
    if activation == "silu":
        sigmoid = 1 / (1 + np.exp(-z))
        return sigmoid * (1 + z * (1 - sigmoid))
    return np.where(z > 0, 1, SLOPE if activation == "leaky_relu" else 0)


def activated(z, activation):
    if activation == "silu":
        return z / (1 + np.exp(-z))
    return z if activation is None else np.where(z > 0, z, z * (SLOPE if activation == "leaky_relu" else 0))


def wide(t):
    return t.detach().double().cpu().numpy()


def near(got, expected, dtype, quantity, factor=1.0):
    got = wide(got)
    assert got.shape == expected.shape
    assert np.isfinite(got).all(), quantity
    assert np.abs(got - expected).max(initial=0) <= factor * TOLERANCE[dtype, quantity] * (
        np.abs(expected).max(initial=0) or 1
    ), quantity


def check(case, device="cpu", tiles=None, way="within"):
    """All launches of one case against the oracle; tiles: in place of the plan's own."""
    partial_sums = way == "partial sums"
    rng = np.random.default_rng([*map(ord, case.name)])
    x, dy = case.tensor(rng, case.mean).to(device), case.tensor(rng).to(device)
    residual = case.tensor(rng).to(device) if case.residual else None
    C = case.shape[1]
    scale, offset = (torch.tensor(rng.normal(size=C)).to(getattr(torch, case.parameters)).to(device) for _ in range(2))
    mask = torch.tensor(rng.random((case.shape[0], 1, *case.shape[2:])) < 0.6).to(device) if case.mask else None
    mask_bytes = mask.to(torch.uint8).contiguous() if case.mask else None
    if case.mask:
        # Half of the padding is 0, wherever the mean lies.
        even = (torch.arange(len(x), device=device) % 2 == 0).view(-1, *[1] * (x.dim() - 1))
        x.masked_fill_(~(mask | even), 0)
    if not case.affine:
        scale = offset = None
    moving = [torch.zeros(C, device=device), torch.ones(C, device=device), torch.zeros(1, dtype=torch.int64, device=device)]
    options = PlanOptions(
        EPSILON,
        masked=case.mask,
        scale=None if scale is None else scale.dtype,
        activation=case.activation and Activation(case.activation, SLOPE),
        residual=None if residual is None else residual.dtype,
        statistics=torch.float32,
        update=1,
        partial_sums=partial_sums,
        reduced_sums=partial_sums,
        single_launch=way == "single launch",
    )
    plan = Plan(tiling.channel_view(x), x.dtype, x.device, options, tiles)
    assert (plan.forward is not None) == (plan.backward is not None) == options.single_launch
    statistics = Statistics(*moving[:2], 0.1, True, moving[2])
    y, stats = ops.forward(plan, x, scale, offset, mask=mask_bytes, residual=residual, statistics=statistics)
    saved = None
    if case.residual and case.activation:
        saved = residual if case.activation == "silu" else y
    dx, dscale, doffset, dresidual = ops.backward(plan, x, dy, stats, scale, offset, mask=mask_bytes, saved=saved)

    truth = oracle.BatchNorm([wide(x)], axes=(1,), masks=None if mask is None else [mask.cpu().numpy()], epsilon=EPSILON)
    n, mean, variance = truth.moments[0]
    gamma, beta = (np.ones(C), np.zeros(C)) if scale is None else (wide(scale), wide(offset))
    if partial_sums:
        count, total, squares = stats[0], stats[1 : C + 1] / stats[0], stats[C + 1 :] / stats[0]
        stats = torch.cat([total, squares - total * total, count[None]])
    assert float(stats[2 * C]) == n
    large = case.mean > 1e3
    limit = TOLERANCE["float32", "large mean" if large else "variance"]
    assert (np.abs(wide(stats[:C]) - mean) <= limit * np.sqrt(variance + EPSILON)).all()
    assert (np.abs(wide(stats[C : 2 * C]) - variance) <= limit * variance).all()
    z = truth.forward(gamma, beta)[0] + (wide(residual) if case.residual else 0)
    near(y, activated(z, case.activation), case.dtype, "output", 10 if large else 1)
    # The sign of z is what the output says, as it was rounded.
    g = wide(dy) * slopes(wide(y) if saved is y else z, case.activation)
    dxs, dscales, doffsets = truth.backward([g], gamma)
    near(dx, dxs[0], case.dtype, "gradient", 10 if large else 1)
    if scale is not None:
        near(dscale, dscales[0], case.parameters if case.parameters != "float32" else "float32", "gradient", 3)
        near(doffset, doffsets[0], case.parameters if case.parameters != "float32" else "float32", "gradient", 3)
    if dresidual is not None:
        near(dresidual, g, case.dtype, "gradient", 3)
    near(moving[0], 0.1 * mean, "float32", "mean")
    near(moving[1], 0.9 + 0.1 * variance * n / (n - 1), "float32", "variance")
    assert moving[2].item() == 1
    return stats[: 2 * C + 1], y, dx
