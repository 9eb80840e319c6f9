"""TensorFlow on the GPUs of one process: layers in a row, forward + backward, and a ResNet-50.

Parts: layers and resnet (a step is a tf.function), layers-compiled and resnet-compiled (XLA compiles each replica's step as a
whole: `syncbn.compiled_step`, and for Keras's synchronised layer also TensorFlow alone), shapes (what inputs whose shape changes
cost), exchange (what a message costs).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from baselines import IN_COMPILED_STEP, KERAS_SYNC, OURS, Adapter, keras_adapters
from timing import case_name, case_option, chosen, in_turns, rounds_option, seconds

import syncbn
from syncbn.tensorflow import passes_gpu
from syncbn.tensorflow._private import barrier
from syncbn.tensorflow.replicas import Replicas

SHAPES = [
    (32, 112, 112, 64),
    (32, 56, 56, 256),
    (32, 28, 28, 512),
    (32, 14, 14, 1024),
    (32, 7, 7, 2048),
    (2, 200, 336, 256),
    (4, 32, 32, 64),
]
CASES = [(dtype, shape) for dtype in ("float32", "bfloat16") for shape in SHAPES]
# Of a ResNet-50, a replica.
IMAGES = [32, 8]
LAYERS, REPEATS = 10, 10
PARTS = ("layers", "layers-compiled", "resnet", "resnet-compiled", "shapes", "exchange")


def options(parser: argparse.ArgumentParser) -> None:
    case_option(parser)
    rounds_option(parser, 5)
    parser.add_argument("--replicas", type=int, default=1, help="how many GPUs train")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))


def measure(given: argparse.Namespace, record: Callable[..., Any]) -> None:
    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)
    strategy = tf.distribute.MirroredStrategy([f"/gpu:{i}" for i in range(given.replicas)])
    name = tf.config.experimental.get_device_details(tf.config.list_physical_devices("GPU")[0])["device_name"]
    record = functools.partial(
        record, replicas=given.replicas, device=name, versions=("tensorflow", "keras", "numpy"), rounds=given.rounds
    )
    for part in given.parts:
        compiled = part.endswith("-compiled")
        if part.startswith("layers"):
            cases = chosen(CASES, given.cases, lambda case: case_name(case[1], case[0]))
            layers(strategy, cases, given.rounds, compiled, record)
        elif part.startswith("resnet"):
            resnet(strategy, chosen(IMAGES, given.cases, resnet_name), given.rounds, compiled, record)
        elif part == "shapes":
            shapes(strategy, record)
        elif given.replicas > 1:
            exchange(strategy, given.rounds, record)


def layers(strategy: Any, cases: Any, rounds: int, compiled: bool, record: Callable[..., Any]) -> None:
    """Microseconds of a layer."""
    copied = copy_rate()
    for dtype, shape in cases:
        adapters = keras_adapters(dtype=dtype if dtype == "float32" else f"mixed_{dtype}")
        steps = {
            subject: layer_step(strategy, adapters[name], shape, dtype, compile_)
            for subject, (name, compile_) in subjects(compiled).items()
        }
        first, found = timed(strategy, steps, rounds)
        # x for the moments; x and y; x and dy for the sums; x, dy and dx.
        floor = 8 * np.prod(shape) * (4 if dtype == "float32" else 2) / copied * 1e6
        for name, taken in found.items():
            record(
                subject=name,
                case=case_name(shape, dtype),
                measure="layer, step compiled by XLA" if compiled else "layer",
                unit="µs",
                values=[second / LAYERS * 1e6 for second in taken],
                floor=floor,
                first_step_s=first[name],
            )


def subjects(compiled: bool) -> dict[str, tuple[str, Callable[..., Any] | None]]:
    """By a row's subject: a layer's name, and what compiles each replica's part of a step, or None."""
    if not compiled:
        return {name: (name, None) for name in keras_adapters()}
    found: dict[str, tuple[str, Callable[..., Any] | None]] = {name: (name, syncbn.compiled_step) for name in keras_adapters()}
    found[KERAS_SYNC] = KERAS_SYNC, lambda step: tf.function(step, jit_compile=True, autograph=False)
    found[f"{KERAS_SYNC}, {IN_COMPILED_STEP}"] = KERAS_SYNC, syncbn.compiled_step
    return found


def resnet_name(images: int) -> str:
    return f"ResNet-50, {images} images a replica"


def resnet(strategy: Any, sizes: list[int], rounds: int, compiled: bool, record: Callable[..., Any]) -> None:
    """Images a second of all replicas together, SGD included, in mixed_bfloat16."""
    for images in sizes:
        steps = {subject: resnet_step(strategy, name, images, how) for subject, (name, how) in subjects(compiled).items()}
        first, found = timed(strategy, steps, rounds)
        for name, taken in found.items():
            record(
                subject=name,
                case=resnet_name(images),
                measure="training, step compiled by XLA" if compiled else "training",
                unit="images/s",
                values=[images * strategy.num_replicas_in_sync / second for second in taken],
                first_step_s=first[name],
            )


def shapes(strategy: Any, record: Callable[..., Any]) -> None:
    """Seconds of `fit` with a partial last batch, and of 50 image sizes, by our rule, by plain operators and by clusters."""
    # The first run of each shape chooses cuDNN's algorithms for the convolutions, which all kinds then share.
    with nothing_compiled():
        fit_seconds(strategy)
        sizes_seconds(strategy)
    kinds = {OURS: contextlib.nullcontext, "plain operators": nothing_compiled, "clusters": everything_compiled}
    for name, passes in kinds.items():
        with passes():
            # The rule compiles what `fit` traces: clusters would find their programs made.
            for epoch, taken in enumerate(() if name == "clusters" else fit_seconds(strategy)):
                measure = "fit, first epoch" if epoch == 0 else "fit, later epoch"
                record(subject=name, case="11 batches of 64, then one of 16", measure=measure, unit="s", values=taken)
            record(subject=name, case="50 image sizes", measure="steps, first time", unit="s", values=sizes_seconds(strategy))


@contextlib.contextmanager
def everything_compiled() -> Iterator[None]:
    kept, passes_gpu.is_compiled = passes_gpu.is_compiled, lambda x, axes: True
    yield
    passes_gpu.is_compiled = kept


@contextlib.contextmanager
def nothing_compiled() -> Iterator[None]:
    kept, passes_gpu.is_compiled = passes_gpu.is_compiled, lambda x, axes: False
    yield
    passes_gpu.is_compiled = kept


def small_model(size: int | None) -> Any:
    blocks = []
    for channels in (32, 64, 128):
        blocks += [keras.layers.Conv2D(channels, 3, strides=2), syncbn.SyncBatchNormalization(), keras.layers.ReLU()]
    return keras.Sequential(
        [keras.Input((size, size, 3)), *blocks, keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10)]
    )


def fit_seconds(strategy: Any) -> list[float]:
    """Two epochs of a dataset whose batch size the trace does not know."""
    rng = np.random.default_rng(0)
    data = tf.data.Dataset.from_tensor_slices((rng.standard_normal((720, 64, 64, 3), np.float32), rng.integers(0, 10, 720)))
    with strategy.scope():
        model = small_model(64)
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    taken = []
    for _ in range(2):
        start = time.perf_counter()
        model.fit(data.batch(64), verbose=0)
        taken.append(time.perf_counter() - start)
    return taken


def sizes_seconds(strategy: Any) -> float:
    """A training step for each of 50 image sizes, all unknown to the trace."""
    with strategy.scope():
        model = small_model(None)

    def step(x: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True)))
        return tape.gradient(loss, [v.value for v in model.trainable_variables])

    run = tf.function(
        lambda x: strategy.run(step, args=(x,)), input_signature=[tf.TensorSpec([None, None, None, 3])], autograph=False
    )
    start = time.perf_counter()
    for i in range(50):
        results = run(tf.random.stateless_normal((4, 64 + 2 * i, 164 - 2 * i, 3), (0, i)))
    wait(strategy, results)
    return time.perf_counter() - start


def exchange(strategy: Any, rounds: int, record: Callable[..., Any]) -> None:
    """Microseconds of one exchange: a chain of 50 in one graph, by copies and by TensorFlow's all-reduce."""
    replicas = strategy.num_replicas_in_sync

    def chain(kind: Replicas, numbers: int) -> Callable[[], Any]:
        def replica() -> Any:
            v = tf.zeros(numbers, tf.float64)
            for _ in range(50):
                v = tf.add_n(kind.messages(v)) / replicas
            return v

        return tf.function(lambda: strategy.run(replica), autograph=False)

    for numbers in (129, 4097):
        kinds = {"copies": Replicas(replicas, 1, True, True), "all_reduce": Replicas(replicas, 1, True)}
        steps = {name: chain(kind, numbers) for name, kind in kinds.items()}
        for name, taken in timed(strategy, steps, rounds)[1].items():
            values = [second / 50 * 1e6 for second in taken]
            record(subject=name, case=f"{numbers} float64", measure="exchange", unit="µs", values=values)


def copy_rate() -> float:
    """Bytes a second that passes over memory read and write."""
    x, passes = tf.ones([1 << 28]), 20

    @tf.function(autograph=False)
    def chain(x: Any) -> Any:
        for _ in range(passes):
            x = tf.sqrt(x)
        return x[:1]

    chain(x)
    taken = statistics.median(seconds(lambda: chain(x).numpy()) for _ in range(9))
    return passes * 2 * 4 * (1 << 28) / taken


def everywhere(strategy: Any, step: Callable[..., Any]) -> Callable[..., Any]:
    """A step on every replica, as a function of per-replica values."""
    return tf.function(lambda *values: strategy.run(step, args=values), autograph=False)


def on_own_device(strategy: Any, make: Callable[[int], Any]) -> Any:
    """Different data on every replica, each on its own GPU, as an input pipeline leaves them."""

    def one(context: Any) -> Any:
        replica = context.replica_id_in_sync_group
        with tf.device(strategy.extended.worker_devices[replica]):
            return tf.identity(make(replica))

    return strategy.experimental_distribute_values_from_function(one)


def values_of(strategy: Any, shape: tuple[int, ...], dtype: str, seed: int) -> Any:
    """A tensor of normal values for every replica."""
    return on_own_device(strategy, lambda replica: tf.cast(tf.random.stateless_normal(shape, (seed, replica)), dtype))


@tf.custom_gradient
def in_memory(y: Any) -> Any:
    """y. XLA writes it, and its gradient, to memory: otherwise it computes bare layers in a row as one, which no model has."""
    return barrier(y)[0], lambda dy: barrier(dy)[0]


def layer_step(strategy: Any, adapter: Adapter, shape: tuple[int, ...], dtype: str, compile_: Any) -> Callable[[], Any]:
    """Forward and backward through `LAYERS` layers in a row."""
    with strategy.scope():
        row = [adapter.make(shape) for _ in range(LAYERS)]
        for layer in row:
            layer.build((None, *shape[1:]))
    weights = [w.value for layer in row for w in layer.trainable_weights]

    def gradients(x: Any, dy: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = x
            for layer in row:
                y = layer(in_memory(y) if compile_ else y, training=True)
        return tape.gradient(y, [x, *weights], dy)

    def step(x: Any, dy: Any) -> Any:
        found = (compile_(gradients) if compile_ else gradients)(x, dy)
        # One value stands for all: TensorFlow copies what a step returns to the first GPU.
        with tf.control_dependencies(found):
            return tf.reshape(found[0], [-1])[:1]

    run = everywhere(strategy, step)
    x, dy = values_of(strategy, shape, dtype, 0), values_of(strategy, shape, dtype, 1)
    return lambda: run(x, dy)


def resnet_step(strategy: Any, name: str, images: int, compile_: Any) -> Callable[[], Any]:
    """A training step of a ResNet-50."""
    keras.mixed_precision.set_dtype_policy("mixed_bfloat16")
    with strategy.scope():
        model = keras.applications.ResNet50(weights=None)
        if name == OURS:
            syncbn.convert(model)
        for layer in model.layers:
            if name == KERAS_SYNC and isinstance(layer, keras.layers.BatchNormalization):
                layer.synchronized = True
        optimizer = keras.optimizers.SGD(0.01)
        optimizer.build(model.trainable_variables)
    keras.mixed_precision.set_dtype_policy("float32")
    loss_of = keras.losses.SparseCategoricalCrossentropy(reduction="sum")

    def gradients(x: Any, labels: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = loss_of(labels, model(x, training=True)) / (images * strategy.num_replicas_in_sync)
        return loss, tape.gradient(loss, [v.value for v in model.trainable_variables])

    def step(x: Any, labels: Any) -> Any:
        loss, found = (compile_(gradients) if compile_ else gradients)(x, labels)
        optimizer.apply(found, model.trainable_variables)
        return loss

    run = everywhere(strategy, step)
    x = values_of(strategy, (images, 224, 224, 3), "float32", 0)
    labels = on_own_device(strategy, lambda replica: np.random.default_rng(replica).integers(0, 1000, images))
    return lambda: run(x, labels)


def wait(strategy: Any, results: Any) -> None:
    """Returns when all devices are done: each works in order, so one value of the last call is enough."""
    for local in strategy.experimental_local_results(tf.nest.flatten(results)[0]):
        tf.reshape(local, [-1])[:1].numpy()


def timed(strategy: Any, steps: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, float], dict[str, list[float]]]:
    """(seconds of the first step, of a later one in each round)."""

    def some(step: Callable[[], Any], repeats: int = REPEATS) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            results = step()
        wait(strategy, results)
        return (time.perf_counter() - start) / repeats

    first = {name: some(step, 1) for name, step in steps.items()}
    for step in steps.values():
        some(step, 3)
    return first, in_turns(steps, rounds, some)
