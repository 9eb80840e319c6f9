"""The gradients of a torch normalization, the path through the moments included."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.forward_ad import unpack_dual

from syncbn.groups import Activation
from syncbn.torch import desync, reference
from syncbn.torch._private import are_functorch_transforms_active, tracing_state
from syncbn.torch.groups import Communicator
from syncbn.torch.reference import Normalization, saved_for_backward
from syncbn.torch.transport import DifferentiableSum, global_sums


class NormConfig(NamedTuple):
    """What a normalization takes besides tensors. layer: its name in the model, for messages."""

    epsilon: float
    activation: Activation | None
    communicator: Communicator | None
    kernels: Any
    layer: str | None


def check_no_transform(x: Tensor) -> None:
    """Raises where a training step would have to be recorded, or differentiated in another way than backward."""
    if tracing_state() is not None:
        raise RuntimeError(
            "torch.jit.trace cannot record the messages of a synchronised training step. Received: a layer in training mode "
            "while tracing. Call model.eval() before, or compile the model with torch.compile."
        )
    if are_functorch_transforms_active() or unpack_dual(x).tangent is not None:
        raise no_transform()


def no_transform() -> RuntimeError:
    """The error of a training step that is to be differentiated in another way than backward."""
    return RuntimeError(
        "A synchronised training step has gradients in reverse mode alone. Received: a layer in training mode under forward-mode "
        "differentiation or a transform of torch.func. Use torch.autograd.grad, with create_graph=True for higher derivatives, "
        "or call model.eval()."
    )


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
        mean: Tensor,
        mean_lo: Tensor | None,
        variance: Tensor,
        config: NormConfig,
    ) -> Tensor:
        """y; saves x and what is O(channels), besides with a residual and an activation one tensor more."""
        norm = Normalization(mean, variance, scale, offset, config.epsilon, config.activation, mean_lo)
        y = config.kernels.normalize(x, norm, residual)
        ctx.save_for_backward(x, scale, offset, mask, count, mean, mean_lo, variance, saved_for_backward(norm, y, residual))
        ctx.config, ctx.residual_dtype = config, None if residual is None else residual.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        """(dx, dscale, doffset, dresidual): dscale and doffset are this replica's own sums."""
        x, scale, offset, mask, count, mean, mean_lo, variance, saved = ctx.saved_tensors
        config: NormConfig = ctx.config
        desync.announce(config.communicator, desync.backward(), config.layer, x.shape)
        if torch.is_grad_enabled():
            gradients = differentiable(dy, x, scale, offset, ctx.residual_dtype, mask, saved, count, config)
            return *gradients, *[None] * 6
        norm = Normalization(mean, variance, scale, offset, config.epsilon, config.activation, mean_lo)
        needs_x, _, _, needs_residual = ctx.needs_input_grad[:4]
        dz, sums, partial_sums = config.kernels.gradient_sums(dy, x, norm, saved, needs_residual)
        # Sent whatever this replica needs: the others wait for it.
        reduced_sums = global_sums(partial_sums, config.communicator)
        dx = config.kernels.input_gradient(dz, x, mask, norm, count, reduced_sums) if needs_x else None
        doffset, dscale = sums.to(scale.dtype).chunk(2)
        dresidual = dz.to(ctx.residual_dtype) if needs_residual else None
        return dx, dscale, doffset, dresidual, *[None] * 6

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Raises: of a tangent of the parameters alone, the moments did not know."""
        raise no_transform()


def differentiable(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    offset: Tensor,
    residual_dtype: torch.dtype | None,
    mask: Tensor | None,
    saved: Tensor | None,
    count: Tensor,
    config: Any,
) -> list[Tensor | None]:
    """(dx, dscale, doffset, dresidual) that can be differentiated again and again. config: a NormConfig, or what has its names.

    The moments, which came in as constants, are formed from x once more by differentiable sums, and y from them. What does not
    require a gradient on this replica (an empty input without a history) is made to, so that all replicas send the same messages.
    """
    inputs = [_without_history(v) for v in (x, scale, offset)]
    if residual_dtype is not None:
        # Its value matters to silu alone, and is saved for it.
        is_saved = config.activation is not None and config.activation.name == "silu"
        residual = saved if is_saved else torch.zeros_like(x, dtype=residual_dtype)
        assert residual is not None
        inputs.append(_without_history(residual))
    y = _from_the_beginning(inputs, mask, None if saved is None else saved > 0, count, config)
    gradients = torch.autograd.grad(y, inputs, dy.to(y.dtype), create_graph=True)
    return [*gradients, *[None] * (4 - len(inputs))]


def _without_history(v: Tensor) -> Tensor:
    """v for a gradient that must not walk from one input to another by a history that they share: the pass around it does."""
    return v.view_as(v) if v.requires_grad else v.detach().requires_grad_()


def _from_the_beginning(inputs: list[Tensor], mask: Tensor | None, positive: Tensor | None, count: Tensor, config: Any) -> Tensor:
    x, scale, offset, *residual = (v.to(reference.wide_dtype(inputs[0])) for v in inputs)
    dims, column = [0, *range(2, x.dim())], [1, -1, *[1] * (x.dim() - 2)]
    at_least_one = count.clamp_min(1)

    def mean_of(v: Tensor) -> Tensor:
        counted = v if mask is None else torch.where(mask, v, 0)
        return (DifferentiableSum.apply(counted.sum(dims), config.communicator) / at_least_one).view(column)

    mean = mean_of(x)
    centred = x - mean
    variance = mean_of(centred * centred) + (1 - count).clamp_min(0)
    if config.epsilon == 0:
        variance = reference.divisible(variance, mean)
    z = scale.view(column) * centred * torch.rsqrt(variance + config.epsilon) + offset.view(column)
    for v in residual:
        z = z + v
    if config.activation is None or config.activation.name == "silu":
        return reference.activated(z, config.activation)
    return torch.where((z if positive is None else positive) > 0, z, z * config.activation.slope)
