"""Scratch that launches share: what programs leave for the last of them, and the counters that find the last.

Launches on one stream run one after the other, so they share; those of another stream, or of a captured graph, which may be
replayed beside anything, have their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from syncbn.torch._private import is_current_stream_capturing
from syncbn.torch.triton.launch import INTERPRETED, address

# Counters per stream: one a block of channels, two for a barrier.
COUNTERS = 1 << 16
# Counters for captured launches, cut off one after the other and never given back.
SLAB = 1 << 22 if not INTERPRETED else 1 << 10


class Scratch:
    """Of one stream: `parts` float32, grown on demand, and `arrivals` int32, 0 between launches."""

    def __init__(self, device: torch.device):
        self.arrivals = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
        self.grow(1 << 16, device)

    def grow(self, parts: int, device: torch.device) -> None:
        """Makes room for so many parts."""
        self.size = parts
        self.parts = torch.empty(parts, dtype=torch.float32, device=device)
        self.addresses = address(self.parts), address(self.arrivals)


_streams: dict[Any, Scratch] = {}
_slabs: dict[Any, Tensor] = {}
# Slabs that others have replaced. Captured graphs hold addresses in them, so their memory must not be given to other tensors.
_replaced: list[Tensor] = []


def counters(device: torch.device, blocks: int) -> Tensor:
    """Fresh counters, 0, that nobody else uses: cut off a slab that launches outside of captures replenish.

    Where the slab is spent, the graph zeroes some of its own, at each replay.
    """
    slab = _slabs.get(device.index)
    if slab is None or slab.numel() < blocks:
        # A slab made here would be zeroed by the graph, and for the launches of this stream alone.
        return torch.zeros(blocks, dtype=torch.int32, device=device)
    _slabs[device.index] = slab[blocks:]
    return slab[:blocks]


def scratch_for(device: torch.device, stream: int, parts: int, blocks: int) -> tuple[Any, Any]:
    """The addresses of parts and counters that a launch on this stream may use."""
    if not blocks:
        # No program waits for another to arrive.
        return address(None), address(None)
    if not INTERPRETED and is_current_stream_capturing():
        # In the graph's own memory, as any other temporary of a captured launch.
        own, arrivals = torch.empty(parts, dtype=torch.float32, device=device), counters(device, blocks)
        return address(own), address(arrivals)
    key = (device.index, stream)
    found = _streams.get(key)
    if found is None:
        found = _streams[key] = Scratch(device)
    slab = _slabs.get(device.index)
    if slab is None or slab.numel() < SLAB // 2:
        if slab is not None:
            _replaced.append(slab)
        _slabs[device.index] = torch.zeros(SLAB, dtype=torch.int32, device=device)
    if parts > found.size:
        found.grow(2 * parts, device)
    if blocks > COUNTERS:
        # So many that they are not worth keeping.
        return found.addresses[0], address(torch.zeros(blocks, dtype=torch.int32, device=device))
    return found.addresses
