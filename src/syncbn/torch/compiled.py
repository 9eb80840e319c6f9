"""What the compiler sees of a normalization: plain operators, which it fuses, and operators of ours where replicas exchange.

Those mutate, by their signatures, one state tensor. The compiler then drops none of them (an empty replica has no use
for the sums, but the others wait for them), takes no two for one, and keeps their order, which must be the same on every rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from syncbn.groups import Activation, Local
from syncbn.torch import reference, transport
from syncbn.torch._private import CHANGES_INPUTS_IN_BOTH_PASSES, preserve_version_counter, resolve_process_group
from syncbn.torch.failures import sends
from syncbn.torch.groups import AVAILABLE, Communicator, GroupMoments, communicator_of, communicator_over, warn_if_not_joined
from syncbn.torch.local import is_local, is_local_in_graph
from syncbn.torch.reference import Normalization, saved_for_backward
from syncbn.torch.transport import global_moments, global_sums

# What an error calls a layer here: a graph keeps no name.
COMPILED_LAYER = "a compiled layer"
# One for all groups: the order of exchanges of different groups must be the same everywhere too. Nothing is ever written to it.
# An ordinary tensor also where inference mode imports this module: others have no version.
with torch.inference_mode(False):
    _state = torch.zeros((), dtype=torch.int64, device="cpu")
    # What backward passes change.
    _backward_state = _state if CHANGES_INPUTS_IN_BOTH_PASSES else _state.clone()


def _versions_of(state: Tensor) -> tuple[Any, Any]:
    """Context managers: one leaves a state at its version less 1, one at its version."""
    before = preserve_version_counter(state)
    state.zero_()
    return before, preserve_version_counter(state)


_versions = {state: _versions_of(state) for state in {_state, _backward_state}}


def _changed_by_nothing(state: Tensor, argument: Tensor) -> Any:
    """Leaves a state at its version. Backward passes have saved it, and would take the messages since for a change of it.

    A graph may give a copy of the state as the argument. It then writes the copy back, and that counts as one change.
    """
    return _versions[state][argument.data_ptr() == state.data_ptr()]


@torch.compiler.assume_constant_result
def communicator_at_trace_time(group: Any) -> tuple[int, str]:
    """(size, name), or (1, ""): constants of the graph that is being compiled. A process group comes in by its name."""
    communicator = communicator_of(resolve_process_group(group) if isinstance(group, str) else group)
    return (1, "") if communicator is None else (communicator.size, communicator.name)


def communicator_when_compiled(group: Any) -> tuple[int, str]:
    """The same, where the group may also be that of a single process, or there is none yet."""
    if isinstance(group, Local) or is_local_in_graph():
        return 1, ""
    # The compiler sees the question, and compiles anew once there is a process group.
    if not AVAILABLE or dist.GroupMember.WORLD is None:
        _warn_at_trace_time(group)
        return 1, ""
    return communicator_at_trace_time(group)


_warn_at_trace_time = torch.compiler.assume_constant_result(warn_if_not_joined)


class CompiledGroup(NamedTuple):
    """What compiled code holds of a communicator: its name, and whether this pass was local, bool [] on the CPU.

    Of one replica "" and None. Compiled code asks for `local_statistics` as it runs: the compiler's guards hold for all threads.
    about: where moments are about a value of each channel, that value and the mean of what deviates from it, float32 [C].
    """

    name: str = ""
    was_local: Tensor | None = None
    about: tuple[Tensor, Tensor] | None = None


# A second library of the same name as in checkpoint.py: fragments of one.
_library = torch.library.Library("syncbn", "FRAGMENT")
_library.define("batch_moments(Tensor x, Tensor? mask, Tensor(a!) state, str group) -> (Tensor, Tensor)")
_library.define("gather(Tensor v, Tensor(a!) state, int size, str group) -> (Tensor, Tensor)")
_library.define("exchange_sums(Tensor(a!) message, Tensor was_local, Tensor(b!) state, str group) -> ()")
_library.define("materialize(Tensor(a!) v) -> ()")


def _batch_moments(x: Tensor, mask: Tensor | None, state: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """float64 [2C + 1], mean, variance and count of x over the replicas; and whether over this one alone.

    Memory order: what was enqueued on the current stream before has been written when x is read; what is enqueued there after
    sees the moments of all replicas. Nothing is said about other streams, and the host waits for nobody.
    """
    local = is_local()
    if not local:
        sends("forward", COMPILED_LAYER, x.shape, group)
    with _changed_by_nothing(_state, state):
        count, mean, variance = global_moments(x, mask, None if local else _communicator_named(group))
        return torch.cat([mean, variance, count[None]]), torch.tensor(local, device="cpu")


def _gather(v: Tensor, state: Tensor, size: int, group: str) -> tuple[Tensor, Tensor]:
    """[size, n], every replica's v [n] in the order of ranks; and whether the others' are 0, as if they were empty."""
    local = is_local()
    if not local:
        sends("forward", COMPILED_LAYER, v.numel() // 3, group)
    with _changed_by_nothing(_state, state):
        rows = torch.nn.functional.pad(v[None], (0, 0, 0, size - 1)) if local else transport.gather(v, _communicator_named(group))
        return rows, torch.tensor(local, device="cpu")


def _exchange_sums(message: Tensor, was_local: Tensor, state: Tensor, group: str) -> None:
    """message, now the sum of every replica's, float64 [2C], unless the forward pass was local. Memory order: as above."""
    with _changed_by_nothing(_backward_state, state):
        if was_local:
            return
        sends("backward", COMPILED_LAYER, message.numel() // 2, group)
        reduced = global_sums(message, _communicator_named(group))
        if reduced is not message:
            message.copy_(reduced)


def _communicator_named(group: str) -> Communicator:
    return communicator_over(resolve_process_group(group))


def _with_flag(v: Tensor) -> tuple[Tensor, Tensor]:
    return v, torch.empty((), dtype=torch.bool, device="cpu")


for _name, _function, _fake in (
    (
        "batch_moments",
        _batch_moments,
        lambda x, mask, state, group: _with_flag(x.new_empty(2 * x.shape[1] + 1, dtype=torch.float64)),
    ),
    ("gather", _gather, lambda v, state, size, group: _with_flag(v.new_empty(size, v.shape[0]))),
    ("exchange_sums", _exchange_sums, lambda message, was_local, state, group: None),
    ("materialize", lambda v: None, lambda v: None),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"syncbn::{_name}", _fake, lib=_library)


def _is_about_a_value(x: Tensor, mask: Tensor | None, group: str) -> bool:
    """Whether moments are about a value of each channel: on a GPU, with one replica, nothing compiles to fewer passes."""
    return x.is_cuda and not group and mask is None and x.dtype != torch.float64 and reference.count(x, None) > 1


def _by_batch_norm(x: Tensor, epsilon: float) -> bool:
    """Whether torch's own operator normalises, as it does for channels last: decision 9 says why."""
    return x.stride(1) == 1 and epsilon != 0


def _value_of_each_channel(x: Tensor) -> Tensor:
    """[C] float32, out of the middle of the batch, where no padding is: about it sums lose little at a large mean."""
    middle: Any = (x.shape[0] // 2, slice(None), *(size // 2 for size in x.shape[2:]))
    k = x[middle].detach().to(torch.float32)
    if x.stride(1) == 1:
        return k
    # A strided view is one of memory, so the compiler must write k there. It would otherwise read k out of x, and make two
    # kernels of the moments and the output.
    return k.clone().as_strided(k.shape, (1,))


def _deviation(x: Tensor, k: Tensor) -> Tensor:
    """x − k in float32."""
    return x.to(torch.float32) - k.view(-1, *[1] * (x.dim() - 2))


def _moments_about_a_value(x: Tensor) -> GroupMoments:
    """The moments of one replica."""
    k = _value_of_each_channel(x)
    # What batch_norm is decomposed into, so that it is done once.
    variance, mean = torch.var_mean(_deviation(x, k), [0, *range(2, x.dim())], correction=0, keepdim=True)
    variance, mean = variance.flatten(), mean.flatten()
    count = torch.full((), reference.count(x, None), dtype=torch.float32, device=x.device)
    return GroupMoments(count, mean + k, variance, communicator=CompiledGroup(about=(k, mean)))


def moments(x: Tensor, mask: Tensor | None, size: int, group: str) -> GroupMoments:
    """The global batch's, of `size` replicas."""
    if group:
        stats, was_local = torch.ops.syncbn.batch_moments(x, mask, _state, group)
        mean, variance, count = stats.split([x.shape[1], x.shape[1], 1])
        return GroupMoments(count[0], mean, variance, size, communicator=CompiledGroup(group, was_local))
    if _is_about_a_value(x, mask, group):
        return _moments_about_a_value(x)
    return GroupMoments(*reference.moments_of_sums(reference.local_sums(x, mask)), communicator=CompiledGroup())


def gather(v: Tensor, size: int, group: str) -> tuple[Tensor, CompiledGroup]:
    """[size, n]: every replica's v [n]; and the group."""
    if not group:
        return v[None], CompiledGroup()
    rows, was_local = torch.ops.syncbn.gather(v, _state, size, group)
    return rows, CompiledGroup(group, was_local)


def _narrowed(x: Tensor, norm: Normalization) -> Normalization:
    """On a GPU the moments in float32, the mean as a pair, in memory.

    The compiler computes vectors anew for each element they apply to; in float64 that would cost more than all the rest.
    """
    if not x.is_cuda or x.dtype == torch.float64 or norm.variance.dtype != torch.float64:
        return norm
    hi = norm.mean.to(torch.float32)
    hi, lo, variance = materialize(hi, (norm.mean - hi).to(torch.float32), norm.variance.to(torch.float32))
    # Not by `_replace`, which torch 2.6 does not compile.
    return Normalization(hi, variance, norm.scale, norm.offset, norm.epsilon, norm.activation, lo)


def materialize(*vectors: Tensor) -> Any:
    """The same vectors, in memory: the compiler works them out anew neither for each element nor in the backward pass."""
    rows = torch.stack(vectors)
    torch.ops.syncbn.materialize(rows)
    return rows.unbind()


def normalize(
    x: Tensor,
    moments: GroupMoments,
    scale: Tensor,
    offset: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    epsilon: float,
    activation: Activation | None,
) -> Tensor:
    """activation(scale·x_hat + offset + residual)."""
    group, was_local, about = moments.communicator
    if about is not None and _by_batch_norm(x, epsilon):
        y = torch.nn.functional.batch_norm(_deviation(x, about[0]), None, None, scale, offset, True, 0.0, epsilon)
        return reference.activated(y if residual is None else y + residual, activation).to(x.dtype)
    mean, mean_lo = about or (moments.mean, moments.mean_lo)
    if residual is x:
        # An autograd function that is compiled takes no tensor twice.
        residual = residual.view_as(residual)
    norm = Normalization(mean, moments.variance, scale, offset, epsilon, activation, mean_lo)
    mean, variance, _, _, _, _, mean_lo = _narrowed(x, norm)
    name, slope = (None, 0.0) if activation is None else tuple(activation)
    # The state is an argument: torch 2.6 confuses tensors that are not with the sizes of a dynamic shape.
    state = _backward_state if group else None
    given = (scale, offset, residual, mask, moments.count, mean, mean_lo, variance, was_local, state)
    return _Normalized.apply(x, *given, epsilon, name, slope, group)


class _Normalized(Function):
    """As autograd.Normalized, for the compiler: constants in place of objects, and no second derivative."""

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
        was_local: Tensor | None,
        state: Tensor | None,
        epsilon: float,
        activation: str | None,
        slope: float,
        group: str,
    ) -> Tensor:
        """y."""
        chosen = None if activation is None else Activation(activation, slope)
        norm = Normalization(mean, variance, scale, offset, epsilon, chosen, mean_lo)
        y = reference.normalize(x, norm, residual)
        saved = saved_for_backward(norm, y, residual)
        ctx.has_lo, ctx.has_mask, ctx.has_saved = mean_lo is not None, mask is not None, saved is not None
        ctx.residual_dtype = None if residual is None else residual.dtype
        optional = (was_local, state, mean_lo, mask, saved)
        ctx.save_for_backward(x, scale, offset, count, mean, variance, *[v for v in optional if v is not None])
        ctx.epsilon, ctx.activation, ctx.group = epsilon, chosen, group
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        """As `Normalized.backward`."""
        x, scale, offset, count, mean, variance, *optional = ctx.saved_tensors
        # Not by `pop`: what is unpacked here is a tuple for the compiler of torch 2.6.
        was_local, state, *optional = optional if ctx.group else (None, None, *optional)
        mean_lo = optional[0] if ctx.has_lo else None
        mask = optional[int(ctx.has_lo)] if ctx.has_mask else None
        saved = optional[-1] if ctx.has_saved else None
        norm = Normalization(mean, variance, scale, offset, ctx.epsilon, ctx.activation, mean_lo)
        dz, doffset, dscale = reference.local_gradients(dy, x, norm, saved)
        sums: tuple[Tensor, ...] = (scale.to(doffset.dtype) * doffset, scale.to(dscale.dtype) * dscale)
        if ctx.group:
            message = torch.cat(sums).to(torch.float64)
            torch.ops.syncbn.exchange_sums(message, was_local, state, ctx.group)
            total = message.to(doffset.dtype)
            if total.dtype != message.dtype:
                # For the same reason as in `_narrowed`.
                torch.ops.syncbn.materialize(total)
            sums = total.chunk(2)
        dx = reference.input_gradient_of(dz, x, mask, norm, count, *sums)
        dresidual = None if ctx.residual_dtype is None else dz.to(ctx.residual_dtype)
        return dx, dscale.to(scale.dtype), doffset.to(scale.dtype), dresidual, *[None] * 11
