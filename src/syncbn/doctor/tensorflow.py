"""TensorFlow: the devices, the strategy, which kernels run, and a known batch over the replicas."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import numpy as np
import tensorflow as tf

from syncbn.doctor import Report, version
from syncbn.doctor.batch import EPSILON, errors, known
from syncbn.functional import sync_batch_norm
from syncbn.tensorflow import engine, replicas

# On a CPU, so that there is something to exchange.
CPU_DEVICES = 2


def report() -> Report:
    """Synchronises a known batch under a MirroredStrategy over all GPUs, or over logical CPU devices made for the check."""
    tf.get_logger().setLevel("ERROR")
    gpus = tf.config.list_physical_devices("GPU")
    # A training that runs beside this one needs the memory.
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    if not gpus:
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * CPU_DEVICES)
    kind, count = ("GPU", len(gpus)) if gpus else ("CPU", CPU_DEVICES)
    strategy = tf.distribute.MirroredStrategy([f"/{kind.lower()}:{i}" for i in range(count)])
    batch = known(count)
    passes: list[str] = []
    mean, variance, y, dx = _synchronised(strategy, batch, passes)
    copied = replicas.copies_messages(strategy)
    exchange = "replicas copy their sums to each other" if copied else "one all-reduce of the strategy each way"
    lines = [
        ("tensorflow", tf.__version__),
        ("keras", f"{version('keras')}, KERAS_BACKEND={os.environ.get('KERAS_BACKEND', 'not set')}"),
        ("devices", _devices(gpus)),
        ("strategy", f"MirroredStrategy over {count} {kind}{'s' * (count > 1)}{'' if gpus else ', made for this check'}"),
        ("TF_CONFIG", "set: several workers; this check ran on this one alone" if "TF_CONFIG" in os.environ else "not set"),
        ("kernels", "XLA clusters on GPUs" if passes[0].endswith("gpu") else "TensorFlow's operators on CPUs"),
        ("exchange", exchange if count > 1 else "none: there is one replica"),
    ]
    return Report(lines, count, errors(batch, mean, variance, y, dx))


def _devices(gpus: list[Any]) -> str:
    if not gpus:
        return "no GPU that TensorFlow sees"
    names = [tf.config.experimental.get_device_details(gpu).get("device_name", gpu.name) for gpu in gpus]
    return ", ".join(f"{names.count(name)} × {name}" for name in sorted(set(names)))


def _synchronised(strategy: Any, batch: Any, passes: list[str]) -> list[np.ndarray]:
    """mean, variance, output and input gradient of every replica; notes which passes are traced."""
    share = strategy.experimental_distribute_values_from_function
    x, dy = (share(lambda context, v=v: tf.constant(v[context.replica_id_in_sync_group])) for v in batch)
    channels = batch.x.shape[-1]

    def replica(x: tf.Tensor, dy: tf.Tensor) -> tuple[tf.Tensor, ...]:
        passes.append(engine.passes_for(x).__name__)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y, mean, variance, _ = sync_batch_norm(x, tf.ones(channels), tf.zeros(channels), epsilon=EPSILON)
        return mean, variance, y, tape.gradient(y, x, dy)

    found = tf.function(lambda x, dy: strategy.run(replica, args=(x, dy)))(x, dy)
    return [np.stack([v.numpy() for v in strategy.experimental_local_results(value)]) for value in found]
