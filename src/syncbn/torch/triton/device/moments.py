"""Moments of the batch in one launch: local sums, the message to the replicas, the merge.

The grid is channel tiles × splits of the positions. Every program accumulates its tiles in float32, in BLOCK_P × BLOCK_C
accumulators. Each accumulator has a pivot of its own, its first value, so that nothing cancels and none waits for another.
Programs store what they found; the last to arrive at a block of channels adds the block's parts in a fixed order and, where there
are replicas, exchanges them (peer_exchange.py). All other programs have left the GPU by then.
"""

from __future__ import annotations

import triton
import triton.language as tl

from syncbn.torch.triton.device import peer_exchange, tiles

# What one program leaves behind, a float32 [C] each: its pivot k, Σ(x − k), Σ(x − k)², and how many values.
PARTS = tl.constexpr(4)


@triton.jit
def accumulate(
    x_ptr,
    mask_ptr,
    c,
    first,
    last,
    A,
    C: tl.constexpr,
    B: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    UNROLL: tl.constexpr,
    STAGES: tl.constexpr,
    MASKED: tl.constexpr,
):
    """(k, s, q, n) of one program, [BLOCK_C] each, from tiles first to last. A pivot is the first value that counts."""
    J = tiles.positions_of(A, B, WIDE)
    s = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    q = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    # n: how many values lie behind each accumulator.
    if MASKED:
        start = first
        n = tl.zeros([BLOCK_P], tl.float32)
        pivot = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    else:
        start = first + 1
        j = tiles.positions(first, BLOCK_P, WIDE)
        n = (j < J).to(tl.float32)
        pivot = tiles.load(x_ptr, j, c, J, C, B, BLOCK_C, EVEN, "")
    for tile in tl.range(start, last, loop_unroll_factor=UNROLL, num_stages=STAGES):
        j = tiles.positions(tile, BLOCK_P, WIDE)
        v = tiles.load(x_ptr, j, c, J, C, B, BLOCK_C, EVEN, "")
        pivot, s, q, n = add(pivot, s, q, n, v, tiles.counted(mask_ptr, j, J, EVEN, MASKED), EVEN, MASKED)
    if EVEN:
        if not MASKED:
            n = tl.zeros([BLOCK_P], tl.float32) + (last - first)
    k, s, q, total = about_one_pivot(pivot, s, q, n)
    return k, s, q, total + tl.zeros([BLOCK_C], tl.float32)


@triton.jit
def add(pivot, s, q, n, v, there, EVEN: tl.constexpr, MASKED: tl.constexpr):
    """(pivot, s, q, n) after one more tile v, of which the values at `there` count. A pivot is the first value that counts."""
    if MASKED:
        pivot = tl.where((n == 0)[:, None], v, pivot)
        v = tl.where(there[:, None], v - pivot, 0.0)
        n += there.to(tl.float32)
    else:
        v -= pivot
        if not EVEN:
            v = tl.where(there[:, None], v, 0.0)
            n += there.to(tl.float32)
    return pivot, s + v, q + v * v, n


@triton.jit
def about_one_pivot(pivot, s, q, n):
    """(k, s, q, n), [BLOCK_C] each but n, from each accumulator's [BLOCK_P, BLOCK_C], n [BLOCK_P]; k: the mean of the pivots."""
    there = n > 0
    # Divided first: a sum could be too large.
    each_pivot = 1.0 / tl.maximum(tl.sum(there.to(tl.float32), 0), 1.0)
    k = tl.sum(tl.where(there[:, None], pivot * each_pivot, 0.0), 0)
    d = tl.where(there[:, None], pivot - k[None, :], 0.0)
    each = n[:, None]
    s, q = tl.reduce((s + each * d, squares_about(q, s, each, d)), 0, tiles.add_pairs)
    return k, s, q, tl.sum(n, 0)


@triton.jit
def squares_about(q, s, n, d):
    """Σ(x − k + d)² from q = Σ(x − k)² and s = Σ(x − k) of n values.

    Squares that are too large stay infinite: infinity less infinity would be NaN.
    """
    return tl.where(q == float("inf"), q, q + d * (2 * s + n * d))


@triton.jit
def merge_parts(parts_ptr, c, J, splits, each, C: tl.constexpr, MERGE_S: tl.constexpr, MERGE_C: tl.constexpr):
    """(n, mean, m2) of this replica in float64, [MERGE_C] each, from what its programs left, MERGE_S of them at a time.

    About a common pivot near the mean: then float32 is enough for the sums, and only the mean itself needs float64. A split
    counted `each` values, the last one the rest of J. Few registers: the whole kernel has as many as its greediest part.
    """
    pivot = tl.load(parts_ptr + c, mask=c < C, other=0.0, cache_modifier=".cg")
    s = tl.zeros([MERGE_S, MERGE_C], tl.float32)
    q = tl.zeros([MERGE_S, MERGE_C], tl.float32)
    for start in tl.range(0, splits, MERGE_S, loop_unroll_factor=2):
        split = start + tl.arange(0, MERGE_S)
        at, there = part_addresses(split, c, splits, C)
        k = tl.load(parts_ptr + at, mask=there, other=0.0, cache_modifier=".cg")
        part_s = tl.load(parts_ptr + at + C, mask=there, other=0.0, cache_modifier=".cg")
        part_q = tl.load(parts_ptr + at + 2 * C, mask=there, other=0.0, cache_modifier=".cg")
        n = tl.minimum(J - tl.minimum(split, splits - 1).to(J.dtype) * each, each).to(tl.float32)[:, None]
        d = tl.where(there, k - pivot[None, :], 0.0)
        s += part_s + n * d
        q += squares_about(part_q, part_s, n, d)
    n = tl.zeros([MERGE_C], tl.float64) + J.to(tl.float64)
    mean, m2 = moments_about(pivot, n, tl.sum(s, 0), tl.sum(q, 0))
    return n, mean, m2


@triton.jit
def merge_masked_parts(parts_ptr, c, splits, C: tl.constexpr, MERGE_S: tl.constexpr, MERGE_C: tl.constexpr):
    """The same where programs say how many values they counted, which may be none: the pivot is the mean of all pivots."""
    row = tl.arange(0, MERGE_S)
    weight = tl.zeros([MERGE_S, MERGE_C], tl.float32)
    for start in range(0, splits, MERGE_S):
        at, there = part_addresses(start + row, c, splits, C)
        weight += tl.load(parts_ptr + at + 3 * C, mask=there, other=0.0, cache_modifier=".cg")
    # Divided first: a sum could be too large.
    each_value = 1.0 / tl.maximum(tl.sum(weight, 0), 1.0)
    weighted = tl.zeros([MERGE_S, MERGE_C], tl.float32)
    for start in range(0, splits, MERGE_S):
        at, there = part_addresses(start + row, c, splits, C)
        n = tl.load(parts_ptr + at + 3 * C, mask=there, other=0.0, cache_modifier=".cg")
        k = tl.load(parts_ptr + at, mask=there, other=0.0, cache_modifier=".cg")
        weighted += n * each_value[None, :] * k
    pivot = tl.sum(weighted, 0)
    s = tl.zeros([MERGE_S, MERGE_C], tl.float32)
    q = tl.zeros([MERGE_S, MERGE_C], tl.float32)
    total = tl.zeros([MERGE_S, MERGE_C], tl.int64)
    for start in range(0, splits, MERGE_S):
        at, there = part_addresses(start + row, c, splits, C)
        k = tl.load(parts_ptr + at, mask=there, other=0.0, cache_modifier=".cg")
        part_s = tl.load(parts_ptr + at + C, mask=there, other=0.0, cache_modifier=".cg")
        part_q = tl.load(parts_ptr + at + 2 * C, mask=there, other=0.0, cache_modifier=".cg")
        n = tl.load(parts_ptr + at + 3 * C, mask=there, other=0.0, cache_modifier=".cg")
        d = tl.where(n > 0, k - pivot[None, :], 0.0)
        s += part_s + n * d
        q += squares_about(part_q, part_s, n, d)
        total += n.to(tl.int64)
    n = tl.sum(total, 0).to(tl.float64)
    mean, m2 = moments_about(pivot, n, tl.sum(s, 0), tl.sum(q, 0))
    return n, mean, m2


@triton.jit
def moments_about(pivot, n, s, q):
    """(mean, m2) in float64 from n, Σ(x − pivot) and Σ(x − pivot)²."""
    # In float32, whose division takes a tenth of the time: its rounding is small beside the standard deviation.
    shift = (s / tl.maximum(n, 1.0).to(tl.float32)).to(tl.float64)
    mean = tl.where(n == 0, 0.0, pivot.to(tl.float64) + shift)
    m2 = q.to(tl.float64) - s.to(tl.float64) * shift
    # Not maximum(m2, 0), which on a GPU turns NaN into 0.
    return mean, tl.where(m2 < 0, 0.0, m2)


@triton.jit
def part_addresses(split, c, splits, C: tl.constexpr):
    """Where the parts of some splits lie, [MERGE_S, MERGE_C], and which are there."""
    at = split[:, None] * (PARTS * C) + c[None, :]
    return at, (split < splits)[:, None] & (c < C)[None, :]


@triton.jit(
    do_not_specialize=["A", "splits", "tiles_per_program", "limit", "tag", "rank"],
    do_not_specialize_on_alignment=tiles.VECTORS,
)
def moments_kernel(
    x_ptr,  # [A, C, B], any float dtype
    mask_ptr,  # uint8 [A, B] where MASKED
    parts_ptr,  # float32 [splits, 4, C], scratch
    arrivals_ptr,  # int32 [blocks], 0 between launches
    stats_ptr,  # float64 [2C + 1]: mean, variance, n; PARTIAL_SUMS: the message, n, Σx, Σx²
    mailboxes_ptr,  # int64 [WORLD_SIZE + 1]: see peer_exchange.py
    A,
    splits,
    tiles_per_program,  # tiles a split
    limit,
    tag,
    rank,
    C: tl.constexpr,
    B: tl.constexpr,
    BLOCK_P: tl.constexpr,  # positions a tile
    BLOCK_C: tl.constexpr,  # channels a tile
    MERGE_C: tl.constexpr,  # channels a block: merged, and exchanged, by one program
    MERGE_S: tl.constexpr,  # splits merged at a time
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    UNROLL: tl.constexpr,  # steps unrolled
    STAGES: tl.constexpr,  # steps whose loads are under way at once, through shared memory; 1: none but the present one
    MASKED: tl.constexpr,
    PDL: tl.constexpr,
    SINGLE_PROGRAM: tl.constexpr,  # one split and one replica: a program has all of its channels
    WORLD_SIZE: tl.constexpr,  # replicas that exchange inside the kernel; 1: none
    PARTIAL_SUMS: tl.constexpr,  # whether replicas will add up what this kernel writes
):
    """mean = Σx/n and variance = Σ(x − mean)²/n over all replicas, and n; (0, 1) where n is 0."""
    if PDL:
        tiles.follow(WORLD_SIZE)
    channel_tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    channel_tile = pid % channel_tiles
    split = pid // channel_tiles
    c = channel_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    peers = (mailboxes_ptr, limit, tag, rank)
    J = tiles.positions_of(A, B, WIDE)
    all_tiles = ((J + BLOCK_P - 1) // BLOCK_P).to(tl.int32)
    first = tl.minimum(split * tiles_per_program, all_tiles)
    last = tl.minimum(first + tiles_per_program, all_tiles)
    k, s, q, n = accumulate(x_ptr, mask_ptr, c, first, last, A, C, B, BLOCK_P, BLOCK_C, EVEN, WIDE, UNROLL, STAGES, MASKED)
    if SINGLE_PROGRAM:
        # The only program of its channels: what it found is all there is.
        if MASKED:
            n = n.to(tl.float64)
        else:
            n = tl.zeros([BLOCK_C], tl.float64) + J.to(tl.float64)
        mean, m2 = moments_about(k, n, s, q)
        write(stats_ptr, c, n, mean, m2, C, PARTIAL_SUMS)
        return
    at = split * (PARTS * C) + c
    inside = c < C
    tl.store(parts_ptr + at, k, mask=inside)
    tl.store(parts_ptr + at + C, s, mask=inside)
    tl.store(parts_ptr + at + 2 * C, q, mask=inside)
    if MASKED:
        tl.store(parts_ptr + at + 3 * C, n, mask=inside)

    block = channel_tile // (MERGE_C // BLOCK_C)
    tiles_here = tl.minimum(MERGE_C // BLOCK_C, channel_tiles - block * (MERGE_C // BLOCK_C))
    if peer_exchange.last_to_arrive(arrivals_ptr + block, tiles_here * splits):
        each = tiles_per_program * BLOCK_P
        merge(parts_ptr, stats_ptr, peers, block, J, splits, each, C, MERGE_C, MERGE_S, MASKED, PDL, WORLD_SIZE, PARTIAL_SUMS)


@triton.jit
def merge(
    parts_ptr,
    stats_ptr,
    peers,
    block,
    J,
    splits,
    each,
    C: tl.constexpr,
    MERGE_C: tl.constexpr,
    MERGE_S: tl.constexpr,
    MASKED: tl.constexpr,
    PDL: tl.constexpr,
    WORLD_SIZE: tl.constexpr,
    PARTIAL_SUMS: tl.constexpr,
):
    """Merges a block's parts, then the replicas', and writes the moments."""
    c = block * MERGE_C + tl.arange(0, MERGE_C)
    if WORLD_SIZE > 1:
        # Early: these loads take as long as those of the parts.
        state = peer_exchange.begin(peers, block)
    if MASKED:
        n, mean, m2 = merge_masked_parts(parts_ptr, c, splits, C, MERGE_S, MERGE_C)
    else:
        n, mean, m2 = merge_parts(parts_ptr, c, J, splits, each, C, MERGE_S, MERGE_C)
    if WORLD_SIZE > 1:
        n, mean, m2 = peer_exchange.moments(peers, state, block, n, mean, m2, MERGE_C, WORLD_SIZE)
        if PDL:
            tiles.lead()
    write(stats_ptr, c, n, mean, m2, C, PARTIAL_SUMS)


@triton.jit
def write(stats_ptr, c, n, mean, m2, C: tl.constexpr, PARTIAL_SUMS: tl.constexpr):
    """What `stats_ptr` points to; NaN stays NaN."""
    if PARTIAL_SUMS:
        tl.store(stats_ptr + c, n, mask=c == 0)
        tl.store(stats_ptr + 1 + c, n * mean, mask=c < C)
        tl.store(stats_ptr + 1 + C + c, m2 + n * mean * mean, mask=c < C)
    else:
        tl.store(stats_ptr + c, mean, mask=c < C)
        tl.store(stats_ptr + C + c, tl.where(n == 0, 1.0, m2 / tl.where(n == 0, 1.0, n)), mask=c < C)
        tl.store(stats_ptr + 2 * C + c, n, mask=c == 0)
