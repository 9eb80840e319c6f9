"""The gradients of a torch normalization, the path through the moments included."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from syncbn.policy import Activation
from syncbn.torch import desync as debug
from syncbn.torch import peer_memory as lanes
from syncbn.torch import reference as eager
from syncbn.torch.groups import DifferentiableSum, Link
from syncbn.torch.passes import Normalization, kept_for_backward


class How(NamedTuple):
    """What a normalization takes besides tensors."""

    epsilon: float
    activation: Activation | None
    link: Link | None
    kernels: Any
    layer: str


class Normalized(Function):
    """y, and in its backward pass one message. Called directly, in the old form: it costs a third of the newer ones."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        offset: Tensor,
        residual: Tensor | None,
        mask: Tensor | None,
        count: Tensor,
        mean: Any,
        variance: Tensor,
        how: How,
    ) -> Tensor:
        """y; keeps x and what is O(channels), besides with a residual and an activation one tensor more."""
        norm = Normalization(mean, variance, scale, offset, how.epsilon, how.activation)
        y = how.kernels.normalize(x, norm, residual)
        pair = mean if isinstance(mean, tuple) else (mean, None)
        ctx.save_for_backward(x, scale, offset, mask, count, *pair, variance, kept_for_backward(norm, y, residual))
        ctx.how, ctx.residual_dtype = how, None if residual is None else residual.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        """(dx, dscale, doffset, dresidual): the last two sums are this replica's own."""
        x, scale, offset, mask, count, hi, lo, variance, kept = ctx.saved_tensors
        how: How = ctx.how
        debug.announce(how.link, debug.backward(), how.layer, x.shape[1])
        if torch.is_grad_enabled():
            gradients = differentiable(dy, x, scale, offset, ctx.residual_dtype, mask, kept, count, how)
            return *gradients, None, None, None, None, None
        norm = Normalization(hi if lo is None else (hi, lo), variance, scale, offset, how.epsilon, how.activation)
        needs_x, _, _, needs_residual = ctx.needs_input_grad[:4]
        dz, sums, message = how.kernels.gradient_sums(dy, x, norm, kept, needs_residual)
        # Sent whatever this replica needs: the others wait for it.
        message = lanes.exchange_sums(message, how.link)
        dx = how.kernels.input_gradient(dz, x, mask, norm, count, message) if needs_x else None
        doffset, dscale = sums.to(scale.dtype).chunk(2)
        dresidual = dz.to(ctx.residual_dtype) if needs_residual else None
        return dx, dscale, doffset, dresidual, None, None, None, None, None


def differentiable(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    offset: Tensor,
    residual_dtype: torch.dtype | None,
    mask: Tensor | None,
    kept: Tensor | None,
    count: Tensor,
    how: How,
) -> list[Tensor | None]:
    """(dx, dscale, doffset, dresidual) that can be differentiated again and again.

    The moments, which came in as constants, are formed from x once more by differentiable sums, and y from them. What does not
    require a gradient on this replica (an empty input without a history) is made to, so that all replicas send the same messages.
    """
    inputs = [_apart(v) for v in (x, scale, offset)]
    if residual_dtype is not None:
        # Its value matters to silu alone, and is kept for it.
        kept_residual = how.activation is not None and how.activation.name == "silu"
        residual = kept if kept_residual else torch.zeros_like(x, dtype=residual_dtype)
        assert residual is not None
        inputs.append(_apart(residual))
    y = _from_the_beginning(inputs, mask, None if kept is None else kept > 0, count, how)
    gradients = torch.autograd.grad(y, inputs, dy.to(y.dtype), create_graph=True)
    return [*gradients, *[None] * (4 - len(inputs))]


def _apart(v: Tensor) -> Tensor:
    """v for a gradient that must not walk from one input to another by a history that they share: the pass around it does."""
    return v.view_as(v) if v.requires_grad else v.detach().requires_grad_()


def _from_the_beginning(inputs: list[Tensor], mask: Tensor | None, positive: Tensor | None, count: Tensor, how: How) -> Tensor:
    x, scale, offset, *residual = (v.to(eager.wide_dtype(inputs[0])) for v in inputs)
    dims, column = [0, *range(2, x.dim())], [1, -1, *[1] * (x.dim() - 2)]
    at_least_one = count.clamp_min(1)

    def mean_of(v: Tensor) -> Tensor:
        counted = v if mask is None else torch.where(mask, v, 0)
        return (DifferentiableSum.apply(counted.sum(dims), how.link) / at_least_one).view(column)

    centred = x - mean_of(x)
    variance = mean_of(centred * centred) + (1 - count).clamp_min(0)
    z = scale.view(column) * centred * torch.rsqrt(variance + how.epsilon) + offset.view(column)
    for v in residual:
        z = z + v
    if how.activation is None or how.activation.name == "silu":
        return eager.activated(z, how.activation)
    return torch.where((z if positive is None else positive) > 0, z, z * how.activation.slope)
