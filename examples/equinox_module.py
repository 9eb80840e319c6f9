"""Equinox: a batch norm made of `sync_batch_norm`. `jax.vmap` names the batch; `jax.jit` divides it among the devices.

Run it on 4 host devices: XLA_FLAGS=--xla_force_host_platform_device_count=4 python examples/equinox_module.py
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from syncbn.functional import sync_batch_norm


class SyncBatchNorm(eqx.Module):
    """As `equinox.nn.BatchNorm`, called on one example, whose statistics are those of all examples along `axis_name`."""

    scale: jax.Array
    bias: jax.Array
    moving: eqx.nn.StateIndex
    axis_name: str = eqx.field(static=True)
    momentum: float = eqx.field(static=True)
    epsilon: float = eqx.field(static=True)

    def __init__(self, features: int, axis_name: str, momentum: float = 0.9, epsilon: float = 1e-5):
        self.scale, self.bias = jnp.ones(features), jnp.zeros(features)
        self.moving = eqx.nn.StateIndex((jnp.zeros(features), jnp.ones(features)))
        self.axis_name, self.momentum, self.epsilon = axis_name, momentum, epsilon

    def __call__(self, x: jax.Array, state: eqx.nn.State, *, train: bool) -> tuple[jax.Array, eqx.nn.State]:
        """x: [features, ...], one example with the channels first."""
        mean, var = state.get(self.moving)
        if not train:
            shape = [-1] + [1] * (x.ndim - 1)
            a = self.scale / jnp.sqrt(var + self.epsilon)
            return x * a.reshape(shape) + (self.bias - mean * a).reshape(shape), state
        y, batch_mean, batch_var, count = sync_batch_norm(
            x, self.scale, self.bias, axis=0, epsilon=self.epsilon, axis_name=self.axis_name
        )
        # A batch that is empty, or masked everywhere, moves nothing.
        m = jnp.where(count > 0, self.momentum, 1.0)
        return y, state.set(self.moving, (m * mean + (1 - m) * batch_mean, m * var + (1 - m) * batch_var))


class Model(eqx.Module):
    """Two linear layers with a batch norm between."""

    first: eqx.nn.Linear
    norm: SyncBatchNorm
    last: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        first, last = jax.random.split(key)
        self.first, self.last = eqx.nn.Linear(8, 16, key=first), eqx.nn.Linear(16, 1, key=last)
        self.norm = SyncBatchNorm(16, axis_name="batch")

    def __call__(self, x: jax.Array, state: eqx.nn.State, *, train: bool) -> tuple[jax.Array, eqx.nn.State]:
        """One example: [8] to [1]."""
        x, state = self.norm(self.first(x), state, train=train)
        return self.last(jax.nn.relu(x)), state


def train(devices: int, x: np.ndarray, y: np.ndarray, steps: int = 5) -> tuple[Model, eqx.nn.State]:
    """The model and its state after some steps of SGD, every step on the whole of x and y, cut among the devices."""
    model, state = eqx.nn.make_with_state(Model)(jax.random.key(0))
    optimizer = optax.sgd(0.1)
    slots = optimizer.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state, slots, x, y):
        def loss_of(model):
            each = jax.vmap(
                lambda x, state: model(x, state, train=True), axis_name="batch", in_axes=(0, None), out_axes=(0, None)
            )
            found, updated = each(x, state)
            return jnp.mean((found - y) ** 2), updated

        gradients, state = eqx.filter_grad(loss_of, has_aux=True)(model)
        updates, slots = optimizer.update(gradients, slots)
        return eqx.apply_updates(model, updates), state, slots

    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    x, y = (jax.device_put(v, NamedSharding(mesh, PartitionSpec("data"))) for v in (x, y))
    model, state, slots = eqx.filter_shard((model, state, slots), NamedSharding(mesh, PartitionSpec()))
    for _ in range(steps):
        model, state, slots = step(model, state, slots, x, y)
    return model, state


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 8)).astype("float32")
    y = np.sin(x.sum(1, keepdims=True))
    many, one = (jax.tree.leaves(eqx.filter(train(n, x, y), eqx.is_array)) for n in (jax.device_count(), 1))
    apart = max(np.abs(np.asarray(a) - np.asarray(b)).max() for a, b in zip(many, one, strict=True))
    print(f"{jax.device_count()} devices and one device end up {apart:.1e} apart")
