"""Flax NNX: a batch norm over all devices, made of `sync_batch_norm`, in a small model that trains under `jax.shard_map`.

Run it on 4 host devices: XLA_FLAGS=--xla_force_host_platform_device_count=4 python examples/flax_nnx.py
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from syncbn.functional import sync_batch_norm


class SyncBatchNorm(nnx.Module):
    """As `flax.nnx.BatchNorm`, with the statistics of all devices along `axis_name`."""

    def __init__(self, features: int, *, axis_name: str | None = None, momentum: float = 0.9, epsilon: float = 1e-5):
        self.scale, self.bias = nnx.Param(jnp.ones(features)), nnx.Param(jnp.zeros(features))
        self.mean, self.var = nnx.BatchStat(jnp.zeros(features)), nnx.BatchStat(jnp.ones(features))
        self.axis_name, self.momentum, self.epsilon = axis_name, momentum, epsilon

    def __call__(self, x: jax.Array, *, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """x: [..., features]; mask: x's shape without the features, True where a value counts."""
        if not train:
            return (x - self.mean[...]) / jnp.sqrt(self.var[...] + self.epsilon) * self.scale[...] + self.bias[...]
        y, mean, var, count = sync_batch_norm(
            x, self.scale[...], self.bias[...], epsilon=self.epsilon, mask=mask, axis_name=self.axis_name
        )
        weight = jnp.where(count > 0, 1 - self.momentum, 0.0)  # a batch that is masked everywhere moves nothing
        self.mean[...] = (1 - weight) * self.mean[...] + weight * mean
        self.var[...] = (1 - weight) * self.var[...] + weight * var
        return y


class Model(nnx.Module):
    """Two dense layers with a batch norm between."""

    def __init__(self, axis_name: str | None, rngs: nnx.Rngs):
        self.first, self.norm = nnx.Linear(8, 16, rngs=rngs), SyncBatchNorm(16, axis_name=axis_name)
        self.last = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """[batch, 8] to [batch, 1]."""
        return self.last(jax.nn.relu(self.norm(self.first(x), train=train)))


def train(devices: int, x: np.ndarray, y: np.ndarray, steps: int = 5) -> nnx.State:
    """The model's state after some steps of SGD, every step on the whole of x and y, cut among the devices."""
    axis = "data" if devices > 1 else None
    graph, parameters, statistics = nnx.split(Model(axis, nnx.Rngs(0)), nnx.Param, nnx.BatchStat)
    optimizer = optax.sgd(0.1)
    carried = parameters, statistics, optimizer.init(parameters)

    def step(carried, x, y):
        parameters, statistics, slots = carried

        def loss_of(parameters):
            model = nnx.merge(graph, parameters, statistics, copy=True)
            loss = jnp.mean((model(x, train=True) - y) ** 2)
            # Averaged inside what is differentiated: with check_vma=True the gradients are the whole batch's then.
            return jax.lax.pmean(loss, axis) if axis else loss, nnx.state(model, nnx.BatchStat)

        gradients, statistics = jax.grad(loss_of, has_aux=True)(parameters)
        updates, slots = optimizer.update(gradients, slots)
        return optax.apply_updates(parameters, updates), statistics, slots

    if axis:
        mesh, same, cut = Mesh(np.array(jax.devices()[:devices]), (axis,)), PartitionSpec(), PartitionSpec(axis)
        step = jax.shard_map(step, mesh=mesh, in_specs=(same, cut, cut), out_specs=same)
    step = jax.jit(step)
    for _ in range(steps):
        carried = step(carried, x, y)
    return nnx.merge_state(*carried[:2])


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 8)).astype("float32")
    y = np.sin(x.sum(1, keepdims=True))
    many, one = train(jax.device_count(), x, y), train(1, x, y)
    apart = max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (many, one)), strict=True))
    print(f"{jax.device_count()} devices and one device end up {apart:.1e} apart")
