"""Which TensorFlow replicas meet, and how their moments become those of the global batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from syncbn import maths
from syncbn.contract import Moments
from syncbn.groups import Group, Local
from syncbn.tensorflow._private import compiled_by_xla
from syncbn.validation import check_no_axis_name, number_of_groups

# Up to this many replicas copy their messages to each other: each sends W − 1 copies, where an all-reduce sends two.
COPIED_REPLICAS = 4
# Above this many replicas gathering every replica's moments would cost more than two sums.
GATHERED_REPLICAS = 64


class Replicas(NamedTuple):
    """The replicas that meet: how many, in how many groups, and what they can add."""

    replicas: int
    groups: int
    has_float64: bool
    copied: bool = False  # whether replicas copy messages to each other, in place of an all-reduce

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
        try:
            return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, v)
        except tf.errors.OpError as error:
            raise message_failed(v, error) from error

    def messages(self, v: tf.Tensor) -> list[tf.Tensor]:
        """Tensors, on this replica's device, whose sum is that of v over the group: in the same order on every replica."""
        if not self.copied:
            return [self.sum_of_group(v)]
        context = tf.distribute.get_replica_context()
        return context.merge_call(_copies_for_all, args=(v,))[tf.get_static_value(context.replica_id_in_sync_group)]

    def of_own_group(self, by_group: tf.Tensor) -> tf.Tensor:
        """This replica's part of what `sum_by_group` gives."""
        return by_group if self.groups == 1 else by_group[self.own_group()]

    def sum_of_group(self, v: tf.Tensor) -> tf.Tensor:
        """The sum of v over this replica's group, differentiable."""
        return self.of_own_group(self.sum_by_group(v))


def message_failed(message: tf.Tensor, error: tf.errors.OpError) -> tf.errors.OpError:
    """The error, of the same type, of a message that failed in eager code. A tf.function raises TensorFlow's own error."""
    reason = (error.message.splitlines() or ["no reason given"])[0][:300]
    return type(error)(
        error.node_def,
        error.op,
        "All replicas must run the same synchronised layers in the same order. Received: a message of shape "
        f"{tuple(message.shape)} of a batch normalization (C channels: 1 + 2C numbers in a forward pass, 2C in a backward pass), "
        f"which failed with {reason!r}. Look first for another worker's own error. Let every worker take the same path and "
        "the same number of steps; an empty batch is fine. What one worker runs alone needs training=False.",
    )


def _copies_for_all(strategy: tf.distribute.Strategy, message: Any) -> list[list[tf.Tensor]]:
    """Every replica's message on the device of each replica: a list for each replica, in the order of the replicas."""
    messages = strategy.experimental_local_results(message)
    copies = []
    for own in messages:
        with tf.device(own.device):
            copies.append([v if v is own else tf.identity(v) for v in messages])
    return copies


def replicas_of(group: Group) -> Replicas:
    """Who meets where this is called; raises where nobody can."""
    if isinstance(group, Local):
        return Replicas(1, 1, True)
    strategy = tf.distribute.get_strategy()
    refuse_parameter_server(strategy)
    if tf.distribute.get_replica_context() is None:
        raise RuntimeError(
            "SyncBatchNormalization must train inside a replica. Received: a call with training=True in cross-replica context of "
            "a tf.distribute strategy. Call the model inside strategy.run(...), or use model.fit."
        )
    replicas = strategy.num_replicas_in_sync
    if replicas == 1:
        return Replicas(1, 1, has_float64(strategy))
    groups = number_of_groups(replicas, check_no_axis_name(group, "TensorFlow", replicas))
    return Replicas(replicas, groups, has_float64(strategy), groups == 1 and copies_messages(strategy))


def refuse_parameter_server(strategy: tf.distribute.Strategy) -> None:
    """Raises where workers do not train in step."""
    # By its type: its replica context reports one replica.
    if isinstance(strategy, tf.distribute.ParameterServerStrategy | tf.distribute.experimental.ParameterServerStrategy):
        raise RuntimeError(
            "SyncBatchNormalization must run under a strategy whose replicas train in step. Received: ParameterServerStrategy, "
            "whose workers do not wait for each other. Use MirroredStrategy, MultiWorkerMirroredStrategy or "
            "keras.layers.BatchNormalization."
        )


def has_float64(strategy: tf.distribute.Strategy) -> bool:
    """Whether messages can be float64: not on TPUs."""
    return not isinstance(strategy, tf.distribute.TPUStrategy | tf.distribute.experimental.TPUStrategy)


def copies_messages(strategy: tf.distribute.Strategy) -> bool:
    """Whether replicas copy their messages to each other: a few GPUs of one process, where that costs less than an all-reduce."""
    # A step that XLA compiles cannot wait for other replicas; its all-reduce is XLA's own.
    return (
        isinstance(strategy, tf.distribute.MirroredStrategy)
        and strategy.num_replicas_in_sync <= COPIED_REPLICAS
        and not compiled_by_xla()
        and all("GPU" in device for device in strategy.extended.worker_devices)
    )


def moments_in_pairs(world: Replicas, n: tf.Tensor, k: tf.Tensor, s: tf.Tensor, q: tf.Tensor) -> Moments:
    """Moments without float64: the mean is a pair (hi, lo)."""
    count, at_least_one = tf.cast(n, k.dtype), tf.cast(tf.maximum(n, 1), k.dtype)
    r, m2 = s / at_least_one, maths.local_m2(count, s, q, maximum=tf.maximum)
    if world.replicas > GATHERED_REPLICAS:
        return own_moments(world, *_by_two_sums(world, n, k, r, m2))
    # Counts above 2²⁴ are not exact in float32, and an integer's bits in a float payload are a denormal that adding
    # flushes to 0: so the floats travel as the bits of integers.
    bits = tf.int64 if k.dtype == tf.float64 else tf.int32
    payload = tf.concat([tf.cast(n, bits)[None], tf.bitcast(tf.concat([k, r, m2], 0), bits)], 0)[None]
    if world.replicas > 1:
        try:
            payload = tf.distribute.get_replica_context().all_gather(payload, axis=0)
        except tf.errors.OpError as error:
            raise message_failed(payload, error) from error
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
    return own_moments(world, tf.reduce_sum(counts, -2), (hi[..., 0, :], lo[..., 0, :]), variance[..., 0, :])


def _by_two_sums(world: Replicas, n: tf.Tensor, k: tf.Tensor, r: tf.Tensor, m2: tf.Tensor) -> tuple[Any, Any, Any]:
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


def own_moments(world: Replicas, counts: tf.Tensor, means: Any, variances: tf.Tensor) -> Moments:
    """This replica's moments from those of all groups, and their average for the moving statistics."""
    own = Moments(
        tf.reshape(world.of_own_group(counts), []), _map(means, world.of_own_group), world.of_own_group(variances), world.replicas
    )
    if world.groups == 1:
        return own
    total = tf.reduce_sum(counts)
    weights = tf.cast(counts, variances.dtype) / tf.cast(tf.maximum(total, 1), variances.dtype)
    mean = tf.reduce_sum(tf.where(counts > 0, weights * joined(means), 0.0), 0)
    variance = tf.reduce_sum(tf.where(counts > 0, weights * variances, 0.0), 0)
    return own._replace(average=(total, mean, variance))


def joined(mean: Any) -> tf.Tensor:
    """A mean that may be a pair, as one tensor."""
    return tf.cast(mean[0], mean[1].dtype) + mean[1] if isinstance(mean, tuple | list) else mean


def _map(mean: Any, f: Callable[[tf.Tensor], tf.Tensor]) -> Any:
    return tuple(map(f, mean)) if isinstance(mean, tuple) else f(mean)
