"""Batch norm of one replica's CUDA tensor in two launches each way, or one; the replicas meet inside them, or not at all.

    measure(…)            moments, and over replicas where the plan says so
    normalize(…)          the output, and the moving statistics
    gradient_sums(…)      dscale, doffset and the coefficients of
    input_gradient(…)     dx

and `forward(…)` and `backward(…)`, which do both, or, where registers hold the batch (`Plan.resident`), one launch instead.

No autograd and no group in here: `lane` is a table of addresses that the engine made.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncbn.torch.triton.device import peer_exchange as exchange
from syncbn.torch.triton.launch import INTERPRETED, Launch, address
from syncbn.torch.triton.plan import Plan
from syncbn.torch.triton.scratch import scratch_for


class Lane(NamedTuple):
    """Where replicas exchange: the table of exchange.py, this replica's place in it, the bound of a wait, the call's tag."""

    table: Tensor
    rank: int
    limit: int
    tag: int


class Moving(NamedTuple):
    """Moving statistics that the forward pass moves: buffers, and the weight of the new value (below 0: 1/batches)."""

    mean: Tensor
    variance: Tensor
    tracked: Tensor
    weight: float


def stream_of(device: torch.device) -> int:
    """The current stream's handle."""
    return 0 if INTERPRETED else torch._C._cuda_getCurrentRawStream(device.index)


def measure(plan: Plan, x: Tensor, keep: Tensor | None, lane: Lane | None = None) -> Tensor:
    """float64 [2C + 1 + …]: mean, variance and count, of x or of all replicas; behind them room for `gradient_sums`.

    From a plan that sends, [2C + 1]: the message n, Σx, Σx².
    """
    return _measure(plan, stream_of(x.device), address(x), address(keep), x.device, lane)


def normalize(
    plan: Plan,
    x: Tensor,
    stats: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    epsilon: float,
    *,
    keep: Tensor | None = None,
    residual: Tensor | None = None,
    slope: float = 0.0,
    moving: Any = None,
) -> Tensor:
    """activation(scale·(x − mean)·rstd + offset + residual), in x's dtype and layout. moving: a `Moving`."""
    stream = stream_of(x.device)
    return _normalize(plan, stream, x, address(x), address(keep), stats, scale, offset, epsilon, residual, slope, moving)


def forward(
    plan: Plan,
    x: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    epsilon: float,
    *,
    keep: Tensor | None,
    residual: Tensor | None,
    slope: float,
    moving: Any,
    lane: Lane | None,
    between: Callable[[Tensor], object] | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, stats): `measure`, `between` (adds the message up over replicas) and `normalize`."""
    device = x.device
    stream, at_x, at_keep = stream_of(device), address(x), address(keep)
    if plan.resident:
        # Written by the launch that writes the output.
        stats = torch.empty(plan.stats_size, dtype=torch.float64, device=device)
    else:
        stats = _measure(plan, stream, at_x, at_keep, device, lane)
        if between is not None:
            between(stats)
    return _normalize(plan, stream, x, at_x, at_keep, stats, scale, offset, epsilon, residual, slope, moving), stats


NO_LANE = (None, 0, 0, 0)
NOT_MOVING = (None, None, None, 0.0)


def _measure(plan: Plan, stream: int, x: Any, keep: Any, device: torch.device, lane: Lane | None) -> Tensor:
    r, f = plan.moments, plan.fold
    stats = torch.empty(plan.stats_size, dtype=torch.float64, device=device)
    parts, arrivals = scratch_for(device, stream, r.parts, r.blocks)
    table, rank, limit, tag = NO_LANE if lane is None else lane
    r.launch(stream, x, keep, parts, arrivals, address(stats), address(table), f.A, r.splits, r.share, limit, tag, rank)
    return stats


def _normalize(
    plan: Plan,
    stream: int,
    x: Tensor,
    at_x: Any,
    at_keep: Any,
    stats: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    epsilon: float,
    residual: Tensor | None,
    slope: float,
    moving: Any,
) -> Tensor:
    y = torch.empty_like(x)
    mean, variance, tracked, weight = moving or NOT_MOVING
    plan.normalize(
        stream,
        at_x,
        address(y),
        address(residual),
        at_keep,
        address(stats),
        address(scale),
        address(offset),
        address(mean),
        address(variance),
        address(tracked),
        *plan.normalize_numbers,
        epsilon,
        *_halves(weight),
        slope,
    )
    return y


@lru_cache(64)
def _halves(weight: float) -> tuple[float, float]:
    """A number as what float32 arguments can say, and the rest of it."""
    rounded = ctypes.c_float(weight).value
    return rounded, weight - rounded


def gradient_sums(
    plan: Plan,
    x: Tensor,
    dy: Tensor,
    stats: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    epsilon: float,
    *,
    keep: Tensor | None = None,
    saved: Tensor | None = None,
    slope: float = 0.0,
    lane: Lane | None = None,
    wide: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dscale, doffset, message); the first two in scale's dtype, or, `wide`, in float64.

    From a plan that sends, the message, float64 [2C]: add it up over replicas. Otherwise what `input_gradient` needs lies behind
    `stats`: an allocation less costs the host as much less as a launch.
    """
    inputs = address(x), address(dy), address(saved), address(keep)
    vectors = address(stats), address(scale), address(offset)
    dscale = doffset = None
    if wide:
        dscale = torch.empty(plan.fold.C, dtype=torch.float64, device=x.device)
        doffset = torch.empty_like(dscale)
    elif scale is not None:
        dscale, doffset = torch.empty_like(scale), torch.empty_like(scale)
    message = _sums(plan, stream_of(x.device), x.device, inputs, stats, vectors, dscale, doffset, epsilon, slope, lane)
    return dscale, doffset, message


def _sums(
    plan: Plan,
    stream: int,
    device: torch.device,
    inputs: tuple[Any, ...],
    stats: Tensor,
    vectors: tuple[Any, ...],
    dscale: Tensor | None,
    doffset: Tensor | None,
    epsilon: float,
    slope: float,
    lane: Lane | None,
) -> Tensor | None:
    r, f = plan.sums, plan.fold
    message = torch.empty(2 * f.C, dtype=torch.float64, device=device) if plan.sent else None
    parts, arrivals = scratch_for(device, stream, r.parts, r.blocks)
    table, rank, limit, tag = NO_LANE if lane is None else lane
    r.launch(
        stream,
        *inputs,
        *vectors,
        parts,
        arrivals,
        address(dscale),
        address(doffset),
        coefficients_at(stats, f.C) if message is None else address(message),
        address(table),
        f.A,
        r.splits,
        r.share,
        limit,
        tag,
        rank,
        epsilon,
        slope,
    )
    return message


if INTERPRETED:

    def coefficients_at(stats: Tensor, C: int) -> Any:
        """Where the coefficients of the input gradient lie, float32 [5C]: behind the moments, on 16 bytes."""
        return stats[2 * C + 2 :].view(torch.float32)

else:

    def coefficients_at(stats: Tensor, C: int) -> Any:
        """Where the coefficients of the input gradient lie, float32 [5C]: behind the moments, on 16 bytes."""
        return stats.data_ptr() + 16 * (C + 1)


def input_gradient(
    plan: Plan,
    x: Tensor,
    dy: Tensor,
    message: Tensor | None,
    stats: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    epsilon: float,
    *,
    keep: Tensor | None = None,
    saved: Tensor | None = None,
    slope: float = 0.0,
    dresidual: Tensor | None = None,
) -> Tensor:
    """dx; with a residual and an activation also the residual's gradient, into `dresidual`."""
    inputs = address(x), address(dy), address(saved), address(keep)
    vectors = address(stats), address(scale), address(offset)
    return _input_gradient(plan, stream_of(x.device), x, inputs, message, stats, vectors, epsilon, slope, dresidual)


def _input_gradient(
    plan: Plan,
    stream: int,
    x: Tensor,
    inputs: tuple[Any, ...],
    message: Tensor | None,
    stats: Tensor,
    vectors: tuple[Any, ...],
    epsilon: float,
    slope: float,
    dresidual: Tensor | None,
) -> Tensor:
    dx = torch.empty_like(x)
    at_x, at_dy, at_saved, at_keep = inputs
    plan.input_gradient(
        stream,
        at_x,
        at_dy,
        address(dx),
        at_saved,
        address(dresidual),
        at_keep,
        coefficients_at(stats, plan.fold.C) if message is None else address(message),
        *vectors,
        *plan.gradient_numbers,
        epsilon,
        slope,
    )
    return dx


def backward(
    plan: Plan,
    x: Tensor,
    dy: Tensor,
    stats: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    epsilon: float,
    *,
    keep: Tensor | None,
    saved: Tensor | None,
    slope: float,
    dresidual: Tensor | None,
    lane: Lane | None,
    between: Callable[[Tensor], object] | None = None,
    needs_dx: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dscale, doffset): `gradient_sums`, `between` (adds the message up over replicas) and `input_gradient`."""
    device = x.device
    stream = stream_of(device)
    inputs = at_x, at_dy, at_saved, at_keep = address(x), address(dy), address(saved), address(keep)
    vectors = address(stats), address(scale), address(offset)
    dscale = doffset = None
    if scale is not None:
        dscale, doffset = torch.empty_like(scale), torch.empty_like(scale)
    if plan.resident:
        dx = torch.empty_like(x)
        at_dx, at_dresidual, sums = address(dx), address(dresidual), (address(dscale), address(doffset))
        plan.backward(stream, at_x, at_dy, at_dx, at_saved, at_dresidual, at_keep, *vectors, *sums, plan.fold.A, epsilon, slope)
        return dx, dscale, doffset
    message = _sums(plan, stream, device, inputs, stats, vectors, dscale, doffset, epsilon, slope, lane)
    if message is not None and between is not None:
        between(message)
    if not needs_dx:
        return None, dscale, doffset
    return _input_gradient(plan, stream, x, inputs, message, stats, vectors, epsilon, slope, dresidual), dscale, doffset


def in_layout_of(x: Tensor, other: Any) -> Tensor:
    """`other`, of x's shape, with x's strides: itself, or a copy."""
    if other.stride() == x.stride() and other.data_ptr() % 16 == 0:
        return other
    return torch.empty_like(x, dtype=other.dtype).copy_(other)


_exchanges: dict[Any, Launch] = {}


def exchange_alone(kind: str, values: Tensor, lane: Lane, replicas: int) -> Tensor:
    """`values` of all replicas: "moments", float64 [2C + 1] as `measure` returns them, or "sums", float64 [2C]."""
    C = values.numel() // 2
    key = (kind, C, replicas, values.device)
    found = _exchanges.get(key)
    if found is None:
        X = exchange.block_channels(C)
        kernel = exchange.exchange_moments_kernel if kind == "moments" else exchange.exchange_sums_kernel
        types = (torch.float64, torch.float64, torch.int64, 1, 1, 1)
        found = _exchanges[key] = Launch(kernel, types, {"C": C, "X": X, "W": replicas}, -(-C // X), 4, values.device)
    table, rank, limit, tag = lane
    out = torch.empty_like(values)
    found(stream_of(values.device), address(values), address(out), address(table), limit, tag, rank)
    return out
