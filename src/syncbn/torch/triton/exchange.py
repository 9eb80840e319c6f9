"""What a launch takes to exchange a message with other replicas. Imports no Triton: peer_memory.py makes it."""

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
