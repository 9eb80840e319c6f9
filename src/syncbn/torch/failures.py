"""What a message between ranks that failed is called, in the error that reaches Python: its layer, and what to do."""

from __future__ import annotations

import sys
import threading
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

RULE = "All ranks must run the same synchronised layers in the same order."
REMEDIES = (
    "Let every rank take the same path; an empty batch is fine. What one rank runs alone needs model.eval(), or belongs in "
    "syncbn.local_statistics(). Ranks that differ in their number of steps need syncbn.EmptySteps."
)
# A batch norm whose name nothing tells; its channels stand beside it.
UNNAMED = "a batch norm"
# Not for the errors of the debug mode itself.
USE_DEBUG = "SYNCBN_DEBUG=1, or syncbn.debug(model), names the rank and the layer."


class _Next(threading.local):
    """The message that this thread sends next: direction, the layer's name, and its input's shape or number of channels."""

    message: tuple[str, str | None, Any] = ("call", None, None)


_next = _Next()
# How many messages each group has noted, by the group's name. The plain errors and the debug mode's count alike.
_numbers: dict[str, int] = {}
# The number of the last message that each group has announced in the debug mode.
announced: dict[str, int] = {}


def sends(direction: str, layer: str | None, size: Any, group: str) -> int:
    """Notes which message comes next in the group of this name. Returns the message's number there, from 1."""
    _next.message = direction, layer, size
    number = _numbers[group] = _numbers.get(group, 0) + 1
    return number


def forget_messages() -> None:
    """Messages count from 1 again: a new default group gives its groups the names of the former one's."""
    _numbers.clear()
    announced.clear()


def message_failed(communicator: Any, error: Exception) -> RuntimeError:
    """The error of a message that its process group could not carry. Raise it from the original one."""
    which = f"message {_numbers.get(communicator.name, 1)} of group {communicator.name!r}"
    return _like(error)(
        f"{RULE} Received: {next_message()}, {which}, failed with {_first_line(error)!r}. Look first for another rank's own "
        f"error. {REMEDIES} {USE_DEBUG}"
    )


def set_up_failed(what: str, error: Exception) -> RuntimeError:
    """The error of a step in which all ranks agree, before their first message. Raise it from the original one."""
    return _like(error)(
        f"{RULE} Received: the first call of a group, in which all ranks {what}, failed with {_first_line(error)!r}. Look "
        f"first for another rank's own error. {REMEDIES} {USE_DEBUG}"
    )


def _like(error: Exception) -> type[RuntimeError]:
    """The original's type where programs may look for it."""
    return type(error) if isinstance(error, dist.DistError | torch.OutOfMemoryError) else RuntimeError


def next_message() -> str:
    """The message that this thread was about to send, in words."""
    direction, layer, size = _next.message
    layer = layer or (name_on_the_stack() if direction == "forward" else None) or UNNAMED
    of_size = "" if size is None else f" ({size} channels)" if isinstance(size, int) else f" (input of shape {tuple(size)})"
    return f"{direction} of {layer}{of_size}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def name_on_the_stack() -> str | None:
    """The path of the innermost module that runs, in the outermost one that has it."""
    running: list[nn.Module] = []
    frame: Any = sys._getframe(1)
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            running.append(module)
        frame = frame.f_back
    for outer in reversed(running):
        for name, module in outer.named_modules():
            if module is running[0] and name:
                return name
    return None
