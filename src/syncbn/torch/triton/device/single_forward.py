"""The forward pass in one launch, for one replica and a batch that registers hold, or hold most of.

A program keeps `HELD` tiles of its channels in registers, from the sums to the output, so it reads them once. It reads its other
tiles twice. If a block of channels has several programs, they meet between the sums and the output (meeting.py). Replicas that
exchange take two launches (moments.py, gradient_sums.py): here all programs would wait for the peers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from syncbn.torch.triton.device import meeting, moments, pointwise, tiles

# May lie anywhere, as a parameter in a flat buffer does; tensors must be aligned for wide loads.
VECTORS = [
    "mask_ptr",
    "stats_ptr",
    "scale_ptr",
    "offset_ptr",
    "moving_mean_ptr",
    "moving_variance_ptr",
    "batches_ptr",
]
NUMBERS = ["A", "splits", "tiles_per_program", "patience"]


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=VECTORS)
def forward_kernel(
    x_ptr,  # [A, C, B], any float dtype
    y_ptr,  # [A, C, B], the same
    residual_ptr,  # [A, C, B] where RESIDUAL
    mask_ptr,  # uint8 [A, B] where MASKED
    stats_ptr,  # float64 [2C + 1], written: mean, variance, n
    scale_ptr,  # [C] where SCALE, any float dtype
    offset_ptr,  # [C] where SCALE
    moving_mean_ptr,  # [C] where UPDATE
    moving_variance_ptr,  # [C] where UPDATE
    batches_ptr,  # int64 [1] where UPDATE: updates so far
    parts_ptr,  # float32 [splits, 4, C] where MEETING, scratch
    arrivals_ptr,  # int32 [blocks of channels, 2] where MEETING: see meeting.py
    A,
    splits,  # programs that share a block of channels
    tiles_per_program,  # tiles a split; the last one may have fewer, but at least HELD
    patience,
    epsilon,
    weight,  # weight of the new value
    weight_rest,  # what float32 leaves of it
    slope,
    C: tl.constexpr,
    B: tl.constexpr,
    BLOCK_P: tl.constexpr,  # positions a tile
    BLOCK_C: tl.constexpr,
    MERGE_S: tl.constexpr,
    HELD: tl.constexpr,  # tiles that a program holds
    STAGES: tl.constexpr,  # the same as in moments.py, of tiles that it does not hold
    EVEN: tl.constexpr,
    PACKED: tl.constexpr,
    THREADS: tl.constexpr,
    PDL: tl.constexpr,
    MASKED: tl.constexpr,
    SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    UPDATE: tl.constexpr,
    REST: tl.constexpr,  # whether a program has tiles that it does not hold
    MEETING: tl.constexpr,  # whether programs share a block
):
    """y = activation(scale·(x − mean)·rstd + offset + residual), the moments, the moving statistics."""
    if PDL:
        tiles.follow(1)
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    block, split = pid % blocks, pid // blocks
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    J = A * B
    all_tiles = (J + BLOCK_P - 1) // BLOCK_P
    first = split * tiles_per_program
    end = tl.minimum(first + tiles_per_program, all_tiles)
    x, r = (), ()
    for t in tl.static_range(HELD):
        j = tiles.positions(first + t, BLOCK_P, False)
        x = x + (tiles.load_narrow(x_ptr, j, c, J, C, B, BLOCK_C, EVEN, ""),)
        if RESIDUAL:
            # Early: it takes as long as x.
            r = r + (tiles.load_narrow(residual_ptr, j, c, J, C, B, BLOCK_C, EVEN, ""),)
    # Early too.
    gamma, beta = pointwise.load_affine(scale_ptr, offset_ptr, c, C, SCALE)
    if UPDATE:
        old = (tl.load(moving_mean_ptr + c, mask=inside, other=0.0), tl.load(moving_variance_ptr + c, mask=inside, other=0.0))
        batches = tl.load(batches_ptr + c, mask=c == 0, other=0)
    if HELD == 1 and not MEETING and not REST:
        # All that there is: about its mean, with fewer registers than pivots take.
        v = tiles.widened(x[0], PACKED)
        there = tiles.counted(mask_ptr, tl.arange(0, BLOCK_P), J, EVEN, MASKED)
        total = tl.sum(there.to(tl.int32), 0) if MASKED else J
        # Divided first: a sum could be too large.
        part = v * (1.0 / tl.maximum(total, 1).to(tl.float32))
        if MASKED:
            part = tl.where(there[:, None], part, 0.0)
        k = tl.sum(part, 0)
        d = v - k[None, :]
        if MASKED or not EVEN:
            d = tl.where(there[:, None], d, 0.0)
        s, q = tl.sum(d, 0), tl.sum(d * d, 0)
    else:
        s = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        q = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        if MASKED:
            n = tl.zeros([BLOCK_P], tl.float32)
            pivot = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        else:
            n = (tiles.positions(first, BLOCK_P, False) < J).to(tl.float32)
            pivot = tiles.widened(x[0], PACKED)
        for t in tl.static_range(0 if MASKED else 1, HELD):
            there = tiles.counted(mask_ptr, tiles.positions(first + t, BLOCK_P, False), J, EVEN, MASKED)
            pivot, s, q, n = moments.add(pivot, s, q, n, tiles.widened(x[t], PACKED), there, EVEN, MASKED)
        if REST:
            for tile in tl.range(first + HELD, end, num_stages=STAGES):
                j = tiles.positions(tile, BLOCK_P, False)
                v = tiles.load(x_ptr, j, c, J, C, B, BLOCK_C, EVEN, "")
                pivot, s, q, n = moments.add(pivot, s, q, n, v, tiles.counted(mask_ptr, j, J, EVEN, MASKED), EVEN, MASKED)
        if EVEN:
            if not MASKED:
                n += end - first - 1
        k, s, q, total = moments.about_one_pivot(pivot, s, q, n)
    last, left = True, 0
    if MEETING:
        counters_ptr = arrivals_ptr + 2 * block
        at = parts_ptr + split * (moments.PARTS * C) + c
        tl.store(at, k, mask=inside)
        tl.store(at + C, s, mask=inside)
        tl.store(at + 2 * C, q, mask=inside)
        if MASKED:
            tl.store(at + 3 * C, total + tl.zeros([BLOCK_C], tl.float32), mask=inside)
        together, last, left = meeting.meet(counters_ptr, split, splits, patience)
        if together == 0:
            meeting.part(counters_ptr, splits, THREADS)
            return
        if MASKED:
            all_n, mean, m2 = moments.merge_masked_parts(parts_ptr, c, splits, C, MERGE_S, BLOCK_C)
        else:
            all_n, mean, m2 = moments.merge_parts(parts_ptr, c, J, splits, tiles_per_program * BLOCK_P, C, MERGE_S, BLOCK_C)
    else:
        all_n = tl.zeros([BLOCK_C], tl.float64) + total.to(tl.float64)
        mean, m2 = moments.moments_about(k, all_n, s, q)
        if HELD == 1 and not REST:
            # The mean of all values: an infinite one is torch's too. The variance is NaN.
            mean = tl.where(tl.abs(k) < float("inf"), mean, k.to(tl.float64))
    variance = tl.where(all_n == 0, 1.0, m2 / tl.where(all_n == 0, 1.0, all_n))
    hi, _, _, a, b = pointwise.affine_of(mean, variance, gamma, beta, epsilon)
    out = (y_ptr, hi, a, b, slope)
    for t in tl.static_range(HELD):
        j = tiles.positions(first + t, BLOCK_P, False)
        added = x[t]
        if RESIDUAL:
            added = r[t]
        write_output(
            out, tiles.widened(x[t], PACKED), added, mask_ptr, j, c, J, C, B, BLOCK_C, EVEN, MASKED, ACTIVATION, RESIDUAL
        )
    if REST:
        for step in tl.range(first + HELD, end, num_stages=STAGES):
            # Backwards: what was read last is still in L2.
            write_output_of(
                out, x_ptr, residual_ptr, mask_ptr, first + HELD + end - 1 - step, c, J,
                C, B, BLOCK_P, BLOCK_C, EVEN, MASKED, ACTIVATION, RESIDUAL,
            )  # fmt: skip
    if MEETING:
        for tile in range(0, tl.where(left == 0, 0, all_tiles)):
            if (left >> (tile // tiles_per_program)) & 1:
                write_output_of(
                    out, x_ptr, residual_ptr, mask_ptr, tile, c, J,
                    C, B, BLOCK_P, BLOCK_C, EVEN, MASKED, ACTIVATION, RESIDUAL,
                )  # fmt: skip
        meeting.part(counters_ptr, splits, THREADS)
    if last:
        moments.write(stats_ptr, c, all_n, mean, m2, C, False)
        if UPDATE:
            wide_weight = tl.full([], 0.0, tl.float64) + weight + weight_rest
            updated = c < tl.where(all_n != 0, C, 0)
            pointwise.store_moving(old, mean, variance, all_n, moving_mean_ptr, moving_variance_ptr, wide_weight, c, updated)
            tl.store(batches_ptr + c, batches + (all_n != 0).to(tl.int64), mask=c == 0)


@triton.jit
def write_output(
    out,
    v,
    added,
    mask_ptr,
    j,
    c,
    J,
    C: tl.constexpr,
    B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EVEN: tl.constexpr,
    MASKED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """Writes a tile of y, from x and, where RESIDUAL, what is added."""
    y_ptr, hi, a, b, slope = out
    if MASKED:
        v = tiles.finite_or_0(v, tiles.load_mask(mask_ptr, j, J, EVEN))
    z = (v - hi[None, :]) * a[None, :] + b[None, :]
    if RESIDUAL:
        z += added.to(tl.float32)
    tiles.store(y_ptr, pointwise.activate(z, slope, ACTIVATION), j, c, J, C, B, BLOCK_C, EVEN, "")


@triton.jit
def write_output_of(
    out,
    x_ptr,
    residual_ptr,
    mask_ptr,
    tile,
    c,
    J,
    C: tl.constexpr,
    B: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EVEN: tl.constexpr,
    MASKED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """The same of a tile that is not held."""
    j = tiles.positions(tile, BLOCK_P, False)
    v = tiles.load(x_ptr, j, c, J, C, B, BLOCK_C, EVEN, "")
    added = v
    if RESIDUAL:
        added = tiles.load(residual_ptr, j, c, J, C, B, BLOCK_C, EVEN, "")
    write_output(out, v, added, mask_ptr, j, c, J, C, B, BLOCK_C, EVEN, MASKED, ACTIVATION, RESIDUAL)
