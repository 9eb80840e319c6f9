"""Sums of the backward pass in one launch: local sums, the message to the replicas, the coefficients of the input gradient.

With g = dy·activation'(z), x_hat = (x − mean)·rstd: doffset = Σg and dscale = Σg·x_hat are this replica's own; over all
replicas Σscale·g and Σscale·g·x_hat make dx = scale·rstd·g − rstd·(Σscale·g + x_hat·Σscale·g·x_hat)/n. The launch has the
form of moments.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from syncbn.torch.triton.device import peer_exchange as exchange
from syncbn.torch.triton.device import pointwise, tiles

VECTORS = ["stats", "scale", "offset", "dscale", "doffset", "coefficients"]


@triton.jit(do_not_specialize=["A", "splits", "share", "limit", "tag", "rank"], do_not_specialize_on_alignment=["keep", *VECTORS])
def sums_kernel(
    x,  # [A, C, B], any float dtype
    dy,  # [A, C, B]
    saved,  # [A, C, B]: the output (relu, leaky_relu) or the residual (silu) where RESIDUAL
    keep,  # uint8 [A, B] where MASKED
    stats,  # float64 [2C + 1]: see pointwise.moments_at
    scale,  # [C] where SCALE, any float dtype
    offset,  # [C] where SCALE
    parts,  # float32 [splits, 2, C], scratch
    arrivals,  # int32 [blocks], 0 between launches
    dscale,  # [C], scale's dtype
    doffset,  # [C], scale's dtype
    coefficients,  # float32 [5, C]: see pointwise.gradient_coefficients; SENT: the message, float64 [2C]
    lane,  # int64 [W + 1]: see exchange.py
    A,
    splits,
    share,  # tiles a split
    limit,
    tag,
    rank,
    epsilon,
    slope,
    C: tl.constexpr,
    B: tl.constexpr,
    T: tl.constexpr,
    K: tl.constexpr,
    X: tl.constexpr,
    R: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    U: tl.constexpr,  # steps unrolled
    S: tl.constexpr,  # steps whose loads are under way at once, through shared memory; 1: none but the present one
    MASKED: tl.constexpr,
    SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    LOCAL: tl.constexpr,  # whether this replica's own sums are asked for
    PDL: tl.constexpr,
    ALONE: tl.constexpr,  # one split and one replica
    W: tl.constexpr,
    SENT: tl.constexpr,  # whether replicas will add up what this kernel writes
    RAW: tl.constexpr,
):
    """dscale = Σg·x_hat, doffset = Σg, and what the input gradient needs of the sums over all replicas."""
    if PDL:
        tiles.follow(W)
    channel_tiles: tl.constexpr = (C + K - 1) // K
    pid = tl.program_id(0)
    channel_tile = pid % channel_tiles
    split = pid // channel_tiles
    c = channel_tile * K + tl.arange(0, K)
    inside = c < C
    hi, a, b = pointwise.affine_coefficients(stats, scale, offset, c, epsilon, C, SCALE, RAW)
    J = tiles.positions_of(A, B, WIDE)
    all_tiles = ((J + T - 1) // T).to(tl.int32)
    first = tl.minimum(split * share, all_tiles)
    last = tl.minimum(first + share, all_tiles)
    sum_g = tl.zeros([T, K], tl.float32)
    sum_gx = tl.zeros([T, K], tl.float32)
    for tile in tl.range(first, last, loop_unroll_factor=U, num_stages=S):
        j = tiles.positions(tile, T, WIDE)
        v = tiles.load(x, j, c, J, C, B, K, EVEN, "")
        g = tiles.load(dy, j, c, J, C, B, K, EVEN, "")
        if MASKED:
            v = tiles.without_stray(v, tiles.load_kept(keep, j, J, EVEN))
        v -= hi[None, :]
        g = pointwise.before_activation(g, v, a, b, saved, j, c, J, slope, C, B, K, EVEN, "", ACTIVATION, RESIDUAL)
        # Nothing exists where g is 0, but x − hi is not 0 there and may be anything.
        sum_g += g
        sum_gx += g * v
    if ALONE:
        # The only program of its channels: what it found is all there is.
        finish(
            tl.sum(sum_g, 0).to(tl.float64),
            tl.sum(sum_gx, 0).to(tl.float64),
            c,
            stats,
            scale,
            offset,
            dscale,
            doffset,
            coefficients,
            lane,
            0,
            limit,
            tag,
            rank,
            epsilon,
            C,
            K,
            SCALE,
            LOCAL,
            PDL,
            W,
            SENT,
            RAW,
        )
        return
    at = split * (2 * C) + c
    tl.store(parts + at, tl.sum(sum_g, 0), mask=inside)
    tl.store(parts + at + C, tl.sum(sum_gx, 0), mask=inside)

    block = channel_tile // (X // K)
    tiles_here = tl.minimum(X // K, channel_tiles - block * (X // K))
    if exchange.last_to_arrive(arrivals + block, tiles_here * splits):
        these = block * X + tl.arange(0, X)
        total_g, total_gx = add_parts(parts, these, splits, C, R, X)
        finish(
            total_g,
            total_gx,
            these,
            stats,
            scale,
            offset,
            dscale,
            doffset,
            coefficients,
            lane,
            block,
            limit,
            tag,
            rank,
            epsilon,
            C,
            X,
            SCALE,
            LOCAL,
            PDL,
            W,
            SENT,
            RAW,
        )


@triton.jit
def add_parts(parts, c, splits, C: tl.constexpr, R: tl.constexpr, X: tl.constexpr):
    """Both sums of this replica in float64, [X], from what its programs left, R of them at a time."""
    row = tl.arange(0, R)
    g = tl.zeros([R, X], tl.float32)
    gx = tl.zeros([R, X], tl.float32)
    for start in tl.range(0, splits, R, loop_unroll_factor=2):
        split = start + row
        there = (split < splits)[:, None] & (c < C)[None, :]
        at = parts + split[:, None] * (2 * C) + c[None, :]
        g += tl.load(at, mask=there, other=0.0, cache_modifier=".cg")
        gx += tl.load(at + C, mask=there, other=0.0, cache_modifier=".cg")
    return tl.sum(g, 0).to(tl.float64), tl.sum(gx, 0).to(tl.float64)


@triton.jit
def finish(
    g,
    gx,
    c,
    stats,
    scale,
    offset,
    dscale,
    doffset,
    coefficients,
    lane,
    block,
    limit,
    tag,
    rank,
    epsilon,
    C: tl.constexpr,
    X: tl.constexpr,
    SCALE: tl.constexpr,
    LOCAL: tl.constexpr,
    PDL: tl.constexpr,
    W: tl.constexpr,
    SENT: tl.constexpr,
    RAW: tl.constexpr,
):
    """From Σg and Σg·(x − hi) of this replica: its gradients, the message, the coefficients of the input gradient."""
    inside = c < C
    if W > 1:
        # Early: these loads take as long as the others.
        own, epoch, poisoned = exchange.begin(lane, block, rank)
    mean, variance = pointwise.moments_at(stats, c, C, RAW)
    lo = mean - mean.to(tl.float32).to(tl.float64)
    rstd = 1.0 / tl.sqrt(variance + epsilon)
    gx_hat = rstd * (gx - lo * g)
    if LOCAL:
        tl.store(dscale + c, tiles.narrowed(gx_hat, dscale), mask=inside)
        tl.store(doffset + c, tiles.narrowed(g, doffset), mask=inside)
    if SCALE:
        gamma = tl.load(scale + c, mask=inside, other=0.0).to(tl.float64)
        g *= gamma
        gx_hat *= gamma
    if SENT:
        tl.store(coefficients + c, g, mask=inside)
        tl.store(coefficients + C + c, gx_hat, mask=inside)
    else:
        if W > 1:
            g, gx_hat = exchange.sums(lane, own, epoch, poisoned, block, g, gx_hat, limit, tag, rank, X, W)
            if PDL:
                tiles.lead()
        hi, a, b, through, rest = pointwise.gradient_coefficients(stats, scale, offset, c, g, gx_hat, epsilon, C, SCALE)
        tl.store(coefficients + c, hi, mask=inside)
        tl.store(coefficients + C + c, a, mask=inside)
        tl.store(coefficients + 2 * C + c, b, mask=inside)
        tl.store(coefficients + 3 * C + c, through, mask=inside)
        tl.store(coefficients + 4 * C + c, rest, mask=inside)
