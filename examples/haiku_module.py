"""Haiku: a batch norm over all devices, made of `sync_batch_norm`, in a small model that trains under `jax.shard_map`.

Run it on 4 host devices: XLA_FLAGS=--xla_force_host_platform_device_count=4 python examples/haiku_module.py
"""

from __future__ import annotations

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, PartitionSpec

from syncbn.functional import sync_batch_norm


class SyncBatchNorm(hk.Module):
    """As `haiku.BatchNorm`, with the statistics of all devices along `axis_name`."""

    def __init__(self, axis_name: str | None = None, momentum: float = 0.9, epsilon: float = 1e-5, name: str | None = None):
        super().__init__(name)
        self.axis_name, self.momentum, self.epsilon = axis_name, momentum, epsilon

    def __call__(self, x: jax.Array, *, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """x: [..., features]; mask: x's shape without the features, True where a value counts."""
        shape = x.shape[-1:]
        scale, bias = (hk.get_parameter(name, shape, init=init) for name, init in (("scale", jnp.ones), ("bias", jnp.zeros)))
        mean, var = (hk.get_state(name, shape, init=init) for name, init in (("mean", jnp.zeros), ("var", jnp.ones)))
        if not train:
            return (x - mean) / jnp.sqrt(var + self.epsilon) * scale + bias
        # `init` runs outside of the map, so no axis has a name there.
        axis_name = () if hk.running_init() else self.axis_name
        y, batch_mean, batch_var, count = sync_batch_norm(x, scale, bias, epsilon=self.epsilon, mask=mask, axis_name=axis_name)
        if not hk.running_init():
            weight = jnp.where(count > 0, 1 - self.momentum, 0.0)  # a batch that is masked everywhere moves nothing
            hk.set_state("mean", (1 - weight) * mean + weight * batch_mean)
            hk.set_state("var", (1 - weight) * var + weight * batch_var)
        return y


def forward(x: jax.Array, *, train: bool) -> jax.Array:
    """Two linear layers with a batch norm between: [batch, 8] to [batch, 1]."""
    x = SyncBatchNorm(axis_name="data")(hk.Linear(16)(x), train=train)
    return hk.Linear(1)(jax.nn.relu(x))


def train(devices: int, x: np.ndarray, y: np.ndarray, steps: int = 5) -> tuple[Any, Any]:
    """(parameters, state) after some steps of SGD, every step on the whole of x and y, cut among the devices."""
    model = hk.without_apply_rng(hk.transform_with_state(forward))
    parameters, statistics = model.init(jax.random.key(0), x, train=True)
    optimizer = optax.sgd(0.1)
    carried = parameters, statistics, optimizer.init(parameters)

    def step(carried, x, y):
        parameters, statistics, slots = carried

        def loss_of(parameters):
            found, updated = model.apply(parameters, statistics, x, train=True)
            # Averaged inside what is differentiated: with check_vma=True the gradients are the whole batch's then.
            return jax.lax.pmean(jnp.mean((found - y) ** 2), "data"), updated

        gradients, statistics = jax.grad(loss_of, has_aux=True)(parameters)
        updates, slots = optimizer.update(gradients, slots)
        return optax.apply_updates(parameters, updates), statistics, slots

    # AxisType.Auto: arrays that lie on no mesh yet, as NumPy's do, are cut where the step needs them.
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    same, cut = PartitionSpec(), PartitionSpec("data")
    step = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(same, cut, cut), out_specs=same))
    for _ in range(steps):
        carried = step(carried, x, y)
    return carried[:2]


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 8)).astype("float32")
    y = np.sin(x.sum(1, keepdims=True))
    many, one = train(jax.device_count(), x, y), train(1, x, y)
    apart = max(np.abs(np.asarray(a) - np.asarray(b)).max() for a, b in zip(*map(jax.tree.leaves, (many, one)), strict=True))
    print(f"{jax.device_count()} devices and one device end up {apart:.1e} apart")
