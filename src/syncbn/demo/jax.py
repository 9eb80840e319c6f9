"""The demo on JAX: one `jax.shard_map` loop round `stateless_call`, over GPUs where there are any, else over host devices."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"
# Keras imports TensorFlow where it is installed.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from syncbn.demo import LOCAL, Run, Task, Watch
from syncbn.demo.data import Digits, batches, digits
from syncbn.demo.model import LAYERS, network

AXIS = "replica"
LEARNING_RATE = 0.02
# Weights are the same on all replicas; arrays of images, and moving statistics, are each replica's own.
SAME, OWN = PartitionSpec(), PartitionSpec(AXIS)


@dataclass
class _Program:
    """What one batch norm needs to train with any batch and seed: JAX compiles it once for each size of batch."""

    model: keras.Model
    optimizer: Any
    step: Callable[..., Any]
    accuracy: Callable[..., Any]


def train(replicas: int, tasks: Sequence[Task], watch: Watch) -> Iterator[Run]:
    """The runs, one after the other, on one mesh."""
    jax.config.update("jax_num_cpu_devices", replicas)
    mesh, images, programs = Mesh(np.array(jax.devices()[:replicas]), (AXIS,)), digits(), {}
    for task in tasks:
        if task.norm not in programs:
            programs[task.norm] = _program(task.norm, mesh)
        yield _run(task, mesh, programs[task.norm], images, watch)


def _layer(norm: str) -> Callable[[], Any]:
    """Keras's own layer knows no axes: under shard_map it is local, as data-parallel training without synchronisation is."""
    return LAYERS[norm] if norm == LOCAL else partial(LAYERS[norm], axis_name=AXIS)


def _program(norm: str, mesh: Mesh) -> _Program:
    model = network(_layer(norm))
    optimizer = keras.optimizers.SGD(LEARNING_RATE, momentum=0.9)
    optimizer.build(model.trainable_variables)
    return _Program(model, optimizer, _step(model, optimizer, mesh), _accuracy(model))


def _run(task: Task, mesh: Mesh, program: _Program, images: Digits, watch: Watch) -> Run:
    keras.utils.set_random_seed(task.seed)
    model = network(_layer(task.norm))
    errors = _errors_against_one_replica(task, mesh, model, images) if task.compare else ()
    state = _state(model, program.optimizer, mesh)
    rows = batches(task.batch * mesh.size, task.seed)
    accuracies, seconds = [], []
    for epoch in range(task.epochs):
        for drawn in islice(rows, task.steps):
            started = time.perf_counter()
            state = jax.block_until_ready(program.step(*state, images.train_images[drawn], images.train_labels[drawn]))
            seconds.append(time.perf_counter() - started)
            watch.step(task)
        weights, statistics, _ = jax.device_get(state)
        # A file would hold the first replica's statistics.
        first = [s[0] for s in statistics]
        accuracies.append(float(program.accuracy(weights, first, images.test_images, images.test_labels)))
        watch.epoch(task, epoch + 1, accuracies[-1])
    apart = max(float(np.ptp(s, axis=0).max()) for s in jax.device_get(state[1]))
    late = seconds[task.steps :] or seconds[1:] or seconds
    return Run(task, accuracies, float(np.median(late)), apart, *errors)


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


def _errors_against_one_replica(task: Task, mesh: Mesh, model: keras.Model, images: Digits) -> tuple[float, float]:
    """How far the first batch norm's output and input gradient are from those of one replica with the whole batch."""
    convolution, norm = model.layers[0], model.layers[1]
    x = np.asarray(convolution(images.train_images[: mesh.size * task.batch]))
    dy = np.random.default_rng(task.seed).normal(size=x.shape).astype("float32")
    alone = LAYERS[task.norm]()
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
    y_error, dx_error = (float(np.abs(np.asarray(m) - np.asarray(o)).max()) for m, o in zip(many, one, strict=True))
    return y_error, dx_error
