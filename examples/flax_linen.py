"""Flax Linen: a batch norm over all devices, made of `sync_batch_norm`, in a small model that trains under `jax.shard_map`.

Run it on 4 host devices: XLA_FLAGS=--xla_force_host_platform_device_count=4 python examples/flax_linen.py
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import AxisType, PartitionSpec

from syncbn.functional import sync_batch_norm


class SyncBatchNorm(nn.Module):
    """As `flax.linen.BatchNorm`, with the statistics of all devices along `axis_name`."""

    axis_name: str | None = None
    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """x: [..., features]; mask: x's shape without the features, True where a value counts."""
        features = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (features,))
        bias = self.param("bias", nn.initializers.zeros, (features,))
        mean = self.variable("batch_stats", "mean", jnp.zeros, (features,))
        var = self.variable("batch_stats", "var", jnp.ones, (features,))
        if not train:
            return (x - mean.value) / jnp.sqrt(var.value + self.epsilon) * scale + bias
        # `init` runs outside of the map, so no axis has a name there.
        axis_name = () if self.is_initializing() else self.axis_name
        y, batch_mean, batch_var, count = sync_batch_norm(x, scale, bias, epsilon=self.epsilon, mask=mask, axis_name=axis_name)
        if not self.is_initializing():
            weight = jnp.where(count > 0, 1 - self.momentum, 0.0)  # a batch that is masked everywhere moves nothing
            mean.value = (1 - weight) * mean.value + weight * batch_mean
            var.value = (1 - weight) * var.value + weight * batch_var
        return y


class Model(nn.Module):
    """Two dense layers with a batch norm between."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """[batch, 8] to [batch, 1]."""
        x = SyncBatchNorm(self.axis_name)(nn.Dense(16)(x), train=train)
        return nn.Dense(1)(jax.nn.relu(x))


def train(devices: int, x: np.ndarray, y: np.ndarray, steps: int = 5) -> dict[str, Any]:
    """The model's variables after some steps of SGD, every step on the whole of x and y, cut among the devices."""
    model = Model(axis_name="data")
    variables = model.init(jax.random.key(0), x, train=True)
    optimizer = optax.sgd(0.1)
    carried = variables["params"], variables["batch_stats"], optimizer.init(variables["params"])

    def step(carried, x, y):
        parameters, statistics, slots = carried

        def loss_of(parameters):
            variables = {"params": parameters, "batch_stats": statistics}
            found, updated = model.apply(variables, x, train=True, mutable=["batch_stats"])
            # Averaged inside what is differentiated: with check_vma=True the gradients are the whole batch's then.
            return jax.lax.pmean(jnp.mean((found - y) ** 2), "data"), updated["batch_stats"]

        gradients, statistics = jax.grad(loss_of, has_aux=True)(parameters)
        updates, slots = optimizer.update(gradients, slots)
        return optax.apply_updates(parameters, updates), statistics, slots

    # AxisType.Auto: arrays that lie on no mesh yet, as NumPy's do, are cut where the step needs them.
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    same, cut = PartitionSpec(), PartitionSpec("data")
    step = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(same, cut, cut), out_specs=same))
    for _ in range(steps):
        carried = step(carried, x, y)
    return {"params": carried[0], "batch_stats": carried[1]}


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 8)).astype("float32")
    y = np.sin(x.sum(1, keepdims=True))
    many, one = train(jax.device_count(), x, y), train(1, x, y)
    apart = max(np.abs(np.asarray(a) - np.asarray(b)).max() for a, b in zip(*map(jax.tree.leaves, (many, one)), strict=True))
    print(f"{jax.device_count()} devices and one device end up {apart:.1e} apart")
