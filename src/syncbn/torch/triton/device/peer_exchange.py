"""How the replicas of one NVLink host exchange messages, inside the kernel that measured them.

Memory-ordering contract
------------------------
Each replica owns one mailbox that all replicas can write; a table names them all. One message is one step of one block of
channels, and a row of 8-byte words. Each word carries 32 bits of the message and, above them, the epoch:

1. The sender stores its row into the slot `epoch mod 2` of every other replica's mailbox, in any order and without a fence.
2. The receiver reads the row (volatile loads, past L1) until every word of it says this epoch. A word is stored and loaded as
   one, so that whoever sees its epoch sees its 32 bits; nothing is asked about the order of two words. So a message goes one way
   through NVLink, where a counter behind a fence goes three.
3. Nobody can be two epochs ahead: to send epoch t + 1 a replica must have received all of epoch t, which this replica sends
   before it reads. A row of parity p is therefore never overwritten while someone may still read it, and two slots do.
4. Rows are merged in the order of the replicas, this replica's own out of registers, by the same program text: all replicas get
   the same bits.

Epochs are counted by the device, since a number from the host would be frozen in a CUDA graph. The wait is bounded by an
iteration count: at the bound the results are NaN, a word in pinned host memory says who was missing, and the mailbox is
poisoned: it neither waits nor sends again (who does not wait could be two epochs ahead), so that the others come to their bound
too. Few programs wait, one a block of channels, so that they cannot keep other kernels, a peer's or their own, from running.

Two tuples travel together here. `peers`: (mailboxes_ptr, limit, tag, rank), the kernel's arguments for an exchange. `state`:
(this replica's mailbox, the epoch, whether the mailbox is poisoned).
"""

from __future__ import annotations

import triton
import triton.language as tl

# How many blocks of how many channels a mailbox has room for.
BLOCKS = tl.constexpr(32)
ROOM = tl.constexpr(256)

# `mailboxes_ptr`, an int64 table: WORLD_SIZE addresses of the replicas' mailboxes, then that of the status word in host memory.
# A mailbox, in units of 8 bytes: epochs [BLOCKS], poison [1], rows [2, WORLD_SIZE, BLOCKS, ROW]. Rows belong to blocks, not to
# channels: layers that cut their channels otherwise must not meet in one row, since only a block's own epochs keep them apart.
POISON = tl.constexpr(32)
ROWS = tl.constexpr(40)
# A row: two values a channel in two halves each, [4, ROOM], then a head: the tag, and n in two halves.
HEAD = tl.constexpr(4 * 256)
ROW = tl.constexpr(4 * 256 + 4)
HALF = tl.constexpr(0xFFFFFFFF)

# What the status word says besides the rank of the replica: `code << 32 | rank`.
ABSENT = tl.constexpr(1)
STRANGER = tl.constexpr(2)


def words(replicas: int) -> int:
    """The length of one mailbox in units of 8 bytes."""
    return int(ROWS.value + 2 * replicas * BLOCKS.value * ROW.value)


def block_channels(channels: int) -> int:
    """Channels that one program exchanges: from the channel count alone, so that every replica cuts alike."""
    block = 64
    while block * BLOCKS.value < channels:
        block *= 2
    return block


@triton.jit
def last_to_arrive(counter, expected):
    """Whether this program is the last of `expected`; all that the others stored before is then visible. Resets the counter."""
    tl.debug_barrier()
    before = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    last = before == expected - 1
    if last:
        tl.store(counter, 0)
    tl.debug_barrier()
    return last


@triton.jit
def mailbox_at(mailboxes_ptr, replica):
    """The mailbox of a replica, as int64 words."""
    return tl.load(mailboxes_ptr + replica).to(tl.pointer_type(tl.int64))


@triton.jit
def row_at(mailbox, epoch, replica, block, WORLD_SIZE: tl.constexpr):
    """The row that a replica writes for a block."""
    return mailbox + ROWS + ((epoch % 2 * WORLD_SIZE + replica) * BLOCKS + block) * ROW


@triton.jit
def begin(peers, block):
    """The state that an exchange starts from, best loaded early."""
    mailboxes_ptr, _, _, rank = peers
    own = mailbox_at(mailboxes_ptr, rank)
    return own, tl.load(own + block) + 1, tl.load(own + POISON) != 0


@triton.jit
def halves(value):
    """The bits of a float64 in two int64 of 32 bits each."""
    bits = value.to(tl.int64, bitcast=True)
    return bits & HALF, (bits >> 32) & HALF


@triton.jit
def joined(low, high):
    """The float64 of two words, their epochs dropped."""
    return ((high << 32) | (low & HALF)).to(tl.float64, bitcast=True)


@triton.jit
def send(peers, state, block, n, a, b, MERGE_C: tl.constexpr, WORLD_SIZE: tl.constexpr):
    """Writes this replica's row into every other mailbox, unless its own is poisoned."""
    mailboxes_ptr, _, tag, rank = peers
    _, epoch, poisoned = state
    # 31 bits of the epoch: it stays positive.
    stamp = (epoch & 0x7FFFFFFF) << 32
    i = tl.arange(0, MERGE_C)
    n_low, n_high = halves(n)
    a_low, a_high = halves(a)
    b_low, b_high = halves(b)
    for replica in range(WORLD_SIZE):
        if (replica != rank) & (poisoned == 0):
            row = row_at(mailbox_at(mailboxes_ptr, replica), epoch, rank, block, WORLD_SIZE)
            tl.store(row + i, stamp | a_low)
            tl.store(row + ROOM + i, stamp | a_high)
            tl.store(row + 2 * ROOM + i, stamp | b_low)
            tl.store(row + 3 * ROOM + i, stamp | b_high)
            tl.store(row + HEAD, stamp | tag.to(tl.int64))
            tl.store(row + HEAD + 1, stamp | n_low)
            tl.store(row + HEAD + 2, stamp | n_high)


@triton.jit
def is_there(row, epoch, MERGE_C: tl.constexpr):
    """Whether all words of a row are of this epoch.

    In a tile of 512 words or more, none of which two threads read: their looks could differ, and they must decide as one.
    """
    stamp = epoch & 0x7FFFFFFF
    r, i = tl.arange(0, 8)[:, None], tl.arange(0, MERGE_C)[None, :]
    # Four lines of values, and of a fifth one the head.
    words = tl.load(row + r * ROOM + i, mask=(r < 4) | ((r == 4) & (i < 3)), other=stamp << 32, volatile=True)
    return tl.min(tl.min(((words >> 32) == stamp).to(tl.int32), 1), 0) != 0


@triton.jit
def receive(peers, state, block, replica, limit, n, a, b, MERGE_C: tl.constexpr, WORLD_SIZE: tl.constexpr):
    """(n, a, b, whether it is sound) of a replica: what it sent, waited for; of this one what is given."""
    mailboxes_ptr, _, tag, rank = peers
    own, epoch, _ = state
    row = row_at(own, epoch, replica, block, WORLD_SIZE)
    mine = replica == rank
    there = is_there(row, epoch, MERGE_C)
    tries = 0
    while (there == 0) & (tries < limit) & (mine == 0):
        there = is_there(row, epoch, MERGE_C)
        tries += 1
    # Behind it every thread sees what one has seen.
    tl.debug_barrier()
    i = tl.arange(0, MERGE_C)
    its_n = joined(tl.load(row + HEAD + 1, volatile=True), tl.load(row + HEAD + 2, volatile=True))
    its_a = joined(tl.load(row + i, volatile=True), tl.load(row + ROOM + i, volatile=True))
    its_b = joined(tl.load(row + 2 * ROOM + i, volatile=True), tl.load(row + 3 * ROOM + i, volatile=True))
    its_tag = tl.load(row + HEAD, volatile=True) & HALF
    sound = mine | (there & (its_tag == tag.to(tl.int64)))
    code = tl.where(there, STRANGER, ABSENT).to(tl.int64)
    # The first reason stays: a poisoned mailbox (limit 0) has none of its own.
    status = tl.load(mailboxes_ptr + WORLD_SIZE).to(tl.pointer_type(tl.int64))
    tl.store(status, (code << 32) | replica, mask=(sound == 0) & (limit > 0))
    tl.store(own + POISON, 1, mask=sound == 0)
    return tl.where(mine, n, its_n), tl.where(mine, a, its_a), tl.where(mine, b, its_b), sound


@triton.jit
def moments(peers, state, block, n, mean, m2, MERGE_C: tl.constexpr, WORLD_SIZE: tl.constexpr):
    """(n, mean, m2) of all replicas by Chan's formula, in the order of the replicas; NaN where one did not come.

    n, the same for all channels, comes in and goes out as [MERGE_C].
    """
    nothing = float("nan")
    limit = peers[1]
    own, epoch, poisoned = state
    mine = tl.max(n, 0)
    send(peers, state, block, mine, mean, m2, MERGE_C, WORLD_SIZE)
    limit = tl.where(poisoned, 0, limit)
    all_sound = poisoned == 0
    n = tl.zeros([MERGE_C], tl.float64)
    all_mean = tl.zeros([MERGE_C], tl.float64)
    all_m2 = tl.zeros([MERGE_C], tl.float64)
    for replica in range(WORLD_SIZE):
        its_n, its_mean, its_m2, sound = receive(peers, state, block, replica, limit, mine, mean, m2, MERGE_C, WORLD_SIZE)
        all_sound = all_sound & sound
        # One bound for all of them, and the first reason stays.
        limit = tl.where(sound, limit, 0)
        d = its_mean - all_mean
        both = n + its_n
        part = its_n / tl.where(both == 0, 1.0, both)
        all_mean += tl.where(its_n == 0, 0.0, d * part)
        all_m2 += tl.where(its_n == 0, 0.0, its_m2 + d * d * n * part)
        n = both
    tl.store(own + block, epoch)
    bad = tl.where(all_sound, 0.0, nothing)
    return n + bad, all_mean + bad, all_m2 + bad


@triton.jit
def sums(peers, state, block, a, b, MERGE_C: tl.constexpr, WORLD_SIZE: tl.constexpr):
    """a and b summed over the replicas, in their order; NaN where one did not come."""
    nothing = float("nan")
    zero = tl.full([], 0.0, tl.float64)
    limit = peers[1]
    own, epoch, poisoned = state
    send(peers, state, block, zero, a, b, MERGE_C, WORLD_SIZE)
    limit = tl.where(poisoned, 0, limit)
    all_sound = poisoned == 0
    all_a = tl.zeros([MERGE_C], tl.float64)
    all_b = tl.zeros([MERGE_C], tl.float64)
    for replica in range(WORLD_SIZE):
        _, its_a, its_b, sound = receive(peers, state, block, replica, limit, zero, a, b, MERGE_C, WORLD_SIZE)
        all_sound = all_sound & sound
        # One bound for all of them, and the first reason stays.
        limit = tl.where(sound, limit, 0)
        all_a += its_a
        all_b += its_b
    tl.store(own + block, epoch)
    bad = tl.where(all_sound, 0.0, nothing)
    return all_a + bad, all_b + bad


@triton.jit(do_not_specialize=["limit", "tag", "rank"])
def exchange_moments_kernel(
    values_ptr,  # float64 [2C + 1]: this replica's mean, variance, count
    out_ptr,  # float64 [2C + 1]: all replicas'
    mailboxes_ptr,  # int64 [WORLD_SIZE + 1]
    limit,
    tag,
    rank,
    C: tl.constexpr,
    MERGE_C: tl.constexpr,
    WORLD_SIZE: tl.constexpr,
):
    """The exchange alone, after arithmetic that other code did."""
    block = tl.program_id(0)
    peers = (mailboxes_ptr, limit, tag, rank)
    state = begin(peers, block)
    c = block * MERGE_C + tl.arange(0, MERGE_C)
    inside = c < C
    mean = tl.load(values_ptr + c, mask=inside, other=0.0)
    variance = tl.load(values_ptr + C + c, mask=inside, other=0.0)
    n = tl.zeros([MERGE_C], tl.float64) + tl.load(values_ptr + 2 * C)
    m2 = tl.where(n == 0, 0.0, variance * n)
    n, mean, m2 = moments(peers, state, block, n, mean, m2, MERGE_C, WORLD_SIZE)
    tl.store(out_ptr + c, mean, mask=inside)
    tl.store(out_ptr + C + c, tl.where(n == 0, 1.0, m2 / tl.where(n == 0, 1.0, n)), mask=inside)
    tl.store(out_ptr + 2 * C + c, n, mask=c == 0)


@triton.jit(do_not_specialize=["limit", "tag", "rank"])
def exchange_sums_kernel(
    values_ptr,  # float64 [2C]: this replica's sums
    out_ptr,  # float64 [2C]: all replicas'
    mailboxes_ptr,  # int64 [WORLD_SIZE + 1]
    limit,
    tag,
    rank,
    C: tl.constexpr,
    MERGE_C: tl.constexpr,
    WORLD_SIZE: tl.constexpr,
):
    """The same for the sums of the backward pass."""
    block = tl.program_id(0)
    peers = (mailboxes_ptr, limit, tag, rank)
    state = begin(peers, block)
    c = block * MERGE_C + tl.arange(0, MERGE_C)
    a = tl.load(values_ptr + c, mask=c < C, other=0.0)
    b = tl.load(values_ptr + C + c, mask=c < C, other=0.0)
    a, b = sums(peers, state, block, a, b, MERGE_C, WORLD_SIZE)
    tl.store(out_ptr + c, a, mask=c < C)
    tl.store(out_ptr + C + c, b, mask=c < C)
