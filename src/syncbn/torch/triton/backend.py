"""The kernels' interface (see the package) on Triton kernels, for CUDA tensors; and plans by call, for what does more at once.

Between `local_sums` and `normalize`, and between `gradient_sums` and `input_gradient`, the engine adds messages up. Where
replicas meet inside the kernels, or there is one, the engine calls fused.py instead.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncbn.policy import Activation
from syncbn.torch import reference as eager
from syncbn.torch.passes import Normalization
from syncbn.torch.triton import ops as fused
from syncbn.torch.triton import plan as plans
from syncbn.torch.triton import tiling
from syncbn.torch.triton.launch import INTERPRETED

_plans: dict[Any, plans.Plan] = {}


@cache
def runs_on(device_index: int) -> bool:
    """Whether Triton compiles for this GPU: NVIDIA's, from sm_80 on."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device_index) >= (8, 0)


def serves(x: Tensor, mask: Tensor | None) -> bool:
    """Whether these kernels take x."""
    # Subclasses (fake tensors, distributed ones) have no memory of their own to point to.
    plain = type(x) is Tensor or type(x) is torch.nn.Parameter
    there = INTERPRETED or (x.is_cuda and runs_on(x.get_device()))
    return plain and there and x.dtype in plans.DTYPES and x.dim() >= 2 and x.shape[1] > 0


def dense_or_copy(x: Tensor) -> Tensor:
    """x, or a copy that the kernels can walk over: contiguous or channels last, and aligned."""
    if x.data_ptr() % 16 == 0 and (x.is_contiguous() or tiling.is_channels_last(x)):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def with_strides(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """x, or a copy that lies like this, aligned."""
    if x.stride() == strides and x.data_ptr() % 16 == 0:
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def plan_for(
    x: Tensor,
    masked: bool = False,
    scale: torch.dtype | None = None,
    activation: str | None = None,
    residual: torch.dtype | None = None,
    moving: torch.dtype | None = None,
    moves: int = 0,
    replicas: int = 1,
    gradients: torch.dtype | None = None,
    sent: bool = False,
    raw: bool = False,
    at_once: bool = False,
) -> plans.Plan:
    """The plan of a call, made once for its shape, strides, dtypes and device; x is dense."""
    key = (
        x.shape,
        x.stride(),
        x.dtype,
        x.device,
        masked,
        scale,
        activation,
        residual,
        moving,
        moves,
        replicas,
        gradients,
        sent,
        raw,
        at_once,
    )
    found = _plans.get(key)
    if found is None:
        f = tiling.fold(x)
        assert f is not None
        found = _plans[key] = plans.Plan(
            f,
            x.dtype,
            x.device,
            masked=masked,
            scale=scale,
            activation=activation,
            residual=residual,
            moving=moving,
            moves=moves,
            replicas=replicas,
            gradients=gradients,
            sent=sent,
            raw=raw,
            at_once=at_once,
        )
    return found


def keep_of(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """A mask [N, 1, …] as uint8 for each position of a channel, in the order in which both folds count them."""
    if mask is None:
        return None
    return mask.expand(x.shape[0], 1, *x.shape[2:]).contiguous().view(torch.uint8)


def local_sums(x: Tensor, mask: Tensor | None) -> Tensor:
    """[1 + 2C] float64: n, Σx, Σx²."""
    x = dense_or_copy(x)
    return fused.measure(plan_for(x, masked=mask is not None, sent=True), x, keep_of(mask, x))


moments_of_sums = eager.moments_of_sums


class Pending(NamedTuple):
    """A gradient before the activation, as what it will be made of."""

    dy: Tensor
    saved: Tensor | None


def normalize(x: Tensor, norm: Normalization, residual: Tensor | None) -> Tensor:
    """activation(scale·x_hat + offset + residual)."""
    x = dense_or_copy(x)
    if residual is not None:
        residual = fused.in_layout_of(x, residual)
    plan = plan_for(
        x, scale=norm.scale.dtype, activation=_name(norm.activation), residual=None if residual is None else residual.dtype
    )
    slope = 0.0 if norm.activation is None else norm.activation.slope
    return fused.normalize(plan, x, _stats(norm), norm.scale, norm.offset, norm.epsilon, residual=residual, slope=slope)


def gradient_sums(dy: Tensor, x: Tensor, norm: Normalization, kept: Tensor | None, whole: bool) -> tuple[Any, Tensor, Tensor]:
    """(dz, this replica's Σdz and Σdz·x_hat, the same times scale)."""
    if whole and norm.activation is not None:
        dy = eager.before_activation(dy.to(torch.float32), x, norm, kept)
        norm, kept = norm._replace(activation=None), None
    x, slope = dense_or_copy(x), 0.0 if norm.activation is None else norm.activation.slope
    dy = fused.in_layout_of(x, dy.to(x.dtype) if not whole else dy)
    if dy.dtype != x.dtype:
        # The residual's gradient stays in float32; the sums are taken of what the input gradient will read.
        whole_dz, dy = dy, dy.to(x.dtype)
    else:
        whole_dz = dy
    saved = None if kept is None else fused.in_layout_of(x, kept)
    plan = _backward_plan(x, norm, saved)
    dscale, doffset, message = fused.gradient_sums(
        plan, x, dy, _stats(norm), norm.scale, norm.offset, norm.epsilon, saved=saved, slope=slope, wide=True
    )
    assert dscale is not None
    assert doffset is not None
    assert message is not None
    return (whole_dz if whole else Pending(dy, saved)), torch.cat([doffset, dscale]), message


def input_gradient(dz: Any, x: Tensor, mask: Tensor | None, norm: Normalization, count: Tensor, message: Tensor) -> Tensor:
    """dx, from the sums over all replicas."""
    x = dense_or_copy(x)
    if not isinstance(dz, Pending):
        dz, norm = Pending(fused.in_layout_of(x, dz.to(x.dtype)), None), norm._replace(activation=None)
    plan = _backward_plan(x, norm, dz.saved, mask is not None)
    slope = 0.0 if norm.activation is None else norm.activation.slope
    # With a residual the kernel writes its gradient too; nobody asked for it here.
    unused = torch.empty_like(x, dtype=_residual_dtype(dz.saved)) if dz.saved is not None else None
    return fused.input_gradient(
        plan,
        x,
        dz.dy,
        message,
        _stats(norm, count),
        norm.scale,
        norm.offset,
        norm.epsilon,
        keep=keep_of(mask, x),
        saved=dz.saved,
        slope=slope,
        dresidual=unused,
    )


def _backward_plan(x: Tensor, norm: Normalization, saved: Tensor | None, masked: bool = False) -> plans.Plan:
    return plan_for(
        x,
        masked=masked,
        scale=norm.scale.dtype,
        activation=_name(norm.activation),
        residual=_residual_dtype(saved),
        gradients=torch.float64,
        sent=True,
    )


def _residual_dtype(saved: Tensor | None) -> torch.dtype | None:
    return None if saved is None else saved.dtype


def _name(activation: Activation | None) -> str | None:
    return None if activation is None else activation.name


def _stats(norm: Normalization, count: Tensor | None = None) -> Tensor:
    """Mean, variance and count as the kernels read them."""
    last = norm.variance.new_ones(1) if count is None else count.to(torch.float64).reshape(1)
    return torch.cat([norm.mean, norm.variance, last])
