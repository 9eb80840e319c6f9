"""A whole torch normalization in two launches each way, or one, on CUDA: moments, moving statistics, output; their gradients.

Used where a layer asks for nothing between the moments and the output. Replicas meet inside the kernels (torch_lanes.py), or
their group's backend adds the kernels' messages up between them. Everything else takes the two verbs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from syncbn.policy import Activation
from syncbn.torch import checkpoint as context
from syncbn.torch import desync as debug
from syncbn.torch import peer_memory as lanes
from syncbn.torch.autograd import How, differentiable
from syncbn.torch.dispatch import cuda_kernels
from syncbn.torch.groups import link_of, sum_in_place


def whole(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    residual: Tensor | None,
    activation: Activation | None,
    epsilon: float,
    group: Any,
    moving: Any,
) -> Tensor | None:
    """The output, moving statistics moved; None where this path does not serve the call, the same on every replica.

    moving: (mean, variance, batches, weight of the new value or None for 1/batches), or None.
    """
    if context.is_taped() or torch._C._are_functorch_transforms_active():
        return None
    # What torch.func leaves behind has no memory of its own.
    if torch._C._functorch.is_dead_tensor_wrapper(x):  # type: ignore[attr-defined]
        return None
    link = None if context.is_local() else link_of(group)
    if link is None and x.numel() <= x.shape[1]:
        # Nothing to learn from, or one value a channel: an error, unless replicas of another group exist.
        return None
    kernels = cuda_kernels()
    if kernels is None or not kernels.serves(x, mask):
        return None
    speaker = debug.speaker()
    # Before lanes are set up, where all ranks wait for each other: a rank that is absent is named.
    debug.announce(link, "forward", speaker, x.shape[1])
    lane = None if link is None else lanes.lane_for(link, x.device, x.shape[1])
    # 1/batches cannot be read by some programs while another counts. Also not in a recomputation, which must save what was saved.
    at_once = link is None and (moving is None or moving[3] is not None)
    if moving is not None:
        mean, variance, batches, weight_of_new = moving
        moving = (mean, variance, batches, -1.0 if weight_of_new is None else weight_of_new) if context.is_first_pass() else None
    # A plain tuple: a named one costs the host as much as an allocation.
    return _apply(x, weight, bias, residual, mask, (epsilon, activation, link, lane, moving, at_once, kernels, speaker))


class Whole(Function):
    """One launch or two each way, and nothing saved but x and what is O(channels), besides one tensor with a residual and an
    activation. Between the launches, where there is a link and no lane, one all-reduce."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, mask: Tensor | None, call: Any
    ) -> Tensor:
        """y. call: (epsilon, activation, link, lane, moving, at_once, kernels, speaker)."""
        epsilon, activation, link, lane, moving, at_once, kernels, _ = call
        sent = link is not None and lane is None
        dense = kernels.dense_or_copy(x)
        name, slope = (None, 0.0) if activation is None else activation
        plan = kernels.plan_for(
            dense,
            mask is not None,
            None if weight is None else weight.dtype,
            name,
            None if residual is None else residual.dtype,
            None if moving is None else moving[0].dtype,
            0 if moving is None else 1 if link is None else 2,
            1 if lane is None else link.size,
            None,
            sent,
            sent,
            at_once,
        )
        keep = None if mask is None else kernels.keep_of(mask, x)
        y, stats = kernels.fused.forward(
            plan,
            dense,
            weight,
            bias,
            epsilon,
            keep=keep,
            residual=None if residual is None else kernels.fused.in_layout_of(dense, residual),
            slope=slope,
            moving=moving,
            lane=None if lane is None else lane.take(x.shape[1], False),
            between=(lambda message: sum_in_place(message, link)) if sent else None,
        )
        ctx.call, ctx.plan, ctx.residual_dtype = call, plan, None if residual is None else residual.dtype
        ctx.strides = dense.stride()
        kept = None
        if residual is not None and activation is not None:
            kept = residual if name == "silu" else y
        ctx.save_for_backward(x, weight, bias, stats, mask, kept)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        """(dx, dweight, dbias, dresidual): the parameters' gradients are this replica's own sums."""
        x, weight, bias, stats, mask, kept = ctx.saved_tensors
        epsilon, activation, link, lane, _, _, kernels, speaker = ctx.call
        debug.announce(link, debug.backward(), speaker, x.shape[1])
        # Batched gradients have no memory of their own either.
        if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(dy):
            with torch.enable_grad():
                return _differentiable(ctx, dy)
        plan = ctx.plan
        # As the forward pass walked over it: a hook may have saved it in another layout, or at another address.
        dense = kernels.with_strides(x, ctx.strides)
        keep = None if mask is None else kernels.keep_of(mask, x)
        slope = 0.0 if activation is None else activation.slope
        given = kernels.fused.in_layout_of(dense, dy if dy.dtype == dense.dtype else dy.to(dense.dtype))
        saved = None if kept is None else kernels.fused.in_layout_of(dense, kept)
        needs_x, _, _, needs_residual, _, _ = ctx.needs_input_grad
        dresidual = None
        if saved is not None:
            dresidual = torch.empty_like(dense, dtype=ctx.residual_dtype)
        elif needs_residual:
            # Without an activation it is dy itself.
            dresidual = dy.to(ctx.residual_dtype)
        # The sums are sent whatever this replica needs: the others wait for them.
        dx, dweight, dbias = kernels.fused.backward(
            plan,
            dense,
            given,
            stats,
            weight,
            bias,
            epsilon,
            keep=keep,
            saved=saved,
            slope=slope,
            dresidual=dresidual,
            lane=None if lane is None else lane.take(x.shape[1], True),
            between=(lambda message: sum_in_place(message, link)) if plan.sent else None,
            needs_dx=needs_x or saved is not None,
        )
        return dx, dweight, dbias, dresidual if needs_residual else None, None, None


# Past what Function.apply does for torch.func, which is excluded above: that costs as much as a launch.
_apply = super(Function, Whole).apply


def _differentiable(ctx: Any, dy: Tensor) -> Any:
    """The gradients, differentiable again, by plain operators."""
    x, weight, bias, stats, mask, kept = ctx.saved_tensors
    epsilon, activation, link, _, _, _, kernels, speaker = ctx.call
    read = None
    if mask is not None:
        read = mask | x.isfinite()
        x = torch.where(read, x, 0)
    one_and_zero = [x.new_full((x.shape[1],), value, dtype=torch.float32) for value in (1, 0)] if weight is None else []
    scale, offset = one_and_zero or (weight, bias)
    how = How(epsilon, activation, link, kernels, speaker)
    count = stats[0] if ctx.plan.sent else stats[2 * x.shape[1]]
    gradients = differentiable(dy, x, scale, offset, ctx.residual_dtype, mask, kept, count, how)
    if read is not None and gradients[0] is not None:
        gradients[0] = torch.where(read, gradients[0], 0)
    if weight is None:
        gradients[1] = gradients[2] = None
    return *gradients, None, None
