"""The demo on TensorFlow: one MirroredStrategy, over GPUs where there are any, else over logical CPU devices."""

from __future__ import annotations

import os
import time
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import numpy as np
import tensorflow as tf

from syncbn.demo import OnStep, Run, Settings
from syncbn.demo.data import Digits, digits
from syncbn.demo.model import NORMS, network

LEARNING_RATE = 0.02


def train(settings: Settings, on_step: OnStep) -> list[Run]:
    """The three runs, one after the other, under one strategy: a second one would break TensorFlow's collectives."""
    tf.get_logger().setLevel("ERROR")
    strategy, images = _strategy(settings.replicas), digits()
    return [_run(name, settings, strategy, images, on_step) for name in NORMS]


def _strategy(replicas: int) -> tf.distribute.MirroredStrategy:
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        return tf.distribute.MirroredStrategy([f"/gpu:{i}" for i in range(min(replicas, len(gpus)))])
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * replicas)
    return tf.distribute.MirroredStrategy([f"/cpu:{i}" for i in range(replicas)])


def _run(name: str, settings: Settings, strategy: Any, images: Digits, on_step: OnStep) -> Run:
    keras.utils.set_random_seed(settings.seed)
    with strategy.scope():
        model = network(NORMS[name])
        model.compile(
            keras.optimizers.SGD(LEARNING_RATE, momentum=0.9),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
    output_off, gradient_off = _off_from_one_replica(name, settings, strategy, model, images)
    size = settings.batch * strategy.num_replicas_in_sync
    # Keras's unsynchronised layer becomes NaN where a replica is empty, so the last, incomplete batch is dropped.
    data = tf.data.Dataset.from_tensor_slices((images.train_images, images.train_labels))
    data = data.shuffle(len(images.train_images), seed=settings.seed).batch(size, drop_remainder=True)
    clock = _Clock(name, settings.epochs * len(data), on_step)
    test = tf.data.Dataset.from_tensor_slices((images.test_images, images.test_labels)).batch(120)
    history = model.fit(data, epochs=settings.epochs, validation_data=test, callbacks=[clock], shuffle=False, verbose=0).history
    return Run(
        name, history["val_accuracy"], clock.seconds_per_step(), _statistics_apart(strategy, model), output_off, gradient_off
    )


class _Clock(keras.callbacks.Callback):
    """Reports every step, and times those after the first epoch, or, where there is no second, after the first step."""

    def __init__(self, name: str, steps: int, on_step: OnStep):
        super().__init__()
        self.name, self.steps, self.on_step = name, steps, on_step
        self.done, self.started, self.seconds = 0, 0.0, []  # type: int, float, list[float]

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.started = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.seconds.append(time.perf_counter() - self.started)
        self.done += 1
        self.on_step(self.name, self.done, self.steps)

    def seconds_per_step(self) -> float:
        return float(np.median(self.seconds[1:] or self.seconds))


def _off_from_one_replica(
    name: str, settings: Settings, strategy: Any, model: keras.Model, images: Digits
) -> tuple[float, float]:
    """How far the first batch norm's output and input gradient are from those of one replica with the whole batch."""
    convolution, norm = model.layers[0], model.layers[1]
    replicas = strategy.num_replicas_in_sync
    x = np.asarray(convolution(images.train_images[: replicas * settings.batch]))
    dy = np.random.default_rng(settings.seed).normal(size=x.shape).astype("float32")
    with strategy.scope():
        layer = NORMS[name]()
        layer.build(x.shape)
        layer.set_weights(norm.get_weights())
    alone = NORMS[name]()
    alone.build(x.shape)
    alone.set_weights(norm.get_weights())

    def step(layer: Any, x: Any, dy: Any) -> tuple[Any, Any]:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        return y, tape.gradient(y, x, dy)

    def share(context: Any) -> tuple[tf.Tensor, tf.Tensor]:
        part = slice(context.replica_id_in_sync_group * settings.batch, (context.replica_id_in_sync_group + 1) * settings.batch)
        return tf.constant(x[part]), tf.constant(dy[part])

    shares = strategy.experimental_distribute_values_from_function(share)
    many = tf.function(lambda shares: strategy.run(lambda share: step(layer, *share), args=(shares,)))(shares)
    one = step(alone, tf.constant(x), tf.constant(dy))
    y_off, dx_off = (
        float(np.abs(np.concatenate(strategy.experimental_local_results(m)) - np.asarray(o)).max())
        for m, o in zip(many, one, strict=True)
    )
    return y_off, dx_off


def _statistics_apart(strategy: Any, model: keras.Model) -> float:
    apart = 0.0
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            for weight in layer.non_trainable_weights:
                values = np.stack(strategy.experimental_local_results(weight.value))
                apart = max(apart, float(np.ptp(values, axis=0).max()))
    return apart
