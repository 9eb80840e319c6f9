"""The JAX engine: the contract's verbs for named axes, for arrays that a mesh shards, and for one replica.

`group` says which. `Axes`: the replicas along named axes. `Sharded`: those of a mesh; a `shard_map` over its batch axis is opened
here, because XLA's partitioner by itself sends three or four messages. Anything else: JAX's global arrays; XLA inserts the
messages of their sums.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from syncbn import validation
from syncbn.contract import (
    Moments,
    Operators,
    check_variables,
    default_train_step,
    ensure_channels,
    materialize,
    record_or_replay,
    should_update_statistics,
)
from syncbn.groups import Activation, Axes, Group, Local, Sharded
from syncbn.jax import mapped
from syncbn.jax.axes import Replicas, manual_axes, may_be_divided, on_one_device, replicas_of, unnamed_axes, warn_of_unnamed
from syncbn.jax.mapped import arithmetic_dtype

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

ACTIVATIONS: dict[str, Callable[[jax.Array, float], jax.Array]] = {
    "relu": lambda y, slope: jax.nn.relu(y),
    "silu": lambda y, slope: jax.nn.silu(y),
    "leaky_relu": lambda y, slope: jnp.where(y > 0, y, slope * y),
}


def supports_jit() -> bool:
    """Always: everything here can be compiled."""
    return True


def moments(
    x: jax.Array, *, axes: tuple[int, ...], mask: jax.Array | None = None, group: Group = None, layer: str | None = None
) -> Moments:
    """Measures the global batch by one gather of integers that hold (n, k, r, m2); above 64 replicas by two sums."""
    x = jnp.asarray(x)
    sharded = _sharded(x, axes, group)
    if sharded is None:
        replicas = _replicas(x, group)
        if not isinstance(group, Axes | Local) and not replicas.names and (unnamed := unnamed_axes(x)):
            warn_of_unnamed(unnamed, layer)
        measured = mapped.moments(x, axes, mask, replicas)
        # The partitioner's sums are of all replicas, so all skip a step that is not finite.
        return measured._replace(replicas=_of_distribution(group)) if replicas.local else measured
    n, mean, variance, average = _moments_sharded(x, mask, axes, sharded)
    return Moments(n, mean, variance, sharded.mesh.shape[sharded.batch], average)


def normalize(
    x: jax.Array,
    moments: Moments,
    scale: jax.Array,
    offset: jax.Array,
    *,
    axes: tuple[int, ...],
    epsilon: float,
    mask: jax.Array | None = None,
    group: Group = None,
    activation: Activation | None = None,
    residual: jax.Array | None = None,
    layer: str | None = None,
) -> jax.Array:
    """activation(scale·(x − mean)/√(variance + epsilon) + offset + residual); one sum over replicas, in the backward pass."""
    x = jnp.asarray(x)
    sharded = None if moments.count is None else _sharded(x, axes, group)
    # Rounded once, at the end.
    dtype = x.dtype if residual is None and activation is None else arithmetic_dtype(x)
    if moments.count is None:
        y = mapped.normalize(x, moments, scale, offset, axes, epsilon, mask, Replicas(), dtype)
    elif sharded is None:
        y = mapped.normalize(x, moments, scale, offset, axes, epsilon, mask, _replicas(x, group), dtype)
    else:
        y = _normalize_sharded(x, mask, moments[:3], scale, offset, axes, epsilon, sharded, dtype)
    if residual is not None:
        y = y + residual.astype(y.dtype)
    if activation is not None:
        y = ACTIVATIONS[activation.name](y, activation.slope)
    return y.astype(x.dtype)


train_step = default_train_step(
    moments,
    normalize,
    should_update_statistics,
    Operators(jnp.where, jnp.maximum, jnp.isfinite, jnp.all, lambda v, dtype: v.astype(dtype)),
)


# Compiled, so that eager calls do not dispatch a mapped program operator by operator.
@partial(jax.jit, static_argnums=(2, 3))
def _moments_sharded(x: jax.Array, mask: jax.Array | None, axes: tuple[int, ...], sharded: Sharded) -> tuple[Any, ...]:
    """(count, mean, variance, average) of global arrays: [C], or, with groups, [replicas, C] of each one's group."""
    specs, grouped = _Specs(sharded, axes, x.ndim), sharded.size is not None

    def local(x: jax.Array, mask: jax.Array | None) -> Any:
        n, mean, variance, _, average = mapped.moments(x, axes, mask, replicas_of(specs.axes))
        # One count per channel, which tells the layer's update that the mesh may divide the channels.
        own = jnp.broadcast_to(n, variance.shape), mean, variance
        if average is None:
            return own, None
        return jax.tree.map(lambda v: v[None], own), (jnp.broadcast_to(average[0], variance.shape), *average[1:])

    each = specs.replica if grouped else specs.channel
    out = (each, (each, each), each), (specs.channel,) * 3 if grouped else None
    (n, mean, variance), average = specs.map(local, (specs.x, specs.mask(mask)), out)(x, mask)
    if sharded.channels is None:
        n, average = n[..., 0], average and (average[0][0], *average[1:])
    return n, mean, variance, average


@partial(jax.jit, static_argnums=(5, 6, 7, 8))
def _normalize_sharded(
    x: jax.Array,
    mask: jax.Array | None,
    own: tuple[Any, ...],
    scale: jax.Array,
    offset: jax.Array,
    axes: tuple[int, ...],
    epsilon: float,
    sharded: Sharded,
    dtype: Any,
) -> jax.Array:
    specs = _Specs(sharded, axes, x.ndim)

    def local(x: jax.Array, mask: jax.Array | None, *vectors: jax.Array) -> jax.Array:
        # A vector of shape [1, C] holds this replica's values.
        n, hi, lo, variance, scale, offset = (v[0] if v.ndim == 2 else v for v in vectors)
        own = Moments(n, (hi, lo), variance)
        return mapped.normalize(x, own, scale, offset, axes, epsilon, mask, replicas_of(specs.axes), dtype)

    n, mean, variance = own
    n = n if n.ndim == variance.ndim else n[..., None]
    vectors = [jnp.broadcast_to(n, variance.shape), *mean, variance, scale, offset]
    return specs.map(local, (specs.x, specs.mask(mask), *map(specs.of, vectors)), specs.x)(x, mask, *vectors)


class _Specs:
    """The partition specs of an input and of the arrays that belong to it. All axes of the mesh are mapped."""

    def __init__(self, sharded: Sharded, axes: tuple[int, ...], rank: int):
        self.sharded = sharded
        self.axes = Axes((sharded.batch,), sharded.size)
        names = [sharded.batch, *[None] * (rank - 1)]
        if sharded.channels is not None:
            names[axes[0]] = sharded.channels
        self.x = PartitionSpec(*names)
        self.channel = PartitionSpec(sharded.channels)
        self.replica = PartitionSpec(sharded.batch, sharded.channels)

    def mask(self, mask: jax.Array | None) -> PartitionSpec | None:
        """A mask has 1 on the channel axes, and may have 1 on the batch axis."""
        if mask is None:
            return None
        return PartitionSpec(None if mask.shape[0] == 1 else self.sharded.batch)

    def of(self, v: jax.Array) -> PartitionSpec:
        """[C], or [replicas, C]."""
        return self.replica if v.ndim == 2 else self.channel

    def map(self, f: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """f on every shard. Types are checked, so that the gradient of a replicated parameter is the total over replicas."""
        return jax.shard_map(f, mesh=self.sharded.mesh, in_specs=in_specs, out_specs=out_specs)


def _sharded(x: jax.Array, axes: tuple[int, ...], group: Group) -> Sharded | None:
    """The mesh over which a `shard_map` is to be opened, or None."""
    if not isinstance(group, Sharded) or manual_axes() or 0 in axes:
        return None
    size = _group_size(group)
    if group.mesh.size == 1 or not may_be_divided(x, group):
        return None
    return group._replace(size=size)


def _of_distribution(group: Group) -> int:
    """How many replicas share a global array that no `shard_map` has divided."""
    return group.mesh.shape[group.batch] if isinstance(group, Sharded) and not manual_axes() else 1


def _group_size(group: Sharded) -> int | None:
    """`group_size`, checked; None where it makes one group."""
    return None if validation.number_of_groups(group.mesh.shape[group.batch], group.size) == 1 else group.size


def _replicas(x: jax.Array, group: Group) -> Replicas:
    """The replicas of the mapped form."""
    several = isinstance(group, Sharded) and group.mesh.size > 1
    if isinstance(group, Sharded):
        if group.batch in manual_axes():
            return replicas_of(Axes((group.batch,), group.size))
        group = _group_size(group)
    if isinstance(group, int) and (several or not on_one_device(x)):
        raise ValueError(
            "`group_size` must come with a way to tell the replicas that train. That is `axis_name`, or a keras.distribution "
            "that divides axis 0 of the input, which must be the batch and no channel axis. Received: "
            f"group_size={group} without, for an input of shape {x.shape}. Give `axis_name`, set a distribution, give a batch "
            "that it divides, or leave `group_size` None."
        )
    return replicas_of(group)
