"""Peer memory: the replicas of one NVLink host exchange messages inside the kernels, by buffers in each other's memory.

Such a buffer is a mailbox. Set-up is the only time that the host waits: all ranks say what they have, agree, and map one
allocation of each, cut into mailboxes. A mailbox serves launches that run one after the other: the default stream has mailbox 0,
every further stream and every captured graph takes the next, in the order of the synchronised calls, the same on all ranks.
Where a group has no mailboxes, or they are spent, its own backend reduces the messages between the same kernels.
"""

from __future__ import annotations

import socket
import time
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn import settings
from syncbn.torch import dispatch
from syncbn.torch._private import (
    backend_name,
    current_raw_stream,
    is_current_stream_capturing,
    symmetric_empty,
    symmetric_rendezvous,
    timeout_of,
)
from syncbn.torch.failures import REMEDIES, RULE, USE_DEBUG, next_message, set_up_failed
from syncbn.torch.groups import Communicator
from syncbn.torch.triton.exchange import Exchange

MAILBOXES = 8
MOST_CHANNELS = 8192
# Replicas of one host; a mailbox grows with them.
MOST_REPLICAS = 16
ENABLED = settings.peer_memory()


class Mailbox:
    """One mailbox of one rank: the table of addresses that kernels take, and what the host sees of it."""

    def __init__(self, table: Tensor, rank: int, replicas: int, limit: int, status: Tensor, name: str):
        self.table, self.rank, self.replicas, self.limit, self.name = table, rank, replicas, limit, name
        self.status = status.numpy()
        # Whose mailbox it is travels with every message: a graph on one rank must not meet a stream on another.
        self.captured = False
        self._exchanges: dict[int, Exchange] = {}

    def exchange(self, channels: int, backward: bool) -> Exchange:
        """What the next launch takes; raises where an earlier one failed. Never waits for the device."""
        status = int(self.status[0])
        if status:
            raise lost_replica(self.name, status >> 32, status & 0xFFFFFFFF)
        tag = channels * 4 + backward * 2 + self.captured
        found = self._exchanges.get(tag)
        if found is None:
            found = self._exchanges[tag] = Exchange(self.table.data_ptr(), self.rank, self.limit, tag)
        return found


def lost_replica(group: str, code: int, rank: int) -> RuntimeError:
    """The error of a wait inside a kernel that ended at its bound (code 1), or with a message of another call."""
    what = "did not come in time" if code == 1 else "sent the message of another call"
    return RuntimeError(
        f"{RULE} Received: in group {group!r} rank {rank} {what}, before the {next_message()}; what depended on it is NaN. Look "
        f"first for that rank's own error. {REMEDIES} {USE_DEBUG} If the rank is merely slow, raise the process group's timeout. "
        "Then start again: the group's buffers are not used any more."
    )


class Mailboxes:
    """All mailboxes of a group on this rank's device, in one allocation."""

    def __init__(self, buffers: list[int], words: int, rank: int, limit: int, name: str, device: torch.device, memory: Any):
        self.memory = memory  # keeps the allocation alive
        self.status = torch.zeros(1, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
        self.free = []
        for i in range(MAILBOXES):
            addresses = [address + i * words * 8 for address in buffers] + [self.status.data_ptr()]
            table = torch.tensor(addresses, dtype=torch.int64, device=device)
            self.free.append(Mailbox(table, rank, len(buffers), limit, self.status, name))
        self.taken: dict[Any, Mailbox | None] = {}

    def of(self, user: Any) -> Mailbox | None:
        """The mailbox of a stream or of a captured graph; None where all are taken, which then stays so."""
        if user not in self.taken:
            mailbox = self.taken[user] = self.free.pop(0) if self.free else None
            if mailbox is not None:
                mailbox.captured = isinstance(user, tuple)
        return self.taken[user]


# By the group's name, with the reference to it: after destroy_process_group another one may have the name.
_mailboxes: dict[str, tuple[Any, Mailboxes | None]] = {}


def mailbox_of(communicator: Communicator | None, device: torch.device) -> Mailbox | None:
    """The mailbox of the current stream, or None where the group's backend carries the messages."""
    if communicator is None or device.type != "cuda":
        return None
    reference, found = _mailboxes.get(communicator.name, (None, None))
    if reference is not communicator.reference:
        if is_current_stream_capturing():
            raise RuntimeError(
                "The first synchronised call of a group must not be captured: it sets up the memory for the exchange. "
                "Received: a call while a CUDA graph is captured. Run one step before the capture, on every rank."
            )
        with torch.cuda.device(device):
            found = _set_up(communicator, device)
        _mailboxes[communicator.name] = communicator.reference, found
    return None if found is None else found.of(_user(device))


def mailbox_for(communicator: Communicator | None, device: torch.device, channels: int) -> Mailbox | None:
    """`mailbox_of`, where it has room for so many channels."""
    return mailbox_of(communicator, device) if channels <= MOST_CHANNELS else None


def _user(device: torch.device) -> Any:
    stream = current_raw_stream(device.index)
    # The streams of one capture become branches that run at once.
    return ("graph", _capture_id(stream), stream) if is_current_stream_capturing() else stream


def _capture_id(stream: int) -> int:
    """What CUDA calls the capture that this stream is part of."""
    import ctypes

    driver = ctypes.CDLL("libcuda.so.1")
    status, found = ctypes.c_int(), ctypes.c_ulonglong()
    error = driver.cuStreamGetCaptureInfo_v2(ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(found), None, None, None)
    if error:
        raise RuntimeError(f"cuStreamGetCaptureInfo_v2 returned {error}")
    return int(found.value)


def _set_up(communicator: Communicator, device: torch.device) -> Mailboxes | None:
    """Agrees with the other ranks whether to have mailboxes, and maps them."""
    facts = _said_by_all(communicator, _facts(communicator, device))
    if not agreed(facts):
        errors = [one["error"] for one in facts if one["error"]]
        if errors:
            _warn(errors[0])
        return None
    found: Mailboxes | None = None
    mine: int | str
    try:
        found, mine = _map(communicator, device)
    except Exception as error:
        mine = f"{type(error).__name__}: {error}"
    # Where one rank cannot, none does; and one offset serves all buffers.
    said = _said_by_all(communicator, mine)
    if found is None or len(set(said)) > 1:
        _warn(next((one for one in said if isinstance(one, str)), f"allocations at the offsets {said}"))
        return None
    return found


def _warn(reason: str) -> None:
    warnings.warn(
        "The replicas of this host cannot map each other's memory; their messages go by the process group instead. "
        f"Received: {reason}. SYNCBN_PEER_MEMORY=0, on every rank, does not try.",
        stacklevel=2,
    )


def _said_by_all(communicator: Communicator, what: Any) -> list[Any]:
    said: list[Any] = [None] * communicator.size
    group = communicator.process_group
    try:
        dist.all_gather_object(said, what, group=group)
    except RuntimeError as error:
        raise set_up_failed("agree on its mailboxes", error) from error
    return said


def _map(communicator: Communicator, device: torch.device) -> tuple[Mailboxes, int]:
    """One allocation of every rank, mapped by all; and its offset in what was mapped."""
    from syncbn.torch.triton.device.peer_exchange import words

    size = words(communicator.size)
    memory = symmetric_empty(size * MAILBOXES, dtype=torch.int64, device=device)
    memory.zero_()
    handle = symmetric_rendezvous(memory, communicator.name)
    # A segment that small allocations may share: what is ours begins at an offset.
    offset = memory.data_ptr() - handle.buffer_ptrs[handle.rank]
    assert offset >= 0, "the allocation lies outside of what was mapped"
    limit = calibrated_limit(device, timeout_of(communicator.process_group).total_seconds())
    torch.cuda.synchronize(device)
    buffers = [address + offset for address in handle.buffer_ptrs]
    return Mailboxes(buffers, size, handle.rank, limit, communicator.name, device, (memory, handle)), offset


def _facts(communicator: Communicator, device: torch.device) -> dict[str, Any]:
    """What a rank has, for `agreed`. Raises nothing: the others wait for it."""
    facts = {"host": "", "device": device.index, "reaches": [], "backend": "", "triton": False, "wants": ENABLED, "error": ""}
    try:
        reaches = [
            i for i in range(torch.cuda.device_count()) if i == device.index or torch.cuda.can_device_access_peer(device.index, i)
        ]
        kernels = dispatch.cuda_kernels()
        facts |= {
            "host": socket.gethostname(),
            "reaches": reaches,
            "backend": backend_name(communicator.process_group, device),
            "triton": kernels is not None and kernels.runs_on(device.index),
        }
    except Exception as error:
        facts["error"] = f"{type(error).__name__}: {error}"
    return facts


def agreed(said: list[dict[str, Any]]) -> bool:
    """Whether replicas that said this exchange inside the kernels: all of one host, each on a device that all others reach."""
    devices = {one["device"] for one in said}
    return (
        len(said) <= MOST_REPLICAS
        and len({one["host"] for one in said}) == 1
        and len(devices) == len(said)
        and all(one["triton"] and one["wants"] and one["backend"] == "nccl" and devices <= set(one["reaches"]) for one in said)
    )


def calibrated_limit(device: torch.device, seconds: float) -> int:
    """How many looks at a mailbox take so long: measured by a wait for nobody."""
    from syncbn.torch.triton.device.peer_exchange import words
    from syncbn.torch.triton.ops import exchange_values

    buffers = torch.zeros(2, words(2), dtype=torch.int64, device=device)
    status = torch.zeros(1, dtype=torch.int64, device="cpu", pin_memory=True)
    table = torch.tensor([buffers[0].data_ptr(), buffers[1].data_ptr(), status.data_ptr()], dtype=torch.int64, device=device)
    message = torch.zeros(2, dtype=torch.float64, device=device)
    exchange_values("sums", message, Exchange(table.data_ptr(), 0, 1, 1), 2)
    torch.cuda.synchronize(device)
    buffers.zero_()
    looks = 20_000
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    exchange_values("sums", message, Exchange(table.data_ptr(), 0, looks, 1), 2)
    torch.cuda.synchronize(device)
    each = (time.perf_counter() - start) / looks
    return max(1, min(2**31 - 1, int(seconds / each)))
