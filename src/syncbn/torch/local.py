"""`local_statistics`: forward passes that only some replicas run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from syncbn.torch._private import get_obj_in_tls, is_key_in_tls, remove_obj_from_tls, stash_obj_in_tls

_KEY = "syncbn.local_statistics"
# How many `local_statistics` the code that is being compiled has entered. A plain module variable: the compiler can follow it.
_traced_depth = 0


@contextlib.contextmanager
def local_statistics() -> Iterator[None]:
    """Inside, no synchronised layer of this thread communicates, and none updates a moving statistic.

    For a forward pass that some replicas run and others do not: a summary, a trace, a warm-up. Layers in training mode
    normalise with the statistics of this replica's own batch. The backward pass of what ran inside is local too, wherever it is
    called. A checkpointed block that ran inside must be recomputed inside, or have `context_fn=syncbn.checkpoint_contexts`.

    It holds for the thread that enters it, and for the threads in which autograd runs a backward pass that is called inside.
    Other threads, those that are started inside included, train as before.

    Example:
        >>> import torch, syncbn
        >>> layer = syncbn.SyncBatchNorm(3)
        >>> with syncbn.local_statistics():
        ...     y = layer(torch.randn(4, 3))
        >>> layer.running_mean
        tensor([0., 0., 0.])
    """
    global _traced_depth
    if torch.compiler.is_compiling():
        _traced_depth += 1
        try:
            yield
        finally:
            _traced_depth -= 1
        return
    was_local = is_local()
    stash_obj_in_tls(_KEY, True)
    try:
        yield
    finally:
        if not was_local:
            remove_obj_from_tls(_KEY)


def is_local() -> bool:
    """Whether `local_statistics` is in force in this thread, now. Compiled code asks as it runs."""
    return is_key_in_tls(_KEY) and bool(get_obj_in_tls(_KEY))


def is_local_in_graph() -> bool:
    """Whether the code that is being compiled lies in a `local_statistics` of its own."""
    return _traced_depth > 0
