"""A batch whose channels fit into registers: one launch each way, x read once in each.

One replica, and few values a channel: every program has all of its channels, so nobody waits for anybody between the
moments and the output, nor between the gradient's sums and the gradient. Where replicas exchange, most of these programs
would wait at once and mask_ptr what they wait for from running: there it is two launches (moments.py, gradient_sums.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from syncbn.torch.triton.device import moments, pointwise, tiles

# May lie anywhere, as a parameter in a flat buffer does; tensors must be aligned for wide loads.
VECTORS = [
    "mask_ptr",
    "stats_ptr",
    "scale_ptr",
    "offset_ptr",
    "moving_mean_ptr",
    "moving_variance_ptr",
    "batches_ptr",
    "dscale_ptr",
    "doffset_ptr",
]


@triton.jit(do_not_specialize=["A"], do_not_specialize_on_alignment=VECTORS)
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
    A,
    epsilon,
    weight,  # weight of the new value
    weight_rest,  # what float32 leaves of it
    slope,
    C: tl.constexpr,
    B: tl.constexpr,
    BLOCK_P: tl.constexpr,  # positions that a program holds: all there are
    BLOCK_C: tl.constexpr,
    EVEN: tl.constexpr,
    PDL: tl.constexpr,
    MASKED: tl.constexpr,
    SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    UPDATE: tl.constexpr,
):
    """y = activation(scale·(x − mean)·rstd + offset + residual), the moments, the moving statistics."""
    if PDL:
        tiles.follow(1)
    pid = tl.program_id(0)
    c = pid * BLOCK_C + tl.arange(0, BLOCK_C)
    j = tl.arange(0, BLOCK_P)
    J = A * B
    v = tiles.load(x_ptr, j, c, J, C, B, BLOCK_C, EVEN, "")
    if RESIDUAL:
        # Early: it takes as long as x.
        r = tiles.load(residual_ptr, j, c, J, C, B, BLOCK_C, EVEN, "")
    if MASKED:
        counted = tiles.load_mask(mask_ptr, j, J, EVEN)
        n = tl.sum(counted.to(tl.int32), 0)
    else:
        counted = j < J
        n = J
    each = 1.0 / tl.maximum(n, 1).to(tl.float32)
    # About the mean, as float32 has it: the second pass is over registers. Divided first: a sum could be too large.
    part = v * each
    if MASKED:
        part = tl.where(counted[:, None], part, 0.0)
    pivot = tl.sum(part, 0)
    d = v - pivot[None, :]
    if MASKED or not EVEN:
        d = tl.where(counted[:, None], d, 0.0)
    n = tl.zeros([BLOCK_C], tl.float64) + n.to(tl.float64)
    mean, m2 = moments.moments_about(pivot, n, tl.sum(d, 0), tl.sum(d * d, 0))
    # An infinite mean, as torch has it; the variance is NaN.
    mean = tl.where(tl.abs(pivot) < float("inf"), mean, pivot.to(tl.float64))
    variance = tl.where(n == 0, 1.0, m2 / tl.where(n == 0, 1.0, n))
    hi, _, _, a, b = pointwise.affine(mean, variance, scale_ptr, offset_ptr, c, epsilon, C, SCALE)
    if MASKED:
        v = tiles.finite_or_0(v, counted)
    z = (v - hi[None, :]) * a[None, :] + b[None, :]
    if RESIDUAL:
        z += r
    tiles.store(y_ptr, pointwise.activate(z, slope, ACTIVATION), j, c, J, C, B, BLOCK_C, EVEN, "")
    moments.write(stats_ptr, c, n, mean, m2, C, False)
    if UPDATE:
        wide_weight = tl.full([], 0.0, tl.float64) + weight + weight_rest
        there = c < tl.where(n != 0, C, 0)
        pointwise.update_channels(mean, variance, n, moving_mean_ptr, moving_variance_ptr, wide_weight, c, there)
        tl.store(batches_ptr + c, tl.load(batches_ptr + c, mask=c == 0, other=0) + (n != 0).to(tl.int64), mask=c == 0)


@triton.jit(do_not_specialize=["A"], do_not_specialize_on_alignment=VECTORS)
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
    A,
    epsilon,
    slope,
    C: tl.constexpr,
    B: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EVEN: tl.constexpr,
    PDL: tl.constexpr,
    MASKED: tl.constexpr,
    SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """dx, the residual's gradient, dscale = Σg·x_hat and doffset = Σg, g = dy·activation'(z)."""
    if PDL:
        tiles.follow(1)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    j = tl.arange(0, BLOCK_P)
    J = A * B
    v = tiles.load(x_ptr, j, c, J, C, B, BLOCK_C, EVEN, "")
    g = tiles.load(dy_ptr, j, c, J, C, B, BLOCK_C, EVEN, "")
    mean, variance = pointwise.moments_at(stats_ptr, c, C, False)
    each = 1.0 / tl.maximum(pointwise.count_of(stats_ptr, C, False).to(tl.float32), 1.0)
    hi, lo, rstd, a, b = pointwise.affine(mean, variance, scale_ptr, offset_ptr, c, epsilon, C, SCALE)
    if MASKED:
        counted = tiles.load_mask(mask_ptr, j, J, EVEN)
        read = tiles.is_read(v, counted)
        v = tl.where(read, v, 0.0)
    v -= hi[None, :]
    g = pointwise.before_activation(g, v, a, b, saved_ptr, j, c, J, slope, C, B, BLOCK_C, EVEN, "", ACTIVATION, RESIDUAL)
    if ACTIVATION != 0:
        if RESIDUAL:
            tiles.store(dresidual_ptr, g, j, c, J, C, B, BLOCK_C, EVEN, "")
    # Nothing exists where g is 0, but x − hi is not 0 there and may be anything.
    sum_g = tl.sum(g, 0)
    sum_gx_hat = rstd * (tl.sum(g * v, 0) - lo * sum_g)
    if SCALE:
        tl.store(dscale_ptr + c, tiles.narrowed(sum_gx_hat, dscale_ptr), mask=c < C)
        tl.store(doffset_ptr + c, tiles.narrowed(sum_g, doffset_ptr), mask=c < C)
        gamma = tl.load(scale_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        sum_g *= gamma
        sum_gx_hat *= gamma
    through, rest = pointwise.path_coefficients(sum_g * each, sum_gx_hat * each, lo, rstd)
    path = v * through[None, :] + rest[None, :]
    if MASKED:
        path = tl.where(counted[:, None], path, 0.0)
        g = tl.where(read, g, 0.0)
    tiles.store(dx_ptr, g * a[None, :] + path, j, c, J, C, B, BLOCK_C, EVEN, "")
