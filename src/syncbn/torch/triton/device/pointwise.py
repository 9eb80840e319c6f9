"""The two passes that write a tensor: normalize, and the input gradient.

y = activation(a·(x − hi) + b + residual), with hi = float32(mean), lo = mean − hi, a = scale·rstd and b = offset − lo·a:
exact to float32 where mean/std = 1e4, where (x − mean)·a in one rounding is not. The moving statistics ride on the first
pass: its first program moves them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from syncbn.torch.triton.device import tiles

# ACTIVATION: 0 none; 1 relu and 2 leaky_relu, of which the output has the sign of z; 3 silu.
ACTIVATIONS = {None: 0, "relu": 1, "leaky_relu": 2, "silu": 3}


# May lie anywhere, as a parameter in a flat buffer does; tensors must be aligned for wide loads.
VECTORS = ["keep", "stats", "scale", "offset", "moving_mean", "moving_variance", "tracked", "coefficients"]


@triton.jit
def moments_at(stats, c, C: tl.constexpr, RAW: tl.constexpr):
    """(mean, variance) of channels c in float64. stats: mean, variance, n; RAW: n, Σx, Σx², as replicas add them up."""
    inside = c < C
    if RAW:
        n = tl.load(stats)
        at_least_one = tl.where(n == 0, 1.0, n)
        mean = tl.load(stats + 1 + c, mask=inside, other=0.0) / at_least_one
        variance = tl.load(stats + 1 + C + c, mask=inside, other=0.0) / at_least_one - mean * mean
        # Not maximum(variance, 0), which would turn NaN into 0.
        variance = tl.where(variance < 0, 0.0, variance)
        return mean, tl.where(n == 0, 1.0, variance)
    return tl.load(stats + c, mask=inside, other=0.0), tl.load(stats + C + c, mask=inside, other=1.0)


@triton.jit
def count_of(stats, C: tl.constexpr, RAW: tl.constexpr):
    """n."""
    if RAW:
        return tl.load(stats)
    return tl.load(stats + 2 * C)


@triton.jit
def moments_near(stats, c, C: tl.constexpr, RAW: tl.constexpr):
    """The same with one division, and to the last bits: for what every program works out anew."""
    if RAW:
        inside = c < C
        n = tl.load(stats)
        each = 1.0 / tl.where(n == 0, 1.0, n)
        mean = tl.load(stats + 1 + c, mask=inside, other=0.0) * each
        variance = tl.load(stats + 1 + C + c, mask=inside, other=0.0) * each - mean * mean
        variance = tl.where(variance < 0, 0.0, variance)
        return mean, tl.where(n == 0, 1.0, variance)
    return moments_at(stats, c, C, RAW)


@triton.jit
def affine_coefficients(stats, scale, offset, c, epsilon, C: tl.constexpr, SCALE: tl.constexpr, RAW: tl.constexpr):
    """(hi, a, b) in float32 for channels c."""
    mean, variance = moments_near(stats, c, C, RAW)
    hi, _, _, a, b = affine(mean, variance, scale, offset, c, epsilon, C, SCALE)
    return hi, a, b


@triton.jit
def affine(mean, variance, scale, offset, c, epsilon, C: tl.constexpr, SCALE: tl.constexpr):
    """(hi, lo, rstd, a, b) in float32, from moments in float64."""
    inside = c < C
    hi = mean.to(tl.float32)
    lo = (mean - hi.to(tl.float64)).to(tl.float32)
    rstd = 1.0 / tl.sqrt_rn(variance.to(tl.float32) + epsilon)
    a = rstd
    b = -lo * a
    if SCALE:
        a *= tl.load(scale + c, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(offset + c, mask=inside, other=0.0).to(tl.float32) - lo * a
    return hi, lo, rstd, a, b


@triton.jit
def gradient_coefficients(stats, scale, offset, c, g, gx_hat, epsilon, C: tl.constexpr, SCALE: tl.constexpr):
    """(hi, a, b, through, rest) in float32, from Σscale·g and Σscale·g·x_hat of all replicas."""
    mean, variance = moments_at(stats, c, C, False)
    lo = mean - mean.to(tl.float32).to(tl.float64)
    n = tl.maximum(count_of(stats, C, False), 1.0)
    through, rest = path_coefficients(g / n, gx_hat / n, lo, 1.0 / tl.sqrt(variance + epsilon))
    hi, a, b = affine_coefficients(stats, scale, offset, c, epsilon, C, SCALE, False)
    return hi, a, b, through.to(tl.float32), rest.to(tl.float32)


@triton.jit
def path_coefficients(mean_g, mean_gx, lo, rstd):
    """(through, rest): what the moments' own dependence on x adds to dx is through·(x − hi) + rest."""
    through = -rstd * rstd * mean_gx
    return through, -rstd * mean_g - lo * through


@triton.jit
def tile_in_order(turn, across, length):
    """The tile of a turn: `across` stretches of `length` tiles side by side, each from its end to its start.

    The kernel before this one swept the same stretches side by side from start to end: what it read last is still in L2.
    """
    # A turn too many would be a tile before the first: past the last one nothing exists either.
    last = length - 1 - turn // across
    return tl.where(last < 0, across * length, turn % across * length + last)


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
def with_saved(z, saved, ACTIVATION: tl.constexpr):
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
    saved,
    j,
    c,
    J,
    slope,
    C: tl.constexpr,
    B: tl.constexpr,
    K: tl.constexpr,
    EVEN: tl.constexpr,
    DROP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """dy·activation'(z) of a tile, from dy = g and v = x − hi."""
    if ACTIVATION == 0:
        return g
    z = v * a[None, :] + b[None, :]
    if RESIDUAL:
        z = with_saved(z, tiles.load(saved, j, c, J, C, B, K, EVEN, DROP), ACTIVATION)
    return g * slope_at(z, slope, ACTIVATION)


@triton.jit(do_not_specialize=["A", "share", "across", "length"], do_not_specialize_on_alignment=VECTORS)
def normalize_kernel(
    x,  # [A, C, B], any float dtype
    y,  # [A, C, B], the same
    residual,  # [A, C, B] where RESIDUAL
    keep,  # uint8 [A, B] where MASKED
    stats,  # float64 [2C + 1]: see `moments_at`
    scale,  # [C] where SCALE, any float dtype
    offset,  # [C] where SCALE
    moving_mean,  # [C] where MOVES
    moving_variance,  # [C] where MOVES
    tracked,  # int64 [1] where MOVES: batches that moved them
    A,
    share,  # tiles a program
    across,  # the order of the tiles: see `tile_in_order`
    length,
    epsilon,
    momentum,  # weight of the new value; below 0: 1 / tracked
    momentum_rest,  # what float32 leaves of it: replicas whose statistics other code moves must get the same bits
    slope,
    C: tl.constexpr,
    B: tl.constexpr,
    T: tl.constexpr,
    K: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    DROP: tl.constexpr,  # how soon L2 may forget what this kernel reads and writes
    PDL: tl.constexpr,
    MASKED: tl.constexpr,
    SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    MOVES: tl.constexpr,  # 0 no; 1 always; 2 where all statistics are finite
    RAW: tl.constexpr,
):
    """y = activation(a·(x − hi) + b + residual), and the moving statistics."""
    if PDL:
        tiles.follow(1)
    channel_tiles: tl.constexpr = (C + K - 1) // K
    pid = tl.program_id(0)
    channel_tile = pid % channel_tiles
    c = channel_tile * K + tl.arange(0, K)
    hi, a, b = affine_coefficients(stats, scale, offset, c, epsilon, C, SCALE, RAW)
    J = tiles.positions_of(A, B, WIDE)
    first = pid // channel_tiles * share
    for turn in range(first, first + share):
        # Past the last tile nothing exists; EVEN promises that there is no such turn.
        j = tiles.positions(tile_in_order(turn, across, length), T, WIDE)
        v = tiles.load(x, j, c, J, C, B, K, EVEN, DROP)
        if MASKED:
            v = tiles.without_stray(v, tiles.load_kept(keep, j, J, EVEN))
        z = (v - hi[None, :]) * a[None, :] + b[None, :]
        if RESIDUAL:
            z += tiles.load(residual, j, c, J, C, B, K, EVEN, DROP)
        tiles.store(y, activate(z, slope, ACTIVATION), j, c, J, C, B, K, EVEN, DROP)
    if MOVES:
        if pid == 0:
            weight = tl.full([], 0.0, tl.float64) + momentum + momentum_rest
            move(stats, moving_mean, moving_variance, tracked, weight, C, MOVES, RAW)


@triton.jit
def move(stats, moving_mean, moving_variance, tracked, weight, C: tl.constexpr, MOVES: tl.constexpr, RAW: tl.constexpr):
    """moving = moving·(1 − weight) + batch·weight, with the unbiased variance, unless the batch says nothing."""
    P: tl.constexpr = 512
    n = count_of(stats, C, RAW)
    # NaN moves too, unless only finite statistics may.
    moves = (n != 0).to(tl.int32)
    if MOVES == 2:
        finite = tl.zeros([P], tl.int32) + 1
        for start in range(0, C, P):
            c = start + tl.arange(0, P)
            mean, variance = moments_at(stats, c, C, RAW)
            finite &= ((tl.abs(mean) < float("inf")) & (tl.abs(variance) < float("inf"))).to(tl.int32)
        moves = moves * tl.min(finite, 0)
    batches = tl.load(tracked) + moves.to(tl.int64)
    tl.store(tracked, batches)
    weight = tl.where(weight < 0, 1.0 / tl.maximum(batches, 1).to(tl.float64), weight)
    for start in range(0, C, P):
        c = start + tl.arange(0, P)
        there = (c < C) & (moves > 0)
        mean, variance = moments_at(stats, c, C, RAW)
        move_channels(mean, variance, n, moving_mean, moving_variance, weight, c, there)


@triton.jit
def move_channels(mean, variance, n, moving_mean, moving_variance, weight, c, there):
    """The same for channels c, from their moments in float64."""
    variance *= n / tl.maximum(n - 1, 1.0)
    old = tl.load(moving_mean + c, mask=there, other=0.0).to(tl.float64)
    tl.store(moving_mean + c, tiles.narrowed(old * (1 - weight) + mean * weight, moving_mean), mask=there)
    old = tl.load(moving_variance + c, mask=there, other=0.0).to(tl.float64)
    tl.store(moving_variance + c, tiles.narrowed(old * (1 - weight) + variance * weight, moving_variance), mask=there)


@triton.jit(do_not_specialize=["A", "share", "across", "length"], do_not_specialize_on_alignment=VECTORS)
def input_gradient_kernel(
    x,  # [A, C, B], any float dtype
    dy,  # [A, C, B]
    dx,  # [A, C, B], x's dtype
    saved,  # [A, C, B]: the output (relu, leaky_relu) or the residual (silu) where RESIDUAL and ACTIVATION
    dresidual,  # [A, C, B] where RESIDUAL and ACTIVATION
    keep,  # uint8 [A, B] where MASKED
    coefficients,  # float32 [5, C]: `gradient_coefficients`; SENT: float64 [2C], Σscale·g and Σscale·g·x_hat of all replicas
    stats,  # float64 [2C + 1] where SENT: see `moments_at`
    scale,  # [C] where SENT and SCALE
    offset,  # [C] where SENT and SCALE
    A,
    share,  # tiles a program
    across,  # the order of the tiles: see `tile_in_order`
    length,
    epsilon,
    slope,
    C: tl.constexpr,
    B: tl.constexpr,
    T: tl.constexpr,
    K: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    DROP: tl.constexpr,  # how soon L2 may forget what this kernel reads and writes
    PDL: tl.constexpr,
    MASKED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SCALE: tl.constexpr,
    SENT: tl.constexpr,  # whether the sums come as the message that replicas added up
    RAW: tl.constexpr,
):
    """dx = [read]·a·g + [counted]·(through·(x − hi) + rest), g = dy·activation'(z); the residual's gradient is g."""
    if PDL:
        tiles.follow(1)
    channel_tiles: tl.constexpr = (C + K - 1) // K
    pid = tl.program_id(0)
    channel_tile = pid % channel_tiles
    c = channel_tile * K + tl.arange(0, K)
    inside = c < C
    if SENT:
        # As `gradient_coefficients`, but in float32 where that is enough: every program does it, and float64 would cost more than
        # the tensor.
        mean, variance = moments_near(stats, c, C, RAW)
        hi, lo, rstd, a, b = affine(mean, variance, scale, offset, c, epsilon, C, SCALE)
        each = 1.0 / tl.maximum(count_of(stats, C, RAW), 1.0)
        mean_g = (tl.load(coefficients + c, mask=inside, other=0.0) * each).to(tl.float32)
        mean_gx = (tl.load(coefficients + C + c, mask=inside, other=0.0) * each).to(tl.float32)
        through, rest = path_coefficients(mean_g, mean_gx, lo, rstd)
    else:
        hi = tl.load(coefficients + c, mask=inside, other=0.0)
        a = tl.load(coefficients + C + c, mask=inside, other=0.0)
        b = tl.load(coefficients + 2 * C + c, mask=inside, other=0.0)
        through = tl.load(coefficients + 3 * C + c, mask=inside, other=0.0)
        rest = tl.load(coefficients + 4 * C + c, mask=inside, other=0.0)
    J = tiles.positions_of(A, B, WIDE)
    first = pid // channel_tiles * share
    for turn in range(first, first + share):
        # Past the last tile nothing exists; EVEN promises that there is no such turn.
        j = tiles.positions(tile_in_order(turn, across, length), T, WIDE)
        v = tiles.load(x, j, c, J, C, B, K, EVEN, DROP)
        g = tiles.load(dy, j, c, J, C, B, K, EVEN, DROP)
        if MASKED:
            kept = tiles.load_kept(keep, j, J, EVEN)
            read = tiles.is_read(v, kept)
            v = tl.where(read, v, 0.0)
        v -= hi[None, :]
        g = before_activation(g, v, a, b, saved, j, c, J, slope, C, B, K, EVEN, DROP, ACTIVATION, RESIDUAL)
        if ACTIVATION != 0:
            if RESIDUAL:
                tiles.store(dresidual, g, j, c, J, C, B, K, EVEN, DROP)
        path = v * through[None, :] + rest[None, :]
        if MASKED:
            path = tl.where(kept[:, None], path, 0.0)
            g = tl.where(read, g, 0.0)
        tiles.store(dx, g * a[None, :] + path, j, c, J, C, B, K, EVEN, DROP)
