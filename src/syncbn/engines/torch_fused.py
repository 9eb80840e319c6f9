"""A whole torch normalization in two launches each way, on CUDA: moments, moving statistics, output; their gradients.

Used where a layer asks for nothing between the moments and the output, and there is one replica or the replicas meet inside the
kernels (torch_lanes.py). Everything else takes the two verbs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from syncbn.engines import torch_context as context
from syncbn.engines import torch_debug as debug
from syncbn.engines import torch_lanes as lanes
from syncbn.engines.torch_autograd import How, differentiable
from syncbn.engines.torch_groups import Link
from syncbn.kernels.choice import cuda_kernels
from syncbn.policy import Activation


class Moving(NamedTuple):
    """The moving statistics that a forward pass moves: buffers, and the weight of the new value, None for 1/batches."""

    mean: Tensor
    variance: Tensor
    batches: Tensor
    weight: float | None


def whole(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, epsilon: float, mask: Tensor | None, residual: Tensor | None,
    activation: Activation | None, link: Link | None, moving: Moving | None,
) -> Tensor | None:  # fmt: skip
    """The output, moving statistics moved; None where this path does not serve the call, the same on every replica."""
    if context.is_taped():
        return None
    lane = lanes.lane_of(link, x.device)
    if link is not None and lane is None:
        return None
    kernels = cuda_kernels()
    if kernels is None or not kernels.serves(x, mask) or x.shape[1] > lanes.MOST_CHANNELS:
        return None
    debug.announce(link, "forward", debug.speaker(), x.shape[1])
    if moving is not None and not context.is_first_pass():
        moving = None
    return Whole.apply(x, weight, bias, residual, mask, epsilon, activation, link, lane, moving, kernels)


class Whole(Function):
    """Two launches each way, and nothing saved but x and what is O(channels), besides one tensor with a residual and an
    activation."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, mask: Tensor | None, epsilon: float,
        activation: Activation | None, link: Link | None, lane: Any, moving: Moving | None, kernels: Any,
    ) -> Tensor:  # fmt: skip
        """y."""
        fused = kernels.fused
        dense = kernels.dense(x)
        keep = kernels.keep_of(mask, x)
        name, slope = (None, 0.0) if activation is None else activation
        residual_dtype = None
        if residual is not None:
            residual_dtype = residual.dtype
            dense_residual = fused.in_layout_of(dense, residual)
        else:
            dense_residual = None
        flags = {
            "masked": mask is not None, "scale": None if weight is None else weight.dtype, "activation": name,
            "residual": residual_dtype, "replicas": 1 if link is None else link.size,
        }  # fmt: skip
        moves: Any = None
        if moving is None:
            plan = kernels.plan_for(dense, **flags)
        else:
            plan = kernels.plan_for(dense, **flags, moving=moving.mean.dtype, moves=1 if link is None else 2)
            moves = (moving.mean, moving.variance, moving.batches, -1.0 if moving.weight is None else moving.weight)
        stats = fused.measure(plan, dense, keep, None if lane is None else lane.take(x.shape[1], False))
        y = fused.normalize(plan, dense, stats, weight, bias, epsilon, keep=keep, residual=dense_residual, slope=slope, moving=moves)
        kept = None
        if residual is not None and activation is not None:
            kept = residual if name == "silu" else y
        ctx.save_for_backward(x, weight, bias, mask, kept, stats)
        ctx.rest = (plan, epsilon, activation, link, lane, kernels, residual_dtype, debug.speaker())
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        """(dx, dweight, dbias, dresidual): the parameters' gradients are this replica's own sums."""
        x, weight, bias, mask, kept, stats = ctx.saved_tensors
        plan, epsilon, activation, link, lane, kernels, residual_dtype, speaker = ctx.rest
        debug.announce(link, "backward", speaker, x.shape[1])
        nothing = (None,) * 7
        if torch.is_grad_enabled():
            how = How(epsilon, activation, link, kernels, speaker)
            gradients = differentiable(dy, x, _or(weight, x, 1), _or(bias, x, 0), residual_dtype, mask, kept, stats[-1], how)
            if weight is None:
                gradients[1] = gradients[2] = None
            return *gradients, *nothing
        fused = kernels.fused
        dense, keep = kernels.dense(x), kernels.keep_of(mask, x)
        slope = 0.0 if activation is None else activation.slope
        given = dy if dy.dtype == dense.dtype else dy.to(dense.dtype)
        given = fused.in_layout_of(dense, given)
        saved = None if kept is None else fused.in_layout_of(dense, kept)
        # Sent whatever this replica needs: the others wait for it.
        dweight, dbias, coefficients = fused.gradient_sums(
            plan, dense, given, stats, weight, bias, epsilon, keep=keep, saved=saved, slope=slope,
            lane=None if lane is None else lane.take(x.shape[1], True),
        )  # fmt: skip
        needs_x, needs_residual = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        dx = dresidual = None
        if needs_residual:
            dresidual = torch.empty_like(dense, dtype=residual_dtype) if saved is not None else dy.to(residual_dtype)
        elif saved is not None:
            dresidual = torch.empty_like(dense, dtype=residual_dtype)
        if needs_x or (needs_residual and saved is not None):
            dx = fused.input_gradient(
                plan, dense, given, coefficients, keep=keep, saved=saved, slope=slope, dresidual=dresidual if saved is not None else None
            )
        return dx, dweight, dbias, dresidual if needs_residual else None, *nothing


def _or(parameter: Tensor | None, x: Tensor, value: float) -> Tensor:
    return x.new_full((x.shape[1],), value, dtype=torch.float32) if parameter is None else parameter
