"""The torch engine: replicas are the processes of a process group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from syncbn import contract, maths
from syncbn.contract import ASSIGNED, Operators, Statistics, check_variables, ensure_channels
from syncbn.groups import Activation
from syncbn.torch import compiled, desync, dispatch, fused, reference
from syncbn.torch._private import (
    are_functorch_transforms_active,
    count_dispatch_modes,
    is_in_selective_checkpoint,
    is_legacy_batchedtensor,
    outside_selective_checkpoints,
    tracing_state,
)
from syncbn.torch.autograd import Normalized, NormConfig, check_no_transform
from syncbn.torch.channel_view import ChannelView
from syncbn.torch.checkpoint import (
    hidden_from_selective_checkpoints,
    record_or_replay,
    should_update_now,
    should_update_statistics,
)
from syncbn.torch.groups import Communicator, GroupMoments, communicator_of, is_single_process
from syncbn.torch.local import is_local
from syncbn.torch.reference import arithmetic_dtype
from syncbn.torch.transport import gather, global_moments

__all__ = [
    "OPERATORS",
    "arithmetic_dtype",
    "check_variables",
    "ensure_channels",
    "is_single_process",
    "materialize",
    "moments",
    "normalize",
    "readable",
    "record_or_replay",
    "scale_and_offset",
    "should_update_statistics",
    "supports_jit",
    "train_step",
]

CHANNELS = (1,)
OPERATORS = Operators(torch.where, reference.maximum, torch.isfinite, torch.all, lambda v, dtype: v.to(dtype))


def supports_jit() -> bool:
    """Whether a Keras model can be compiled as a whole: torch compiles what it is asked to."""
    return True


def materialize(*vectors: Tensor) -> Any:
    """The same vectors; compiled code has them in memory, and does not work them out anew in the backward pass."""
    return compiled.materialize(*vectors) if torch.compiler.is_compiling() else vectors


def readable(x: Tensor, mask: Tensor | None) -> Tensor:
    """x, with 0 for what is masked and not finite. Else a NaN in the padding would spread: NaN · 0 is NaN."""
    return x if mask is None else torch.where(mask | x.isfinite(), x, 0)


def scale_and_offset(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight and bias [C] in the arithmetic's dtype, or what stands for them; the channels of x are on dim 1."""
    new: dict[str, Any] = {"dtype": arithmetic_dtype(x), "device": x.device}
    scale = torch.ones(x.shape[1], **new) if weight is None else weight.to(new["dtype"])
    return scale, torch.zeros(x.shape[1], **new) if bias is None else bias.to(new["dtype"])


@hidden_from_selective_checkpoints
@torch.no_grad()
def moments(
    x: Tensor, *, axes: tuple[int, ...] = CHANNELS, mask: Tensor | None = None, group: Any = None, layer: str | None = None
) -> GroupMoments:
    """Measures the global batch: one all-reduce of (n, Σx, Σx²) in float64; without float64 one gather of (n, k, s/n, m2).

    group: besides a `groups.Group`, a torch.distributed process group (or, compiled, its name). The channels are on `axes`.
    layer: its name in the model, for messages.
    """
    view = ChannelView(axes, x.shape)
    x, mask = view.of(x), view.of_mask(mask)
    if torch.compiler.is_compiling():
        size, name = compiled.communicator_when_compiled(group)
        if reference.has_float64(x.device):
            return compiled.moments(x, mask, size, name)
        return _moments_in_pairs(x, mask, lambda v: compiled.gather(v, size, name))
    check_no_transform(x)
    return record_or_replay(lambda: _measure(x, mask, None if is_local() else communicator_of(group), layer))


def _measure(x: Tensor, mask: Tensor | None, communicator: Communicator | None, layer: str | None) -> GroupMoments:
    desync.announce(communicator, "forward", layer, x.shape)
    if not reference.has_float64(x.device):
        return _moments_in_pairs(x, mask, lambda v: (v[None] if communicator is None else gather(v, communicator), communicator))
    size = 1 if communicator is None else communicator.size
    return GroupMoments(*global_moments(x, mask, communicator), size, communicator=communicator)


@hidden_from_selective_checkpoints
def normalize(
    x: Tensor,
    moments: Any,
    scale: Tensor,
    offset: Tensor,
    *,
    axes: tuple[int, ...] = CHANNELS,
    epsilon: float,
    mask: Tensor | None = None,
    group: Any = None,
    activation: Activation | None = None,
    residual: Tensor | None = None,
    layer: str | None = None,
) -> Tensor:
    """activation(scale·(x − mean)/√(variance + epsilon) + offset + residual); one all-reduce, in the backward pass.

    The group is that of the moments.
    """
    view = ChannelView(axes, x.shape)
    x, mask, residual = view.of(x), view.of_mask(mask), None if residual is None else view.of(residual)
    if epsilon == 0 and moments.count is not None:
        # Not by `_replace`, which torch 2.6 does not compile.
        count, mean, variance, replicas, average, mean_lo, communicator = moments
        moments = GroupMoments(count, mean, reference.divisible(variance, mean), replicas, average, mean_lo, communicator)
    if moments.count is None:
        y = _with_constants(x, moments, scale, offset, epsilon, activation, residual)
    elif torch.compiler.is_compiling():
        y = compiled.normalize(x, moments, scale, offset, residual, mask, epsilon, activation)
    else:
        config = NormConfig(epsilon, activation, moments.communicator, dispatch.kernels_for(x, mask), layer)
        measured = (moments.count, moments.mean, moments.mean_lo, moments.variance)
        y = Normalized.apply(x, scale, offset, residual, mask, *measured, config)
    return view.restore(y)


_by_the_other_verbs = contract.default_train_step(moments, normalize, should_update_statistics, OPERATORS)


def train_step(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Statistics | None,
    *,
    axes: tuple[int, ...] = CHANNELS,
    epsilon: float,
    mask: Tensor | None = None,
    group: Any = None,
    activation: Activation | None = None,
    residual: Tensor | None = None,
    layer: str | None = None,
) -> tuple[Tensor, Statistics | None]:
    """(y, new statistics): a training step, on CUDA in the fewest launches, on one replica by torch's own operator.

    A masked value that is not finite is read as 0. weight and bias may be None, and of any float dtype.
    """
    assert axes == CHANNELS or (weight is not None and bias is not None)
    compiling = torch.compiler.is_compiling()
    # Not by the decorator, which costs about 1 µs a call.
    if not compiling and count_dispatch_modes() and is_in_selective_checkpoint():
        with outside_selective_checkpoints():
            return train_step(
                x,
                weight,
                bias,
                statistics,
                axes=axes,
                epsilon=epsilon,
                mask=mask,
                group=group,
                activation=activation,
                residual=residual,
                layer=layer,
            )
    if axes == CHANNELS and not compiling:
        communicator = None if is_local() else communicator_of(group)
        given = (weight, bias)
        if (weight is None) != (bias is None):
            given = scale_and_offset(x, weight, bias)
        # With an epsilon of 0 torch's function refuses to train, and the kernels would divide by 0.
        kernels = fused.kernels_for(x, *given, statistics, mask, communicator) if epsilon else None
        if kernels is not None:
            return fused.train_step(kernels, x, given, statistics, mask, residual, epsilon, activation, communicator, layer)
        plain = epsilon and communicator is None and mask is None and residual is None and activation is None
        if plain and can_use_native(x, weight, bias, statistics):
            return _native_train_step(x, weight, bias, statistics, epsilon)
    scale, offset = scale_and_offset(x, weight, bias)
    options = {"axes": axes, "mask": mask, "group": group, "activation": activation, "residual": residual, "layer": layer}
    return _by_the_other_verbs(readable(x, mask), scale, offset, statistics, epsilon=epsilon, **options)


def can_use_native(x: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Statistics | None) -> bool:
    """Whether torch's own batch norm does a training step of one replica: no other mixtures of dtypes, and no biased variance."""
    if x.numel() <= x.shape[1]:
        return False
    dtype = x.dtype
    return (
        (weight is None or weight.dtype is dtype)
        and (bias is None or bias.dtype is dtype)
        and (statistics is None or (statistics.unbiased and statistics.mean.dtype is dtype))
    )


def _native_train_step(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Statistics | None, epsilon: float
) -> tuple[Tensor, Statistics | None]:
    """By torch's operator, which updates the statistics itself."""
    if statistics is None:
        return _by_torch(x, weight, bias, None, None, True, 0.0, epsilon), None
    mean, variance, momentum, _, batches, _ = statistics
    if not should_update_now(False):
        # A recomputation must save as many tensors as the first pass.
        mean, variance, momentum = mean.clone(), variance.clone(), momentum or 0.0
    elif batches is not None:
        batches.add_(1)
    if momentum is None:
        # As torch does, nothing is updated where nobody counts.
        momentum = 0.0 if batches is None else 1.0 / float(batches)
    return _by_torch(x, weight, bias, mean, variance, True, momentum, epsilon), ASSIGNED


def _by_torch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    training: bool,
    momentum: float,
    epsilon: float,
) -> Tensor:
    """By the operator: the function around it refuses an epsilon of 0 in torch 2.11."""
    restrides = _may_have_wrong_gradient(x, weight, bias)
    x, cudnn = _restrided(x) if restrides else x, torch.backends.cudnn.enabled
    y = torch.batch_norm(x, weight, bias, mean, variance, training, momentum, epsilon, cudnn)
    if restrides:
        # By a hook, which leaves y no view: programs change it in place.
        y.register_hook(_restrided_gradient)
    return y


def _may_have_wrong_gradient(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether torch's gradient may be wrong: on the CPU (2.13) it is, for some strides of axes of length 1.

    False where nothing is differentiated, and where a trace or a transform would see more operators.
    """
    return (
        x.dim() > 3
        # Before sizes are compared: in a trace they may depend on data.
        and not torch.compiler.is_compiling()
        and tracing_state() is None
        and not count_dispatch_modes()
        and not are_functorch_transforms_active()
        and 1 in x.shape
        and torch.is_grad_enabled()
        and any(v is not None and v.requires_grad for v in (x, weight, bias))
        and x.device.type == "cpu"
        and x.layout is torch.strided
    )


def _restrided(v: Tensor) -> Tensor:
    """v with the strides of its memory format. An axis of length 1 may have others, by which torch may take another format."""
    if v.is_contiguous():
        return v.flatten().view(v.shape)
    rows = v.movedim(1, -1)
    return rows.flatten().view(rows.shape).movedim(-1, 1) if rows.is_contiguous() else v


def _restrided_gradient(dy: Tensor | None) -> Tensor | None:
    """A hook: None leaves a gradient as it is. A second derivative may have none, and batched gradients have no memory."""
    return None if dy is None or is_legacy_batchedtensor(dy) else _restrided(dy)


def _with_constants(
    x: Tensor,
    moments: Any,
    scale: Tensor,
    offset: Tensor,
    epsilon: float,
    activation: Activation | None,
    residual: Tensor | None,
) -> Tensor:
    """Operators that tracing, export, vmap and jacrev know; their own gradients are right."""
    dtype = arithmetic_dtype(x)
    mean, variance, scale, offset = (v.to(dtype) for v in (moments.mean, moments.variance, scale, offset))
    y = _by_torch(x, scale, offset, mean, variance, False, 0.0, epsilon)
    if residual is not None:
        y = y + residual.to(y.dtype)
    return reference.activated(y, activation)


def _moments_in_pairs(x: Tensor, mask: Tensor | None, exchange: Callable[[Tensor], tuple[Tensor, Any]]) -> GroupMoments:
    """Moments without float64: the mean in two parts. exchange(v [n]) returns every replica's [size, n], and the communicator."""
    n, k, s, q = reference.local_moments(x, mask)
    n = n if isinstance(n, Tensor) else torch.full((), n, dtype=torch.int64, device=x.device)
    count = n.to(k.dtype)
    at_least_one = count.clamp_min(1)
    floats = torch.cat([k, s / at_least_one, maths.local_m2(count, s, q, maximum=reference.maximum)])
    # Counts above 2²⁴ are not exact in float32, and an integer's bits in a float payload are a denormal that arithmetic may
    # flush to 0: so the floats travel as the bits of integers.
    payload = torch.cat([n.to(torch.int32)[None], floats.view(torch.int32)])
    rows, communicator = exchange(payload)
    counts = rows[:, :1]
    ks, rs, m2s = rows[:, 1:].contiguous().view(k.dtype).chunk(3, dim=1)
    _, (hi, lo), variance = maths.merge(
        counts.to(k.dtype),
        ks,
        rs,
        m2s,
        ks.index_select(0, counts[:, 0].argmax()[None]),
        add=lambda v: v.sum(0, keepdim=True),
        maximum=reference.maximum,
        where=torch.where,
    )
    return GroupMoments(counts.sum(), hi[0], variance[0], rows.shape[0], mean_lo=lo[0], communicator=communicator)
