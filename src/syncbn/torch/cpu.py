"""The CPU path, on torch's fused batch norm operators in inference mode: one pass where plain ones make three."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from syncbn import maths
from syncbn.torch import reference
from syncbn.torch._private import count_dispatch_modes
from syncbn.torch.reference import Normalization, arithmetic_dtype, maximum, moments_of_sums, split

__all__ = ["gradient_sums", "input_gradient", "local_sums", "moments_of_sums", "normalize", "serves"]

# The operators compute x·a + (b − hi·a) in the input's dtype, which loses what |mean|/std amounts to: above this figure x − hi
# is formed first.
NEAR = 16.0
# Below this size asking whether it matters costs more than a second pass.
SMALL = 2**16

# They add float32 up without a cascade, 1e-4 off at a million rows. Blocks of rows, and images no larger than this, keep it under
# 1e-5.
BLOCK_ROWS = 4096
LARGEST_IMAGE = 2**18

_backward = torch.ops.aten.native_batch_norm_backward
_constants: dict[tuple[int, torch.dtype, float], Tensor] = {}


def serves(x: Tensor, mask: Tensor | None) -> bool:
    """Whether the operators take this input in one pass."""
    return (
        mask is None
        and x.device.type == "cpu"
        and 0 < x.numel() <= LARGEST_IMAGE * x.shape[1] * x.shape[0]
        and _layout(x) is not None
    )


def local_sums(x: Tensor, mask: Tensor | None) -> Tensor:
    """[1 + 2C] float64: n, Σx, Σx²."""
    x = x.to(arithmetic_dtype(x))
    n = reference.count(x, None)
    k = x.sum([0, *range(2, x.dim())]) / n
    rest = _centred(x, k)
    q, s = _gradients(rest, rest, torch.zeros_like(k), _filled(x, 1.0), 0.0)
    return reference.message_of(n, k, s, q)


def normalize(x: Tensor, norm: Normalization, residual: Tensor | None) -> Tensor:
    """activation(scale·x_hat + offset + residual)."""
    if residual is None and norm.activation is None:
        return _pre_activation(x, norm).to(x.dtype)
    z = _pre_activation(x.to(arithmetic_dtype(x)), norm)
    if residual is not None:
        z.add_(residual)
    if norm.activation is not None:
        name, slope = norm.activation
        if name == "leaky_relu":
            functional.leaky_relu_(z, slope)
        else:
            functional.silu(z, inplace=True) if name == "silu" else z.relu_()
    return z.to(x.dtype)


def gradient_sums(dy: Tensor, x: Tensor, norm: Normalization, saved: Tensor | None, full: bool) -> tuple[Any, Tensor, Tensor]:
    """(dz, this replica's Σdz and Σdz·x_hat, the same times scale); dz is a tensor in any case."""
    x = x.to(arithmetic_dtype(x))
    dz = _before_activation(_like(dy, x), x, norm, saved)
    hi, lo, rstd = split(norm, x)
    sum_dz_x_hat, sum_dz = _gradients(dz, x, hi, norm.variance.to(hi.dtype), norm.epsilon)
    return dz, *reference.sums_and_message(norm, sum_dz.to(rstd.dtype), sum_dz_x_hat - lo * rstd * sum_dz)


def input_gradient(dz: Any, x: Tensor, mask: Tensor | None, norm: Normalization, count: Tensor, message: Tensor) -> Tensor:
    """dx, from the sums over all replicas."""
    wide_x = x.to(arithmetic_dtype(x))
    hi, lo, rstd = split(norm, x)
    a, b = maths.moment_path_coefficients(count, lo, rstd, *message.chunk(2), maximum=maximum)
    dx = _affine(wide_x, norm, hi, rstd, a / rstd, b)
    dx.addcmul_(dz, _column(norm.scale * rstd.to(hi.dtype), x))
    return dx.to(x.dtype)


def _gradients(dz: Tensor, x: Tensor, mean: Tensor, variance: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(Σdz·(x − mean)/√(variance + epsilon), Σdz): the gradients of a batch norm's scale and offset."""
    constants = (_filled(x, 1.0), mean, variance, None, None, False, epsilon, [False, True, True])
    if x.numel() > BLOCK_ROWS * x.shape[1] and (x.dim() == 2 or not x.is_contiguous()):
        blocks = [v.movedim(1, -1).reshape(-1, x.shape[1]).split(BLOCK_ROWS) for v in (dz, x)]
        sums = torch.stack([torch.stack(_backward(*rows, *constants)[1:]) for rows in zip(*blocks, strict=True)])
        return tuple(sums.sum(0, dtype=torch.float64))
    _, dscale, doffset = _backward(dz, x, *constants)
    return dscale, doffset


def _pre_activation(x: Tensor, norm: Normalization) -> Tensor:
    hi, lo, rstd = split(norm, x)
    return _affine(x, norm, hi, rstd, norm.scale, norm.offset - lo * (norm.scale * rstd))


def _affine(x: Tensor, norm: Normalization, hi: Tensor, rstd: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """scale·(x − hi)·rstd + offset."""
    # A fake tensor has no value to compare. Torch 2.10 to 2.12 refuse an epsilon of 0.
    readable = type(x) is Tensor and not count_dispatch_modes()
    if readable and norm.epsilon and x.numel() > SMALL and (hi * rstd).abs().max().item() < NEAR:
        variance, scale, offset = (v.to(hi.dtype) for v in (norm.variance, scale, offset))
        return functional.batch_norm(x, hi, variance, scale, offset, False, 0.0, norm.epsilon)
    rest = _centred(x.to(hi.dtype), hi)
    return torch.addcmul(_column(offset.to(hi.dtype), x), rest, _column((scale * rstd).to(hi.dtype), x))


def _before_activation(dy: Tensor, x: Tensor, norm: Normalization, saved: Tensor | None) -> Tensor:
    if norm.activation is None:
        return dy
    name, slope = norm.activation
    if name == "silu":
        z = _pre_activation(x, norm)
        return torch.ops.aten.silu_backward(dy, z if saved is None else z.add_(saved))
    # The output has the sign that the value before the activation had.
    z = _pre_activation(x, norm) if saved is None else saved.to(dy.dtype)
    if name == "relu":
        return torch.ops.aten.threshold_backward(dy, z, 0)
    return torch.ops.aten.leaky_relu_backward(dy, z, slope, False)


def _centred(x: Tensor, k: Tensor) -> Tensor:
    """x − k in one pass, in x's memory format."""
    # Not an epsilon of 0 either: a half for the variance and a half for epsilon are exactly 1.
    return functional.batch_norm(x, k, _filled(x, 0.5), None, None, False, 0.0, 0.5)


def _like(dy: Tensor, x: Tensor) -> Tensor:
    """dy in x's dtype and memory format."""
    return dy.to(x.dtype).contiguous(memory_format=_layout(x) or torch.contiguous_format)


def _layout(x: Tensor) -> torch.memory_format | None:
    """The memory format that x is dense in, None where it is in none."""
    if x.is_contiguous():
        return torch.contiguous_format
    if x.dim() in (4, 5):
        channels_last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        return channels_last if x.is_contiguous(memory_format=channels_last) else None
    return None


def _filled(x: Tensor, value: float) -> Tensor:
    """[C] of one value, made once."""
    key = x.shape[1], arithmetic_dtype(x), value
    if type(x) is not Tensor:
        # What is made for a fake tensor is one.
        return torch.full((key[0],), value, dtype=key[1], device="cpu")
    if key not in _constants:
        _constants[key] = torch.full((key[0],), value, dtype=key[1], device="cpu")
    return _constants[key]


def _column(v: Tensor, x: Tensor) -> Tensor:
    return v.view(-1, *[1] * (x.dim() - 2))
