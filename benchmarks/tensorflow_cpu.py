"""TensorFlow on logical CPU devices: forward + backward of one layer on every replica, in one tf.function."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from peers import tensorflow_peers
from rows import quantiles

SHAPES = [(8, 28, 28, 64), (4, 14, 14, 256), (2, 56, 56, 64), (4, 256)]
MEMORY_SHAPE = (16, 112, 112, 64)
REPLICAS = 4


def strategy_of(replicas: int) -> Any:
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * replicas)
    return tf.distribute.MirroredStrategy([f"/cpu:{i}" for i in range(replicas)])


def step_of(strategy: Any, make: Any, shape: tuple[int, ...]) -> Any:
    """A function without arguments that runs one step and returns when it is done."""
    import tensorflow as tf

    with strategy.scope():
        layer = make()
        layer.build((None, *shape[1:]))

    def values(seed: int) -> Any:
        def one(context: Any) -> Any:
            rng = np.random.default_rng([seed, context.replica_id_in_sync_group])
            return tf.constant(rng.standard_normal(shape, np.float32))

        return strategy.experimental_distribute_values_from_function(one)

    def replica(x: Any, dy: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        return tape.gradient(y, [x, layer.gamma.value, layer.beta.value], dy)

    everywhere = tf.function(lambda x, dy: strategy.run(replica, args=(x, dy)))
    x, dy = values(0), values(1)

    def step() -> None:
        for value in tf.nest.flatten(everywhere(x, dy)):
            for local in strategy.experimental_local_results(value):
                local[(0,) * local.shape.rank].numpy()

    return step


def times(strategy: Any, rounds: int) -> list[dict[str, Any]]:
    """Rows of seconds per step; peers take turns within each round, in an order that rotates."""
    peers, rows = tensorflow_peers(), []
    for shape in SHAPES:
        steps = {name: step_of(strategy, make, shape) for name, make in peers.items()}
        for step in steps.values():
            for _ in range(3):
                step()
        repeats, seconds, order = 5 if np.prod(shape) > 100_000 else 25, {name: [] for name in steps}, list(steps)
        for _ in range(rounds):
            for name in order:
                start = time.perf_counter()
                for _ in range(repeats):
                    steps[name]()
                seconds[name].append((time.perf_counter() - start) / repeats)
            order = order[1:] + order[:1]
        common = {"quantity": "seconds per step", "dtype": "float32", "shape": shape, "replicas": REPLICAS, "rounds": rounds}
        rows += [{"peer": name, **common, **quantiles(seconds[name])} for name in steps]
    return rows


def accuracy(strategy: Any) -> list[dict[str, Any]]:
    """Rows of the variance's largest relative error, replicas' means one standard deviation apart, against float64."""
    import tensorflow as tf

    rows, shape = [], (500, 8)
    for mean in (1e2, 1e3, 1e4):
        rng = np.random.default_rng(0)
        inputs = [(mean + i + rng.standard_normal(shape)).astype("float32") for i in range(REPLICAS)]
        truth = np.concatenate(inputs).astype("float64").var(0)
        x = strategy.experimental_distribute_values_from_function(
            lambda context, inputs=inputs: tf.constant(inputs[context.replica_id_in_sync_group])
        )
        for name, make in list(tensorflow_peers(momentum=0.0).items())[:2]:  # the third does not claim to know this variance
            with strategy.scope():
                layer = make()
                layer.build((None, shape[1]))
            tf.function(lambda x, layer=layer: strategy.run(lambda x: layer(x, training=True), args=(x,)))(x)
            error = float(np.abs(np.asarray(layer.moving_variance) / truth - 1).max())
            common = {
                "quantity": f"variance error at mean/std {mean:.0e}",
                "dtype": "float32",
                "shape": shape,
                "replicas": REPLICAS,
            }
            rows.append({"peer": name, **common, "median": error})
    return rows


def memory() -> list[dict[str, Any]]:
    """Rows of peak memory above that of a process that holds x and dy, in units of one replica's input; a process each."""
    rows = []
    for name in tensorflow_peers():
        command = [sys.executable, str(Path(__file__)), name]
        out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout
        common = {"quantity": "peak memory, inputs", "dtype": "float32", "shape": MEMORY_SHAPE, "replicas": 1}
        rows.append({"peer": name, **common, "median": json.loads(out.splitlines()[-1])})
    return rows


def peak(name: str) -> float:
    """One replica's peak above what its input, cotangent and input gradient need, in inputs."""
    strategy = strategy_of(1)
    small = step_of(strategy, tensorflow_peers()[name], (2, *MEMORY_SHAPE[1:]))
    small()  # what TensorFlow itself takes
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = step_of(strategy, tensorflow_peers()[name], MEMORY_SHAPE)
    for _ in range(3):
        step()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (after - before) * 1024 / (4 * float(np.prod(MEMORY_SHAPE)))


if __name__ == "__main__":
    print(peak(sys.argv[1]))
