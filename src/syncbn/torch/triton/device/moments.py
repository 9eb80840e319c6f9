"""Moments of the batch in one launch: local sums, the message to the replicas, the merge.

The grid is channel tiles × splits of the positions. Every program accumulates its share in float32 about pivots of its own:
each of its T·K lanes takes its first value, so that nothing cancels and no lane waits for another. Programs store what they
found; the last to arrive at a block of channels adds the block's parts in a fixed order and, where there are replicas,
exchanges them (exchange.py). All other programs have left the GPU by then.
"""

from __future__ import annotations

import triton
import triton.language as tl

from syncbn.torch.triton.device import peer_exchange as exchange
from syncbn.torch.triton.device import tiles

# What one program leaves behind, a float32 [C] each: its pivot k, Σ(x − k), Σ(x − k)², and how many values.
PARTS = tl.constexpr(4)


@triton.jit
def accumulate(
    x,
    keep,
    c,
    first,
    last,
    A,
    C: tl.constexpr,
    B: tl.constexpr,
    T: tl.constexpr,
    K: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    U: tl.constexpr,
    S: tl.constexpr,
):
    """(k, s, q, n) of one program's share, tiles first to last: k, s, q of shape [K], n a scalar or, masked, [K]."""
    J = tiles.positions_of(A, B, WIDE)
    j = tiles.positions(first, T, WIDE)
    pivot = tiles.load(x, j, c, J, C, B, K, EVEN, "")
    s = tl.zeros([T, K], tl.float32)
    q = tl.zeros([T, K], tl.float32)
    # How many values lie behind each lane.
    n = (j < J).to(tl.float32)
    for tile in tl.range(first + 1, last, loop_unroll_factor=U, num_stages=S):
        j = tiles.positions(tile, T, WIDE)
        v = tiles.load(x, j, c, J, C, B, K, EVEN, "") - pivot
        if not EVEN:
            v = tl.where((j < J)[:, None], v, 0.0)
            n += (j < J).to(tl.float32)
        s += v
        q += v * v
    if EVEN:
        n = tl.zeros([T], tl.float32) + (last - first)
    k, s, q, total = about_one_pivot(pivot, s, q, n)
    return k, s, q, total + tl.zeros([K], tl.float32)


@triton.jit
def accumulate_masked(
    x,
    keep,
    c,
    first,
    last,
    A,
    C: tl.constexpr,
    B: tl.constexpr,
    T: tl.constexpr,
    K: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    U: tl.constexpr,
    S: tl.constexpr,
):
    """The same where a mask says what counts: a lane's pivot is its first value that does."""
    J = tiles.positions_of(A, B, WIDE)
    n = tl.zeros([T], tl.float32)
    pivot = tl.zeros([T, K], tl.float32)
    s = tl.zeros([T, K], tl.float32)
    q = tl.zeros([T, K], tl.float32)
    for tile in tl.range(first, last, loop_unroll_factor=U, num_stages=S):
        j = tiles.positions(tile, T, WIDE)
        kept = tiles.load_kept(keep, j, J, EVEN)
        v = tiles.load(x, j, c, J, C, B, K, EVEN, "")
        pivot = tl.where((n == 0)[:, None], v, pivot)
        v = tl.where(kept[:, None], v - pivot, 0.0)
        n += kept.to(tl.float32)
        s += v
        q += v * v
    k, s, q, total = about_one_pivot(pivot, s, q, n)
    return k, s, q, total + tl.zeros([K], tl.float32)


@triton.jit
def about_one_pivot(pivot, s, q, n):
    """(k, s, q, n) of all lanes, [K] each but n, from each lane's [T, K], n [T]: k is the mean of the pivots."""
    there = n > 0
    lanes = tl.maximum(tl.sum(there.to(tl.float32), 0), 1.0)
    k = tl.sum(tl.where(there[:, None], pivot, 0.0), 0) / lanes
    d = tl.where(there[:, None], pivot - k[None, :], 0.0)
    of_lane = n[:, None]
    return k, tl.sum(s + of_lane * d, 0), tl.sum(q + d * (2 * s + of_lane * d), 0), tl.sum(n, 0)


@triton.jit
def merge_parts(parts, c, J, splits, each, C: tl.constexpr, R: tl.constexpr, X: tl.constexpr):
    """(n, mean, m2) of this replica in float64, [X] each, from what its programs left, R of them at a time.

    About a common pivot near the mean: then float32 is enough for the sums, and only the mean itself needs float64. A split
    counted `each` values, the last one the rest of J. Few registers: the whole kernel has as many as its greediest part.
    """
    pivot = tl.load(parts + c, mask=c < C, other=0.0, cache_modifier=".cg")
    s = tl.zeros([R, X], tl.float32)
    q = tl.zeros([R, X], tl.float32)
    for start in tl.range(0, splits, R, loop_unroll_factor=2):
        split = start + tl.arange(0, R)
        at, there = part_addresses(split, c, splits, C)
        k = tl.load(parts + at, mask=there, other=0.0, cache_modifier=".cg")
        part_s = tl.load(parts + at + C, mask=there, other=0.0, cache_modifier=".cg")
        part_q = tl.load(parts + at + 2 * C, mask=there, other=0.0, cache_modifier=".cg")
        n = tl.minimum(J - tl.minimum(split, splits - 1).to(J.dtype) * each, each).to(tl.float32)[:, None]
        d = tl.where(there, k - pivot[None, :], 0.0)
        s += part_s + n * d
        q += part_q + d * (2 * part_s + n * d)
    n = tl.zeros([X], tl.float64) + J.to(tl.float64)
    mean, m2 = moments_about(pivot, n, tl.sum(s, 0), tl.sum(q, 0))
    return n, mean, m2


@triton.jit
def merge_masked_parts(parts, c, splits, C: tl.constexpr, R: tl.constexpr, X: tl.constexpr):
    """The same where programs say how many values they counted, which may be none: the pivot is the mean of all pivots."""
    row = tl.arange(0, R)
    weight = tl.zeros([R, X], tl.float32)
    weighted = tl.zeros([R, X], tl.float32)
    for start in range(0, splits, R):
        at, there = part_addresses(start + row, c, splits, C)
        n = tl.load(parts + at + 3 * C, mask=there, other=0.0, cache_modifier=".cg")
        k = tl.load(parts + at, mask=there, other=0.0, cache_modifier=".cg")
        weight += n
        weighted += n * k
    pivot = tl.sum(weighted, 0) / tl.maximum(tl.sum(weight, 0), 1.0)
    s = tl.zeros([R, X], tl.float32)
    q = tl.zeros([R, X], tl.float32)
    total = tl.zeros([R, X], tl.int64)
    for start in range(0, splits, R):
        at, there = part_addresses(start + row, c, splits, C)
        k = tl.load(parts + at, mask=there, other=0.0, cache_modifier=".cg")
        part_s = tl.load(parts + at + C, mask=there, other=0.0, cache_modifier=".cg")
        part_q = tl.load(parts + at + 2 * C, mask=there, other=0.0, cache_modifier=".cg")
        n = tl.load(parts + at + 3 * C, mask=there, other=0.0, cache_modifier=".cg")
        d = tl.where(n > 0, k - pivot[None, :], 0.0)
        s += part_s + n * d
        q += part_q + d * (2 * part_s + n * d)
        total += n.to(tl.int64)
    n = tl.sum(total, 0).to(tl.float64)
    mean, m2 = moments_about(pivot, n, tl.sum(s, 0), tl.sum(q, 0))
    return n, mean, m2


@triton.jit
def moments_about(pivot, n, s, q):
    """(mean, m2) in float64 from n, Σ(x − pivot) and Σ(x − pivot)²."""
    at_least_one = tl.maximum(n, 1.0)
    wide = s.to(tl.float64)
    mean = tl.where(n == 0, 0.0, pivot.to(tl.float64) + wide / at_least_one)
    m2 = q.to(tl.float64) - wide * wide / at_least_one
    # Not maximum(m2, 0), which on a GPU turns NaN into 0.
    return mean, tl.where(m2 < 0, 0.0, m2)


@triton.jit
def part_addresses(split, c, splits, C: tl.constexpr):
    """Where the parts of some splits lie, [R, X], and which are there."""
    at = split[:, None] * (PARTS * C) + c[None, :]
    return at, (split < splits)[:, None] & (c < C)[None, :]


@triton.jit(do_not_specialize=["A", "splits", "share", "limit", "tag", "rank"], do_not_specialize_on_alignment=["keep", "stats"])
def moments_kernel(
    x,  # [A, C, B], any float dtype
    keep,  # uint8 [A, B] where MASKED
    parts,  # float32 [splits, 4, C], scratch
    arrivals,  # int32 [blocks], 0 between launches
    stats,  # float64 [2C + 1]: mean, variance, n; SENT: the message, n, Σx, Σx²
    lane,  # int64 [W + 1]: see exchange.py
    A,
    splits,
    share,  # tiles a split
    limit,
    tag,
    rank,
    C: tl.constexpr,
    B: tl.constexpr,
    T: tl.constexpr,  # positions a tile
    K: tl.constexpr,  # channels a tile
    X: tl.constexpr,  # channels a block: merged, and exchanged, by one program
    R: tl.constexpr,  # splits merged at a time
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    U: tl.constexpr,  # steps unrolled
    S: tl.constexpr,  # steps whose loads are under way at once, through shared memory; 1: none but the present one
    MASKED: tl.constexpr,
    PDL: tl.constexpr,
    ALONE: tl.constexpr,  # one split and one replica: a program has all of its channels
    W: tl.constexpr,  # replicas that exchange inside the kernel; 1: none
    SENT: tl.constexpr,  # whether replicas will add up what this kernel writes
):
    """mean = Σx/n and variance = Σ(x − mean)²/n over all replicas, and n; (0, 1) where n is 0."""
    if PDL:
        tiles.follow(W)
    channel_tiles: tl.constexpr = (C + K - 1) // K
    pid = tl.program_id(0)
    channel_tile = pid % channel_tiles
    split = pid // channel_tiles
    c = channel_tile * K + tl.arange(0, K)
    J = tiles.positions_of(A, B, WIDE)
    all_tiles = ((J + T - 1) // T).to(tl.int32)
    first = tl.minimum(split * share, all_tiles)
    last = tl.minimum(first + share, all_tiles)
    if MASKED:
        k, s, q, n = accumulate_masked(x, keep, c, first, last, A, C, B, T, K, EVEN, WIDE, U, S)
    else:
        k, s, q, n = accumulate(x, keep, c, first, last, A, C, B, T, K, EVEN, WIDE, U, S)
    if ALONE:
        # The only program of its channels: what it found is all there is.
        if MASKED:
            n = n.to(tl.float64)
        else:
            n = tl.zeros([K], tl.float64) + J.to(tl.float64)
        mean, m2 = moments_about(k, n, s, q)
        write(stats, c, n, mean, m2, C, SENT)
        return
    at = split * (PARTS * C) + c
    inside = c < C
    tl.store(parts + at, k, mask=inside)
    tl.store(parts + at + C, s, mask=inside)
    tl.store(parts + at + 2 * C, q, mask=inside)
    if MASKED:
        tl.store(parts + at + 3 * C, n, mask=inside)

    block = channel_tile // (X // K)
    tiles_here = tl.minimum(X // K, channel_tiles - block * (X // K))
    if exchange.last_to_arrive(arrivals + block, tiles_here * splits):
        finish(parts, stats, lane, block, J, splits, share * T, limit, tag, rank, C, X, R, MASKED, PDL, W, SENT)


@triton.jit
def finish(
    parts,
    stats,
    lane,
    block,
    J,
    splits,
    each,
    limit,
    tag,
    rank,
    C: tl.constexpr,
    X: tl.constexpr,
    R: tl.constexpr,
    MASKED: tl.constexpr,
    PDL: tl.constexpr,
    W: tl.constexpr,
    SENT: tl.constexpr,
):
    """Merges a block's parts, then the replicas', and writes the moments."""
    c = block * X + tl.arange(0, X)
    if W > 1:
        # Early: these loads take as long as those of the parts.
        own, epoch, poisoned = exchange.begin(lane, block, rank)
    if MASKED:
        n, mean, m2 = merge_masked_parts(parts, c, splits, C, R, X)
    else:
        n, mean, m2 = merge_parts(parts, c, J, splits, each, C, R, X)
    if W > 1:
        n, mean, m2 = exchange.moments(lane, own, epoch, poisoned, block, n, mean, m2, limit, tag, rank, X, W)
        if PDL:
            tiles.lead()
    write(stats, c, n, mean, m2, C, SENT)


@triton.jit
def write(stats, c, n, mean, m2, C: tl.constexpr, SENT: tl.constexpr):
    """What `stats` holds; NaN stays NaN."""
    if SENT:
        tl.store(stats + c, n, mask=c == 0)
        tl.store(stats + 1 + c, n * mean, mask=c < C)
        tl.store(stats + 1 + C + c, m2 + n * mean * mean, mask=c < C)
    else:
        tl.store(stats + c, mean, mask=c < C)
        tl.store(stats + C + c, tl.where(n == 0, 1.0, m2 / tl.where(n == 0, 1.0, n)), mask=c < C)
        tl.store(stats + 2 * C + c, n, mask=c == 0)
