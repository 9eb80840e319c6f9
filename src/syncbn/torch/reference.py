"""Plain torch: the reference for every torch kernel, on any device, and what a compiler sees.

It is also the interface of one replica's arithmetic. No replica communicates in here, and nothing is differentiated. Three
modules have these functions, which the engine calls in this order, and `dispatch.kernels_for(x, mask)` picks one: this one;
cpu.py, on torch's fused CPU operators; triton/backend.py, for CUDA. A module may be faster than this one, and must agree with it.

    local_sums(x, mask) -> message                      [1 + 2C] float64: n, Σx, Σx². The engine adds it up over replicas
    moments_of_sums(message) -> (count, mean, variance)  [], [C], [C] float64, of the summed message; 0, 0 and 1 where n is 0
    normalize(x, norm, residual) -> y                   activation(scale·(x − mean)/√(variance + ε) + offset + residual)
    gradient_sums(dy, x, norm, saved, full) -> (dz, sums, message)
                                                        dz: the gradient before the activation; sums: [2C] wide, this replica's
                                                        Σdz and Σdz·x_hat; message: scale · each. The engine adds the message up
    input_gradient(dz, x, mask, norm, count, message) -> dx
                                                        scale·rstd·dz − [mask]·rstd·(Σg + x_hat·Σg·x_hat)/count, where
                                                        message holds the sums over all replicas of g = scale·dz

x         [N, C, …]: rank ≥ 2, channels on dim 1, any float dtype, any strides (N, or any other size but C, may be 0)
mask      bool [N, 1, …], each axis full or 1, True where a value counts; or None. A masked value is finite
residual  x's shape, any float dtype and strides; or None
y, dx     x's shape, dtype and memory format; arithmetic in float32 (float64 for float64 x), rounded once
dy        x's shape; strides may differ from x's
saved     what `saved_for_backward` says the forward pass saved: y, the residual, or None
dz        what `input_gradient` of the same module takes: it need not be a tensor, and may stand for dy and an activation still
          to be applied, unless `full` is true: then a tensor of x's shape (the residual's gradient)
wide      float64, or on devices without it the arithmetic's dtype: there the engine calls local_moments(x, mask) -> (n, k, s, q)
          instead of local_sums, and `norm.mean_lo` is what rounding took from the mean

Nothing here may wait for the device (no .item(), no shape that depends on data), except on the CPU after the message.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncbn import maths
from syncbn.groups import Activation


class Normalization(NamedTuple):
    """What one normalization is, apart from its input.

    mean, variance: [C] wide; scale, offset: [C], of the arithmetic's dtype. mean_lo: where there is no float64, what rounding
    took from the mean.
    """

    mean: Any
    variance: Any
    scale: Any
    offset: Any
    epsilon: float
    activation: Activation | None = None
    mean_lo: Any = None


def saved_for_backward(norm: Normalization, y: Any, residual: Any) -> Any:
    """What the backward pass needs besides x to find the activation's slope: nothing where x alone tells it."""
    if norm.activation is None or residual is None:
        return None
    return residual if norm.activation.name == "silu" else y


def arithmetic_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which an input is normalised: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# Of the squared mean: a variance below it is what rounding made of 0, in float64 of Σx².
ROUNDING = 2.0**-48


def divisible(variance: Tensor, mean: Tensor) -> Tensor:
    """The variance for an epsilon of 0: of a constant channel so large that x_hat and its gradient are 0, as torch's are."""
    largest = torch.finfo(torch.float32).max
    return torch.where(variance <= mean * mean * ROUNDING, largest, variance)


def has_float64(device: torch.device) -> bool:
    """Whether sums and messages can be float64."""
    return device.type != "mps"


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums, messages and moments."""
    return torch.float64 if has_float64(x.device) else arithmetic_dtype(x)


def maximum(v: Any, least: float) -> Any:
    """`v`, a number or a tensor, but at least `least`; NaN stays NaN."""
    return v.clamp_min(least) if isinstance(v, Tensor) else max(v, least)


def local_moments(x: Tensor, mask: Tensor | None) -> tuple[Any, Tensor, Tensor, Tensor]:
    """(n, k, s, q): the count (a number; with a mask int64 []), the pivot k [C], Σ(x − k) and Σ(x − k)² [C]."""
    x, wide = x.to(arithmetic_dtype(x)), wide_dtype(x)
    n, counted = count(x, mask), x if mask is None else torch.where(mask, x, 0)
    k = (_sum(counted, wide) / maximum(n, 1)).to(x.dtype)
    rest = x - _column(k, x)
    if mask is not None:
        rest = torch.where(mask, rest, 0)
    return n, k, _sum(rest, wide), _sum(rest * rest, wide)


def local_sums(x: Tensor, mask: Tensor | None) -> Tensor:
    """[1 + 2C] float64: n, Σx, Σx², formed in float64 from sums about a pivot."""
    return message_of(*local_moments(x, mask))


def message_of(n: Any, k: Tensor, s: Tensor, q: Tensor) -> Tensor:
    """[1 + 2C] float64 from sums about a pivot."""
    wide = torch.float64
    n = n.to(wide) if isinstance(n, Tensor) else torch.full((), n, dtype=wide, device=k.device)
    return torch.cat([n[None], *maths.raw_sums(n, k.to(wide), s.to(wide), q.to(wide))])


def moments_of_sums(message: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(count, mean, variance) in float64."""
    n, (total, squares) = message[0], message[1:].chunk(2)
    return n, *maths.moments_of_sums(n, total, squares, maximum=maximum)


def normalize(x: Tensor, norm: Normalization, residual: Tensor | None) -> Tensor:
    """activation(scale·x_hat + offset + residual)."""
    y = activated(pre_activation(x, norm, residual), norm.activation)
    # Not a cast to its own dtype: torch 2.11 compiles that to a second name of the output, and sends the gradient to the other.
    return y if y.dtype == x.dtype else y.to(x.dtype)


def pre_activation(x: Tensor, norm: Normalization, residual: Tensor | None) -> Tensor:
    """scale·x_hat + offset + residual, in the arithmetic's dtype."""
    hi, lo, rstd = split(norm, x)
    a, b = maths.affine_coefficients(lo, rstd, norm.scale.to(rstd.dtype), norm.offset.to(rstd.dtype))
    z = _affine(x, hi, a, b)
    return z if residual is None else z + residual.to(z.dtype)


def gradient_sums(dy: Tensor, x: Tensor, norm: Normalization, saved: Tensor | None, full: bool) -> tuple[Any, Tensor, Tensor]:
    """(dz, this replica's Σdz and Σdz·x_hat, the same times scale); dz is a tensor in any case."""
    dz, sum_dz, sum_dz_x_hat = local_gradients(dy, x, norm, saved)
    return dz, *sums_and_message(norm, sum_dz, sum_dz_x_hat)


def local_gradients(dy: Tensor, x: Tensor, norm: Normalization, saved: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(dz, this replica's Σdz, its Σdz·x_hat)."""
    dz = before_activation(dy.to(arithmetic_dtype(x)), x, norm, saved)
    hi, lo, rstd = split(norm, x)
    sum_dz = _sum(dz, rstd.dtype)
    return dz, sum_dz, maths.scale_gradient(lo, rstd, sum_dz, _sum(dz * (x - _column(hi, x)), rstd.dtype))


def sums_and_message(norm: Normalization, sum_dz: Tensor, sum_dz_x_hat: Tensor) -> tuple[Tensor, Tensor]:
    """[2C] each."""
    sums = torch.stack([sum_dz, sum_dz_x_hat])
    return sums.reshape(-1), (sums * norm.scale.to(sums.dtype)).reshape(-1)


def before_activation(dy: Tensor, x: Tensor, norm: Normalization, saved: Tensor | None) -> Tensor:
    """The gradient before the activation, dy in the arithmetic's dtype."""
    if norm.activation is None:
        return dy
    name, slope = norm.activation
    if name == "silu":
        z = pre_activation(x, norm, saved)
        sigmoid = torch.sigmoid(z)
        return dy * (sigmoid * (1 + z * (1 - sigmoid)))
    # The output has the sign that the value before the activation had.
    z = pre_activation(x, norm, None) if saved is None else saved
    return torch.where(z > 0, dy, dy * slope if slope else 0)


def input_gradient(dz: Any, x: Tensor, mask: Tensor | None, norm: Normalization, count: Tensor, message: Tensor) -> Tensor:
    """dx, from the sums over all replicas."""
    return input_gradient_of(dz, x, mask, norm, count, *message.chunk(2))


def input_gradient_of(
    dz: Tensor, x: Tensor, mask: Tensor | None, norm: Normalization, count: Tensor, sum_g: Tensor, sum_g_x_hat: Tensor
) -> Tensor:
    """dx, from Σg and Σg·x_hat over all replicas, g = scale·dz."""
    hi, lo, rstd = split(norm, x)
    a, b = maths.moment_path_coefficients(count, lo, rstd, sum_g, sum_g_x_hat, maximum=maximum)
    through = _affine(x, hi, a, b)
    if mask is not None:
        through = torch.where(mask, through, 0)
    direct = _column((norm.scale.to(rstd.dtype) * rstd).to(through.dtype), x)
    return (through + direct * dz).to(x.dtype)


def activated(z: Tensor, activation: Activation | None) -> Tensor:
    """The activation of z."""
    if activation is None:
        return z
    if activation.name == "leaky_relu":
        return torch.nn.functional.leaky_relu(z, activation.slope)
    return torch.nn.functional.silu(z) if activation.name == "silu" else torch.relu(z)


def count(x: Tensor, mask: Tensor | None) -> Any:
    """How many values a channel has: a number, or with a mask an int64 tensor."""
    size = x.shape[0] * x.shape[2:].numel()
    if mask is None:
        return size
    # The mask may stand for more values than it has: each of its elements for as many.
    each = 1
    for i in range(x.dim()):
        if i != 1 and mask.shape[i] == 1:
            each = each * x.shape[i]
    return mask.sum() * each


def split(norm: Normalization, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(hi, lo, rstd): the mean as hi, of the arithmetic's dtype, and what it leaves."""
    rstd = torch.rsqrt(norm.variance + norm.epsilon)
    if norm.mean_lo is not None:
        return norm.mean, norm.mean_lo, rstd
    hi = norm.mean.to(arithmetic_dtype(x))
    return hi, norm.mean - hi, rstd


def _affine(x: Tensor, hi: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a·(x − hi) + b."""
    return (x - _column(hi, x)) * _column(a.to(hi.dtype), x) + _column(b.to(hi.dtype), x)


def _sum(v: Tensor, wide: torch.dtype) -> Tensor:
    """Σ over all but the channels, in the wide dtype."""
    dims = [0, *range(2, v.dim())]
    if v.device.type == "cpu" and not torch.compiler.is_compiling():
        # Torch adds float32 in a cascade there; asked for float64 it would first copy v.
        return v.sum(dims).to(wide)
    return v.sum(dims, dtype=wide)


def _column(v: Tensor, x: Tensor) -> Tensor:
    """[C] so that it broadcasts to x."""
    return v.view(-1, *[1] * (x.dim() - 2))
