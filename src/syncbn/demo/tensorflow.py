"""The demo on TensorFlow: one MirroredStrategy, over GPUs where there are any, else over logical CPU devices."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import numpy as np
import tensorflow as tf

from syncbn.demo import Run, Task, Watch
from syncbn.demo.data import Digits, digits
from syncbn.demo.model import LAYERS, network

LEARNING_RATE = 0.02


def train(replicas: int, tasks: Sequence[Task], watch: Watch) -> Iterator[Run]:
    """The runs, one after the other, under one strategy: a second one would break TensorFlow's collectives."""
    tf.get_logger().setLevel("ERROR")
    strategy, images = _strategy(replicas), digits()
    for task in tasks:
        yield _run(task, strategy, images, watch)


def _strategy(replicas: int) -> tf.distribute.MirroredStrategy:
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        return tf.distribute.MirroredStrategy([f"/gpu:{i}" for i in range(min(replicas, len(gpus)))])
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * replicas)
    return tf.distribute.MirroredStrategy([f"/cpu:{i}" for i in range(replicas)])


def _run(task: Task, strategy: Any, images: Digits, watch: Watch) -> Run:
    keras.utils.set_random_seed(task.seed)
    with strategy.scope():
        model = network(LAYERS[task.norm])
        model.compile(
            keras.optimizers.SGD(LEARNING_RATE, momentum=0.9),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
    errors = _errors_against_one_replica(task, strategy, model, images) if task.compare else ()
    data = tf.data.Dataset.from_tensor_slices((images.train_images, images.train_labels))
    # Keras's unsynchronised layer becomes NaN where a replica is empty, so the last, incomplete batch is dropped.
    data = data.shuffle(len(images.train_images), seed=task.seed)
    data = data.batch(task.batch * strategy.num_replicas_in_sync, drop_remainder=True).repeat()
    clock = _Clock(task, watch)
    test = tf.data.Dataset.from_tensor_slices((images.test_images, images.test_labels)).batch(120)
    given: dict[str, Any] = {"epochs": task.epochs, "steps_per_epoch": task.steps, "shuffle": False, "verbose": 0}
    history = model.fit(data, validation_data=test, callbacks=[clock], **given).history
    return Run(task, history["val_accuracy"], clock.seconds_per_step(), _statistics_apart(strategy, model), *errors)


class _Clock(keras.callbacks.Callback):
    """Reports every step and epoch, and times the steps. The first one is left out: it compiles."""

    def __init__(self, task: Task, watch: Watch):
        super().__init__()
        self.task, self.watch = task, watch
        self.started, self.seconds = 0.0, []  # type: float, list[float]

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.started = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.seconds.append(time.perf_counter() - self.started)
        self.watch.step(self.task)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.watch.epoch(self.task, epoch + 1, logs["val_accuracy"])

    def seconds_per_step(self) -> float:
        return float(np.median(self.seconds[1:] or self.seconds))


def _errors_against_one_replica(task: Task, strategy: Any, model: keras.Model, images: Digits) -> tuple[float, float]:
    """How far the first batch norm's output and input gradient are from those of one replica with the whole batch."""
    convolution, norm = model.layers[0], model.layers[1]
    replicas = strategy.num_replicas_in_sync
    x = np.asarray(convolution(images.train_images[: replicas * task.batch]))
    dy = np.random.default_rng(task.seed).normal(size=x.shape).astype("float32")
    with strategy.scope():
        layer = LAYERS[task.norm]()
        layer.build(x.shape)
        layer.set_weights(norm.get_weights())
    alone = LAYERS[task.norm]()
    alone.build(x.shape)
    alone.set_weights(norm.get_weights())

    def step(layer: Any, x: Any, dy: Any) -> tuple[Any, Any]:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        return y, tape.gradient(y, x, dy)

    def share(context: Any) -> tuple[tf.Tensor, tf.Tensor]:
        part = slice(context.replica_id_in_sync_group * task.batch, (context.replica_id_in_sync_group + 1) * task.batch)
        return tf.constant(x[part]), tf.constant(dy[part])

    shares = strategy.experimental_distribute_values_from_function(share)
    many = tf.function(lambda shares: strategy.run(lambda share: step(layer, *share), args=(shares,)))(shares)
    one = step(alone, tf.constant(x), tf.constant(dy))
    y_error, dx_error = (
        float(np.abs(np.concatenate(strategy.experimental_local_results(m)) - np.asarray(o)).max())
        for m, o in zip(many, one, strict=True)
    )
    return y_error, dx_error


def _statistics_apart(strategy: Any, model: keras.Model) -> float:
    apart = 0.0
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            for weight in layer.non_trainable_weights:
                values = np.stack(strategy.experimental_local_results(weight.value))
                apart = max(apart, float(np.ptp(values, axis=0).max()))
    return apart
