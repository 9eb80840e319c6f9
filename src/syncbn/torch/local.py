"""`local_statistics`: forward passes that only some replicas run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

# A plain module variable: the compiler guards on it, and recompiles inside `local_statistics`.
_local_depth = 0


@contextlib.contextmanager
def local_statistics() -> Iterator[None]:
    """Inside, no synchronised layer communicates, and no moving statistic is updated.

    For a forward pass that some replicas run and others do not: a summary, a trace, a warm-up. Layers in training mode
    normalise with the statistics of this replica's own batch. The backward pass of what ran inside is local too, wherever it is
    called. A checkpointed block that ran inside must be recomputed inside, or have `context_fn=syncbn.checkpoint_contexts`.

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
