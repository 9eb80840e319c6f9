"""The forward pass in one launch, for one replica and a batch of which all or most fits in registers.

A program loads `REGISTER_TILES` tiles of its channels into registers. It computes the moments and the output from them, so it
reads them once. It reads its other tiles twice. If several programs share a block of channels, there is a barrier between the
moments and the output (barrier.py). Replicas that exchange take two launches (moments.py, gradient_sums.py). In one launch, all
programs would wait for the other replicas.
"""

from __future__ import annotations

import triton
import triton.language as tl

from syncbn.torch.triton.device import barrier, moments, pointwise, tiles

NUMBERS = ["A", "splits", "tiles_per_program", "max_polls"]


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=tiles.VECTORS)
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
    parts_ptr,  # float32 [splits, 4, C] where BARRIER, scratch
    arrivals_ptr,  # int32 [blocks of channels, 2] where BARRIER: see barrier.py
    A,
    splits,  # programs that share a block of channels
    tiles_per_program,  # tiles a split; the last one may have fewer, but at least REGISTER_TILES
    max_polls,
    epsilon,
    weight,  # weight of the new value
    weight_rest,  # what float32 leaves of it
    slope,
    C: tl.constexpr,
    B: tl.constexpr,
    BLOCK_P: tl.constexpr,  # positions a tile
    BLOCK_C: tl.constexpr,
    MERGE_S: tl.constexpr,
    REGISTER_TILES: tl.constexpr,  # tiles that a program keeps in registers
    STAGES: tl.constexpr,  # the same as in moments.py, of the other tiles
    EVEN: tl.constexpr,
    PACKED: tl.constexpr,
    THREADS: tl.constexpr,
    PDL: tl.constexpr,
    MASKED: tl.constexpr,
    SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    UPDATE: tl.constexpr,
    REREAD: tl.constexpr,  # whether a program has other tiles, which it reads twice
    BARRIER: tl.constexpr,  # whether several programs share a block
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
    for t in tl.static_range(REGISTER_TILES):
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
    if REGISTER_TILES == 1 and not BARRIER and not REREAD:
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
        for t in tl.static_range(0 if MASKED else 1, REGISTER_TILES):
            there = tiles.counted(mask_ptr, tiles.positions(first + t, BLOCK_P, False), J, EVEN, MASKED)
            pivot, s, q, n = moments.add(pivot, s, q, n, tiles.widened(x[t], PACKED), there, EVEN, MASKED)
        if REREAD:
            for tile in tl.range(first + REGISTER_TILES, end, num_stages=STAGES):
                j = tiles.positions(tile, BLOCK_P, False)
                v = tiles.load(x_ptr, j, c, J, C, B, BLOCK_C, EVEN, "")
                pivot, s, q, n = moments.add(pivot, s, q, n, v, tiles.counted(mask_ptr, j, J, EVEN, MASKED), EVEN, MASKED)
        if EVEN:
            if not MASKED:
                n += end - first - 1
        k, s, q, total = moments.about_one_pivot(pivot, s, q, n)
    last, abandoned = True, 0
    if BARRIER:
        counters_ptr = arrivals_ptr + 2 * block
        at = parts_ptr + split * (moments.PARTS * C) + c
        tl.store(at, k, mask=inside)
        tl.store(at + C, s, mask=inside)
        tl.store(at + 2 * C, q, mask=inside)
        if MASKED:
            tl.store(at + 3 * C, total + tl.zeros([BLOCK_C], tl.float32), mask=inside)
        complete, last, abandoned = barrier.arrive_and_wait(counters_ptr, split, splits, max_polls)
        if complete == 0:
            barrier.release_counters(counters_ptr, splits, THREADS)
            return
        if MASKED:
            all_n, mean, m2 = moments.merge_masked_parts(parts_ptr, c, splits, C, MERGE_S, BLOCK_C)
        else:
            all_n, mean, m2 = moments.merge_parts(parts_ptr, c, J, splits, tiles_per_program * BLOCK_P, C, MERGE_S, BLOCK_C)
    else:
        all_n = tl.zeros([BLOCK_C], tl.float64) + total.to(tl.float64)
        mean, m2 = moments.moments_about(k, all_n, s, q)
        if REGISTER_TILES == 1 and not REREAD:
            # The mean of all values: an infinite one is torch's too. The variance is NaN.
            mean = tl.where(tl.abs(k) < float("inf"), mean, k.to(tl.float64))
    variance = tl.where(all_n == 0, 1.0, m2 / tl.where(all_n == 0, 1.0, all_n))
    hi, _, _, a, b = pointwise.affine_of(mean, variance, gamma, beta, epsilon)
    out = (y_ptr, hi, a, b, slope)
    for t in tl.static_range(REGISTER_TILES):
        j = tiles.positions(first + t, BLOCK_P, False)
        residual_tile = x[t]
        if RESIDUAL:
            residual_tile = r[t]
        write_output(
            out, tiles.widened(x[t], PACKED), residual_tile, mask_ptr, j, c, J, C, B, BLOCK_C, EVEN, MASKED, ACTIVATION, RESIDUAL
        )
    if REREAD:
        for step in tl.range(first + REGISTER_TILES, end, num_stages=STAGES):
            # Backwards: what was read last is still in L2.
            read_and_write_output(
                out, x_ptr, residual_ptr, mask_ptr, first + REGISTER_TILES + end - 1 - step, c, J,
                C, B, BLOCK_P, BLOCK_C, EVEN, MASKED, ACTIVATION, RESIDUAL,
            )  # fmt: skip
    if BARRIER:
        for tile in range(0, tl.where(abandoned == 0, 0, all_tiles)):
            if (abandoned >> (tile // tiles_per_program)) & 1:
                read_and_write_output(
                    out, x_ptr, residual_ptr, mask_ptr, tile, c, J,
                    C, B, BLOCK_P, BLOCK_C, EVEN, MASKED, ACTIVATION, RESIDUAL,
                )  # fmt: skip
        barrier.release_counters(counters_ptr, splits, THREADS)
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
    residual_tile,
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
    """Writes a tile of y, from x and, where RESIDUAL, what is residual_tile."""
    y_ptr, hi, a, b, slope = out
    if MASKED:
        v = tiles.finite_or_0(v, tiles.load_mask(mask_ptr, j, J, EVEN))
    z = (v - hi[None, :]) * a[None, :] + b[None, :]
    if RESIDUAL:
        z += residual_tile.to(tl.float32)
    tiles.store(y_ptr, pointwise.activate(z, slope, ACTIVATION), j, c, J, C, B, BLOCK_C, EVEN, "")


@triton.jit
def read_and_write_output(
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
    """The same for a tile that is not in registers."""
    j = tiles.positions(tile, BLOCK_P, False)
    v = tiles.load(x_ptr, j, c, J, C, B, BLOCK_C, EVEN, "")
    residual_tile = v
    if RESIDUAL:
        residual_tile = tiles.load(residual_ptr, j, c, J, C, B, BLOCK_C, EVEN, "")
    write_output(out, v, residual_tile, mask_ptr, j, c, J, C, B, BLOCK_C, EVEN, MASKED, ACTIVATION, RESIDUAL)
