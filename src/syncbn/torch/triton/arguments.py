"""What a launch takes besides tensors and numbers. Imports no Triton: engine code makes these too."""

from __future__ import annotations

from typing import Any, NamedTuple


class Exchange(NamedTuple):
    """Where and how one message is exchanged; made once for a mailbox, a number of channels and a direction.

    mailboxes: the address of the table of mailboxes (peer_exchange.py). rank: this replica's place in it. limit: the bound of a
    wait, a number of looks. tag: which call it is, the same on all replicas.
    """

    mailboxes: Any
    rank: int
    limit: int
    tag: int


class Moving(NamedTuple):
    """Moving statistics that a launch updates: buffers, and the weight of the new value (below 0: 1/batches)."""

    mean: Any
    variance: Any
    batches: Any
    weight: float
