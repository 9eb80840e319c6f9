"""The TensorFlow engine: replicas are those of a tf.distribute strategy, reached by `ReplicaContext`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from syncbn import maths, policy
from syncbn.contract import Moments, found_once, may_move, realized, speak_as
from syncbn.tensorflow import passes_cpu as kernels
from syncbn.tensorflow.replicas import Replicas, joined, moments_in_pairs, own_moments, refuse_parameter_server, replicas_of

__all__ = ["arithmetic_dtype", "found_once", "may_move", "moments", "normalize", "realized", "speak_as", "supports_jit"]

ACTIVATIONS: dict[str, Callable[[tf.Tensor, float], tf.Tensor]] = {
    "relu": lambda y, slope: tf.nn.relu(y),
    "silu": lambda y, slope: tf.nn.silu(y),
    # Not tf.nn.leaky_relu: it rounds the slope to float32.
    "leaky_relu": lambda y, slope: tf.where(y > 0, y, slope * y),
}


def arithmetic_dtype(x: tf.Tensor) -> tf.DType:
    """The dtype in which an input is normalised: float64 for float64, else float32."""
    return tf.float64 if x.dtype == tf.float64 else tf.float32


def supports_jit() -> bool:
    """False where several replicas train: TensorFlow cannot compile a model over them."""
    strategy = tf.distribute.get_strategy()
    refuse_parameter_server(strategy)
    return strategy.num_replicas_in_sync == 1


@tf.autograph.experimental.do_not_convert
def moments(x: tf.Tensor, *, axes: tuple[int, ...], mask: tf.Tensor | None = None, group: policy.Group = None) -> Moments:
    """Measures the global batch: one all-reduce of (n, Σx, Σx²) in float64; on TPUs one gather of (n, k, s/n, m2)."""
    world = replicas_of(group)
    folded, folded_mask = _fold(x, mask, axes)
    n, k, s, q = kernels.local_moments(tf.stop_gradient(folded), folded_mask, world.wide(folded.dtype))
    if not world.has_float64:
        return moments_in_pairs(world, n, k, s, q)
    count, wide_k = tf.cast(n, tf.float64), tf.cast(k, tf.float64)
    if world.replicas == 1:
        variance = maths.local_m2(count, s, q, maximum=tf.maximum) / tf.maximum(count, 1)
        return Moments(count, wide_k + s / tf.maximum(count, 1), maths.variance_or_one(count, variance, maximum=tf.maximum))
    total, squares = maths.raw_sums(count, wide_k, s, q)
    message = world.sum_by_group(tf.concat([tf.reshape(count, [1]), total, squares], 0))
    channels = k.shape[0]
    counts, totals, squares = tf.split(message, [1, channels, channels], axis=-1)
    return own_moments(world, counts, *maths.moments_of_sums(counts, totals, squares, maximum=tf.maximum))


@tf.autograph.experimental.do_not_convert
def normalize(
    x: tf.Tensor,
    moments: Moments,
    scale: tf.Tensor,
    offset: tf.Tensor,
    *,
    axes: tuple[int, ...],
    epsilon: float,
    mask: tf.Tensor | None = None,
    group: policy.Group = None,
    activation: policy.Activation | None = None,
    residual: tf.Tensor | None = None,
) -> tf.Tensor:
    """activation(scale·(x − mean)/√(variance + epsilon) + offset + residual); one all-reduce, in the backward pass."""
    folded, folded_mask = _fold(x, mask, axes)
    pass_ = _Normalization(moments, epsilon, folded_mask, folded.dtype)
    if moments.count is None:
        # TensorFlow's own gradients are right for constants, and an exported model keeps them.
        y = pass_.forward(folded, scale, offset)
    else:
        y = pass_.synchronised(folded, scale, offset, replicas_of(group))
    y = kernels.Fold(axes, x.shape.rank).unfold(y, x)
    if residual is not None:
        y = y + tf.cast(residual, y.dtype)
    if activation is not None:
        y = ACTIVATIONS[activation.name](y, activation.slope)
    return tf.cast(y, x.dtype)


class _Normalization:
    """One normalization of a folded input, and its gradients where the moments are those of replicas that meet."""

    def __init__(self, moments: Moments, epsilon: float, mask: tf.Tensor | None, dtype: tf.DType):
        self.mask, self.epsilon = mask, epsilon
        self.mean, self.variance = joined(moments.mean), moments.variance
        self.wide = self.variance.dtype
        self.hi, self.lo = _split(moments.mean, dtype)
        self.n = None if moments.count is None else tf.cast(moments.count, self.wide)

    def forward(self, x: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor) -> tf.Tensor:
        rstd = self._rstd(self.variance)
        return self._affine(x, *maths.affine_coefficients(self.lo, rstd, self._widen(scale), self._widen(offset)))

    def synchronised(self, x: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor, world: Replicas) -> tf.Tensor:
        self.world = world

        @tf.custom_gradient
        def normalized(x: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor) -> Any:
            # The pass itself is hidden from the tape, which would keep its temporaries.
            y = self.forward(*map(tf.stop_gradient, (x, scale, offset)))
            return y, lambda dy: self.backward(dy, x, scale)

        return normalized(x, scale, offset)

    def backward(self, dy: tf.Tensor, x: tf.Tensor, scale: tf.Tensor) -> list[tf.Tensor]:
        """(dx, dscale, doffset), by the fused passes; differentiated again, by plain operators."""

        @tf.custom_gradient
        def gradients(dy: tf.Tensor, x: tf.Tensor, scale: tf.Tensor) -> Any:
            def again(*cotangents: tf.Tensor) -> list[tf.Tensor]:
                with tf.GradientTape() as tape:
                    tape.watch([dy, x, scale])
                    outputs = self._backward_by_operators(dy, x, scale)
                return tape.gradient(outputs, [dy, x, scale], cotangents, unconnected_gradients="zero")

            return self._backward_by_passes(*map(tf.stop_gradient, (dy, x, scale))), again

        return gradients(dy, x, scale)

    def _backward_by_passes(self, dy: tf.Tensor, x: tf.Tensor, scale: tf.Tensor) -> list[tf.Tensor]:
        rstd, wide_scale = self._rstd(self.variance), self._widen(scale)
        dx, sum_dy, sum_dy_x = kernels.affine_gradient(dy, x, self.hi, tf.cast(wide_scale * rstd, x.dtype), self.wide)
        dscale = maths.scale_gradient(self.lo, rstd, sum_dy, sum_dy_x)
        sums = self.world.sum_of_group(tf.concat([wide_scale * sum_dy, wide_scale * dscale], 0))
        a, b = maths.moment_path_coefficients(self.n, self.lo, rstd, *tf.split(sums, 2), maximum=tf.maximum)
        dx += self._where_counted(self._affine(x, a, b))
        return [dx, tf.cast(dscale, scale.dtype), tf.cast(sum_dy, scale.dtype)]

    def _backward_by_operators(self, dy: tf.Tensor, x: tf.Tensor, scale: tf.Tensor) -> list[tf.Tensor]:
        """The same, differentiable any number of times: the moments, which came in as constants, hang on x again."""
        mean, variance = self._attach(x)
        # In the wide dtype x − mean needs no pair, and nobody asks for a fast second derivative.
        dy, x, wide_scale = self._widen(dy), self._widen(x), self._widen(scale)

        def along(v: tf.Tensor) -> tf.Tensor:
            return kernels.along_channels(v, x)

        rstd, rest = self._rstd(variance), [0, *range(2, x.shape.rank)]
        x_hat = (x - along(mean)) * along(rstd)
        sum_dy, dscale = tf.reduce_sum(dy, rest), tf.reduce_sum(dy * x_hat, rest)
        sums = self.world.sum_of_group(tf.concat([wide_scale * sum_dy, wide_scale * dscale], 0))
        through = maths.moment_path(self.n, x_hat, along(rstd), *map(along, tf.split(sums, 2)), maximum=tf.maximum)
        dx = along(wide_scale * rstd) * dy + self._where_counted(through)
        return [tf.cast(dx, self.hi.dtype), tf.cast(dscale, scale.dtype), tf.cast(sum_dy, scale.dtype)]

    def _attach(self, x: tf.Tensor) -> list[tf.Tensor]:
        """(mean, variance) as they are, with their true gradient for x, which is differentiable again."""

        @tf.custom_gradient
        def attached(x: tf.Tensor) -> Any:
            def grad(dmean: tf.Tensor, dvariance: tf.Tensor) -> tf.Tensor:
                mean, _ = self._attach(x)
                sums = self.world.sum_of_group(tf.concat([dmean, dvariance], 0)) / tf.maximum(self.n, 1)
                of_mean, of_variance = (kernels.along_channels(half, x) for half in tf.split(sums, 2))
                dx = of_mean + 2 * of_variance * (self._widen(x) - kernels.along_channels(mean, x))
                return tf.cast(self._where_counted(dx), x.dtype)

            return [tf.identity(self.mean), tf.identity(self.variance)], grad

        return attached(x)

    def _affine(self, x: tf.Tensor, a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
        return kernels.affine(x, self.hi, tf.cast(a, x.dtype), tf.cast(b, x.dtype))

    def _rstd(self, variance: tf.Tensor) -> tf.Tensor:
        return tf.math.rsqrt(variance + self.epsilon)

    def _widen(self, v: tf.Tensor) -> tf.Tensor:
        return tf.cast(v, self.wide)

    def _where_counted(self, dx: tf.Tensor) -> tf.Tensor:
        return dx if self.mask is None else tf.where(self.mask, dx, tf.zeros([], dx.dtype))


def _fold(x: tf.Tensor, mask: tf.Tensor | None, axes: tuple[int, ...]) -> tuple[tf.Tensor, tf.Tensor | None]:
    fold = kernels.Fold(axes, x.shape.rank)
    if mask is not None:
        mask = fold.fold(tf.broadcast_to(mask, [1 if i in axes else kernels.size(x, i) for i in range(x.shape.rank)]))
    return fold.fold(tf.cast(x, arithmetic_dtype(x))), mask


def _split(mean: Any, dtype: tf.DType) -> tuple[tf.Tensor, tf.Tensor]:
    """The mean as (hi, lo): hi in the arithmetic's dtype, lo what it leaves."""
    if isinstance(mean, tuple):
        return mean
    hi = tf.cast(mean, dtype)
    return hi, mean - tf.cast(hi, mean.dtype)
