"""Where the replicas of one NVLink host meet inside the kernels: buffers in each other's memory, made once for a group.

Set-up is the only time that the host waits: all ranks say what they have, agree, and map one allocation of each, cut into lanes.
A lane serves launches that run one after the other: the default stream has lane 0, every further stream and every captured
graph takes the next, in the order of the synchronised calls, the same on all ranks. Where a group has no lanes, or they are
spent, its own backend reduces the messages between the same kernels.
"""

from __future__ import annotations

import os
import socket
import time
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn import policy_torch
from syncbn.torch.dispatch import kernels_for
from syncbn.torch.groups import Link, sum_in_place, timeout_of

LANES = 8
MOST_CHANNELS = 8192
# Replicas of one host; a lane's buffer grows with them.
MOST_REPLICAS = 16
# SYNCBN_PEER_MEMORY=0 leaves all messages to the group's backend.
ENABLED = os.environ.get("SYNCBN_PEER_MEMORY", "1") != "0"


class Lane:
    """One lane of one rank: the table that kernels take, and what the host sees of it."""

    def __init__(self, table: Tensor, rank: int, replicas: int, limit: int, status: Tensor, name: str):
        self.table, self.rank, self.replicas, self.limit, self.name = table, rank, replicas, limit, name
        self.said = status.numpy()
        # Whose lane it is travels with every message: a graph on one rank must not meet a stream on another.
        self.captured = False

    def take(self, channels: int, backward: bool) -> Any:
        """What the next launch takes; raises where an earlier one failed. Never waits for the device."""
        said = int(self.said[0])
        if said:
            raise policy_torch.lost_replica(self.name, said >> 32, said & 0xFFFFFFFF)
        # A fused.Lane, plain: a named tuple costs the host three times as much.
        return self.table, self.rank, self.limit, channels * 4 + backward * 2 + self.captured


class Lanes:
    """All lanes of a group on this rank's device, in one allocation."""

    def __init__(self, buffers: list[int], words: int, rank: int, limit: int, name: str, device: torch.device, memory: Any):
        self.memory = memory  # keeps the allocation alive
        self.status = torch.zeros(1, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
        self.free = []
        for lane in range(LANES):
            addresses = [address + lane * words * 8 for address in buffers] + [self.status.data_ptr()]
            table = torch.tensor(addresses, dtype=torch.int64, device=device)
            self.free.append(Lane(table, rank, len(buffers), limit, self.status, name))
        self.taken: dict[Any, Lane | None] = {}

    def of(self, user: Any) -> Lane | None:
        """The lane of a stream or of a captured graph; None where all are taken, which then stays so."""
        if user not in self.taken:
            lane = self.taken[user] = self.free.pop(0) if self.free else None
            if lane is not None:
                lane.captured = isinstance(user, tuple)
        return self.taken[user]


# By the group's name, with the reference to it: after destroy_process_group another one may have the name.
_lanes: dict[str, tuple[Any, Lanes | None]] = {}


def lane_of(link: Link | None, device: torch.device) -> Lane | None:
    """The lane of the current stream, or None where the group's backend carries the messages."""
    if link is None or device.type != "cuda":
        return None
    reference, found = _lanes.get(link.name, (None, None))
    if reference is not link.reference:
        if torch.cuda.is_current_stream_capturing():
            raise policy_torch.first_call_in_capture()
        with torch.cuda.device(device):
            found = _set_up(link, device)
        _lanes[link.name] = link.reference, found
    return None if found is None else found.of(_user(device))


def lane_for(link: Link | None, device: torch.device, channels: int) -> Lane | None:
    """`lane_of`, where it has room for so many channels."""
    return lane_of(link, device) if channels <= MOST_CHANNELS else None


def measured(x: Tensor, mask: Tensor | None, link: Link | None) -> tuple[Tensor, Tensor, Tensor]:
    """(count, mean, variance) of the global batch, float64: one message of (n, Σx, Σx²), or what stands for it in a lane."""
    kernels = kernels_for(x, mask)
    lane = lane_for(link, x.device, x.shape[1])
    if lane is not None:
        return _exchanged_moments(lane, *kernels.moments_of_sums(kernels.local_sums(x, mask)))
    return kernels.moments_of_sums(sum_in_place(kernels.local_sums(x, mask), link))


def _exchanged_moments(lane: Lane, count: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from syncbn.torch.triton.ops import exchange_alone

    channels = mean.numel()
    stats = exchange_alone("moments", torch.cat([mean, variance, count[None]]), lane.take(channels, False), lane.replicas)
    return stats[2 * channels], stats[:channels], stats[channels : 2 * channels]


def exchange_sums(message: Tensor, link: Link | None) -> Tensor:
    """The backward message [2C] of all replicas, by the group's lane or, in place, its backend."""
    channels = message.numel() // 2
    lane = lane_for(link, message.device, channels)
    if lane is None:
        return sum_in_place(message, link)
    from syncbn.torch.triton.ops import exchange_alone

    return exchange_alone("sums", message, lane.take(channels, True), lane.replicas)


def _user(device: torch.device) -> Any:
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    # The streams of one capture become branches that run at once.
    return ("graph", _capture_id(stream), stream) if torch.cuda.is_current_stream_capturing() else stream


def _capture_id(stream: int) -> int:
    """What CUDA calls the capture that this stream is part of."""
    import ctypes

    driver = ctypes.CDLL("libcuda.so.1")
    status, found = ctypes.c_int(), ctypes.c_ulonglong()
    error = driver.cuStreamGetCaptureInfo_v2(ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(found), None, None, None)
    if error:
        raise RuntimeError(f"cuStreamGetCaptureInfo_v2 returned {error}")
    return int(found.value)


def _set_up(link: Link, device: torch.device) -> Lanes | None:
    """Agrees with the other ranks whether to have lanes, and maps them."""
    if not agreed(_said_by_all(link, _facts(link, device))):
        return None
    found: Lanes | None = None
    mine: int | str
    try:
        found, mine = _map(link, device)
    except Exception as error:
        mine = f"{type(error).__name__}: {error}"
    # Where one rank cannot, none does; and one offset serves all buffers.
    said = _said_by_all(link, mine)
    if found is None or len(set(said)) > 1:
        reason = next((one for one in said if isinstance(one, str)), f"allocations at the offsets {said}")
        warnings.warn(policy_torch.no_peer_memory(reason), stacklevel=2)
        return None
    return found


def _said_by_all(link: Link, what: Any) -> list[Any]:
    said: list[Any] = [None] * link.size
    dist.all_gather_object(said, what, group=link.process_group)
    return said


def _map(link: Link, device: torch.device) -> tuple[Lanes, int]:
    """One allocation of every rank, mapped by all; and its offset in what was mapped."""
    import torch.distributed._symmetric_memory as symmetric_memory

    from syncbn.torch.triton.device import peer_exchange as exchange

    words = exchange.words(link.size)
    memory = symmetric_memory.empty(words * LANES, dtype=torch.int64, device=device)
    memory.zero_()
    handle = symmetric_memory.rendezvous(memory, link.name)  # type: ignore[arg-type]
    # A segment that small allocations may share: what is ours begins at an offset.
    offset = memory.data_ptr() - handle.buffer_ptrs[handle.rank]
    assert offset >= 0, "the allocation lies outside of what was mapped"
    limit = calibrated_limit(device, timeout_of(link.process_group).total_seconds())
    torch.cuda.synchronize(device)
    buffers = [address + offset for address in handle.buffer_ptrs]
    return Lanes(buffers, words, handle.rank, limit, link.name, device, (memory, handle)), offset


def _facts(link: Link, device: torch.device) -> dict[str, Any]:
    """What a rank has, for `agreed`. Raises nothing: the others wait for it."""
    from syncbn.torch.dispatch import cuda_kernels

    try:
        kernels = cuda_kernels()
        triton = kernels is not None and kernels.runs_on(device.index)
    except Exception:
        # Raised again by the call that this is for.
        triton = False
    return {
        "host": socket.gethostname(),
        "device": device.index,
        "reaches": [
            i for i in range(torch.cuda.device_count()) if i == device.index or torch.cuda.can_device_access_peer(device.index, i)
        ],
        "backend": link.process_group._get_backend(device).name(),
        "triton": triton,
        "wants": ENABLED,
    }


def agreed(said: list[dict[str, Any]]) -> bool:
    """Whether replicas that said this meet inside the kernels: all of one host, each on a device that all others reach."""
    devices = {one["device"] for one in said}
    return (
        len(said) <= MOST_REPLICAS
        and len({one["host"] for one in said}) == 1
        and len(devices) == len(said)
        and all(one["triton"] and one["wants"] and one["backend"] == "nccl" and devices <= set(one["reaches"]) for one in said)
    )


def calibrated_limit(device: torch.device, seconds: float) -> int:
    """How many looks at a counter take so long: measured by a wait for nobody."""
    from syncbn.torch.triton.device import peer_exchange as exchange
    from syncbn.torch.triton.ops import Lane as Taken
    from syncbn.torch.triton.ops import exchange_alone

    words = exchange.words(2)
    buffers = torch.zeros(2, words, dtype=torch.int64, device=device)
    status = torch.zeros(1, dtype=torch.int64, device="cpu", pin_memory=True)
    table = torch.tensor([buffers[0].data_ptr(), buffers[1].data_ptr(), status.data_ptr()], dtype=torch.int64, device=device)
    message = torch.zeros(2, dtype=torch.float64, device=device)
    exchange_alone("sums", message, Taken(table, 0, 1, 1), 2)
    torch.cuda.synchronize(device)
    buffers.zero_()
    looks = 20_000
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    exchange_alone("sums", message, Taken(table, 0, looks, 1), 2)
    torch.cuda.synchronize(device)
    each = (time.perf_counter() - start) / looks
    return max(1, min(2**31 - 1, int(seconds / each)))
