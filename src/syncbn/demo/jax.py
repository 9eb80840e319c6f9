"""The demo on JAX: one `jax.shard_map` loop round `stateless_call`, over GPUs where there are any, else over host devices."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from syncbn.demo import OnStep, Run, Settings
from syncbn.demo.data import Digits, digits
from syncbn.demo.model import NORMS, network

AXIS = "replica"
LEARNING_RATE = 0.02
# Weights are the same on all replicas; arrays of images, and moving statistics, are each replica's own.
SAME, OWN = PartitionSpec(), PartitionSpec(AXIS)


def train(settings: Settings, on_step: OnStep) -> list[Run]:
    """The three runs, one after the other, on the same mesh."""
    jax.config.update("jax_num_cpu_devices", settings.replicas)
    devices = jax.devices()[: settings.replicas]
    mesh, images = Mesh(np.array(devices), (AXIS,)), digits()
    return [_run(name, settings, mesh, images, on_step) for name in NORMS]


def _norm(name: str) -> Callable[[], Any]:
    """Keras's own layer knows no axes: under shard_map it is local, as data-parallel training without synchronisation is."""
    return partial(NORMS[name], axis_name=AXIS) if name.startswith("Sync") else NORMS[name]


def _run(name: str, settings: Settings, mesh: Mesh, images: Digits, on_step: OnStep) -> Run:
    keras.utils.set_random_seed(settings.seed)
    model = network(_norm(name))
    optimizer = keras.optimizers.SGD(LEARNING_RATE, momentum=0.9)
    optimizer.build(model.trainable_variables)
    output_off, gradient_off = _off_from_one_replica(name, settings, mesh, model, images)
    step, accuracy = _step(model, optimizer, mesh), _accuracy(model)
    state = _state(model, optimizer, mesh)
    size, count = settings.batch * mesh.size, len(images.train_images)
    steps, rng = count // size, np.random.default_rng(settings.seed)
    accuracies, seconds = [], []
    for epoch in range(settings.epochs):
        # The last, incomplete batch is dropped: all shards of an array have the same size.
        for i, rows in enumerate(rng.permutation(count)[: steps * size].reshape(steps, size)):
            started = time.perf_counter()
            state = jax.block_until_ready(step(*state, images.train_images[rows], images.train_labels[rows]))
            seconds.append(time.perf_counter() - started)
            on_step(name, epoch * steps + i + 1, settings.epochs * steps)
        weights, statistics, _ = jax.device_get(state)
        # A file would hold the first replica's statistics.
        accuracies.append(float(accuracy(weights, [s[0] for s in statistics], images.test_images, images.test_labels)))
    apart = max(float(np.ptp(s, axis=0).max()) for s in jax.device_get(state[1]))
    late = seconds[steps:] or seconds[1:] or seconds
    return Run(name, accuracies, float(np.median(late)), apart, output_off, gradient_off)


def _state(model: keras.Model, optimizer: Any, mesh: Mesh) -> tuple[Any, ...]:
    """(weights, statistics, the optimizer's variables), placed with their sharding, so that one program serves all steps."""
    own = [np.stack([np.asarray(v.value)] * mesh.size) for v in model.non_trainable_variables]
    same = [np.asarray(v.value) for v in model.trainable_variables], [np.asarray(v.value) for v in optimizer.variables]
    weights, slots = jax.device_put(same, jax.NamedSharding(mesh, SAME))
    return weights, jax.device_put(own, jax.NamedSharding(mesh, OWN)), slots


def _step(model: keras.Model, optimizer: Any, mesh: Mesh) -> Callable[..., Any]:
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def replica(weights: Any, statistics: Any, slots: Any, x: Any, labels: Any) -> Any:
        def loss(weights: Any) -> Any:
            logits, moved = model.stateless_call(weights, [s[0] for s in statistics], x, training=True)
            return loss_of(labels, logits), moved

        gradients, moved = jax.grad(loss, has_aux=True)(weights)
        weights, slots = optimizer.stateless_apply(slots, jax.lax.pmean(gradients, AXIS), weights)
        return weights, [m[None] for m in moved], slots

    specs: dict[str, Any] = {"in_specs": (SAME, OWN, SAME, OWN, OWN), "out_specs": (SAME, OWN, SAME)}
    return jax.jit(jax.shard_map(replica, mesh=mesh, check_vma=False, **specs), donate_argnums=(0, 1, 2))


def _accuracy(model: keras.Model) -> Callable[..., Any]:
    @jax.jit
    def accuracy(weights: Any, statistics: Any, x: Any, labels: Any) -> Any:
        logits, _ = model.stateless_call(weights, statistics, x, training=False)
        return jnp.mean(jnp.argmax(logits, -1) == labels)

    return accuracy


def _off_from_one_replica(name: str, settings: Settings, mesh: Mesh, model: keras.Model, images: Digits) -> tuple[float, float]:
    """How far the first batch norm's output and input gradient are from those of one replica with the whole batch."""
    convolution, norm = model.layers[0], model.layers[1]
    x = np.asarray(convolution(images.train_images[: mesh.size * settings.batch]))
    dy = np.random.default_rng(settings.seed).normal(size=x.shape).astype("float32")
    alone = NORMS[name]()
    alone.build(x.shape)

    def step(layer: Any, x: Any, dy: Any) -> tuple[Any, Any]:
        weights, statistics = (
            [jnp.asarray(v.value) for v in part] for part in (norm.trainable_variables, norm.non_trainable_variables)
        )
        y, pull = jax.vjp(lambda x: layer.stateless_call(weights, statistics, x, training=True)[0], x)
        return y, pull(dy)[0]

    specs: dict[str, Any] = {"in_specs": (OWN, OWN), "out_specs": (OWN, OWN)}
    many = jax.jit(jax.shard_map(partial(step, norm), mesh=mesh, check_vma=False, **specs))(x, dy)
    one = jax.jit(partial(step, alone))(x, dy)
    y_off, dx_off = (float(np.abs(np.asarray(m) - np.asarray(o)).max()) for m, o in zip(many, one, strict=True))
    return y_off, dx_off
