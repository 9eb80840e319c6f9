"""The TensorFlow engine: replicas are those of a tf.distribute strategy, reached by `ReplicaContext`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import tensorflow as tf

from syncbn import maths
from syncbn.contract import (
    Moments,
    Operators,
    Statistics,
    default_train_step,
    materialize,
    record_or_replay,
    should_update_statistics,
)
from syncbn.groups import Activation, Group
from syncbn.tensorflow import passes_cpu, passes_gpu
from syncbn.tensorflow._private import compiled_by_xla, has_tangents
from syncbn.tensorflow.passes_cpu import ChannelView, along_channels
from syncbn.tensorflow.replicas import Replicas, joined, moments_in_pairs, own_moments, refuse_parameter_server, replicas_of

__all__ = [
    "arithmetic_dtype",
    "check_variables",
    "ensure_channels",
    "materialize",
    "moments",
    "normalize",
    "record_or_replay",
    "should_update_statistics",
    "supports_jit",
    "train_step",
]

ACTIVATIONS: dict[str, Callable[[tf.Tensor, float], tf.Tensor]] = {
    "relu": lambda y, slope: tf.nn.relu(y),
    "silu": lambda y, slope: tf.nn.silu(y),
    # Not tf.nn.leaky_relu: it rounds the slope to float32.
    "leaky_relu": lambda y, slope: tf.where(y > 0, y, slope * y),
}


def arithmetic_dtype(x: tf.Tensor) -> tf.DType:
    """The dtype in which an input is normalised: float64 for float64, else float32."""
    return tf.float64 if x.dtype == tf.float64 else tf.float32


def passes_for(x: tf.Tensor) -> ModuleType:
    """The passes for the device that runs what is traced here: a model on the CPU of a GPU machine takes the CPU's."""
    if compiled_by_xla():
        return passes_gpu
    with tf.init_scope():
        # A new tensor lies on the device of this replica, or of the device scope. Graphs name it only where a scope does.
        device = tf.constant(0.0).device
    return passes_gpu if "GPU" in device else passes_cpu


def supports_jit() -> bool:
    """False where several replicas train: TensorFlow cannot compile a model over them."""
    strategy = tf.distribute.get_strategy()
    refuse_parameter_server(strategy)
    return strategy.num_replicas_in_sync == 1


def check_variables(name: str, *variables: Any) -> None:
    """Raises where several replicas train and a variable was made outside of their strategy's scope: all would assign it."""
    strategy = tf.distribute.get_strategy()
    refuse_parameter_server(strategy)
    replicas = strategy.num_replicas_in_sync
    if replicas == 1 or tf.distribute.get_replica_context() is None:
        return
    if not all(isinstance(v, tf.distribute.DistributedValues) for v in variables):
        raise RuntimeError(
            f"A layer that several replicas train must be made in their strategy's scope. Received: the layer {name!r}, made "
            f"outside of it, and {replicas} replicas of {type(strategy).__name__}. Make the layer, or its model, inside "
            "`with strategy.scope():`."
        )


def ensure_channels(x: tf.Tensor, shape: Sequence[int | None], axes: tuple[int, ...]) -> tf.Tensor:
    """x with the rank and the channels of this shape known: where a graph does not know them, they are compared when it runs."""
    if isinstance(x, tf.RaggedTensor):
        raise TypeError(
            f"A synchronised layer takes dense tensors. Received: a RaggedTensor of shape {x.shape}. Make the layer for the rank "
            "of `x.flat_values`, and call x.with_flat_values(layer(x.flat_values))."
        )
    # A variable becomes a tensor: custom gradients take no variables.
    x = tf.convert_to_tensor(x)
    if x.shape.rank is None or (x.shape.rank == len(shape) and any(x.shape[a] is None for a in axes)):
        x = tf.ensure_shape(x, [n if i in axes else None for i, n in enumerate(shape)])
    return x


@tf.autograph.experimental.do_not_convert
def moments(
    x: tf.Tensor, *, axes: tuple[int, ...], mask: tf.Tensor | None = None, group: Group = None, layer: str | None = None
) -> Moments:
    """Measures the global batch: one all-reduce of (n, Σx, Σx²) in float64; on TPUs one gather of (n, k, s/n, m2)."""
    world, x = replicas_of(group), tf.stop_gradient(x)
    if not world.has_float64:
        return moments_in_pairs(world, *passes_cpu.local_moments(x, mask, axes, arithmetic_dtype(x)))
    passes = passes_for(x)
    message = passes.local_sums(x, mask, axes=axes)
    if world.groups == 1:
        count, mean, variance = passes.moments_of_sums(world.messages(message))
        return Moments(count, mean, variance, world.replicas)
    channels = (message.shape[0] - 1) // 2
    counts, totals, squares = tf.split(world.sum_by_group(message), [1, channels, channels], axis=-1)
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
    group: Group = None,
    activation: Activation | None = None,
    residual: tf.Tensor | None = None,
    layer: str | None = None,
) -> tf.Tensor:
    """activation(scale·(x − mean)/√(variance + epsilon) + offset + residual); one all-reduce, in the backward pass."""
    if moments.count is None:
        y = _with_constants(x, moments, scale, offset, axes, epsilon)
    else:
        world = replicas_of(group)
        passes = passes_for(x) if world.has_float64 else passes_cpu
        normalization = _Normalization(moments, epsilon, mask, axes, world, passes)
        y = normalization(x, scale, offset, _dtype_before(x, activation, residual))
    return _finished(y, x.dtype, activation, residual)


@tf.autograph.experimental.do_not_convert
def train_step(
    x: tf.Tensor,
    weight: tf.Tensor,
    bias: tf.Tensor,
    statistics: Statistics,
    *,
    axes: tuple[int, ...],
    epsilon: float,
    mask: tf.Tensor | None = None,
    group: Group = None,
    activation: Activation | None = None,
    residual: tf.Tensor | None = None,
    layer: str | None = None,
) -> tuple[tf.Tensor, Statistics | None]:
    """(y, the statistics after this step). On a GPU: two clusters forward and two backward; with one replica one each way."""
    world, passes = replicas_of(group), passes_for(x)
    common = {"axes": axes, "epsilon": epsilon}
    if passes is passes_cpu or world.groups > 1 or not world.has_float64:
        fused = {"mask": mask, "group": group, "activation": activation, "residual": residual}
        return _train_step_by_verbs(x, weight, bias, statistics, **common, **fused)
    normalization = _Normalization(None, epsilon, mask, axes, world, passes)
    updated: list[tf.Tensor] = []

    def forward(x: tf.Tensor, weight: tf.Tensor, bias: tf.Tensor) -> tf.Tensor:
        y, (count, mean, variance), updated[:] = passes.forward(
            x,
            mask,
            weight,
            bias,
            (statistics.mean, statistics.variance),
            normalization.exchange,
            dtype=_dtype_before(x, activation, residual),
            weight=statistics.weight,
            **common,
        )
        normalization.moments = Moments(count, mean, variance, world.replicas)
        return y

    y = normalization.with_gradients(forward, x, weight, bias)
    mean, variance = updated
    return _finished(y, x.dtype, activation, residual), statistics._replace(mean=mean, variance=variance)


_train_step_by_verbs = default_train_step(
    moments,
    normalize,
    should_update_statistics,
    Operators(tf.where, tf.maximum, tf.math.is_finite, tf.reduce_all, tf.cast),
)


def _dtype_before(x: tf.Tensor, activation: Activation | None, residual: tf.Tensor | None) -> tf.DType:
    """What a normalization returns: rounded once, after the residual and the activation."""
    return x.dtype if activation is None and residual is None else arithmetic_dtype(x)


def refuse_forward_mode(given: tuple[tf.Tensor, ...]) -> None:
    """Raises where a `tf.autodiff.ForwardAccumulator` is in force: it does not see through custom gradients."""
    if has_tangents(given):
        raise NotImplementedError(
            "Forward-mode derivatives of a batch norm in training are not supported on TensorFlow. Received: an input with a "
            "tangent of a tf.autodiff.ForwardAccumulator. Use tf.GradientTape, or call the layer with training=False."
        )


def _finished(y: tf.Tensor, dtype: tf.DType, activation: Activation | None, residual: tf.Tensor | None) -> tf.Tensor:
    if residual is not None:
        y = y + tf.cast(residual, y.dtype)
    if activation is not None:
        y = ACTIVATIONS[activation.name](y, activation.slope)
    return tf.cast(y, dtype)


def _with_constants(
    x: tf.Tensor, moments: Moments, scale: tf.Tensor, offset: tf.Tensor, axes: tuple[int, ...], epsilon: float
) -> tf.Tensor:
    """Plain or fused operators, which exported models keep; TensorFlow's own gradients are right for constants."""
    passes = passes_for(x)
    if passes is passes_cpu:
        return passes.normalize(
            x, moments.mean, moments.variance, scale, offset, axes=axes, epsilon=epsilon, dtype=arithmetic_dtype(x)
        )
    wide = tf.cast(x, arithmetic_dtype(x))
    hi, lo = passes.split(moments.mean, wide.dtype)
    a, b = maths.affine_coefficients(lo, tf.math.rsqrt(moments.variance + epsilon), scale, offset)
    hi, a, b = (passes.Layout.of(x, axes).spread(tf.cast(v, wide.dtype)) for v in (hi, a, b))
    return (wide - hi) * a + b


class _Normalization:
    """One normalization, and its gradients where the moments are those of replicas that communicate."""

    def __init__(
        self,
        moments: Any,
        epsilon: float,
        mask: tf.Tensor | None,
        axes: tuple[int, ...],
        world: Replicas,
        passes: ModuleType,
    ):
        self.moments, self.epsilon, self.mask, self.axes = moments, epsilon, mask, axes
        self.world, self.passes = world, passes
        self.exchange = None if world.replicas == 1 else world.messages

    def __call__(self, x: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
        """The output, of this dtype."""
        static = {"axes": self.axes, "epsilon": self.epsilon, "dtype": dtype}

        def forward(x: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor) -> tf.Tensor:
            return self.passes.normalize(x, self.moments.mean, self.moments.variance, scale, offset, **static)

        return self.with_gradients(forward, x, scale, offset)

    def with_gradients(self, forward: Callable[..., tf.Tensor], *given: tf.Tensor) -> tf.Tensor:
        """forward(x, scale, offset), with the gradients of a normalization."""
        refuse_forward_mode(given)

        @tf.custom_gradient
        def normalized(x: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor) -> Any:
            # The pass itself is hidden from the tape, which would keep its temporaries.
            y = forward(*map(tf.stop_gradient, (x, scale, offset)))
            return y, lambda dy: self.backward(dy, x, scale)

        return normalized(*given)

    def backward(self, *given: tf.Tensor) -> list[tf.Tensor]:
        """(dx, dscale, doffset) of (dy, x, scale), by the fused passes; differentiated again, by plain operators."""

        @tf.custom_gradient
        def gradients(*given: tf.Tensor) -> Any:
            def again(*cotangents: tf.Tensor) -> list[tf.Tensor]:
                with tf.GradientTape() as tape:
                    tape.watch(given)
                    outputs = self._backward_by_operators(*given)
                return tape.gradient(outputs, given, cotangents, unconnected_gradients="zero")

            return self._backward_by_passes(*map(tf.stop_gradient, given)), again

        return gradients(*given)

    def _backward_by_passes(self, dy: tf.Tensor, x: tf.Tensor, scale: tf.Tensor) -> list[tf.Tensor]:
        static = {"axes": self.axes, "epsilon": self.epsilon}
        return list(self.passes.backward(dy, x, self.mask, self.moments[:3], scale, self.exchange, **static))

    def _backward_by_operators(self, dy: tf.Tensor, x: tf.Tensor, scale: tf.Tensor) -> list[tf.Tensor]:
        """The same, differentiable any number of times: the moments, which came in as constants, hang on x again."""
        dtype, view = x.dtype, ChannelView(self.axes, x.shape.rank)
        # In the wide dtype x − mean needs no pair, and nobody asks for a fast second derivative.
        flat, dy = self._widen(view.of(x)), self._widen(view.of(dy))
        mask = None if self.mask is None else view.of_mask(self.mask, x)
        wide_scale = self._widen(scale)
        mean, variance = self._attach(flat, mask)

        def along(v: tf.Tensor) -> tf.Tensor:
            return along_channels(v, flat)

        rstd, rest = tf.math.rsqrt(variance + self.epsilon), [0, *range(2, flat.shape.rank)]
        x_hat = (flat - along(mean)) * along(rstd)
        sum_dy, dscale = tf.reduce_sum(dy, rest), tf.reduce_sum(dy * x_hat, rest)
        sums = self.world.sum_of_group(tf.concat([wide_scale * sum_dy, wide_scale * dscale], 0))
        n = self._widen(self.moments.count)
        through = maths.moment_path(n, x_hat, along(rstd), *map(along, tf.split(sums, 2)), maximum=tf.maximum)
        dx = along(wide_scale * rstd) * dy + _where(mask, through)
        parameter = arithmetic_dtype(x)
        return [tf.cast(view.restore(dx, x), dtype), tf.cast(dscale, parameter), tf.cast(sum_dy, parameter)]

    def _attach(self, x: tf.Tensor, mask: tf.Tensor | None) -> list[tf.Tensor]:
        """(mean, variance) as they are, with their true gradient for the wide x of a `ChannelView`; differentiable again."""
        n = tf.maximum(self._widen(self.moments.count), 1)

        @tf.custom_gradient
        def attached(x: tf.Tensor) -> Any:
            def grad(dmean: tf.Tensor, dvariance: tf.Tensor) -> tf.Tensor:
                mean, _ = self._attach(x, mask)
                sums = self.world.sum_of_group(tf.concat([dmean, dvariance], 0)) / n
                of_mean, of_variance = (along_channels(half, x) for half in tf.split(sums, 2))
                return _where(mask, of_mean + 2 * of_variance * (x - along_channels(mean, x)))

            return [tf.identity(joined(self.moments.mean)), tf.identity(self.moments.variance)], grad

        return attached(x)

    def _widen(self, v: tf.Tensor) -> tf.Tensor:
        return tf.cast(v, self.moments.variance.dtype)


def _where(mask: tf.Tensor | None, v: tf.Tensor) -> tf.Tensor:
    return v if mask is None else tf.where(mask, v, tf.zeros([], v.dtype))
