"""From TensorFlow 2.2 to Keras 3: an old file and an old checkpoint in, training on several replicas, an exported model out.

    python examples/legacy_to_keras3.py model.h5 weights.ckpt exported

`model.h5` is what `model.save` of TensorFlow 2.2 to 2.15 wrote, and `weights.ckpt` what `save_weights` wrote. The images here are
random: put yours in their place. It runs on all GPUs of the machine, or on 2 logical CPU devices.
"""

import sys

import keras
import numpy as np
import tensorflow as tf
from keras_mirrored import strategy_for_this_machine

import syncbn


def main(file, checkpoint, folder):
    """Loads, trains and exports; prints what the exported model gives beside the trained one."""
    strategy = strategy_for_this_machine()
    with strategy.scope():
        # convert=True: plain batch norms are synchronised too.
        model = syncbn.load_legacy(file, convert=True)
        syncbn.load_weights(model, checkpoint)
        model.compile(keras.optimizers.SGD(0.01), "mse")
    layers = [layer.name for layer in model.layers if isinstance(layer, syncbn.SyncBatchNormalization)]
    print(f"loaded, synchronised: {', '.join(layers)}")

    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, *model.input_shape[1:])).astype("float32")
    y = rng.normal(size=(16, *model.output_shape[1:])).astype("float32")
    losses = model.fit(x, y, batch_size=4, epochs=3, verbose=0).history["loss"]
    print(f"trained on {strategy.num_replicas_in_sync} replicas, loss {losses[0]:.3f} to {losses[-1]:.3f}")

    model.export(folder, verbose=False)  # a SavedModel, for TensorFlow Serving
    exported = tf.saved_model.load(folder)
    apart = np.abs(exported.serve(tf.constant(x)).numpy() - model.predict(x, verbose=0)).max()
    print(f"exported to {folder}, outputs {apart:.0e} apart")


if __name__ == "__main__":
    main(*sys.argv[1:])
