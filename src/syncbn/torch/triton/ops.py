"""Batch norm of one replica's CUDA tensor in two launches each way, or one; replicas exchange inside them, or not at all.

    measure(…)            moments, and over replicas where the plan says so
    normalize(…)          the output, and the moving statistics
    gradient_sums(…)      dscale, doffset and the coefficients of
    input_gradient(…)     dx

and `forward(…)` and `backward(…)`, which do both, or one launch instead, if enough of the batch fits in registers
(`Plan.forward`, `Plan.backward`).

x, dy, residual and saved are [N, C, …] in one dense layout (`in_layout_of`). mask is uint8, one value a position. scale and
offset are [C] or None. statistics are a `syncbn.contract.Statistics` that the launch updates, or None. No autograd and no group
in here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncbn.contract import Statistics
from syncbn.torch._private import current_raw_stream
from syncbn.torch.triton.device import peer_exchange
from syncbn.torch.triton.exchange import Exchange
from syncbn.torch.triton.launch import INTERPRETED, Launch, address
from syncbn.torch.triton.plan import EXCHANGE, Plan
from syncbn.torch.triton.scratch import scratch_for

# How replicas communicate between the launches of a plan, or inside them: a function that adds a message up over the replicas, in
# place, or an Exchange.
Transport = Exchange | Callable[[Tensor], object] | None

NO_EXCHANGE = Exchange(None, 0, 0, 0)


class Gradients(NamedTuple):
    """What the backward pass returns. dresidual: where there are a residual and an activation."""

    dx: Tensor | None
    dscale: Tensor | None
    doffset: Tensor | None
    dresidual: Tensor | None


# By a device's index, the handle of its current stream.
stream_of = (lambda device_index: 0) if INTERPRETED else current_raw_stream


def measure(plan: Plan, x: Tensor, mask: Tensor | None, exchange: Exchange | None = None) -> Tensor:
    """float64 [2C + 1 + …]: mean, variance and count, of x or of all replicas; behind them room for `gradient_sums`.

    From a plan of partial sums, [2C + 1]: the message n, Σx, Σx².
    """
    device = x.device
    stream = stream_of(x.get_device())
    launch, parts, counters = plan.moments
    stats = torch.empty(plan.stats_size, dtype=torch.float64, device=device)
    parts_ptr, arrivals_ptr = scratch_for(device, stream, parts, counters)
    mailboxes, rank, limit, tag = exchange or NO_EXCHANGE
    launch.start(
        stream,
        x_ptr=x,
        mask_ptr=mask,
        parts_ptr=parts_ptr,
        arrivals_ptr=arrivals_ptr,
        stats_ptr=stats,
        mailboxes_ptr=mailboxes,
        limit=limit,
        tag=tag,
        rank=rank,
    )
    return stats


def normalize(
    plan: Plan,
    x: Tensor,
    stats: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    *,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    statistics: Statistics | None = None,
) -> Tensor:
    """activation(scale·(x − mean)·rstd + offset + residual), in x's dtype and layout."""
    y = torch.empty_like(x)
    mean, variance, batches, weight, rest = _updated(statistics)
    plan.normalize.start(
        stream_of(x.get_device()),
        x_ptr=x,
        y_ptr=y,
        residual_ptr=residual,
        mask_ptr=mask,
        stats_ptr=stats,
        scale_ptr=scale,
        offset_ptr=offset,
        moving_mean_ptr=mean,
        moving_variance_ptr=variance,
        batches_ptr=batches,
        weight=weight,
        weight_rest=rest,
    )
    return y


def _updated(statistics: Statistics | None) -> tuple[Any, Any, Any, float, float]:
    """What a launch takes to update the moving statistics: mean, variance, batches, the weight of the new value in two parts."""
    if statistics is None:
        return None, None, None, 0.0, 0.0
    mean, variance, new, _, batches, _ = statistics
    # Below 0: 1/batches.
    return mean, variance, batches, *_halves(-1.0 if new is None else new)


@lru_cache(64)
def _halves(weight: float) -> tuple[float, float]:
    """A number as what float32 arguments can say, and the rest of it."""
    rounded = ctypes.c_float(weight).value
    return rounded, weight - rounded


def forward(
    plan: Plan,
    x: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    *,
    mask: Tensor | None,
    residual: Tensor | None,
    statistics: Statistics | None,
    transport: Transport = None,
) -> tuple[Tensor, Tensor]:
    """(y, stats)."""
    if plan.forward is not None:
        return _forward_in_a_single_launch(plan, x, scale, offset, mask, residual, statistics)
    if plan.options.partial_sums:
        stats = measure(plan, x, mask)
        _reduce(stats, transport)
    else:
        stats = measure(plan, x, mask, transport)  # type: ignore[arg-type]
    return normalize(plan, x, stats, scale, offset, mask=mask, residual=residual, statistics=statistics), stats


def _forward_in_a_single_launch(
    plan: Plan,
    x: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    mask: Tensor | None,
    residual: Tensor | None,
    statistics: Statistics | None,
) -> tuple[Tensor, Tensor]:
    assert plan.forward is not None
    launch, parts, counters = plan.forward
    device = x.device
    stream = stream_of(x.get_device())
    y, stats = torch.empty_like(x), torch.empty(plan.stats_size, dtype=torch.float64, device=device)
    mean, variance, batches, weight, rest = _updated(statistics)
    parts_ptr, arrivals_ptr = scratch_for(device, stream, parts, counters)
    launch.start(
        stream,
        x_ptr=x,
        y_ptr=y,
        residual_ptr=residual,
        mask_ptr=mask,
        stats_ptr=stats,
        scale_ptr=scale,
        offset_ptr=offset,
        moving_mean_ptr=mean,
        moving_variance_ptr=variance,
        batches_ptr=batches,
        parts_ptr=parts_ptr,
        arrivals_ptr=arrivals_ptr,
        weight=weight,
        weight_rest=rest,
    )
    return y, stats


def _reduce(message: Tensor, transport: Transport) -> None:
    # None: one replica that sends to nobody.
    if transport is not None:
        transport(message)  # type: ignore[operator]


def gradient_sums(
    plan: Plan,
    x: Tensor,
    dy: Tensor,
    stats: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    *,
    mask: Tensor | None = None,
    saved: Tensor | None = None,
    exchange: Exchange | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dscale, doffset, message); the first two in the plan's dtype for gradients, or scale's.

    From a plan of partial sums, the message, float64 [2C]: add it up over replicas. Otherwise what `input_gradient` needs lies
    behind `stats`: an allocation less costs the host as much less as a launch.
    """
    device, C = x.device, plan.view.C
    stream, dtype = stream_of(x.get_device()), plan.options.gradients
    launch, parts, counters = plan.sums
    dscale = doffset = message = None
    if dtype is not None:
        dscale, doffset = torch.empty(C, dtype=dtype, device=device), torch.empty(C, dtype=dtype, device=device)
    elif scale is not None:
        dscale, doffset = torch.empty_like(scale), torch.empty_like(scale)
    if plan.options.partial_sums:
        message = torch.empty(2 * C, dtype=torch.float64, device=device)
    parts_ptr, arrivals_ptr = scratch_for(device, stream, parts, counters)
    mailboxes, rank, limit, tag = exchange or NO_EXCHANGE
    launch.start(
        stream,
        x_ptr=x,
        dy_ptr=dy,
        saved_ptr=saved,
        mask_ptr=mask,
        stats_ptr=stats,
        scale_ptr=scale,
        offset_ptr=offset,
        parts_ptr=parts_ptr,
        arrivals_ptr=arrivals_ptr,
        dscale_ptr=dscale,
        doffset_ptr=doffset,
        coefficients_ptr=coefficients_at(stats, C) if message is None else address(message),
        mailboxes_ptr=mailboxes,
        limit=limit,
        tag=tag,
        rank=rank,
    )
    return dscale, doffset, message


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
    *,
    mask: Tensor | None = None,
    saved: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(dx, dresidual); the second where there are a residual and an activation. message: of all replicas."""
    dx, dresidual = torch.empty_like(x), _dresidual(plan, x, saved)
    plan.input_gradient.start(
        stream_of(x.get_device()),
        x_ptr=x,
        dy_ptr=dy,
        dx_ptr=dx,
        saved_ptr=saved,
        dresidual_ptr=dresidual,
        mask_ptr=mask,
        coefficients_ptr=coefficients_at(stats, plan.view.C) if message is None else address(message),
        stats_ptr=stats,
        scale_ptr=scale,
        offset_ptr=offset,
    )
    return dx, dresidual


def _dresidual(plan: Plan, x: Tensor, saved: Tensor | None) -> Tensor | None:
    return None if saved is None else torch.empty_like(x, dtype=plan.options.residual)


def backward(
    plan: Plan,
    x: Tensor,
    dy: Tensor,
    stats: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    *,
    mask: Tensor | None,
    saved: Tensor | None,
    transport: Transport = None,
    needs_dx: bool = True,
) -> Gradients:
    """The gradients; dx and dresidual only where they are needed, but the message is always sent."""
    if plan.backward is not None:
        return _backward_in_a_single_launch(plan, x, dy, stats, scale, offset, mask, saved)
    exchange = None if plan.options.partial_sums else transport
    dscale, doffset, message = gradient_sums(
        plan,
        x,
        dy,
        stats,
        scale,
        offset,
        mask=mask,
        saved=saved,
        exchange=exchange,  # type: ignore[arg-type]
    )
    if message is not None:
        _reduce(message, transport)
    if not needs_dx:
        return Gradients(None, dscale, doffset, None)
    dx, dresidual = input_gradient(plan, x, dy, message, stats, scale, offset, mask=mask, saved=saved)
    return Gradients(dx, dscale, doffset, dresidual)


def _backward_in_a_single_launch(
    plan: Plan,
    x: Tensor,
    dy: Tensor,
    stats: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    mask: Tensor | None,
    saved: Tensor | None,
) -> Gradients:
    assert plan.backward is not None
    launch, parts, counters = plan.backward
    stream = stream_of(x.get_device())
    dx, dresidual = torch.empty_like(x), _dresidual(plan, x, saved)
    dscale = doffset = None
    if scale is not None:
        dscale, doffset = torch.empty_like(scale), torch.empty_like(scale)
    parts_ptr, arrivals_ptr = scratch_for(x.device, stream, parts, counters)
    launch.start(
        stream,
        x_ptr=x,
        dy_ptr=dy,
        dx_ptr=dx,
        saved_ptr=saved,
        dresidual_ptr=dresidual,
        mask_ptr=mask,
        stats_ptr=stats,
        scale_ptr=scale,
        offset_ptr=offset,
        dscale_ptr=dscale,
        doffset_ptr=doffset,
        parts_ptr=parts_ptr,
        arrivals_ptr=arrivals_ptr,
    )
    return Gradients(dx, dscale, doffset, dresidual)


def in_layout_of(x: Tensor, other: Any) -> Tensor:
    """`other`, of x's shape, with x's strides: itself, or a copy."""
    if other.stride() == x.stride() and other.data_ptr() % 16 == 0:
        return other
    return torch.empty_like(x, dtype=other.dtype).copy_(other)


_exchanges: dict[Any, Launch] = {}


def exchange_values(kind: str, values: Tensor, exchange: Exchange, replicas: int) -> Tensor:
    """`values` of all replicas: "moments", float64 [2C + 1] as `measure` returns them, or "sums", float64 [2C]."""
    C = values.numel() // 2
    key = (kind, C, replicas, values.device)
    launch = _exchanges.get(key) or _exchanges.setdefault(key, exchange_launch(kind, C, replicas, values.device))
    out = torch.empty_like(values)
    mailboxes, rank, limit, tag = exchange
    launch.start(
        stream_of(values.get_device()), values_ptr=values, out_ptr=out, mailboxes_ptr=mailboxes, limit=limit, tag=tag, rank=rank
    )
    return out


def exchange_launch(kind: str, C: int, replicas: int, device: torch.device) -> Launch:
    """The launch of an exchange alone, after arithmetic that other code did."""
    block = peer_exchange.block_channels(C)
    kernel = peer_exchange.exchange_moments_kernel if kind == "moments" else peer_exchange.exchange_sums_kernel
    types = {"values_ptr": torch.float64, "out_ptr": torch.float64, "mailboxes_ptr": torch.int64, "limit": 1, "tag": 1, "rank": 1}
    constants = {"C": C, "MERGE_C": block, "WORLD_SIZE": replicas}
    return Launch(kernel, types, constants, programs=-(-C // block), warps=4, device=device, addresses=EXCHANGE)
