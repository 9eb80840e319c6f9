"""Training with uneven numbers of steps: a rank that has finished goes on with empty batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.join import Join, Joinable, JoinHook


class EmptySteps(Joinable):
    """Runs `step` on an empty batch, on every rank that has finished, for as long as another rank has batches.

    Give it alone to `torch.distributed.algorithms.join.Join`: DistributedDataParallel must not be in Join's list, because the
    collectives with which it shadows the others' cannot be ordered beside those of the layers. Its own gradient reduction
    takes place in the step, on the empty batch too.

    Args:
        step: one whole training step, forward, backward and optimizer; its loss must be finite (not a mean over no samples:
            use `loss.sum() / batch_size` with the usual batch size) and reach all parameters.
        empty: callable that returns the arguments of `step` for a batch of 0 samples.
        device: where Join's own messages live: over NCCL this rank's GPU.
        process_group: the ranks that train together; None for all.

    Example:
        steps = syncbn.EmptySteps(step, lambda: (torch.empty(0, 3),), torch.device("cpu"))
        with Join([steps]):
            for batch in batches:   # as many as this rank happens to have
                steps(batch)
    """

    def __init__(
        self,
        step: Callable[..., Any],
        empty: Callable[[], tuple[Any, ...]],
        device: torch.device | str = "cpu",
        process_group: Any = None,
    ):
        super().__init__()
        self._step, self._empty, self._device = step, empty, torch.device(device)
        self._process_group = process_group

    def __call__(self, *batch: Any) -> Any:
        """One step of a rank that still has batches."""
        Join.notify_join_context(self)
        return self._step(*batch)

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """What a rank that has finished does meanwhile."""
        return _EmptyStep(self)

    @property
    def join_device(self) -> torch.device:
        """Where Join's own messages live."""
        return self._device

    @property
    def join_process_group(self) -> Any:
        """Whom Join asks."""
        return self._process_group or dist.group.WORLD


class _EmptyStep(JoinHook):
    def __init__(self, steps: EmptySteps):
        self._steps = steps

    def main_hook(self) -> None:
        self._steps._step(*self._steps._empty())
