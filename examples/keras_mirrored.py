"""Keras `fit` under MirroredStrategy: 2 images per replica, on handwritten digits.

    python examples/keras_mirrored.py

Needs scikit-learn, for the images. It runs on all GPUs of the machine, or on 2 logical CPU devices.
"""

import keras
import tensorflow as tf
from sklearn.datasets import load_digits

import syncbn


def strategy_for_this_machine(replicas=2):
    """A MirroredStrategy over all GPUs, or over logical CPU devices. Make one alone in a process."""
    if tf.config.list_physical_devices("GPU"):
        return tf.distribute.MirroredStrategy()
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * replicas)
    return tf.distribute.MirroredStrategy([f"/cpu:{i}" for i in range(replicas)])


def main(epochs=2):
    """Trains, and prints the accuracy on images that were not trained on."""
    strategy = strategy_for_this_machine()
    pixels, labels = load_digits(return_X_y=True)
    images = (pixels / 16).reshape(-1, 8, 8, 1).astype("float32")
    keras.utils.set_random_seed(0)
    with strategy.scope():  # the layers must be made in it
        model = keras.Sequential([
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, use_bias=False), syncbn.SyncBatchNormalization(momentum=0.9), keras.layers.ReLU(),
            keras.layers.Conv2D(32, 3, use_bias=False), syncbn.SyncBatchNormalization(momentum=0.9), keras.layers.ReLU(),
            keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10),
        ])  # fmt: skip
        model.compile(
            keras.optimizers.SGD(0.02, momentum=0.9),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
    batch = 2 * strategy.num_replicas_in_sync  # Keras counts the images of all replicas
    model.fit(images[:-400], labels[:-400], batch_size=batch, epochs=epochs, verbose=0)
    _, accuracy = model.evaluate(images[-400:], labels[-400:], batch_size=100, verbose=0)
    print(f"{strategy.num_replicas_in_sync} replicas, test accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
