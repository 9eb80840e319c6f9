"""The kernels' interface (reference.py) on Triton kernels, for CUDA tensors; and plans by call, for whole training steps.

Between `local_sums` and `normalize`, and between `gradient_sums` and `input_gradient`, the engine adds messages up. Where
replicas exchange inside the kernels, or there is one, fused.py calls ops.py instead.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncbn.torch import reference
from syncbn.torch.reference import Normalization
from syncbn.torch.triton import ops, tiling
from syncbn.torch.triton.launch import INTERPRETED
from syncbn.torch.triton.plan import DTYPES, Plan, PlanOptions

# By what a plan depends on; of training steps also by what its options are made of.
_plans: dict[Any, Plan] = {}
_step_plans: dict[Any, Plan] = {}
# With channels last, a single launch is compiled for each number of positions. So only the first few numbers of a kind of call
# get one. The others take two launches, whose kernels are compiled once. Otherwise images that all differ in size would always
# compile.
MAX_SIZES = 8
_sizes: dict[Any, set[int]] = {}


@cache
def runs_on(device_index: int) -> bool:
    """Whether Triton compiles for this GPU: NVIDIA's, from sm_80 on."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device_index) >= (8, 0)


def serves(x: Tensor, mask: Tensor | None) -> bool:
    """Whether these kernels take x."""
    # Subclasses (fake tensors, distributed ones) have no memory of their own to point to.
    plain = type(x) is Tensor or type(x) is torch.nn.Parameter
    there = INTERPRETED or (x.is_cuda and runs_on(x.get_device()))
    return plain and there and x.dtype in DTYPES and x.dim() >= 2 and x.shape[1] > 0


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


def plan_for(x: Tensor, options: PlanOptions) -> Plan:
    """The plan of a kind of call, made once for the shape, strides, dtype and device of x, which is dense."""
    key = (x.shape, x.stride(), x.dtype, x.get_device(), options)
    found = _plans.get(key)
    if found is None:
        view = tiling.channel_view(x)
        assert view is not None
        if options.single_launch and view.B == 1:
            # A recomputation, which updates no statistics, must save what the first pass saved.
            kind = (view.C, x.dtype, x.get_device(), options._replace(statistics=None, update=0))
            sizes = _sizes.setdefault(kind, set())
            if len(sizes) < MAX_SIZES:
                sizes.add(view.A)
            options = options._replace(single_launch=view.A in sizes)
        found = _plans[key] = Plan(view, x.dtype, x.device, options)
    return found


def plan_of_step(x: Tensor, weight: Tensor | None, residual: Tensor | None, masked: bool, call: Any) -> tuple[Plan, Tensor]:
    """The plan of a whole training step, and x or its `dense_or_copy`. call: a `fused.FusedCall`."""
    statistics, mailbox, communicator, dtype = call.statistics, call.mailbox, call.communicator, None
    if statistics is not None:
        dtype = statistics.mean.dtype
    replicas = 1 if mailbox is None else communicator.size
    # All that the options are made of: making them costs the host as much as a launch.
    key = (
        x.shape,
        x.stride(),
        x.dtype,
        x.get_device(),
        weight is None or weight.dtype,
        residual is None or residual.dtype,
        dtype,
        masked,
        call.epsilon,
        call.activation,
        communicator is None,
        replicas,
        call.single_launch,
    )
    found = _step_plans.get(key)
    # Only strides of dense tensors have a plan.
    if found is not None and x.data_ptr() % 16 == 0:
        return found, x
    dense = dense_or_copy(x)
    if dense is not x:
        return plan_of_step(dense, weight, residual, masked, call)
    if found is None:
        all_reduced = communicator is not None and mailbox is None
        options = PlanOptions(
            epsilon=call.epsilon,
            masked=masked,
            scale=None if weight is None else weight.dtype,
            activation=call.activation,
            residual=None if residual is None else residual.dtype,
            statistics=dtype,
            update=0 if statistics is None else 1 if communicator is None else 2,
            replicas=replicas,
            partial_sums=all_reduced,
            reduced_sums=all_reduced,
            single_launch=call.single_launch,
        )
        found = _step_plans[key] = plan_for(x, options)
    return found, x


def mask_of(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """A mask [N, 1, …] as uint8 for each position of a channel, in the order in which both layouts count them."""
    if mask is None:
        return None
    return mask.expand(x.shape[0], 1, *x.shape[2:]).contiguous().view(torch.uint8)


def local_sums(x: Tensor, mask: Tensor | None) -> Tensor:
    """[1 + 2C] float64: n, Σx, Σx²."""
    x = dense_or_copy(x)
    return ops.measure(plan_for(x, PlanOptions(0.0, masked=mask is not None, partial_sums=True)), x, mask_of(mask, x))


moments_of_sums = reference.moments_of_sums


class Pending(NamedTuple):
    """A gradient before the activation, as what it will be made of."""

    dy: Tensor
    saved: Tensor | None


def normalize(x: Tensor, norm: Normalization, residual: Tensor | None) -> Tensor:
    """activation(scale·x_hat + offset + residual)."""
    x = dense_or_copy(x)
    if residual is not None:
        residual = ops.in_layout_of(x, residual)
    dtype = None if residual is None else residual.dtype
    options = PlanOptions(norm.epsilon, scale=norm.scale.dtype, activation=norm.activation, residual=dtype)
    return ops.normalize(plan_for(x, options), x, _stats(norm), norm.scale, norm.offset, residual=residual)


def gradient_sums(dy: Tensor, x: Tensor, norm: Normalization, saved: Tensor | None, full: bool) -> tuple[Any, Tensor, Tensor]:
    """(dz, this replica's Σdz and Σdz·x_hat, the same times scale)."""
    if full and norm.activation is not None:
        dy = reference.before_activation(dy.to(torch.float32), x, norm, saved)
        norm, saved = norm._replace(activation=None), None
    x = dense_or_copy(x)
    dz = ops.in_layout_of(x, dy if full else dy.to(x.dtype))
    # The residual's gradient stays in float32; the sums are taken of what the input gradient will read.
    dy = dz.to(x.dtype)
    if saved is not None:
        saved = ops.in_layout_of(x, saved)
    plan = _backward_plan(x, norm, saved)
    dscale, doffset, message = ops.gradient_sums(plan, x, dy, _stats(norm), norm.scale, norm.offset, saved=saved)
    assert dscale is not None
    assert doffset is not None
    assert message is not None
    return (dz if full else Pending(dy, saved)), torch.cat([doffset, dscale]), message


def input_gradient(dz: Any, x: Tensor, mask: Tensor | None, norm: Normalization, count: Tensor, message: Tensor) -> Tensor:
    """dx, from the sums over all replicas."""
    x = dense_or_copy(x)
    if not isinstance(dz, Pending):
        dz, norm = Pending(ops.in_layout_of(x, dz.to(x.dtype)), None), norm._replace(activation=None)
    plan, stats = _backward_plan(x, norm, dz.saved, mask is not None), _stats(norm, count)
    given = {"mask": mask_of(mask, x), "saved": dz.saved}
    dx, _ = ops.input_gradient(plan, x, dz.dy, message, stats, norm.scale, norm.offset, **given)
    return dx


def _backward_plan(x: Tensor, norm: Normalization, saved: Tensor | None, masked: bool = False) -> Plan:
    options = PlanOptions(
        norm.epsilon,
        masked=masked,
        scale=norm.scale.dtype,
        activation=norm.activation,
        residual=None if saved is None else saved.dtype,
        gradients=torch.float64,
        partial_sums=True,
    )
    return plan_for(x, options)


def _stats(norm: Normalization, count: Tensor | None = None) -> Tensor:
    """Mean, variance and count as the kernels read them."""
    last = norm.variance.new_ones(1) if count is None else count.to(torch.float64).reshape(1)
    return torch.cat([norm.mean, norm.variance, last])
