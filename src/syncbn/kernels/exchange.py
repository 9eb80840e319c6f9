"""What replicas of one NVLink host say to each other, inside the kernel that measured it.

Memory-ordering contract
------------------------
Each replica owns one buffer that all replicas can write; `lane` names them all (`Lane` below lays them out). One message is
one step of one block of channels:

1. The sender writes its values and its tag into its own row of the slot `epoch mod 2` in every replica's buffer. The program
   meets at a barrier; then one thread adds 1 to every replica's arrival counter of that parity with `release` at system
   scope. The barrier makes the other threads' writes happen before the release, and the release is cumulative: whoever sees
   the counter sees the values.
2. The receiver reads its own counter with `acquire` at system scope until all W replicas have added theirs, meets at a
   barrier, and reads the rows past L1 (`.cg`). So every row read is the row of this epoch.
3. Nobody can be two epochs ahead: to send epoch t + 1 a replica must have received all of epoch t, which this replica sends
   before it reads. A row of parity p is therefore never overwritten while someone may still read it, and two slots do.
   Counters are kept per parity: a replica that is one epoch ahead adds to the other one.
4. Rows are merged in the order of the replicas, by the same program text: all replicas get the same bits.

Epochs are counted by the device, since a number from the host would be frozen in a CUDA graph. The wait is bounded by an
iteration count: at the bound the results are NaN, a word in pinned host memory says who was missing, and the lane is
poisoned: it never waits again. Few programs wait, one a block of channels, so that they cannot keep other kernels, a
peer's or their own, from running.
"""

from __future__ import annotations

import triton
import triton.language as tl

# How many blocks of how many channels a lane has room for.
BLOCKS = tl.constexpr(32)
ROOM = tl.constexpr(256)
# Values a channel that a message may hold.
VALUES = tl.constexpr(3)

# `lane`, an int64 table: W addresses of the replicas' buffers, then that of the status word in host memory.
# A buffer, in units of 8 bytes: arrivals [2, BLOCKS], epochs [BLOCKS], poison [1], tags [2, W, BLOCKS],
# rows [2, W, BLOCKS, VALUES, ROOM]. Rows belong to blocks, not to channels: layers that cut their channels otherwise must
# not meet in one row, since only a block's own epochs keep them apart.
EPOCHS = tl.constexpr(2 * 32)
POISON = tl.constexpr(3 * 32)
TAGS = tl.constexpr(3 * 32 + 8)

# What the status word says besides the rank of the replica: `code << 32 | rank`.
ABSENT = tl.constexpr(1)
STRANGER = tl.constexpr(2)


def words(replicas: int) -> int:
    """The length of one lane's buffer in units of 8 bytes."""
    return int(TAGS.value + 2 * replicas * (BLOCKS.value * (1 + VALUES.value * ROOM.value)))


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
def words_at(lane, replica):
    """The buffer of a replica, as int64 words."""
    return tl.load(lane + replica).to(tl.pointer_type(tl.int64))


@triton.jit
def row_at(buffer, parity, replica, block, W: tl.constexpr):
    """The row that a replica writes for a block, as float64."""
    rows = (buffer + TAGS + 2 * W * BLOCKS).to(tl.pointer_type(tl.float64))
    return rows + ((parity * W + replica) * BLOCKS + block) * (VALUES * ROOM)


@triton.jit
def tag_at(buffer, parity, replica, block, W: tl.constexpr):
    """Where a replica says which call its row belongs to."""
    return buffer + TAGS + (parity * W + replica) * BLOCKS + block


@triton.jit
def send(lane, block, a, b, d, epoch, tag, rank, X: tl.constexpr, W: tl.constexpr):
    """Writes this replica's row and tag into every buffer, then says so to each."""
    parity = epoch % 2
    i = tl.arange(0, X)
    for replica in range(W):
        buffer = words_at(lane, replica)
        row = row_at(buffer, parity, rank, block, W)
        tl.store(row + i, a)
        tl.store(row + ROOM + i, b)
        tl.store(row + 2 * ROOM + i, d)
        tl.store(tag_at(buffer, parity, rank, block, W), (epoch << 32) | tag)
    tl.debug_barrier()
    for replica in range(W):
        tl.atomic_add(words_at(lane, replica) + parity * BLOCKS + block, 1, sem="release", scope="sys")


@triton.jit
def receive(lane, block, epoch, limit, tag, rank, W: tl.constexpr):
    """Waits until all rows of this epoch are there; whether they are, and belong to the same call."""
    own = words_at(lane, rank)
    parity = epoch % 2
    arrivals = own + parity * BLOCKS + block
    # This parity's epochs so far, each with W arrivals.
    expected = (epoch + 1) // 2 * W
    seen = tl.atomic_add(arrivals, 0, sem="acquire", scope="sys")
    tries = 0
    while (seen < expected) & (tries < limit):
        seen = tl.atomic_add(arrivals, 0, sem="acquire", scope="sys")
        tries += 1
    tl.debug_barrier()
    sound = seen >= expected
    status = tl.load(lane + W).to(tl.pointer_type(tl.int64))
    for replica in range(W):
        heard = tl.load(tag_at(own, parity, replica, block, W), cache_modifier=".cg")
        code = tl.where((heard >> 32) == epoch, STRANGER, ABSENT).to(tl.int64)
        tl.store(status, (code << 32) | replica, mask=heard != ((epoch << 32) | tag))
        sound = sound & (heard == ((epoch << 32) | tag))
    tl.store(own + POISON, 1, mask=sound == 0)
    return sound


@triton.jit
def moments(lane, block, n, mean, m2, limit, tag, rank, X: tl.constexpr, W: tl.constexpr):
    """(n, mean, m2) of all replicas by Chan's formula, in the order of the replicas; NaN where one did not come."""
    own = words_at(lane, rank)
    epoch = tl.load(own + EPOCHS + block) + 1
    poisoned = tl.load(own + POISON) != 0
    nothing = float("nan")
    send(lane, block, tl.where(poisoned, nothing, n), mean, m2, epoch, tag, rank, X, W)
    sound = receive(lane, block, epoch, tl.where(poisoned, 0, limit), tag, rank, W) & (poisoned == 0)
    n = tl.zeros([X], tl.float64)
    mean = tl.zeros([X], tl.float64)
    m2 = tl.zeros([X], tl.float64)
    for replica in range(W):
        at = row_at(own, epoch % 2, replica, block, W) + tl.arange(0, X)
        more = tl.load(at, cache_modifier=".cg")
        d = tl.load(at + ROOM, cache_modifier=".cg") - mean
        its_m2 = tl.load(at + 2 * ROOM, cache_modifier=".cg")
        both = n + more
        part = more / tl.where(both == 0, 1.0, both)
        mean += tl.where(more == 0, 0.0, d * part)
        m2 += tl.where(more == 0, 0.0, its_m2 + d * d * n * part)
        n = both
    tl.store(own + EPOCHS + block, epoch)
    bad = tl.where(sound, 0.0, nothing)
    return n + bad, mean + bad, m2 + bad


@triton.jit
def sums(lane, block, a, b, limit, tag, rank, X: tl.constexpr, W: tl.constexpr):
    """a and b summed over the replicas, in their order; NaN where one did not come."""
    own = words_at(lane, rank)
    epoch = tl.load(own + EPOCHS + block) + 1
    poisoned = tl.load(own + POISON) != 0
    nothing = float("nan")
    send(lane, block, tl.where(poisoned, nothing, a), b, b, epoch, tag, rank, X, W)
    sound = receive(lane, block, epoch, tl.where(poisoned, 0, limit), tag, rank, W) & (poisoned == 0)
    a = tl.zeros([X], tl.float64)
    b = tl.zeros([X], tl.float64)
    for replica in range(W):
        at = row_at(own, epoch % 2, replica, block, W) + tl.arange(0, X)
        a += tl.load(at, cache_modifier=".cg")
        b += tl.load(at + ROOM, cache_modifier=".cg")
    tl.store(own + EPOCHS + block, epoch)
    bad = tl.where(sound, 0.0, nothing)
    return a + bad, b + bad


@triton.jit(do_not_specialize=["limit", "tag", "rank"])
def exchange_moments_kernel(
    stats,  # float64 [2C + 1]: this replica's mean, variance, count; then everybody's
    lane,  # int64 [W + 1]
    limit,
    tag,
    rank,
    C: tl.constexpr,
    X: tl.constexpr,
    W: tl.constexpr,
):
    """The exchange alone, after arithmetic that other code did. One program: it reads the count before any block writes it."""
    mine = tl.load(stats + 2 * C)
    tl.debug_barrier()
    for block in range((C + X - 1) // X):
        c = block * X + tl.arange(0, X)
        inside = c < C
        mean = tl.load(stats + c, mask=inside, other=0.0)
        variance = tl.load(stats + C + c, mask=inside, other=0.0)
        n = tl.zeros([X], tl.float64) + mine
        n, mean, m2 = moments(lane, block, n, mean, tl.where(n == 0, 0.0, variance * n), limit, tag, rank, X, W)
        tl.store(stats + c, mean, mask=inside)
        tl.store(stats + C + c, tl.where(n == 0, 1.0, m2 / tl.where(n == 0, 1.0, n)), mask=inside)
        tl.store(stats + 2 * C + c, n, mask=c == 0)


@triton.jit(do_not_specialize=["limit", "tag", "rank"])
def exchange_sums_kernel(
    message,  # float64 [2C]: this replica's sums; then everybody's
    lane,  # int64 [W + 1]
    limit,
    tag,
    rank,
    C: tl.constexpr,
    X: tl.constexpr,
    W: tl.constexpr,
):
    """The same for the sums of the backward pass."""
    block = tl.program_id(0)
    c = block * X + tl.arange(0, X)
    a = tl.load(message + c, mask=c < C, other=0.0)
    b = tl.load(message + C + c, mask=c < C, other=0.0)
    a, b = sums(lane, block, a, b, limit, tag, rank, X, W)
    tl.store(message + c, a, mask=c < C)
    tl.store(message + C + c, b, mask=c < C)
