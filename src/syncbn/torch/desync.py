"""Before each message the ranks tell each other what they are about to say, and a rank that says something else is named."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import torch
import torch.distributed as dist

from syncbn import settings
from syncbn.torch._private import default_store, timeout_of
from syncbn.torch.failures import REMEDIES, RULE, UNNAMED, announced, name_on_the_stack, sends
from syncbn.torch.groups import Communicator

_enabled = settings.debug()
# Whether `debug` has given names. Names that were found on the stack depend on what a rank called first, and are not compared.
_named = False


def debug(model: torch.nn.Module | None = None, enabled: bool = True) -> None:
    """Makes all ranks compare what they are about to send before each message, forward and backward.

    A rank that took another path (skipped a layer, changed an order, is in eval) then raises, on every rank, an error that names
    the layer and what each rank said; a rank that does not come is named after the group's timeout. It costs about half a
    millisecond a message. Compiled code is not checked. The environment variable SYNCBN_DEBUG=1 does the same without names
    that are compared: a layer is then called as in the outermost module that runs it first.

    Args:
        model: its synchronised layers are called by their names in it from now on, and these names are compared.
        enabled: False ends it.

    Example:
        >>> import torch, syncbn
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), syncbn.SyncBatchNorm(3))
        >>> syncbn.debug(model)
        >>> syncbn.debug(enabled=False)
    """
    global _enabled, _named
    _enabled, _named = enabled, enabled and (_named or model is not None)
    for name, module in () if model is None else model.named_modules():
        if hasattr(module, "_name_in_model"):
            module._name_in_model = name or type(module).__name__


def enabled() -> bool:
    """Whether messages are announced."""
    return _enabled


def backward() -> str:
    """What a backward pass is called: one that can be differentiated again sends other messages."""
    return "backward, to be differentiated" if torch.is_grad_enabled() else "backward"


def announce(communicator: Communicator | None, direction: str, layer: str | None, shape: Any) -> None:
    """Notes which message comes. In the debug mode also tells the group, reads what the others say, and raises where they differ.

    Through the group's store: a collective would be paired with whatever collective the other rank is in.
    """
    if communicator is None:
        return
    number = sends(direction, layer, shape, communicator.name)
    if _enabled:
        layer = layer or (name_on_the_stack() if direction == "forward" else None) or UNNAMED
        _compare(communicator, {"call": number, "direction": direction, "channels": shape[1], "layer": layer})


def _compare(communicator: Communicator, said: dict[str, Any]) -> None:
    group, name = communicator.process_group, communicator.name
    rank = dist.get_rank(group)
    number, last = said["call"], announced.get(name)
    announced[name] = number
    store = dist.PrefixStore(f"syncbn/{name}", default_store())
    keys = [f"{number}/{other}" for other in range(communicator.size)]
    timeout = timeout_of(group)
    try:
        store.set(f"{number}/{rank}", json.dumps(said))
        store.wait(keys, timeout)
        read = [json.loads(value) for value in store.multi_get(keys)]
    except Exception as error:
        absent = [dist.get_global_rank(group, other) for other in _absent(store, keys)]
        who = f"nothing from ranks {absent} within {timeout.total_seconds():g} s" if absent else "no answer from the ranks' store"
        raise RuntimeError(
            f"{RULE} Received: {who}, while this one came to the {_described(said)}. Look for what those ranks do instead, or "
            f"raise the timeout of the process group. {REMEDIES}"
        ) from error
    if any(other[key] != said[key] for other in read for key in said if _named or key != "layer"):
        each = "; ".join(f"rank {dist.get_global_rank(group, i)}: {_described(other)}" for i, other in enumerate(read))
        raise RuntimeError(f"{RULE} Received: {each}. {REMEDIES}")
    if last is not None:
        # Every rank has read the last one: all of them have come here.
        store.delete_key(f"{last}/{rank}")


def _absent(store: Any, keys: list[str]) -> list[int]:
    """Who has said nothing; nobody where the store, which lives in one of the ranks, is gone."""
    with contextlib.suppress(Exception):
        return [other for other, key in enumerate(keys) if not store.check([key])]
    return []


def _described(said: dict[str, Any]) -> str:
    return f"{said['direction']} of {said['layer']} (message {said['call']}, {said['channels']} channels)"
