"""Activation checkpointing, which runs a forward pass twice: what the first pass recorded is replayed in the second.

Here too: when moving statistics are updated, which depends on it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from syncbn.torch._private import current_graph_task_id, is_in_selective_checkpoint, is_recomputing, outside_selective_checkpoints
from syncbn.torch.local import is_local, is_local_in_graph
from syncbn.validation import check_renorm_not_recomputed

T = TypeVar("T")

# The two causes, which look alike from inside.
RECOMPUTATION = "a checkpoint that keeps no record, or in the backward pass of an autograd function of your own"


class _Recording:
    """What the layers of a checkpointed block measured in its first pass, in the order of their calls."""

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
            raise RuntimeError(
                "A checkpointed block must call the same layers in its recomputation as in its first pass. Received: more calls "
                "than were recorded. Make the block depend on its arguments alone."
            ) from None


class _Contexts(threading.local):
    """The recordings and replays in force in this thread, the innermost last."""

    def __init__(self) -> None:
        self.stack: list[_Recording | _Replay] = []


_contexts = _Contexts()


def checkpoint_contexts() -> tuple[Any, Any]:
    """For `torch.utils.checkpoint.checkpoint(…, use_reentrant=False, context_fn=syncbn.checkpoint_contexts)`.

    The recomputation then takes the moments that the first pass recorded: it sends no message. Layers with renorm need it,
    because their r and d come from statistics that the first pass has moved.

    Returns:
        A pair of context managers, for the first pass and for the recomputation.
    """
    recording = _Recording()
    # A graph that is retained is recomputed again, from the beginning.
    return _Context(lambda: recording), _Context(lambda: _Replay(recording))


class _Context:
    """A context manager that can be entered again."""

    def __init__(self, make: Callable[[], _Recording | _Replay]):
        self._make = make

    def __enter__(self) -> None:
        _contexts.stack.append(self._make())

    def __exit__(self, *error: object) -> None:
        _contexts.stack.pop()


def record_or_replay(find: Callable[[], Any]) -> Any:
    """find(), or what it returned in the first pass, where a recomputation is given its record."""
    if torch.compiler.is_compiling() or not _contexts.stack:
        return find()
    replayed = [context.next() for context in _contexts.stack if isinstance(context, _Replay)]
    found = replayed[0] if replayed else find()
    for context in _contexts.stack:
        if isinstance(context, _Recording):
            context.found.append(found)
    return found


def hidden_from_selective_checkpoints(verb: Callable[..., T]) -> Callable[..., T]:
    """The same function, whose operators a selective checkpoint does not see.

    Such a checkpoint counts operators, and hands what it kept of the first pass to those of the recomputation in their order.
    But a recomputation of ours runs fewer, because it updates no statistics. And an all-reduce changes its message in place.
    """

    @functools.wraps(verb)
    def hidden(*arguments: Any, **named: Any) -> T:
        if torch.compiler.is_compiling() or not is_in_selective_checkpoint():
            return verb(*arguments, **named)
        with outside_selective_checkpoints():
            return verb(*arguments, **named)

    return hidden


def is_recording_or_replaying() -> bool:
    """Whether a checkpoint records or replays what the layers measure."""
    return bool(_contexts.stack)


def is_replaying() -> bool:
    """Whether this recomputation is given the record of its first pass."""
    return any(isinstance(context, _Replay) for context in _contexts.stack)


# In compiled code the question must be asked when the code runs, not when it is traced: a checkpoint may surround it.
_library = torch.library.Library("syncbn", "FRAGMENT")
_library.define("may_update(Tensor like, bool renorm) -> Tensor")


def _may_update(like: Tensor, renorm: bool) -> Tensor:
    may_update = not is_local()
    if may_update and is_recomputing():
        check_renorm_not_recomputed(renorm, f"a compiled layer in {RECOMPUTATION}")
        may_update = False
    # On the CPU: a launch less, and compiled code takes it as a number.
    return torch.tensor(may_update, device="cpu")


_library.impl("may_update", _may_update, "CompositeExplicitAutograd")
torch.library.register_fake(
    "syncbn::may_update", lambda like, renorm: torch.empty((), dtype=torch.bool, device="cpu"), lib=_library
)


def may_update_when_compiled(like: Tensor, renorm: bool) -> Tensor:
    """bool []: `should_update_now`, asked as the compiled code runs. Such code keeps no record."""
    return torch.ops.syncbn.may_update(like, renorm)


def should_update_statistics(like: Tensor, renorm: bool) -> Any:
    """Whether moving statistics may be updated in this pass; compiled, a bool tensor.

    Not in `local_statistics`, nor in the recomputation of a checkpointed block, where renorm needs the record of the first pass.
    """
    if torch.compiler.is_compiling():
        return False if is_local_in_graph() else may_update_when_compiled(like, renorm)
    return should_update_now(renorm)


def should_update_now(renorm: bool) -> bool:
    """The same, of code that is not compiled."""
    if is_local() or (_contexts.stack and is_replaying()):
        return False
    if current_graph_task_id() == -1:
        # The usual case, told by one call: no backward pass runs.
        return True
    recomputed = is_recomputing()
    check_renorm_not_recomputed(renorm and recomputed, f"a layer in {RECOMPUTATION}")
    return not recomputed
