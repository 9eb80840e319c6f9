"""TensorFlow on several hosts: MultiWorkerMirroredStrategy in a loop of its own. Started as examples/two_hosts.md says."""

import keras
import numpy as np
import tensorflow as tf

import syncbn


def main(steps=5):
    """Trains on data of this worker, and prints its moving mean: it is the same on every worker."""
    # Before anything else runs on TensorFlow. A lost worker ends the others' step after the timeout.
    options = tf.distribute.experimental.CommunicationOptions(timeout_seconds=300)
    strategy = tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
    with strategy.scope():
        model = keras.Sequential([
            keras.Input((8,)),
            keras.layers.Dense(16), syncbn.SyncBatchNormalization(), keras.layers.ReLU(),
            keras.layers.Dense(1),
        ])  # fmt: skip
        optimizer = keras.optimizers.SGD(0.05)
        optimizer.build(model.trainable_variables)
    worker = strategy.cluster_resolver.task_id
    rng = np.random.default_rng(worker)

    @tf.function
    def step(x):
        def replica(x):
            with tf.GradientTape() as tape:
                # The gradients of all replicas are summed.
                loss = tf.reduce_mean((model(x, training=True) - tf.reduce_sum(x, 1, keepdims=True)) ** 2)
                loss /= strategy.num_replicas_in_sync
            variables = model.trainable_variables
            optimizer.apply(tape.gradient(loss, [v.value for v in variables]), variables)

        strategy.run(replica, args=(x,))

    for _ in range(steps):
        batch = rng.normal(size=(4, 8)).astype("float32")
        step(strategy.experimental_distribute_values_from_function(lambda _, batch=batch: tf.constant(batch)))
    mean = strategy.experimental_local_results(model.layers[1].moving_mean.value)[0]
    print(f"worker {worker} of {strategy.num_replicas_in_sync} replicas, moving mean {mean.numpy()[:3]}")


if __name__ == "__main__":
    main()
