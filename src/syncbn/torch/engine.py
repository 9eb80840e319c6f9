"""The torch engine: replicas are the processes of a process group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn import maths, policy
from syncbn.contract import Moments
from syncbn.torch import checkpoint as context
from syncbn.torch import compiled
from syncbn.torch import desync as debug
from syncbn.torch import fused as torch_fused
from syncbn.torch import peer_memory as lanes
from syncbn.torch import reference as eager
from syncbn.torch.autograd import How, Normalized
from syncbn.torch.channel_view import Fold
from syncbn.torch.dispatch import kernels_for
from syncbn.torch.groups import Link, gather, link_of
from syncbn.torch.reference import arithmetic_dtype

__all__ = [
    "arithmetic_dtype",
    "found_once",
    "is_alone",
    "may_move",
    "moments",
    "normalize",
    "realized",
    "replicas",
    "speak_as",
    "supports_jit",
    "whole",
]

found_once, speak_as = context.found_once, debug.speak_as
whole = torch_fused.whole


def supports_jit() -> bool:
    """Whether a Keras model can be compiled as a whole: torch compiles what it is asked to."""
    return True


def replicas(group: Any = None) -> int:
    """How many replicas meet in this group, now."""
    if context.is_local():
        return 1
    if torch.compiler.is_compiling():
        return _link_when_compiled(group)[0]
    link = link_of(group)
    return 1 if link is None else link.size


def realized(*vectors: Tensor) -> Any:
    """The same vectors; compiled code has them in memory, and does not work them out anew in the backward pass."""
    return compiled.realized(*vectors) if torch.compiler.is_compiling() else vectors


def is_alone() -> bool:
    """Whether there is no other replica at all, in whatever group."""
    return not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


def may_move(like: Tensor, renorm: bool) -> Any:
    """Whether moving statistics may move in this pass; compiled, a bool tensor.

    Not in `local_statistics`, nor in the recomputation of a checkpointed block, where renorm needs the record of the first pass.
    """
    if context.is_local():
        return False
    if torch.compiler.is_compiling():
        return context.first_pass_when_compiled(like, renorm)
    first = context.is_first_pass()
    if renorm and not first and not context.is_replayed():
        raise policy.recomputed_renorm("a layer in a checkpoint that keeps no record", policy.RECORD_MOMENTS)
    return first


@torch.no_grad()
def moments(x: Tensor, *, axes: tuple[int, ...] = (1,), mask: Tensor | None = None, group: Any = None) -> Moments:
    """Measures the global batch: one all-reduce of (n, Σx, Σx²) in float64; without float64 one gather of (n, k, s/n, m2).

    group: besides a `policy.Group`, a torch.distributed process group (or, compiled, its name). The channels are on `axes`.
    """
    fold = Fold(axes, x.shape)
    x, mask = fold.fold(x), fold.fold_mask(mask)
    if torch.compiler.is_compiling():
        size, name = (1, "") if context.is_local() else _link_when_compiled(group)
        if not eager.has_float64(x.device):
            return _moments_in_pairs(x, mask, Link(size, name, None) if name else None)
        return compiled.moments(x, mask, size, name)
    return context.found_once(lambda: _measure(x, mask, None if context.is_local() else link_of(group)))


def _measure(x: Tensor, mask: Tensor | None, link: Link | None) -> Moments:
    debug.announce(link, "forward", debug.speaker(), x.shape[1])
    if not eager.has_float64(x.device):
        return _moments_in_pairs(x, mask, link)
    return Moments(*lanes.measured(x, mask, link), 1 if link is None else link.size)


def normalize(
    x: Tensor,
    moments: Moments,
    scale: Tensor,
    offset: Tensor,
    *,
    axes: tuple[int, ...] = (1,),
    epsilon: float,
    mask: Tensor | None = None,
    group: Any = None,
    activation: policy.Activation | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """activation(scale·(x − mean)/√(variance + epsilon) + offset + residual); one all-reduce, in the backward pass."""
    fold = Fold(axes, x.shape)
    folded, mask, residual = fold.fold(x), fold.fold_mask(mask), None if residual is None else fold.fold(residual)
    if moments.count is None:
        return fold.unfold(_with_constants(folded, moments, scale, offset, epsilon, activation, residual))
    alone = moments.replicas == 1
    if torch.compiler.is_compiling():
        name = "" if alone else _link_when_compiled(group)[1]
        return fold.unfold(compiled.normalize(folded, moments, scale, offset, residual, mask, epsilon, activation, name))
    link = None if alone else link_of(group)
    how = How(epsilon, activation, link, kernels_for(folded, mask), debug.speaker())
    return fold.unfold(Normalized.apply(folded, scale, offset, residual, mask, *moments[:3], how))


def _link_when_compiled(group: Any) -> tuple[int, str]:
    return (1, "") if isinstance(group, policy.Alone) else compiled.link_at_trace_time(group)


def _with_constants(
    x: Tensor,
    moments: Moments,
    scale: Tensor,
    offset: Tensor,
    epsilon: float,
    activation: policy.Activation | None,
    residual: Tensor | None,
) -> Tensor:
    """Operators that tracing, export, vmap and jacrev know; their own gradients are right."""
    dtype = arithmetic_dtype(x)
    mean, variance, scale, offset = (v.to(dtype) for v in (moments.mean, moments.variance, scale, offset))
    y = torch.nn.functional.batch_norm(x, mean, variance, scale, offset, False, 0.0, epsilon)
    if residual is not None:
        y = y + residual.to(y.dtype)
    return eager.activated(y, activation)


def _moments_in_pairs(x: Tensor, mask: Tensor | None, link: Link | None) -> Moments:
    """Moments without float64: the mean is a pair (hi, lo)."""
    n, k, s, q = eager.local_moments(x, mask)
    n = n if isinstance(n, Tensor) else torch.full((), n, dtype=torch.int64, device=x.device)
    count = n.to(k.dtype)
    at_least_one = count.clamp_min(1)
    floats = torch.cat([k, s / at_least_one, maths.local_m2(count, s, q, maximum=eager.maximum)])
    # Counts above 2²⁴ are not exact in float32, and an integer's bits in a float payload are a denormal that arithmetic may
    # flush to 0: so the floats travel as the bits of integers.
    payload = torch.cat([n.to(torch.int32)[None], floats.view(torch.int32)])
    rows = payload[None] if link is None else gather(payload, link)
    counts = rows[:, :1]
    ks, rs, m2s = rows[:, 1:].contiguous().view(k.dtype).chunk(3, dim=1)
    _, (hi, lo), variance = maths.merge(
        counts.to(k.dtype),
        ks,
        rs,
        m2s,
        ks.index_select(0, counts[:, 0].argmax()[None]),
        add=lambda v: v.sum(0, keepdim=True),
        maximum=eager.maximum,
        where=torch.where,
    )
    return Moments(counts.sum(), (hi[0], lo[0]), variance[0], 1 if link is None else link.size)
