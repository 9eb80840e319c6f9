"""The TensorFlow engine: replicas are those of a tf.distribute strategy, reached by `ReplicaContext`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from syncbn import maths, policy
from syncbn.engines import Moments
from syncbn.kernels import tensorflow as kernels

# Above this many replicas gathering every replica's moments would cost more than two sums.
GATHERED_REPLICAS = 64

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
    _refuse_parameter_server(strategy)
    return strategy.num_replicas_in_sync == 1


@tf.autograph.experimental.do_not_convert
def moments(x: tf.Tensor, *, axes: tuple[int, ...], mask: tf.Tensor | None = None, group: policy.Group = None) -> Moments:
    """Measures the global batch: one all-reduce of (n, Σx, Σx²) in float64; on TPUs one gather of (n, k, s/n, m2)."""
    world = _world(group)
    folded, folded_mask = _fold(x, mask, axes)
    n, k, s, q = kernels.local_moments(tf.stop_gradient(folded), folded_mask, world.wide(folded.dtype))
    if not world.has_float64:
        return _moments_in_pairs(world, n, k, s, q)
    count, wide_k = tf.cast(n, tf.float64), tf.cast(k, tf.float64)
    if world.replicas == 1:
        variance = maths.local_m2(count, s, q, maximum=tf.maximum) / tf.maximum(count, 1)
        return Moments(count, wide_k + s / tf.maximum(count, 1), maths.variance_or_one(count, variance, maximum=tf.maximum))
    total, squares = maths.raw_sums(count, wide_k, s, q)
    message = world.sum_by_group(tf.concat([tf.reshape(count, [1]), total, squares], 0))
    channels = k.shape[0]
    counts, totals, squares = tf.split(message, [1, channels, channels], axis=-1)
    return _own(world, counts, *maths.moments_of_sums(counts, totals, squares, maximum=tf.maximum))


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
        y = pass_.synchronised(folded, scale, offset, _world(group))
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
        self.mean, self.variance = _joined(moments.mean), moments.variance
        self.wide = self.variance.dtype
        self.hi, self.lo = _split(moments.mean, dtype)
        self.n = None if moments.count is None else tf.cast(moments.count, self.wide)

    def forward(self, x: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor) -> tf.Tensor:
        rstd = self._rstd(self.variance)
        return self._affine(x, *maths.affine_coefficients(self.lo, rstd, self._widen(scale), self._widen(offset)))

    def synchronised(self, x: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor, world: _World) -> tf.Tensor:
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


class _World(NamedTuple):
    """The replicas that meet: how many, in how many groups, and what they can add."""

    replicas: int
    groups: int
    has_float64: bool

    def wide(self, dtype: tf.DType) -> tf.DType:
        """The dtype of sums and moments."""
        return tf.float64 if self.has_float64 else dtype

    def own_group(self) -> tf.Tensor:
        """The number of this replica's group."""
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        return tf.cast(replica, tf.int32) // (self.replicas // self.groups)

    def sum_by_group(self, v: tf.Tensor) -> tf.Tensor:
        """The sum of v over all replicas, or, with groups, one row a group: one all-reduce, none where there is one replica."""
        if self.groups > 1:
            # Selected, not multiplied by 0: NaN · 0 would reach the other groups.
            mine = tf.equal(tf.range(self.groups), self.own_group())[:, None]
            v = tf.where(mine, v[None], tf.zeros([], v.dtype))
        if self.replicas == 1:
            return v
        return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, v)

    def of_own_group(self, by_group: tf.Tensor) -> tf.Tensor:
        """This replica's part of what `sum_by_group` gives."""
        return by_group if self.groups == 1 else by_group[self.own_group()]

    def sum_of_group(self, v: tf.Tensor) -> tf.Tensor:
        """The sum of v over this replica's group, differentiable."""
        return self.of_own_group(self.sum_by_group(v))


def _world(group: policy.Group) -> _World:
    if isinstance(group, policy.Alone):
        return _World(1, 1, True)
    strategy = tf.distribute.get_strategy()
    _refuse_parameter_server(strategy)
    if tf.distribute.get_replica_context() is None:
        raise policy.cross_replica()
    replicas = strategy.num_replicas_in_sync
    if replicas == 1:
        return _World(1, 1, _has_float64(strategy))
    if isinstance(group, policy.Axes | policy.Sharded):
        raise policy.axis_name_elsewhere(group, "TensorFlow", replicas)
    return _World(replicas, policy.groups(replicas, group), _has_float64(strategy))


def _refuse_parameter_server(strategy: tf.distribute.Strategy) -> None:
    # By its type: its replica context reports one replica.
    if isinstance(strategy, tf.distribute.ParameterServerStrategy | tf.distribute.experimental.ParameterServerStrategy):
        raise policy.parameter_server()


def _has_float64(strategy: tf.distribute.Strategy) -> bool:
    return not isinstance(strategy, tf.distribute.TPUStrategy | tf.distribute.experimental.TPUStrategy)


def _moments_in_pairs(world: _World, n: tf.Tensor, k: tf.Tensor, s: tf.Tensor, q: tf.Tensor) -> Moments:
    """Moments without float64: the mean is a pair (hi, lo)."""
    count, at_least_one = tf.cast(n, k.dtype), tf.cast(tf.maximum(n, 1), k.dtype)
    r, m2 = s / at_least_one, maths.local_m2(count, s, q, maximum=tf.maximum)
    if world.replicas > GATHERED_REPLICAS:
        return _own(world, *_merge_by_two_sums(world, n, k, r, m2))
    # Counts above 2²⁴ are not exact in float32, and an integer's bits in a float payload are a denormal that adding
    # flushes to 0: so the floats travel as the bits of integers.
    bits = tf.int64 if k.dtype == tf.float64 else tf.int32
    payload = tf.concat([tf.cast(n, bits)[None], tf.bitcast(tf.concat([k, r, m2], 0), bits)], 0)[None]
    if world.replicas > 1:
        payload = tf.distribute.get_replica_context().all_gather(payload, axis=0)
    if world.groups > 1:
        payload = tf.reshape(payload, [world.groups, world.replicas // world.groups, 1 + 3 * k.shape[0]])
    counts = payload[..., :1]
    ks, rs, m2s = tf.split(tf.bitcast(payload[..., 1:], k.dtype), 3, axis=-1)
    largest = tf.argmax(counts, -2)
    pivot = tf.gather(ks, largest, axis=-2, batch_dims=counts.shape.rank - 2)
    _, (hi, lo), variance = maths.merge(
        tf.cast(counts, k.dtype),
        ks,
        rs,
        m2s,
        pivot,
        add=lambda v: tf.reduce_sum(v, -2, keepdims=True),
        maximum=tf.maximum,
        where=tf.where,
    )
    return _own(world, tf.reduce_sum(counts, -2), (hi[..., 0, :], lo[..., 0, :]), variance[..., 0, :])


def _merge_by_two_sums(world: _World, n: tf.Tensor, k: tf.Tensor, r: tf.Tensor, m2: tf.Tensor) -> tuple[Any, Any, Any]:
    """Two sums whose length does not depend on the number of replicas: first the mean, then what lies around it."""
    unit = 4096
    count = tf.cast(n, k.dtype)
    parts = tf.cast(tf.stack([n // unit, n % unit]), k.dtype)
    first = world.sum_by_group(tf.concat([parts, count * (k + r)], 0))
    counts = tf.cast(first[..., :1], tf.int64) * unit + tf.cast(first[..., 1:2], tf.int64)
    totals = tf.cast(tf.maximum(counts, 1), k.dtype)
    m = first[..., 2:] / totals
    rest = (k - world.of_own_group(m)) + r
    second = world.sum_by_group(tf.concat([count * rest, m2 + count * rest * rest], 0))
    lo, around = (half / totals for half in tf.split(second, 2, axis=-1))
    variance = maths.variance_or_one(tf.cast(counts, k.dtype), around - lo * lo, maximum=tf.maximum)
    return counts, maths.two_sum(m, lo), variance


def _own(world: _World, counts: tf.Tensor, means: Any, variances: tf.Tensor) -> Moments:
    """This replica's moments from those of all groups, and their average for the moving statistics."""
    own = Moments(
        tf.reshape(world.of_own_group(counts), []), _map(means, world.of_own_group), world.of_own_group(variances), world.replicas
    )
    if world.groups == 1:
        return own
    total = tf.reduce_sum(counts)
    weights = tf.cast(counts, variances.dtype) / tf.cast(tf.maximum(total, 1), variances.dtype)
    mean = tf.reduce_sum(tf.where(counts > 0, weights * _joined(means), 0.0), 0)
    variance = tf.reduce_sum(tf.where(counts > 0, weights * variances, 0.0), 0)
    return own._replace(average=(total, mean, variance))


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


def _joined(mean: Any) -> tf.Tensor:
    return mean[0] + mean[1] if isinstance(mean, tuple) else mean


def _map(mean: Any, f: Callable[[tf.Tensor], tf.Tensor]) -> Any:
    return tuple(map(f, mean)) if isinstance(mean, tuple) else f(mean)
