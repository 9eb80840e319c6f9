"""One replica's arithmetic, fast. No replica talks to another in here, and nothing is differentiated.

tensorflow.py serves TensorFlow. For torch several modules do the same, and `choice.kernels_for(x, mask)` picks one: eager.py is
the reference, on any device and for the compiler; native.py runs on torch's fused CPU operators. Each has these functions, which
`syncbn.torch.engine` calls in this order; a module may be faster than eager.py, and must agree with it.

    local_sums(x, mask) -> message                      [1 + 2C] float64: n, Σx, Σx². The engine adds it up over replicas
    moments_of_sums(message) -> (count, mean, variance)  [], [C], [C] float64, of the summed message; 0, 0 and 1 where n is 0
    normalize(x, norm, residual) -> y                   activation(scale·(x − mean)/√(variance + ε) + offset + residual)
    gradient_sums(dy, x, norm, kept, whole) -> (dz, sums, message)
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
kept      what `kept_for_backward` says the forward pass kept: y, the residual, or None
dz        what `input_gradient` of the same module takes: it need not be a tensor, and may stand for dy and an activation still
          to be applied, unless `whole` is true: then a tensor of x's shape (the residual's gradient)
wide      float64, or on devices without it the arithmetic's dtype: there the engine calls eager.local_moments(x, mask) ->
          (n, k, s, q) instead of local_sums, and `norm.mean` is a pair (hi, lo)

Nothing here may wait for the device (no .item(), no shape that depends on data), except on the CPU after the message.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from syncbn.policy import Activation


class Normalization(NamedTuple):
    """What one normalization is, apart from its input.

    mean, variance: [C] wide (the mean may be a pair); scale, offset: [C], of the arithmetic's dtype.
    """

    mean: Any
    variance: Any
    scale: Any
    offset: Any
    epsilon: float
    activation: Activation | None = None


def kept_for_backward(norm: Normalization, y: Any, residual: Any) -> Any:
    """What the backward pass needs besides x to find the activation's slope: nothing where x alone tells it."""
    if norm.activation is None or residual is None:
        return None
    return residual if norm.activation.name == "silu" else y
