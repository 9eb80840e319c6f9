"""The variance's error at large means, on the CPU, 4 replicas: TensorFlow, PyTorch and JAX, each in a process of its own."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from baselines import MOMENTUM, OURS, keras_adapters

MEANS = (1, 10, 100, 1_000, 10_000, 100_000)
SEEDS = range(5)
REPLICAS, SHAPE = 4, (512, 8)
TORCH, FLAX = "torch BatchNorm, one process", "flax axis_name"
PACKAGES = {"tensorflow": ("tensorflow-cpu", "keras"), "torch": ("torch",), "jax": ("jax", "flax")}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--frameworks", nargs="+", choices=list(PACKAGES), default=list(PACKAGES), help="default: all")


def measure(given: argparse.Namespace, record: Callable[..., Any]) -> None:
    """Largest relative error over the channels, the median of five seeds."""
    for framework in given.frameworks:
        found: dict[tuple[str, int], list[float]] = {}
        for row in of_process(framework):
            found.setdefault((row["subject"], row["mean"]), []).append(row["error"])
        for (subject, mean), errors in found.items():
            record(
                subject=subject,
                case=f"{framework}, mean/std {mean:.0e}",
                measure="relative error of the variance",
                unit="1",
                values={"median": statistics.median(errors), "each": errors},
                replicas=1 if subject == TORCH else REPLICAS,
                versions=(*PACKAGES[framework], "numpy"),
                framework=framework,
                mean=mean,
                dtype="float32",
                shape=SHAPE,
            )


def of_process(framework: str) -> list[dict[str, Any]]:
    """What a framework's process prints."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "KERAS_BACKEND": framework, "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={REPLICAS}"
    command = [sys.executable, __file__, framework]
    printed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return [json.loads(line) for line in printed.splitlines() if line.startswith('{"subject"')]


def cases() -> Iterator[tuple[int, list[np.ndarray]]]:
    """Means, and the replicas' inputs: their means are one standard deviation apart."""
    for mean in MEANS:
        for seed in SEEDS:
            rng = np.random.default_rng(seed)
            yield mean, [(mean + i + rng.standard_normal(SHAPE)).astype("float32") for i in range(REPLICAS)]


def show(subject: str, mean: int, inputs: list[np.ndarray], variance: Any, ddof: int = 0) -> None:
    """Prints a row: the largest relative error over the channels."""
    truth = np.concatenate(inputs).astype("float64").var(0, ddof=ddof)
    error = float(np.abs(np.asarray(variance, "float64") / truth - 1).max())
    print(json.dumps({"subject": subject, "mean": mean, "error": error}), flush=True)


def tensorflow() -> None:
    import tensorflow as tf
    from tensorflow_cpu import strategy_of

    strategy = strategy_of(REPLICAS)
    with strategy.scope():
        layers = {name: adapter.make(SHAPE) for name, adapter in list(keras_adapters(momentum=0.0).items())[:2]}
        for layer in layers.values():
            layer.build((None, SHAPE[1]))
    steps = {
        name: tf.function(lambda x, layer=layer: strategy.run(lambda x: layer(x, training=True), args=(x,)))
        for name, layer in layers.items()
    }
    for mean, inputs in cases():
        x = strategy.experimental_distribute_values_from_function(
            lambda context, inputs=inputs: tf.constant(inputs[context.replica_id_in_sync_group])
        )
        for name, step in steps.items():
            step(x)
            show(name, mean, inputs, layers[name].moving_variance)


def torch() -> None:
    import torch as framework

    for mean, inputs in cases():
        layer = framework.nn.BatchNorm1d(SHAPE[1], momentum=1.0)
        layer(framework.from_numpy(np.concatenate(inputs)))
        show(TORCH, mean, inputs, layer.running_var, ddof=1)
    with tempfile.TemporaryDirectory() as folder:
        framework.multiprocessing.spawn(torch_rank, (str(Path(folder) / "meeting"),), REPLICAS)


def torch_rank(rank: int, path: str) -> None:
    import torch as framework

    import syncbn

    framework.distributed.init_process_group("gloo", f"file://{path}", rank=rank, world_size=REPLICAS)
    for mean, inputs in cases():
        layer = syncbn.SyncBatchNorm(SHAPE[1], momentum=1.0)
        layer(framework.from_numpy(inputs[rank]))
        if rank == 0:
            show(OURS, mean, inputs, layer.running_var, ddof=1)
    framework.distributed.destroy_process_group()


def jax() -> None:
    import jax as framework
    from baselines import jax_adapters
    from jax.sharding import Mesh, PartitionSpec

    mesh, cut, same = Mesh(np.array(framework.devices()), ("data",)), PartitionSpec("data"), PartitionSpec()
    zeros = np.zeros(SHAPE[1], "float32")
    adapters = jax_adapters("data")
    for name in (OURS, FLAX):
        layer = adapters[name].make(SHAPE)

        def variance(x: Any, layer: Any = layer) -> Any:
            # With old statistics of 0 the new variance is the batch's, times 1 - momentum.
            return layer(x, (zeros + 1, zeros), (zeros, zeros))[1][1]

        step = framework.jit(framework.shard_map(variance, mesh=mesh, in_specs=cut, out_specs=same, check_vma=False))
        for mean, inputs in cases():
            show(name, mean, inputs, np.asarray(step(np.concatenate(inputs)), "float64") / (1 - MOMENTUM))


if __name__ == "__main__":
    if importlib.util.find_spec("syncbn") is None:
        sys.exit("syncbn must be importable: set PYTHONPATH=src, or install it.")
    {"tensorflow": tensorflow, "torch": torch, "jax": jax}[sys.argv[1]]()
