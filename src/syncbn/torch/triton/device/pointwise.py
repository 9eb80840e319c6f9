"""The two passes that write a tensor: normalize, and the input gradient.

y = activation(a·(x − hi) + b + residual), with hi = float32(mean), lo = mean − hi, a = scale·rstd and b = offset − lo·a:
exact to float32 where mean/std = 1e4, where (x − mean)·a in one rounding is not. The first program of the first
pass also updates the moving statistics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from syncbn.torch.triton.device import tiles

# ACTIVATION: 0 none; 1 relu and 2 leaky_relu, of which the output has the sign of z; 3 silu.
ACTIVATIONS = {None: 0, "relu": 1, "leaky_relu": 2, "silu": 3}


@triton.jit
def moments_at(stats_ptr, c, C: tl.constexpr, REDUCED_SUMS: tl.constexpr):
    """(mean, variance) of channels c in float64. stats: mean, variance, n; REDUCED_SUMS: n, Σx, Σx², as replicas add them up."""
    inside = c < C
    if REDUCED_SUMS:
        n = tl.load(stats_ptr)
        at_least_one = tl.where(n == 0, 1.0, n)
        mean = tl.load(stats_ptr + 1 + c, mask=inside, other=0.0) / at_least_one
        variance = tl.load(stats_ptr + 1 + C + c, mask=inside, other=0.0) / at_least_one - mean * mean
        # Not maximum(variance, 0), which would turn NaN into 0.
        variance = tl.where(variance < 0, 0.0, variance)
        return mean, tl.where(n == 0, 1.0, variance)
    return tl.load(stats_ptr + c, mask=inside, other=0.0), tl.load(stats_ptr + C + c, mask=inside, other=1.0)


@triton.jit
def count_of(stats_ptr, C: tl.constexpr, REDUCED_SUMS: tl.constexpr):
    """n."""
    if REDUCED_SUMS:
        return tl.load(stats_ptr)
    return tl.load(stats_ptr + 2 * C)


@triton.jit
def moments_near(stats_ptr, c, C: tl.constexpr, REDUCED_SUMS: tl.constexpr):
    """The same with one division, and to the last bits: for what every program works out anew."""
    if REDUCED_SUMS:
        inside = c < C
        n = tl.load(stats_ptr)
        each = 1.0 / tl.where(n == 0, 1.0, n)
        mean = tl.load(stats_ptr + 1 + c, mask=inside, other=0.0) * each
        variance = tl.load(stats_ptr + 1 + C + c, mask=inside, other=0.0) * each - mean * mean
        variance = tl.where(variance < 0, 0.0, variance)
        return mean, tl.where(n == 0, 1.0, variance)
    return moments_at(stats_ptr, c, C, REDUCED_SUMS)


@triton.jit
def affine_coefficients(
    stats_ptr, scale_ptr, offset_ptr, c, epsilon, C: tl.constexpr, SCALE: tl.constexpr, REDUCED_SUMS: tl.constexpr
):
    """(hi, a, b) in float32 for channels c."""
    mean, variance = moments_near(stats_ptr, c, C, REDUCED_SUMS)
    hi, _, _, a, b = affine(mean, variance, scale_ptr, offset_ptr, c, epsilon, C, SCALE)
    return hi, a, b


@triton.jit
def affine(mean, variance, scale_ptr, offset_ptr, c, epsilon, C: tl.constexpr, SCALE: tl.constexpr):
    """(hi, lo, rstd, a, b) in float32, from moments in float64."""
    gamma, beta = load_affine(scale_ptr, offset_ptr, c, C, SCALE)
    return affine_of(mean, variance, gamma, beta, epsilon)


@triton.jit
def load_affine(scale_ptr, offset_ptr, c, C: tl.constexpr, SCALE: tl.constexpr):
    """Scale and offset of channels c in float32; 1 and 0 where there are none."""
    if SCALE:
        gamma = tl.load(scale_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        return gamma, tl.load(offset_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    return c * 0.0 + 1.0, c * 0.0


@triton.jit
def affine_of(mean, variance, gamma, beta, epsilon):
    """`affine` from scale and offset."""
    hi = mean.to(tl.float32)
    lo = (mean - hi.to(tl.float64)).to(tl.float32)
    rstd = 1.0 / tl.sqrt_rn(variance.to(tl.float32) + epsilon)
    a = gamma * rstd
    return hi, lo, rstd, a, beta - lo * a


@triton.jit
def gradient_coefficients(stats_ptr, scale_ptr, offset_ptr, c, g, gx_hat, epsilon, C: tl.constexpr, SCALE: tl.constexpr):
    """(hi, a, b, through, rest) in float32, from Σscale·g and Σscale·g·x_hat of all replicas."""
    mean, variance = moments_at(stats_ptr, c, C, False)
    lo = mean - mean.to(tl.float32).to(tl.float64)
    n = tl.maximum(count_of(stats_ptr, C, False), 1.0)
    through, rest = path_coefficients(g / n, gx_hat / n, lo, 1.0 / tl.sqrt(variance + epsilon))
    hi, a, b = affine_coefficients(stats_ptr, scale_ptr, offset_ptr, c, epsilon, C, SCALE, False)
    return hi, a, b, through.to(tl.float32), rest.to(tl.float32)


@triton.jit
def path_coefficients(mean_g, mean_gx, lo, rstd):
    """(through, rest): what the moments' own dependence on x adds to dx is through·(x − hi) + rest."""
    through = -rstd * rstd * mean_gx
    return through, -rstd * mean_g - lo * through


@triton.jit
def tile_in_order(step, across, length):
    """The tile of a step: `across` stretches of `length` tiles side by side, each from its end to its start.

    The kernel before this one swept the same stretches side by side from start to end: what it read last is still in L2.
    """
    # A step too many would be a tile before the first: past the last one nothing exists either.
    last = length - 1 - step // across
    return tl.where(last < 0, across * length, step % across * length + last)


@triton.jit
def activate(z, slope, ACTIVATION: tl.constexpr):
    """activation(z)."""
    if ACTIVATION == 1:
        # Not maximum(z, 0), which would turn NaN into 0.
        return tl.where(z < 0, 0.0, z)
    if ACTIVATION == 2:
        return tl.where(z < 0, z * slope, z)
    if ACTIVATION == 3:
        return z / (1.0 + tl.exp(-z))
    return z


@triton.jit
def with_residual(z, saved, ACTIVATION: tl.constexpr):
    """z, or something of its sign, where a residual was added: from the residual for silu, else from the output."""
    if ACTIVATION == 3:
        return z + saved
    return saved


@triton.jit
def slope_at(z, slope, ACTIVATION: tl.constexpr):
    """activation'(z)."""
    if ACTIVATION == 1:
        return tl.where(z > 0, 1.0, 0.0)
    if ACTIVATION == 2:
        return tl.where(z > 0, 1.0, slope)
    sigmoid = 1.0 / (1.0 + tl.exp(-z))
    return sigmoid * (1.0 + z * (1.0 - sigmoid))


@triton.jit
def before_activation(
    g,
    v,
    a,
    b,
    saved_ptr,
    j,
    c,
    J,
    slope,
    C: tl.constexpr,
    B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EVEN: tl.constexpr,
    EVICTION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """dy·activation'(z) of a tile, from dy = g and v = x − hi."""
    saved = v
    if ACTIVATION != 0:
        if RESIDUAL:
            saved = tiles.load(saved_ptr, j, c, J, C, B, BLOCK_C, EVEN, EVICTION)
    return gradient_before_activation(g, v, a, b, saved, slope, ACTIVATION, RESIDUAL)


@triton.jit
def gradient_before_activation(g, v, a, b, saved, slope, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr):
    """The same from what was saved, where RESIDUAL."""
    if ACTIVATION == 0:
        return g
    z = v * a[None, :] + b[None, :]
    if RESIDUAL:
        z = with_residual(z, saved, ACTIVATION)
    return g * slope_at(z, slope, ACTIVATION)


@triton.jit(do_not_specialize=["A", "tiles_per_program", "across", "length"], do_not_specialize_on_alignment=tiles.VECTORS)
def normalize_kernel(
    x_ptr,  # [A, C, B], any float dtype
    y_ptr,  # [A, C, B], the same
    residual_ptr,  # [A, C, B] where RESIDUAL
    mask_ptr,  # uint8 [A, B] where MASKED
    stats_ptr,  # float64 [2C + 1]: see `moments_at`
    scale_ptr,  # [C] where SCALE, any float dtype
    offset_ptr,  # [C] where SCALE
    moving_mean_ptr,  # [C] where UPDATE
    moving_variance_ptr,  # [C] where UPDATE
    batches_ptr,  # int64 [1] where UPDATE: updates so far
    A,
    tiles_per_program,  # tiles a program
    across,  # the order of the tiles: see `tile_in_order`
    length,
    epsilon,
    weight,  # weight of the new value; below 0: 1 / batches_ptr
    weight_rest,  # what float32 leaves of it: replicas whose statistics other code updates must get the same bits
    slope,
    C: tl.constexpr,
    B: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    EVICTION: tl.constexpr,  # how soon L2 may forget what this kernel reads and writes
    PDL: tl.constexpr,
    MASKED: tl.constexpr,
    SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    UPDATE: tl.constexpr,  # 0 no; 1 always; 2 where all statistics are finite
    REDUCED_SUMS: tl.constexpr,
):
    """y = activation(a·(x − hi) + b + residual), and the moving statistics."""
    if PDL:
        tiles.follow(1)
    channel_tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    channel_tile = pid % channel_tiles
    c = channel_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    hi, a, b = affine_coefficients(stats_ptr, scale_ptr, offset_ptr, c, epsilon, C, SCALE, REDUCED_SUMS)
    J = tiles.positions_of(A, B, WIDE)
    first = pid // channel_tiles * tiles_per_program
    for step in range(first, first + tiles_per_program):
        # Past the last tile nothing exists; EVEN promises that there is no such step.
        j = tiles.positions(tile_in_order(step, across, length), BLOCK_P, WIDE)
        v = tiles.load(x_ptr, j, c, J, C, B, BLOCK_C, EVEN, EVICTION)
        if MASKED:
            v = tiles.finite_or_0(v, tiles.load_mask(mask_ptr, j, J, EVEN))
        z = (v - hi[None, :]) * a[None, :] + b[None, :]
        if RESIDUAL:
            z += tiles.load(residual_ptr, j, c, J, C, B, BLOCK_C, EVEN, EVICTION)
        tiles.store(y_ptr, activate(z, slope, ACTIVATION), j, c, J, C, B, BLOCK_C, EVEN, EVICTION)
    if UPDATE:
        if pid == 0:
            wide_weight = tl.full([], 0.0, tl.float64) + weight + weight_rest
            update_statistics(stats_ptr, moving_mean_ptr, moving_variance_ptr, batches_ptr, wide_weight, C, UPDATE, REDUCED_SUMS)


@triton.jit
def update_statistics(
    stats_ptr,
    moving_mean_ptr,
    moving_variance_ptr,
    batches_ptr,
    weight,
    C: tl.constexpr,
    UPDATE: tl.constexpr,
    REDUCED_SUMS: tl.constexpr,
):
    """moving = moving·(1 − weight) + batch·weight, with the unbiased variance, unless the batch says nothing."""
    P: tl.constexpr = 512
    n = count_of(stats_ptr, C, REDUCED_SUMS)
    # NaN is taken too, unless only finite statistics may.
    updates = (n != 0).to(tl.int32)
    if UPDATE == 2:
        finite = tl.zeros([P], tl.int32) + 1
        for start in range(0, C, P):
            c = start + tl.arange(0, P)
            mean, variance = moments_at(stats_ptr, c, C, REDUCED_SUMS)
            finite &= ((tl.abs(mean) < float("inf")) & (tl.abs(variance) < float("inf"))).to(tl.int32)
        updates = updates * tl.min(finite, 0)
    batches = tl.load(batches_ptr) + updates.to(tl.int64)
    tl.store(batches_ptr, batches)
    weight = tl.where(weight < 0, 1.0 / tl.maximum(batches, 1).to(tl.float64), weight)
    for start in range(0, C, P):
        c = start + tl.arange(0, P)
        # Not (c < C) & (updates > 0): the interpreter of Triton 3.9 makes numbers of a mask and a scalar.
        there = c < tl.where(updates > 0, C, 0)
        mean, variance = moments_at(stats_ptr, c, C, REDUCED_SUMS)
        update_channels(mean, variance, n, moving_mean_ptr, moving_variance_ptr, weight, c, there)


@triton.jit
def update_channels(mean, variance, n, moving_mean_ptr, moving_variance_ptr, weight, c, there):
    """The same for channels c, from their moments in float64."""
    old = (tl.load(moving_mean_ptr + c, mask=there, other=0.0), tl.load(moving_variance_ptr + c, mask=there, other=0.0))
    store_moving(old, mean, variance, n, moving_mean_ptr, moving_variance_ptr, weight, c, there)


@triton.jit
def store_moving(old, mean, variance, n, moving_mean_ptr, moving_variance_ptr, weight, c, there):
    """The same from the old values, which were loaded before."""
    old_mean, old_variance = old
    variance *= n / tl.maximum(n - 1, 1.0)
    mean = old_mean.to(tl.float64) * (1 - weight) + mean * weight
    variance = old_variance.to(tl.float64) * (1 - weight) + variance * weight
    tl.store(moving_mean_ptr + c, tiles.narrowed(mean, moving_mean_ptr), mask=there)
    tl.store(moving_variance_ptr + c, tiles.narrowed(variance, moving_variance_ptr), mask=there)


@triton.jit(do_not_specialize=["A", "tiles_per_program", "across", "length"], do_not_specialize_on_alignment=tiles.VECTORS)
def input_gradient_kernel(
    x_ptr,  # [A, C, B], any float dtype
    dy_ptr,  # [A, C, B]
    dx_ptr,  # [A, C, B], x's dtype
    saved_ptr,  # [A, C, B]: the output (relu, leaky_relu) or the residual (silu) where RESIDUAL and ACTIVATION
    dresidual_ptr,  # [A, C, B] where RESIDUAL and ACTIVATION
    mask_ptr,  # uint8 [A, B] where MASKED
    coefficients_ptr,  # float32 [5, C]: `gradient_coefficients`; PARTIAL_SUMS: float64 [2C], the message of all replicas
    stats_ptr,  # float64 [2C + 1] where PARTIAL_SUMS: see `moments_at`
    scale_ptr,  # [C] where PARTIAL_SUMS and SCALE
    offset_ptr,  # [C] where PARTIAL_SUMS and SCALE
    A,
    tiles_per_program,  # tiles a program
    across,  # the order of the tiles: see `tile_in_order`
    length,
    epsilon,
    slope,
    C: tl.constexpr,
    B: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    EVICTION: tl.constexpr,  # how soon L2 may forget what this kernel reads and writes
    PDL: tl.constexpr,
    MASKED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SCALE: tl.constexpr,
    PARTIAL_SUMS: tl.constexpr,  # whether the sums come as the message that replicas added up
    REDUCED_SUMS: tl.constexpr,
):
    """dx = [read]·a·g + [counted]·(through·(x − hi) + rest), g = dy·activation'(z); the residual's gradient is g."""
    if PDL:
        tiles.follow(1)
    channel_tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    channel_tile = pid % channel_tiles
    c = channel_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    if PARTIAL_SUMS:
        # As `gradient_coefficients`, but in float32 where that is enough: every program does it, and float64 would cost more than
        # the tensor.
        mean, variance = moments_near(stats_ptr, c, C, REDUCED_SUMS)
        hi, lo, rstd, a, b = affine(mean, variance, scale_ptr, offset_ptr, c, epsilon, C, SCALE)
        each = 1.0 / tl.maximum(count_of(stats_ptr, C, REDUCED_SUMS), 1.0)
        mean_g = (tl.load(coefficients_ptr + c, mask=inside, other=0.0) * each).to(tl.float32)
        mean_gx = (tl.load(coefficients_ptr + C + c, mask=inside, other=0.0) * each).to(tl.float32)
        through, rest = path_coefficients(mean_g, mean_gx, lo, rstd)
    else:
        hi = tl.load(coefficients_ptr + c, mask=inside, other=0.0)
        a = tl.load(coefficients_ptr + C + c, mask=inside, other=0.0)
        b = tl.load(coefficients_ptr + 2 * C + c, mask=inside, other=0.0)
        through = tl.load(coefficients_ptr + 3 * C + c, mask=inside, other=0.0)
        rest = tl.load(coefficients_ptr + 4 * C + c, mask=inside, other=0.0)
    J = tiles.positions_of(A, B, WIDE)
    first = pid // channel_tiles * tiles_per_program
    for step in range(first, first + tiles_per_program):
        # Past the last tile nothing exists; EVEN promises that there is no such step.
        j = tiles.positions(tile_in_order(step, across, length), BLOCK_P, WIDE)
        v = tiles.load(x_ptr, j, c, J, C, B, BLOCK_C, EVEN, EVICTION)
        g = tiles.load(dy_ptr, j, c, J, C, B, BLOCK_C, EVEN, EVICTION)
        if MASKED:
            counted = tiles.load_mask(mask_ptr, j, J, EVEN)
            read = tiles.is_read(v, counted)
            v = tl.where(read, v, 0.0)
        v -= hi[None, :]
        g = before_activation(g, v, a, b, saved_ptr, j, c, J, slope, C, B, BLOCK_C, EVEN, EVICTION, ACTIVATION, RESIDUAL)
        if ACTIVATION != 0:
            if RESIDUAL:
                tiles.store(dresidual_ptr, g, j, c, J, C, B, BLOCK_C, EVEN, EVICTION)
        path = v * through[None, :] + rest[None, :]
        if MASKED:
            path = tl.where(counted[:, None], path, 0.0)
            g = tl.where(read, g, 0.0)
        tiles.store(dx_ptr, g * a[None, :] + path, j, c, J, C, B, BLOCK_C, EVEN, EVICTION)
