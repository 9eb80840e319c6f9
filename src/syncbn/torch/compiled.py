"""What the compiler sees of a normalization: plain operators, which it fuses, and operators of ours where replicas meet.

Those mutate, by their signatures, one state tensor. The compiler then drops none of them (an empty replica has no use
for the sums, but the others wait for them), takes no two for one, and keeps their order, which must be the same on every rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from syncbn.contract import Moments
from syncbn.policy import Activation
from syncbn.torch import peer_memory as lanes
from syncbn.torch import reference as eager
from syncbn.torch.groups import Link, link_of, link_over
from syncbn.torch.passes import Normalization, kept_for_backward

# One for all groups: the order of exchanges of different groups must be the same everywhere too. Nothing is ever written to it.
_state = torch.zeros((), dtype=torch.int64, device="cpu")
# Backward passes have saved it, and would take the messages that came since for a change of it.
_changed_by_nothing = torch.autograd._unsafe_preserve_version_counter(_state)


@torch.compiler.assume_constant_result
def link_at_trace_time(group: Any) -> tuple[int, str]:
    """(size, name), or (1, ""): constants of the graph that is being compiled. A process group comes in by its name."""
    if isinstance(group, str):
        group = dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
    link = link_of(group)
    return (1, "") if link is None else (link.size, link.name)


# A second library of the same name as in torch_context.py: fragments of one.
_library = torch.library.Library("syncbn", "FRAGMENT")
_library.define("batch_moments(Tensor x, Tensor? mask, Tensor(a!) state, str group) -> Tensor")
_library.define("exchange_sums(Tensor(a!) message, Tensor(b!) state, str group) -> ()")
_library.define("realize(Tensor(a!) v) -> ()")


def _batch_moments(x: Tensor, mask: Tensor | None, state: Tensor, group: str) -> Tensor:
    """float64 [2C + 1]: mean, variance and count of x over the replicas.

    Memory order: what was enqueued on the current stream before has been written when x is read; what is enqueued there after
    sees the moments of all replicas. Nothing is said about other streams, and the host waits for nobody.
    """
    with _changed_by_nothing:
        count, mean, variance = lanes.measured(x, mask, _link_named(group))
        return torch.cat([mean, variance, count[None]])


def _exchange_sums(message: Tensor, state: Tensor, group: str) -> None:
    """message, now the sum of every replica's, float64 [2C]. Memory order: as above."""
    with _changed_by_nothing:
        everybodys = lanes.exchange_sums(message, _link_named(group))
        if everybodys is not message:
            message.copy_(everybodys)


def _link_named(group: str) -> Link:
    return link_over(dist.distributed_c10d._resolve_process_group(group))  # type: ignore[arg-type]


for _name, _function, _fake in (
    ("batch_moments", _batch_moments, lambda x, mask, state, group: x.new_empty(2 * x.shape[1] + 1, dtype=torch.float64)),
    ("exchange_sums", _exchange_sums, lambda message, state, group: None),
    ("realize", lambda v: None, lambda v: None),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"syncbn::{_name}", _fake, lib=_library)


def _as_torch_does(x: Tensor, mask: Tensor | None, group: str) -> bool:
    """Whether torch's own operators serve: on a GPU, alone, nothing else compiles to fewer or better passes."""
    return x.is_cuda and not group and mask is None and x.dtype != torch.float64 and eager.count(x, None) > 1


def _about_a_value(x: Tensor) -> tuple[Tensor, Tensor]:
    """(x − k, k) in float32, k a value of each channel, out of the middle, where no padding is.

    What is measured about it loses little at a large mean, and is normalised to the same.
    """
    middle: Any = (x.shape[0] // 2, slice(None), *(size // 2 for size in x.shape[2:]))
    k = x[middle].detach().to(torch.float32).view(-1, *[1] * (x.dim() - 2))
    return x.to(torch.float32) - k, k


def moments(x: Tensor, mask: Tensor | None, size: int, group: str) -> Moments:
    """The global batch's, of `size` replicas."""
    if group:
        stats = torch.ops.syncbn.batch_moments(x, mask, _state, group)
        mean, variance, count = stats.split([x.shape[1], x.shape[1], 1])
        return Moments(count[0], mean, variance, size)
    if not _as_torch_does(x, mask, group):
        return Moments(*eager.moments_of_sums(eager.local_sums(x, mask)), 1)
    # What batch_norm is decomposed into, so that it is done once.
    rest, k = _about_a_value(x)
    variance, mean = torch.var_mean(rest, [0, *range(2, x.dim())], correction=0, keepdim=True)
    mean = mean + k
    count = torch.full((), eager.count(x, None), dtype=torch.float64, device=x.device)
    return Moments(count, mean.flatten(), variance.flatten(), 1)


def _narrowed(x: Tensor, norm: Normalization) -> Normalization:
    """On a GPU the moments in float32, the mean as a pair, in memory.

    The compiler computes vectors anew for each element that they meet; in float64 that would cost more than all the rest.
    """
    if not x.is_cuda or x.dtype == torch.float64 or norm.variance.dtype != torch.float64:
        return norm
    hi = norm.mean.to(torch.float32)
    hi, lo, variance = realized(hi, (norm.mean - hi).to(torch.float32), norm.variance.to(torch.float32))
    return norm._replace(mean=(hi, lo), variance=variance)


def realized(*vectors: Tensor) -> Any:
    """The same vectors, in memory: the compiler works them out anew neither for each element nor in the backward pass."""
    rows = torch.stack(vectors)
    torch.ops.syncbn.realize(rows)
    return rows.unbind()


def normalize(
    x: Tensor,
    moments: Moments,
    scale: Tensor,
    offset: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    epsilon: float,
    activation: Activation | None,
    group: str,
) -> Tensor:
    """activation(scale·x_hat + offset + residual)."""
    if _as_torch_does(x, mask, group):
        y = torch.nn.functional.batch_norm(_about_a_value(x)[0], None, None, scale, offset, True, 0.0, epsilon)
        return eager.activated(y if residual is None else y + residual, activation).to(x.dtype)
    if residual is x:
        # An autograd function that is compiled takes no tensor twice.
        residual = residual.view_as(residual)
    norm = _narrowed(x, Normalization(moments.mean, moments.variance, scale, offset, epsilon, activation))
    hi, lo = norm.mean if isinstance(norm.mean, tuple) else (norm.mean, None)
    name, slope = (None, 0.0) if activation is None else tuple(activation)
    return _Normalized.apply(x, scale, offset, residual, mask, moments.count, hi, lo, norm.variance, epsilon, name, slope, group)


class _Normalized(Function):
    """As torch_autograd.Normalized, for the compiler: constants in place of objects, and no second derivative."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        offset: Tensor,
        residual: Tensor | None,
        mask: Tensor | None,
        count: Tensor,
        hi: Tensor,
        lo: Tensor | None,
        variance: Tensor,
        epsilon: float,
        activation: str | None,
        slope: float,
        group: str,
    ) -> Tensor:
        """y."""
        chosen = None if activation is None else Activation(activation, slope)
        norm = Normalization(hi if lo is None else (hi, lo), variance, scale, offset, epsilon, chosen)
        y = eager.normalize(x, norm, residual)
        kept = kept_for_backward(norm, y, residual)
        ctx.has_lo, ctx.has_mask, ctx.has_kept = lo is not None, mask is not None, kept is not None
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.save_for_backward(x, scale, offset, count, hi, variance, *[v for v in (lo, mask, kept) if v is not None])
        ctx.epsilon, ctx.activation, ctx.group = epsilon, chosen, group
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        """As `Normalized.backward`."""
        x, scale, offset, count, hi, variance, *optional = ctx.saved_tensors
        lo = optional[0] if ctx.has_lo else None
        mask = optional[int(ctx.has_lo)] if ctx.has_mask else None
        kept = optional[-1] if ctx.has_kept else None
        norm = Normalization(hi if lo is None else (hi, lo), variance, scale, offset, ctx.epsilon, ctx.activation)
        dz, doffset, dscale = eager.local_gradients(dy, x, norm, kept)
        sums: tuple[Tensor, ...] = (scale.to(doffset.dtype) * doffset, scale.to(dscale.dtype) * dscale)
        if ctx.group:
            message = torch.cat(sums).to(torch.float64)
            torch.ops.syncbn.exchange_sums(message, _state, ctx.group)
            total = message.to(doffset.dtype)
            if total.dtype != message.dtype:
                # For the same reason as in `_narrowed`.
                torch.ops.syncbn.realize(total)
            sums = total.chunk(2)
        dx = eager.input_gradient_of(dz, x, mask, norm, count, *sums)
        dresidual = None if ctx.residual_dtype is None else dz.to(ctx.residual_dtype)
        return dx, dscale.to(scale.dtype), doffset.to(scale.dtype), dresidual, *[None] * 9
