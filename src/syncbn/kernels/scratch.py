"""Scratch that launches share: what programs leave for the last of them, and the counters that find the last.

Launches on one stream run one after the other, so they share; those of another stream, or of a captured graph, which may be
replayed beside anything, have their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from syncbn.kernels.launch import INTERPRETED

# Counters per stream; blocks of channels never are more.
COUNTERS = 8192
# Counters for captured launches, cut off one after the other and never given back.
SLAB = 1 << 22


class Scratch:
    """Of one stream: `parts` float32, grown on demand, and `arrivals` int32, 0 between launches."""

    def __init__(self, device: torch.device):
        self.device = device
        self.parts = torch.empty(1 << 16, dtype=torch.float32, device=device)
        self.arrivals = torch.zeros(COUNTERS, dtype=torch.int32, device=device)

    def grown(self, parts: int) -> Scratch:
        """With room for so many parts."""
        if parts > self.parts.numel():
            self.parts = torch.empty(parts * 2, dtype=torch.float32, device=self.device)
        return self


class Captured:
    """Of one captured launch: parts in the graph's own memory, counters of its own."""

    def __init__(self, device: torch.device, parts: int, blocks: int):
        self.parts = torch.empty(parts, dtype=torch.float32, device=device)
        self.arrivals = counters(device, blocks)


_streams: dict[tuple[int, int], Scratch] = {}
_slabs: dict[int, Tensor] = {}


def counters(device: torch.device, blocks: int) -> Tensor:
    """Fresh counters, 0, that nobody else uses. Where the slab is spent, the graph zeroes some of its own, at each replay."""
    slab = _slabs.get(device.index or 0)
    if slab is None or slab.numel() < blocks:
        # Not kept: a slab that is zeroed inside a graph is zeroed for the launches of this stream alone.
        return torch.zeros(blocks, dtype=torch.int32, device=device)
    _slabs[device.index or 0] = slab[blocks:]
    return slab[:blocks]


def replenish(device: torch.device) -> None:
    """Outside of captures: enough counters for the next ones."""
    slab = _slabs.get(device.index or 0)
    if slab is None or slab.numel() < SLAB // 2:
        _slabs[device.index or 0] = torch.zeros(SLAB, dtype=torch.int32, device=device)


def scratch_for(device: torch.device, stream: int, parts: int, blocks: int) -> Scratch | Captured:
    """What a launch on this stream may use."""
    if not INTERPRETED and torch.cuda.is_current_stream_capturing():
        return Captured(device, parts, blocks)
    key = (device.index or 0, stream)
    found = _streams.get(key)
    if found is None:
        found = _streams[key] = Scratch(device)
    if not INTERPRETED:
        replenish(device)
    return found.grown(parts)
