"""One of the two processes of test_multi_worker.py: trains a layer in a loop of its own and writes down what it saw."""

from __future__ import annotations

import sys

import keras
import numpy as np
import tensorflow as tf
from cases import Case

from syncbn import SyncBatchNormalization

BATCHES = [(3, 4, 0, 0), (5, 0, 0, 0), (2, 6, 0, 0)]  # the second step finds the second worker with nothing
CASES = [Case(f"step {i}", batches, (4, 3)) for i, batches in enumerate(BATCHES)]


def train(strategy, rank: int) -> dict[str, np.ndarray]:
    """Three steps of SGD; the outputs, input gradients and final weights."""
    with strategy.scope():
        layer = SyncBatchNormalization(momentum=0.5)
        layer.build((None, 4, 3))
        optimizer = keras.optimizers.SGD(0.1)
        optimizer.build(layer.trainable_variables)

    @tf.function(reduce_retracing=True)
    def step(x, dy):
        def replica(x, dy):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, training=True)
            dx, *gradients = tape.gradient(y, [x, *[w.value for w in layer.trainable_variables]], dy)
            optimizer.apply(gradients, layer.trainable_variables)  # sums them over the replicas
            return y, dx

        return strategy.run(replica, args=(x, dy))

    seen = {}
    for i, case in enumerate(CASES):
        x, dy = (
            strategy.experimental_distribute_values_from_function(lambda _, v=v: tf.constant(v))
            for v in (case.inputs(2)[rank], case.cotangents(2)[rank])
        )
        y, dx = step(x, dy)
        seen[f"y{i}"], seen[f"dx{i}"] = (np.asarray(strategy.experimental_local_results(v)[0]) for v in (y, dx))
    for name, weight in zip(("gamma", "beta", "mean", "variance"), layer.get_weights(), strict=True):
        seen[name] = np.asarray(weight)
    return seen


if __name__ == "__main__":
    options = tf.distribute.experimental.CommunicationOptions(
        implementation=tf.distribute.experimental.CommunicationImplementation.RING, timeout_seconds=60
    )
    rank, path = int(sys.argv[1]), sys.argv[2]
    np.savez(path, **train(tf.distribute.MultiWorkerMirroredStrategy(communication_options=options), rank))
