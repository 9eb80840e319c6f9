"""Sums of the backward pass in one launch: local sums, the message to the replicas, the coefficients of the input gradient.

With g = dy·activation'(z), x_hat = (x − mean)·rstd: doffset = Σg and dscale = Σg·x_hat are this replica's own; over all
replicas Σscale·g and Σscale·g·x_hat make dx = scale·rstd·g − rstd·(Σscale·g + x_hat·Σscale·g·x_hat)/n. The launch has the
form of moments.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from syncbn.torch.triton.device import peer_exchange, pointwise, tiles


@triton.jit(
    do_not_specialize=["A", "splits", "tiles_per_program", "limit", "tag", "rank"],
    do_not_specialize_on_alignment=tiles.VECTORS,
)
def sums_kernel(
    x_ptr,  # [A, C, B], any float dtype
    dy_ptr,  # [A, C, B]
    saved_ptr,  # [A, C, B]: the output (relu, leaky_relu) or the residual (silu) where RESIDUAL
    mask_ptr,  # uint8 [A, B] where MASKED
    stats_ptr,  # float64 [2C + 1]: see pointwise.moments_at
    scale_ptr,  # [C] where SCALE, any float dtype
    offset_ptr,  # [C] where SCALE
    parts_ptr,  # float32 [splits, 2, C], scratch
    arrivals_ptr,  # int32 [blocks], 0 between launches
    dscale_ptr,  # [C], scale's dtype
    doffset_ptr,  # [C], scale's dtype
    coefficients_ptr,  # float32 [5, C]: see pointwise.gradient_coefficients; PARTIAL_SUMS: the message, float64 [2C]
    mailboxes_ptr,  # int64 [WORLD_SIZE + 1]: see peer_exchange.py
    A,
    splits,
    tiles_per_program,  # tiles a split
    limit,
    tag,
    rank,
    epsilon,
    slope,
    C: tl.constexpr,
    B: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MERGE_C: tl.constexpr,
    MERGE_S: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    UNROLL: tl.constexpr,  # steps unrolled
    STAGES: tl.constexpr,  # steps whose loads are under way at once, through shared memory; 1: none but the present one
    MASKED: tl.constexpr,
    SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    LOCAL: tl.constexpr,  # whether this replica's own sums are asked for
    PDL: tl.constexpr,
    SINGLE_PROGRAM: tl.constexpr,  # one split and one replica
    WORLD_SIZE: tl.constexpr,
    PARTIAL_SUMS: tl.constexpr,  # whether replicas will add up what this kernel writes
    REDUCED_SUMS: tl.constexpr,
):
    """dscale = Σg·x_hat, doffset = Σg, and what the input gradient needs of the sums over all replicas."""
    if PDL:
        tiles.follow(WORLD_SIZE)
    channel_tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    channel_tile = pid % channel_tiles
    split = pid // channel_tiles
    c = channel_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    norm = (stats_ptr, scale_ptr, offset_ptr, epsilon)
    out = (dscale_ptr, doffset_ptr, coefficients_ptr)
    peers = (mailboxes_ptr, limit, tag, rank)
    hi, a, b = pointwise.affine_coefficients(stats_ptr, scale_ptr, offset_ptr, c, epsilon, C, SCALE, REDUCED_SUMS)
    J = tiles.positions_of(A, B, WIDE)
    all_tiles = ((J + BLOCK_P - 1) // BLOCK_P).to(tl.int32)
    first = tl.minimum(split * tiles_per_program, all_tiles)
    last = tl.minimum(first + tiles_per_program, all_tiles)
    sum_g = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    sum_gx = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for tile in tl.range(first, last, loop_unroll_factor=UNROLL, num_stages=STAGES):
        j = tiles.positions(tile, BLOCK_P, WIDE)
        v = tiles.load(x_ptr, j, c, J, C, B, BLOCK_C, EVEN, "")
        g = tiles.load(dy_ptr, j, c, J, C, B, BLOCK_C, EVEN, "")
        if MASKED:
            v = tiles.finite_or_0(v, tiles.load_mask(mask_ptr, j, J, EVEN))
        v -= hi[None, :]
        g = pointwise.before_activation(g, v, a, b, saved_ptr, j, c, J, slope, C, B, BLOCK_C, EVEN, "", ACTIVATION, RESIDUAL)
        # Nothing exists where g is 0, but x − hi is not 0 there and may be anything.
        sum_g += g
        sum_gx += g * v
    if SINGLE_PROGRAM:
        # The only program of its channels: what it found is all there is.
        g, gx = tl.sum(sum_g, 0).to(tl.float64), tl.sum(sum_gx, 0).to(tl.float64)
        finish(norm, out, peers, 0, c, g, gx, C, BLOCK_C, SCALE, LOCAL, PDL, WORLD_SIZE, PARTIAL_SUMS, REDUCED_SUMS)
        return
    at = split * (2 * C) + c
    tl.store(parts_ptr + at, tl.sum(sum_g, 0), mask=inside)
    tl.store(parts_ptr + at + C, tl.sum(sum_gx, 0), mask=inside)

    block = channel_tile // (MERGE_C // BLOCK_C)
    tiles_here = tl.minimum(MERGE_C // BLOCK_C, channel_tiles - block * (MERGE_C // BLOCK_C))
    if peer_exchange.last_to_arrive(arrivals_ptr + block, tiles_here * splits):
        these = block * MERGE_C + tl.arange(0, MERGE_C)
        g, gx = add_parts(parts_ptr, these, splits, C, MERGE_S, MERGE_C)
        finish(norm, out, peers, block, these, g, gx, C, MERGE_C, SCALE, LOCAL, PDL, WORLD_SIZE, PARTIAL_SUMS, REDUCED_SUMS)


@triton.jit
def add_parts(parts_ptr, c, splits, C: tl.constexpr, MERGE_S: tl.constexpr, MERGE_C: tl.constexpr):
    """Both sums of this replica in float64, [MERGE_C], from what its programs left, MERGE_S of them at a time."""
    row = tl.arange(0, MERGE_S)
    g = tl.zeros([MERGE_S, MERGE_C], tl.float32)
    gx = tl.zeros([MERGE_S, MERGE_C], tl.float32)
    for start in tl.range(0, splits, MERGE_S, loop_unroll_factor=2):
        split = start + row
        there = (split < splits)[:, None] & (c < C)[None, :]
        at = parts_ptr + split[:, None] * (2 * C) + c[None, :]
        g += tl.load(at, mask=there, other=0.0, cache_modifier=".cg")
        gx += tl.load(at + C, mask=there, other=0.0, cache_modifier=".cg")
    return tl.sum(g, 0).to(tl.float64), tl.sum(gx, 0).to(tl.float64)


@triton.jit
def finish(
    norm,
    out,
    peers,
    block,
    c,
    g,
    gx,
    C: tl.constexpr,
    MERGE_C: tl.constexpr,
    SCALE: tl.constexpr,
    LOCAL: tl.constexpr,
    PDL: tl.constexpr,
    WORLD_SIZE: tl.constexpr,
    PARTIAL_SUMS: tl.constexpr,
    REDUCED_SUMS: tl.constexpr,
):
    """From Σg and Σg·(x − hi) of this replica: its gradients, the message, the coefficients of the input gradient."""
    stats_ptr, scale_ptr, offset_ptr, epsilon = norm
    dscale_ptr, doffset_ptr, coefficients_ptr = out
    inside = c < C
    if WORLD_SIZE > 1:
        # Early: these loads take as long as the others.
        state = peer_exchange.begin(peers, block)
    mean, variance = pointwise.moments_at(stats_ptr, c, C, REDUCED_SUMS)
    lo = mean - mean.to(tl.float32).to(tl.float64)
    rstd = 1.0 / tl.sqrt(variance + epsilon)
    gx_hat = rstd * (gx - lo * g)
    if LOCAL:
        tl.store(dscale_ptr + c, tiles.narrowed(gx_hat, dscale_ptr), mask=inside)
        tl.store(doffset_ptr + c, tiles.narrowed(g, doffset_ptr), mask=inside)
    if SCALE:
        gamma = tl.load(scale_ptr + c, mask=inside, other=0.0).to(tl.float64)
        g *= gamma
        gx_hat *= gamma
    if PARTIAL_SUMS:
        tl.store(coefficients_ptr + c, g, mask=inside)
        tl.store(coefficients_ptr + C + c, gx_hat, mask=inside)
    else:
        if WORLD_SIZE > 1:
            g, gx_hat = peer_exchange.sums(peers, state, block, g, gx_hat, MERGE_C, WORLD_SIZE)
            if PDL:
                tiles.lead()
        hi, a, b, through, rest = pointwise.gradient_coefficients(
            stats_ptr, scale_ptr, offset_ptr, c, g, gx_hat, epsilon, C, SCALE
        )
        tl.store(coefficients_ptr + c, hi, mask=inside)
        tl.store(coefficients_ptr + C + c, a, mask=inside)
        tl.store(coefficients_ptr + 2 * C + c, b, mask=inside)
        tl.store(coefficients_ptr + 3 * C + c, through, mask=inside)
        tl.store(coefficients_ptr + 4 * C + c, rest, mask=inside)
