"""What a torch forward pass runs inside of: `local_statistics`, or activation checkpointing, which runs it twice."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from syncbn import policy, policy_torch

# A plain module variable: the compiler guards on it, and recompiles inside `local_statistics`.
_local_depth = 0


@contextlib.contextmanager
def local_statistics() -> Iterator[None]:
    """Inside, no synchronised layer communicates and no moving statistic moves.

    For a forward pass that some replicas run and others do not: a summary, a trace, a warm-up. Layers in training mode
    normalise with the statistics of this replica's own batch, and the backward pass of what ran inside is local too, wherever
    it is called. (A checkpointed block that ran inside must be recomputed inside, or have
    `context_fn=syncbn.checkpoint_contexts`.)

    Example:
        >>> import torch, syncbn
        >>> layer = syncbn.SyncBatchNorm(3)
        >>> with syncbn.local_statistics():
        ...     y = layer(torch.randn(4, 3))
        >>> layer.running_mean
        tensor([0., 0., 0.])
    """
    global _local_depth
    _local_depth += 1
    try:
        yield
    finally:
        _local_depth -= 1


def is_local() -> bool:
    """Whether `local_statistics` is in force."""
    return _local_depth > 0


class _Recording:
    """What the layers of a checkpointed block found out in its first pass, in the order of their calls."""

    def __init__(self) -> None:
        self.found: list[Any] = []


class _Replay:
    """The same, handed back in the same order."""

    def __init__(self, recording: _Recording):
        self._rest = iter(recording.found)

    def next(self) -> Any:
        try:
            return next(self._rest)
        except StopIteration:
            raise policy_torch.replayed_too_often() from None


class _Tapes(threading.local):
    """The recordings and replays in force in this thread, the innermost last."""

    def __init__(self) -> None:
        self.stack: list[_Recording | _Replay] = []


_tapes = _Tapes()


def checkpoint_contexts() -> tuple[Any, Any]:
    """For `torch.utils.checkpoint.checkpoint(…, use_reentrant=False, context_fn=syncbn.checkpoint_contexts)`.

    The recomputation then takes the moments that the first pass recorded: it sends no message. Layers with renorm need it,
    because their r and d come from statistics that the first pass has moved.

    Returns:
        A pair of context managers, for the first pass and for the recomputation.
    """
    recording = _Recording()
    # A graph that is retained is recomputed again, from the beginning.
    return _Taped(lambda: recording), _Taped(lambda: _Replay(recording))


class _Taped:
    """A context manager that can be entered again."""

    def __init__(self, make: Callable[[], _Recording | _Replay]):
        self._make = make

    def __enter__(self) -> None:
        _tapes.stack.append(self._make())

    def __exit__(self, *error: object) -> None:
        _tapes.stack.pop()


def found_once(find: Callable[[], Any]) -> Any:
    """find(), or what it returned in the first pass, where a recomputation is given its record."""
    if torch.compiler.is_compiling() or not _tapes.stack:
        return find()
    replayed = [tape.next() for tape in _tapes.stack if isinstance(tape, _Replay)]
    found = replayed[0] if replayed else find()
    for tape in _tapes.stack:
        if isinstance(tape, _Recording):
            tape.found.append(found)
    return found


def is_taped() -> bool:
    """Whether a checkpoint records or replays what the layers find out."""
    return bool(_tapes.stack)


def is_replayed() -> bool:
    """Whether this recomputation is given the record of its first pass."""
    return any(isinstance(tape, _Replay) for tape in _tapes.stack)


def is_first_pass() -> bool:
    """False in the recomputation of a checkpointed block: only that runs a forward pass inside a backward pass."""
    return torch._C._current_graph_task_id() == -1


# In compiled code the question must be asked when the code runs, not when it is traced: a checkpoint may surround it.
_library = torch.library.Library("syncbn", "FRAGMENT")
_library.define("first_pass(Tensor like, bool required) -> Tensor")


def _first_pass(like: Tensor, required: bool) -> Tensor:
    first = is_first_pass()
    if required and not first:
        raise policy.recomputed_renorm("a compiled layer in a checkpoint", policy.RECORD_MOMENTS)
    # On the CPU: a launch less, and compiled code takes it as a number.
    return torch.tensor(first, device="cpu")


_library.impl("first_pass", _first_pass, "CompositeExplicitAutograd")
torch.library.register_fake(
    "syncbn::first_pass", lambda like, required: torch.empty((), dtype=torch.bool, device="cpu"), lib=_library
)


def first_pass_when_compiled(like: Tensor, required: bool) -> Tensor:
    """bool []: whether this is the first pass, asked as the compiled code runs; raises in a recomputation if it must be."""
    return torch.ops.syncbn.first_pass(like, required)
