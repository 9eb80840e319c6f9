"""Before each message the ranks tell each other what they are about to say, and a rank that says something else is named."""

from __future__ import annotations

import json
import os

import torch
import torch.distributed as dist

from syncbn import policy_torch
from syncbn.torch.groups import Link, timeout_of

_enabled = os.environ.get("SYNCBN_DEBUG", "0") not in ("", "0")
# How many messages each group has announced.
_announced: dict[str, int] = {}
_speaker = "a layer without a name"


def debug(model: torch.nn.Module | None = None, enabled: bool = True) -> None:
    """Makes all ranks compare what they are about to send before each message, forward and backward.

    A rank that took another path (skipped a layer, changed an order, is in eval) then raises, on every rank, an error that names
    the layer and what each rank said; a rank that does not come is named after the group's timeout. It costs about half a
    millisecond a message. The same as the environment variable SYNCBN_DEBUG=1, but the layers of `model` get their names.
    Compiled code is not checked.

    Args:
        model: its synchronised layers are called by their names in it from now on.
        enabled: False ends it.

    Example:
        >>> import torch, syncbn
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), syncbn.SyncBatchNorm(3))
        >>> syncbn.debug(model)
        >>> syncbn.debug(enabled=False)
    """
    global _enabled
    _enabled = enabled
    for name, module in () if model is None else model.named_modules():
        if hasattr(module, "_name_in_model"):
            module._name_in_model = name or type(module).__name__


def speak_as(name: str | None) -> None:
    """Whose messages come next."""
    global _speaker
    _speaker = name or "a layer without a name"


def speaker() -> str:
    """Whose messages these are."""
    return _speaker


def enabled() -> bool:
    """Whether messages are announced."""
    return _enabled


def backward() -> str:
    """What a backward pass is called: one that can be differentiated again sends other messages."""
    return "backward, to be differentiated" if torch.is_grad_enabled() else "backward"


def announce(link: Link | None, direction: str, layer: str, channels: int, training: bool = True) -> None:
    """Tells the group what comes, hears what the others say, and raises where they differ.

    Through the group's store: a collective would meet whatever collective the other rank is in.
    """
    if link is None or not _enabled:
        return
    group, rank = link.process_group, dist.get_rank(link.process_group)
    number = _announced[link.name] = _announced.get(link.name, -1) + 1
    store = dist.PrefixStore(f"syncbn/{link.name}", dist.distributed_c10d._get_default_store())
    said = {"direction": direction, "layer": layer, "call": number, "channels": channels, "training": training}
    store.set(f"{number}/{rank}", json.dumps(said))
    keys = [f"{number}/{other}" for other in range(link.size)]
    timeout = timeout_of(group)
    try:
        store.wait(keys, timeout)
    except Exception as error:
        absent = [dist.get_global_rank(group, other) for other, key in enumerate(keys) if not store.check([key])]
        raise policy_torch.absent_ranks(said, absent, timeout.total_seconds()) from error
    heard = [json.loads(value) for value in store.multi_get(keys)]
    if any(other != said for other in heard):
        raise policy_torch.ranks_differ({dist.get_global_rank(group, i): other for i, other in enumerate(heard)})
    if number:
        # Every rank has read the last one: all of them have come here.
        store.delete_key(f"{number - 1}/{rank}")
