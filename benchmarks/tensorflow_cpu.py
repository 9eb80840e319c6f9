"""TensorFlow on logical CPU devices: forward + backward of one layer on every replica, in one tf.function."""

from __future__ import annotations

import argparse
import functools
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from baselines import Adapter, keras_adapters
from rows import quantiles
from timing import case_name, case_option, chosen, in_turns, rounds_option, seconds

SHAPES = [(8, 28, 28, 64), (4, 14, 14, 256), (2, 56, 56, 64), (4, 256)]
MEMORY_SHAPE = (16, 112, 112, 64)
REPLICAS = 4


def options(parser: argparse.ArgumentParser) -> None:
    case_option(parser)
    rounds_option(parser, 15)
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory, which takes a process per layer")


def measure(given: argparse.Namespace, record: Callable[..., Any]) -> None:
    strategy = strategy_of(REPLICAS)
    record = functools.partial(record, versions=("tensorflow-cpu", "keras", "numpy"), dtype="float32")
    times(strategy, chosen(SHAPES, given.cases, case_name), given.rounds, record)
    accuracy(strategy, record)
    if not given.no_memory:
        memory(record)


def strategy_of(replicas: int) -> Any:
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * replicas)
    return tf.distribute.MirroredStrategy([f"/cpu:{i}" for i in range(replicas)])


def step_of(strategy: Any, adapter: Adapter, shape: tuple[int, ...]) -> Callable[[], None]:
    """A function without arguments that runs one step and returns when it is done."""
    with strategy.scope():
        layer = adapter.make(shape)
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


def times(strategy: Any, shapes: list[tuple[int, ...]], rounds: int, record: Callable[..., Any]) -> None:
    """Seconds per step."""
    for shape in shapes:
        steps = {name: step_of(strategy, adapter, shape) for name, adapter in keras_adapters().items()}
        for step in steps.values():
            seconds(step, 3)
        repeats = 5 if np.prod(shape) > 100_000 else 25
        found = in_turns(steps, rounds, lambda step, repeats=repeats: seconds(step, repeats))
        common = {
            "case": case_name(shape),
            "measure": "step",
            "unit": "s",
            "replicas": REPLICAS,
            "shape": shape,
            "rounds": rounds,
        }
        for name, taken in found.items():
            record(subject=name, values=quantiles(taken), **common)


def accuracy(strategy: Any, record: Callable[..., Any]) -> None:
    """The variance's largest relative error, replicas' means one standard deviation apart, against float64."""
    shape = (500, 8)
    for mean in (1e2, 1e3, 1e4):
        rng = np.random.default_rng(0)
        inputs = [(mean + i + rng.standard_normal(shape)).astype("float32") for i in range(REPLICAS)]
        truth = np.concatenate(inputs).astype("float64").var(0)
        x = strategy.experimental_distribute_values_from_function(
            lambda context, inputs=inputs: tf.constant(inputs[context.replica_id_in_sync_group])
        )
        # The third layer does not claim to know this variance.
        for name, adapter in list(keras_adapters(momentum=0.0).items())[:2]:
            with strategy.scope():
                layer = adapter.make(shape)
                layer.build((None, shape[1]))
            tf.function(lambda x, layer=layer: strategy.run(lambda x: layer(x, training=True), args=(x,)))(x)
            error = float(np.abs(np.asarray(layer.moving_variance) / truth - 1).max())
            record(
                subject=name,
                case=f"{case_name(shape)}, mean/std {mean:.0e}",
                measure="relative error of the variance",
                unit="1",
                values=error,
                replicas=REPLICAS,
                shape=shape,
                mean=mean,
            )


def memory(record: Callable[..., Any]) -> None:
    """Peak memory above that of a process that holds x and dy, in units of one replica's input; a process each."""
    for name in keras_adapters():
        command = [sys.executable, str(Path(__file__)), name]
        out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout
        record(
            subject=name,
            case=case_name(MEMORY_SHAPE),
            measure="peak memory",
            unit="inputs",
            values=json.loads(out.splitlines()[-1]),
            shape=MEMORY_SHAPE,
        )


def peak(name: str) -> float:
    """One replica's peak above what its input, cotangent and input gradient need, in inputs."""
    strategy = strategy_of(1)
    small = step_of(strategy, keras_adapters()[name], (2, *MEMORY_SHAPE[1:]))
    small()  # what TensorFlow itself takes
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = step_of(strategy, keras_adapters()[name], MEMORY_SHAPE)
    for _ in range(3):
        step()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (after - before) * 1024 / (4 * float(np.prod(MEMORY_SHAPE)))


if __name__ == "__main__":
    print(peak(sys.argv[1]))
