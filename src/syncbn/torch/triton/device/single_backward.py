"""The backward pass in one launch, as single_forward.py. A program keeps tiles of x, dy and what was saved in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from syncbn.torch.triton.device import barrier, gradient_sums, pointwise, tiles

NUMBERS = ["A", "splits", "tiles_per_program", "max_polls"]


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=tiles.VECTORS)
def backward_kernel(
    x_ptr,  # [A, C, B], any float dtype
    dy_ptr,  # [A, C, B]
    dx_ptr,  # [A, C, B], x's dtype
    saved_ptr,  # [A, C, B]: the output (relu, leaky_relu) or the residual (silu) where RESIDUAL and ACTIVATION
    dresidual_ptr,  # [A, C, B] where RESIDUAL and ACTIVATION
    mask_ptr,  # uint8 [A, B] where MASKED
    stats_ptr,  # float64 [2C + 1]: mean, variance, n
    scale_ptr,  # [C] where SCALE, any float dtype
    offset_ptr,  # [C] where SCALE
    dscale_ptr,  # [C] where SCALE, scale's dtype
    doffset_ptr,  # [C] where SCALE, scale's dtype
    parts_ptr,  # float32 [splits, 2, C] where BARRIER, scratch
    arrivals_ptr,  # int32 [blocks of channels, 2] where BARRIER: see barrier.py
    A,
    splits,  # programs that share a block of channels
    tiles_per_program,  # tiles a split; the last one may have fewer, but at least REGISTER_TILES
    max_polls,
    epsilon,
    slope,
    C: tl.constexpr,
    B: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MERGE_S: tl.constexpr,
    REGISTER_TILES: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,
    PACKED: tl.constexpr,
    THREADS: tl.constexpr,
    PDL: tl.constexpr,
    MASKED: tl.constexpr,
    SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    REREAD: tl.constexpr,
    BARRIER: tl.constexpr,
):
    """dx, the residual's gradient, dscale = Σg·x_hat and doffset = Σg, g = dy·activation'(z)."""
    if PDL:
        tiles.follow(1)
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    SAVED: tl.constexpr = RESIDUAL and ACTIVATION != 0
    pid = tl.program_id(0)
    block, split = pid % blocks, pid // blocks
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    J = A * B
    all_tiles = (J + BLOCK_P - 1) // BLOCK_P
    first = split * tiles_per_program
    end = tl.minimum(first + tiles_per_program, all_tiles)
    x, dy, saved = (), (), ()
    for t in tl.static_range(REGISTER_TILES):
        j = tiles.positions(first + t, BLOCK_P, False)
        x = x + (tiles.load_narrow(x_ptr, j, c, J, C, B, BLOCK_C, EVEN, ""),)
        dy = dy + (tiles.load_narrow(dy_ptr, j, c, J, C, B, BLOCK_C, EVEN, ""),)
        if SAVED:
            saved = saved + (tiles.load_narrow(saved_ptr, j, c, J, C, B, BLOCK_C, EVEN, ""),)
    mean, variance = pointwise.moments_at(stats_ptr, c, C, False)
    each = 1.0 / tl.maximum(pointwise.count_of(stats_ptr, C, False).to(tl.float32), 1.0)
    hi, lo, rstd, a, b = pointwise.affine(mean, variance, scale_ptr, offset_ptr, c, epsilon, C, SCALE)
    norm = (hi, a, b, slope)
    sum_g = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    sum_gx = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for t in tl.static_range(REGISTER_TILES):
        j = tiles.positions(first + t, BLOCK_P, False)
        saved_tile = x[t]
        if SAVED:
            saved_tile = saved[t]
        g, v = centred(
            norm,
            tiles.widened(dy[t], PACKED),
            tiles.widened(x[t], PACKED),
            saved_tile,
            mask_ptr,
            j,
            J,
            EVEN,
            MASKED,
            ACTIVATION,
            RESIDUAL,
        )
        # Nothing exists where g is 0, but x − hi is not 0 there and may be anything.
        sum_g += g
        sum_gx += g * v
    if REREAD:
        for tile in tl.range(first + REGISTER_TILES, end, num_stages=STAGES):
            j = tiles.positions(tile, BLOCK_P, False)
            v_here, dy_here, saved_here = load_inputs(x_ptr, dy_ptr, saved_ptr, j, c, J, C, B, BLOCK_C, EVEN, SAVED)
            g_here, v_here = centred(norm, dy_here, v_here, saved_here, mask_ptr, j, J, EVEN, MASKED, ACTIVATION, RESIDUAL)
            sum_g += g_here
            sum_gx += g_here * v_here
    if REGISTER_TILES == 1:
        # One after the other: with fewer registers.
        all_g, all_gx = tl.sum(sum_g, 0), tl.sum(sum_gx, 0)
    else:
        all_g, all_gx = tl.reduce((sum_g, sum_gx), 0, tiles.add_pairs)
    last, abandoned = True, 0
    if BARRIER:
        counters_ptr = arrivals_ptr + 2 * block
        at = parts_ptr + split * (2 * C) + c
        tl.store(at, all_g, mask=inside)
        tl.store(at + C, all_gx, mask=inside)
        complete, last, abandoned = barrier.arrive_and_wait(counters_ptr, split, splits, max_polls)
        if complete == 0:
            barrier.release_counters(counters_ptr, splits, THREADS)
            return
        wide_g, wide_gx = gradient_sums.add_parts(parts_ptr, c, splits, C, MERGE_S, BLOCK_C)
        all_g, all_gx = wide_g.to(tl.float32), wide_gx.to(tl.float32)
    all_gx_hat = rstd * (all_gx - lo * all_g)
    if SCALE:
        if last:
            tl.store(dscale_ptr + c, tiles.narrowed(all_gx_hat, dscale_ptr), mask=inside)
            tl.store(doffset_ptr + c, tiles.narrowed(all_g, doffset_ptr), mask=inside)
        gamma = tl.load(scale_ptr + c, mask=inside, other=0.0).to(tl.float32)
        all_g *= gamma
        all_gx_hat *= gamma
    through, rest = pointwise.path_coefficients(all_g * each, all_gx_hat * each, lo, rstd)
    out = (dx_ptr, dresidual_ptr, through, rest)
    for t in tl.static_range(REGISTER_TILES):
        j = tiles.positions(first + t, BLOCK_P, False)
        saved_tile = x[t]
        if SAVED:
            saved_tile = saved[t]
        v, g = tiles.widened(x[t], PACKED), tiles.widened(dy[t], PACKED)
        write_gradient(out, norm, v, g, saved_tile, mask_ptr, j, c, J, C, B, BLOCK_C, EVEN, MASKED, ACTIVATION, RESIDUAL)
    if REREAD:
        for step in tl.range(first + REGISTER_TILES, end, num_stages=STAGES):
            # Backwards: what was read last is still in L2.
            read_and_write_gradient(
                out, norm, x_ptr, dy_ptr, saved_ptr, mask_ptr, first + REGISTER_TILES + end - 1 - step, c, J,
                C, B, BLOCK_P, BLOCK_C, EVEN, MASKED, ACTIVATION, RESIDUAL,
            )  # fmt: skip
    if BARRIER:
        for tile in range(0, tl.where(abandoned == 0, 0, all_tiles)):
            if (abandoned >> (tile // tiles_per_program)) & 1:
                read_and_write_gradient(
                    out, norm, x_ptr, dy_ptr, saved_ptr, mask_ptr, tile, c, J,
                    C, B, BLOCK_P, BLOCK_C, EVEN, MASKED, ACTIVATION, RESIDUAL,
                )  # fmt: skip
        barrier.release_counters(counters_ptr, splits, THREADS)


@triton.jit
def centred(
    norm,
    g,
    v,
    saved_tile,
    mask_ptr,
    j,
    J,
    EVEN: tl.constexpr,
    MASKED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """(the gradient before the activation, x − hi) of a tile, in float32."""
    hi, a, b, slope = norm
    if MASKED:
        v = tiles.finite_or_0(v, tiles.load_mask(mask_ptr, j, J, EVEN))
    v -= hi[None, :]
    return pointwise.gradient_before_activation(g, v, a, b, saved_tile.to(tl.float32), slope, ACTIVATION, RESIDUAL), v


@triton.jit
def write_gradient(
    out,
    norm,
    v,
    g,
    saved_tile,
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
    """Writes a tile of dx and, with an activation, of the residual's gradient."""
    dx_ptr, dresidual_ptr, through, rest = out
    _, a, _, _ = norm
    if MASKED:
        there = tiles.load_mask(mask_ptr, j, J, EVEN)
        read = tiles.is_read(v, there)
    g, v = centred(norm, g, v, saved_tile, mask_ptr, j, J, EVEN, MASKED, ACTIVATION, RESIDUAL)
    if ACTIVATION != 0:
        if RESIDUAL:
            tiles.store(dresidual_ptr, g, j, c, J, C, B, BLOCK_C, EVEN, "")
    path = v * through[None, :] + rest[None, :]
    if MASKED:
        path = tl.where(there[:, None], path, 0.0)
        g = tl.where(read, g, 0.0)
    tiles.store(dx_ptr, g * a[None, :] + path, j, c, J, C, B, BLOCK_C, EVEN, "")


@triton.jit
def read_and_write_gradient(
    out,
    norm,
    x_ptr,
    dy_ptr,
    saved_ptr,
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
    v, g, saved_tile = load_inputs(x_ptr, dy_ptr, saved_ptr, j, c, J, C, B, BLOCK_C, EVEN, RESIDUAL and ACTIVATION != 0)
    write_gradient(out, norm, v, g, saved_tile, mask_ptr, j, c, J, C, B, BLOCK_C, EVEN, MASKED, ACTIVATION, RESIDUAL)


@triton.jit
def load_inputs(
    x_ptr,
    dy_ptr,
    saved_ptr,
    j,
    c,
    J,
    C: tl.constexpr,
    B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EVEN: tl.constexpr,
    SAVED: tl.constexpr,
):
    """Tiles of x and of dy, and of what was saved; where nothing was, of x again."""
    v = tiles.load(x_ptr, j, c, J, C, B, BLOCK_C, EVEN, "")
    g = tiles.load(dy_ptr, j, c, J, C, B, BLOCK_C, EVEN, "")
    saved_tile = v
    if SAVED:
        saved_tile = tiles.load(saved_ptr, j, c, J, C, B, BLOCK_C, EVEN, "")
    return v, g, saved_tile
