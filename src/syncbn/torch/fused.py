"""A training step in two launches each way, or one, on CUDA: moments, moving statistics, output; their gradients.

Used where a layer asks for nothing between the moments and the output. Replicas exchange inside the kernels (peer_memory.py), or
their group's backend adds the kernels' messages up between them. Everything else takes the other two verbs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from syncbn.contract import ASSIGNED, Statistics
from syncbn.groups import Activation
from syncbn.torch import desync, dispatch
from syncbn.torch._private import (
    are_functorch_transforms_active,
    is_dead_tensor_wrapper,
    is_legacy_batchedtensor,
    tracing_state,
)
from syncbn.torch.autograd import differentiable, no_transform
from syncbn.torch.checkpoint import is_recording_or_replaying, should_update_now
from syncbn.torch.groups import Communicator
from syncbn.torch.peer_memory import Mailbox, mailbox_for
from syncbn.torch.transport import sum_in_place


class FusedCall(NamedTuple):
    """What a step takes besides tensors that need gradients.

    mailbox: of the current stream, where replicas exchange inside the kernels. statistics: those that the launch updates.
    single_launch: whether one launch may do it all.
    """

    epsilon: float
    activation: Activation | None
    communicator: Communicator | None
    kernels: Any
    layer: str | None
    mailbox: Mailbox | None
    statistics: Statistics | None
    single_launch: bool


def kernels_for(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Statistics | None,
    mask: Tensor | None,
    communicator: Communicator | None,
) -> Any:
    """The kernels, where they do this whole step, else None."""
    kernels = dispatch.fused_kernels(x, mask)
    if kernels is None or is_recording_or_replaying() or are_functorch_transforms_active():
        return None
    # torch.jit.trace records no kernels, but torch's own operator.
    if tracing_state() is not None:
        return None
    # What torch.func leaves behind has no memory of its own.
    if is_dead_tensor_wrapper(x):
        return None
    if communicator is None and x.numel() <= x.shape[1]:
        # No value, or one value a channel.
        return None
    # The kernels take addresses.
    if not _alike(x, weight, bias):
        return None
    if statistics is None:
        return kernels
    # The kernels count batches, and their variance is Bessel's.
    if statistics.batches is None or not statistics.unbiased or not _alike(x, statistics.mean, statistics.variance):
        return None
    return kernels


def _alike(x: Tensor, a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two vectors, or neither, lie close packed, in one dtype, on the device of x."""
    if a is None or b is None:
        return a is b
    # get_device(): a number, where two devices take longer to compare.
    return a.is_contiguous() and b.is_contiguous() and a.dtype is b.dtype and a.get_device() == b.get_device() == x.get_device()


def train_step(
    kernels: Any,
    x: Tensor,
    parameters: tuple[Tensor | None, Tensor | None],
    statistics: Statistics | None,
    mask: Tensor | None,
    residual: Tensor | None,
    epsilon: float,
    activation: Activation | None,
    communicator: Communicator | None,
    layer: str | None,
) -> tuple[Tensor, Statistics | None]:
    """(y, what there is to assign: nothing), by the kernels of `kernels_for`. parameters: weight and bias."""
    mailbox = None
    if communicator is not None:
        # Before mailboxes are set up, where all ranks wait for each other: a rank that is absent is named.
        desync.announce(communicator, "forward", layer, x.shape)
        mailbox = mailbox_for(communicator, x.device, x.shape[1])
    # 1/batches cannot be read by some programs while another counts. Also not in a recomputation, which must save what was saved.
    single_launch = communicator is None and (statistics is None or statistics.weight is not None)
    updated = statistics if statistics is not None and should_update_now(False) else None
    call = FusedCall(epsilon, activation, communicator, kernels, layer, mailbox, updated, single_launch)
    y = _apply(x, *parameters, residual, mask, call)
    return y, None if statistics is None else ASSIGNED


class FusedBatchNorm(Function):
    """One launch or two each way, and nothing saved but x and what is O(channels), besides one tensor with a residual and an
    activation. Between the launches, where there are replicas and no mailbox, one all-reduce."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        call: FusedCall,
    ) -> Tensor:
        """y."""
        kernels, activation = call.kernels, call.activation
        plan, dense = kernels.plan_of_step(x, weight, residual, mask is not None, call)
        y, stats = kernels.ops.forward(
            plan,
            dense,
            weight,
            bias,
            mask=None if mask is None else kernels.mask_of(mask, x),
            residual=None if residual is None else kernels.ops.in_layout_of(dense, residual),
            statistics=call.statistics,
            transport=None if call.communicator is None else _transport(call, x.shape[1], False),
        )
        ctx.call, ctx.plan, ctx.residual_dtype = call, plan, None if residual is None else residual.dtype
        ctx.strides = dense.stride()
        saved = None
        if residual is not None and activation is not None:
            saved = residual if activation.name == "silu" else y
        ctx.save_for_backward(x, weight, bias, stats, mask, saved)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        """(dx, dweight, dbias, dresidual): the parameters' gradients are this replica's own sums."""
        x, weight, bias, stats, mask, saved = ctx.saved_tensors
        call: FusedCall = ctx.call
        kernels = call.kernels
        if call.communicator is not None:
            desync.announce(call.communicator, desync.backward(), call.layer, x.shape)
        # Batched gradients have no memory of their own either.
        if torch.is_grad_enabled() or is_legacy_batchedtensor(dy):
            with torch.enable_grad():
                return _differentiable(ctx, dy)
        # As the forward pass walked over it: a hook may have saved it in another layout, or at another address.
        dense = kernels.with_strides(x, ctx.strides)
        needs_x, _, _, needs_residual, _, _ = ctx.needs_input_grad
        # The sums are sent whatever this replica needs: the others wait for them.
        dx, dweight, dbias, dresidual = kernels.ops.backward(
            ctx.plan,
            dense,
            kernels.ops.in_layout_of(dense, dy if dy.dtype == dense.dtype else dy.to(dense.dtype)),
            stats,
            weight,
            bias,
            mask=None if mask is None else kernels.mask_of(mask, x),
            saved=None if saved is None else kernels.ops.in_layout_of(dense, saved),
            transport=None if call.communicator is None else _transport(call, x.shape[1], True),
            needs_dx=needs_x or saved is not None,
        )
        if needs_residual and saved is None:
            # Without an activation it is dy itself.
            dresidual = dy.to(ctx.residual_dtype)
        return dx, dweight, dbias, dresidual if needs_residual else None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Raises: there is no forward mode."""
        raise no_transform()


# Past what Function.apply does for torch.func, which is excluded above: that costs as much as a launch.
_apply = super(Function, FusedBatchNorm).apply


def _transport(call: FusedCall, channels: int, backward: bool) -> Any:
    """What `ops` takes as its transport, where there are replicas."""
    if call.mailbox is not None:
        return call.mailbox.exchange(channels, backward)
    return lambda message: sum_in_place(message, call.communicator)


def _differentiable(ctx: Any, dy: Tensor) -> Any:
    """The gradients, differentiable again, by plain operators."""
    x, weight, bias, stats, mask, saved = ctx.saved_tensors
    read = None
    if mask is not None:
        read = mask | x.isfinite()
        x = torch.where(read, x, 0)
    one_and_zero = [x.new_full((x.shape[1],), value, dtype=torch.float32) for value in (1, 0)] if weight is None else []
    scale, offset = one_and_zero or (weight, bias)
    count = stats[0] if ctx.plan.options.partial_sums else stats[2 * x.shape[1]]
    gradients = differentiable(dy, x, scale, offset, ctx.residual_dtype, mask, saved, count, ctx.call)
    if read is not None and gradients[0] is not None:
        gradients[0] = torch.where(read, gradients[0], 0)
    if weight is None:
        gradients[1] = gradients[2] = None
    return *gradients, None, None
