"""Keras's `fit` with a step that XLA compiles on each replica: the fastest way to train on several GPUs.

    python examples/keras_xla.py

Runs on all GPUs of the machine, or on one CPU.
"""

import keras
import numpy as np
import tensorflow as tf

import syncbn


class CompiledModel(keras.Model):
    """A model whose forward and backward pass XLA compiles as a whole on each replica."""

    def train_step(self, data):
        """One step of `fit`: the gradients in one program, the optimizer outside of it."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)

        def gradients(x, y, sample_weight):
            with tf.GradientTape() as tape:
                prediction = self(x, training=True)
                loss = self.compute_loss(x=x, y=y, y_pred=prediction, sample_weight=sample_weight)
                scaled = self.optimizer.scale_loss(loss)
            return loss, prediction, tape.gradient(scaled, [w.value for w in self.trainable_weights])

        loss, prediction, found = syncbn.compiled_step(gradients)(x, y, sample_weight)
        self.optimizer.apply(found, self.trainable_weights)
        for metric in self.metrics:
            if metric.name == "loss":
                # Keras divides a loss by the number of replicas, for the sum of their gradients.
                replicas = tf.distribute.get_strategy().num_replicas_in_sync
                metric.update_state(loss * replicas, sample_weight=tf.shape(x)[0])
            else:
                metric.update_state(y, prediction, sample_weight)
        return self.get_metrics_result()


def train(strategy, model_class=CompiledModel, epochs=3):
    """Trains a small network; returns the model and the loss of each epoch."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 12, 12, 3)).astype("float32")
    y = x.mean((1, 2, 3), keepdims=False)[:, None] * 10
    with strategy.scope():
        inputs = keras.Input((12, 12, 3))
        h = keras.layers.ReLU()(syncbn.SyncBatchNormalization()(keras.layers.Conv2D(8, 3)(inputs)))
        h = syncbn.SyncBatchNormalization()(keras.layers.Dense(16)(keras.layers.Flatten()(h)))
        model = model_class(inputs, keras.layers.Dense(1)(h))
        # Keras would compile one program for all replicas.
        model.compile(keras.optimizers.SGD(0.05), "mse", jit_compile=False)
    return model, model.fit(x, y, batch_size=32, epochs=epochs, shuffle=False, verbose=0).history["loss"]


if __name__ == "__main__":
    gpus = tf.config.list_logical_devices("GPU")
    print(*(f"{loss:.4f}" for loss in train(tf.distribute.MirroredStrategy() if gpus else tf.distribute.get_strategy())[1]))
