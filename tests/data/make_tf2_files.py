"""Writes what users of TensorFlow 2.2 to 2.15 have: each model in every format, with the numbers that TensorFlow computes.

    python3.8 -m venv env
    env/bin/pip install tensorflow-cpu==2.2.0 'protobuf<3.21' 'numpy<1.19' 'h5py<3'
    env/bin/python make_tf2_files.py tf2.2 [MODEL ...]

Later versions: 2.3.0 and 2.4.0 on Python 3.8, 2.6.0 (with keras==2.6.0) and 2.9.0 on 3.9, 2.12.0 and 2.15.0 on 3.11, each with
the protobuf and NumPy of its time. `tf2.2` holds all models as TensorFlow 2.2.0 wrote them; the other folders hold one or two each.

Of each model NAME:

    NAME.h5                     the whole model; not of a subclassed one, which TensorFlow refuses
    NAME.savedmodel.tar.xz      the whole model, the folder packed
    NAME.weights.h5             `save_weights`: Keras 2's layout, from TensorFlow 2.12 on the layout that became Keras 3's
    NAME.keras                  the same, from TensorFlow 2.12 on
    NAME.hdf5                   from TensorFlow 2.12 on: `save_weights` in Keras 2's layout
    NAME.ckpt.index, .data-*    `save_weights` as it writes by default: a checkpoint
    NAME.train/                 `tf.train.CheckpointManager` of the model and its optimizer, after the training step
    NAME.npz                    x, cotangent, y (inference), y_training, dx, names and values of the weights before and after a
                                training step, and the version

The step is one forward pass in training mode, and the gradient of sum(y_training · cotangent) for x. `mirrored_*` take it on two
replicas, each with half of the batch.
"""

import os
import shutil
import sys
import zlib

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import numpy as np
import tensorflow as tf

layers = tf.keras.layers
Sync = layers.experimental.SyncBatchNormalization
NEW_LAYOUT = tuple(int(part) for part in tf.__version__.split(".")[:2]) >= (2, 12)
CLIPPING = {"rmin": 0.4, "rmax": 2.5, "dmax": 4.0}


def page():
    """The example of TensorFlow's page: it has no input shape, and is built by its first batch."""
    model = tf.keras.Sequential()
    model.add(layers.Dense(16))
    model.add(Sync())
    return model, (8,)


def sequential():
    """With `input_shape` on the first layer."""
    parts = [layers.Dense(6, input_shape=(5,)), Sync(momentum=0.8), layers.ReLU(), layers.Dense(3), Sync(center=False)]
    return tf.keras.Sequential(parts), (5,)


def first_layer():
    """With `input_shape` on ours."""
    return tf.keras.Sequential([Sync(input_shape=(4, 3), epsilon=1e-4), layers.Flatten(), layers.Dense(2)]), (4, 3)


def functional():
    """Renorm, a plain layer, and slashes in names, as DenseNet and MobileNetV3 have them."""
    first = layers.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, use_bias=False, name="stem/conv")(first)
    ours = Sync(renorm=True, renorm_clipping=CLIPPING, renorm_momentum=0.7, name="stem/conv/bn")(x)
    plain = layers.BatchNormalization(scale=False)(x)
    x = layers.Concatenate()([layers.ReLU()(ours), plain])
    return tf.keras.Model(first, layers.Dense(2)(layers.GlobalAveragePooling2D()(x))), (8, 8, 3)


def axis_lists():
    """A list of one axis, and a plain layer with two."""
    first = layers.Input((4, 6, 3))
    x = Sync(axis=[3], gamma_regularizer="l2", beta_constraint="non_neg")(first)
    return tf.keras.Model(first, layers.BatchNormalization(axis=[1, 3], name="two_axes")(x)), (4, 6, 3)


def other_axes():
    """Channels first, then two axes: some versions divide by the wrong count here."""
    return tf.keras.Sequential([Sync(axis=1, input_shape=(4, 6, 3), name="first"), Sync(axis=[1, 3], name="two")]), (4, 6, 3)


def nested():
    """Models in a model: one with an input shape and called twice, one without and frozen; and a wrapper."""
    first = layers.Input((6, 4))
    parts = [layers.Conv1D(4, 3, padding="same", input_shape=(6, 4)), Sync(), layers.ReLU()]
    block = tf.keras.Sequential(parts, name="block")
    frozen = tf.keras.Sequential([layers.Dense(4), Sync(), layers.Dense(3)], name="frozen")
    x = frozen(block(block(first)))
    frozen.layers[0].trainable = frozen.layers[1].trainable = False
    x = layers.TimeDistributed(layers.Dense(4, name="each_step"))(x)
    return tf.keras.Model(first, layers.Dense(2)(layers.GlobalAveragePooling1D()(x))), (6, 4)


class Subclassed(tf.keras.Model):
    """Layers as attributes and in a list."""

    def __init__(self):
        super().__init__()
        self.stem = layers.Dense(4)
        self.norm = Sync()
        self.tail = [layers.Dense(4), layers.BatchNormalization(), layers.Dense(2)]

    def call(self, x, training=None):
        x = self.norm(self.stem(x), training=training)
        x = self.tail[1](self.tail[0](x), training=training)
        return self.tail[2](x)


def subclassed():
    """Files hold no configuration of it."""
    return Subclassed(), (5,)


def mirrored_page():
    """The page's, under a strategy."""
    model, shape = page()
    model.build((None, *shape))
    return model, shape


def mirrored_sequential():
    """Two layers of ours, under a strategy."""
    return sequential()


MODELS = [
    page,
    sequential,
    first_layer,
    functional,
    axis_lists,
    other_axes,
    nested,
    subclassed,
    mirrored_page,
    mirrored_sequential,
]


def fill(model, rng):
    """Random weights; what stands under a root, scales, and what is constrained, are positive."""
    for weight in model.weights:
        value = rng.normal(0, 0.7, weight.shape)
        positive = weight.constraint or any(part in weight.name for part in ("variance", "stddev", "gamma"))
        weight.assign(np.abs(value) + 0.5 if positive else value)


def local_step(model, x, cotangent):
    """Output in training, and the input's gradient."""
    x = tf.convert_to_tensor(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = model(x, training=True)
    return y, tape.gradient(y, x, tf.convert_to_tensor(cotangent))


def mirrored_step(strategy, model, x, cotangent):
    """The same, each replica with its part of the batch."""
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    batches = tf.data.Dataset.from_tensor_slices((x, cotangent)).batch(len(x)).with_options(options)
    for batch in strategy.experimental_distribute_dataset(batches):
        found = tf.function(lambda x, c: strategy.run(local_step, (model, x, c)))(*batch)
        return [np.concatenate(strategy.experimental_local_results(value)) for value in found]


def train_folder(model, path):
    """A checkpoint of training, with an optimizer that has taken a step of length 0, so that it has slots."""
    optimizer = tf.keras.optimizers.Adam(0.0)
    optimizer.apply_gradients([(tf.ones_like(v), v) for v in model.trainable_variables])
    checkpoint = tf.train.Checkpoint(model=model, optimizer=optimizer, step=tf.Variable(7))
    tf.train.CheckpointManager(checkpoint, path, max_to_keep=1).save()


def write(folder, make, strategy):
    """All files of one model."""
    name = make.__name__
    path = os.path.join(folder, name)
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    with strategy.scope():
        model, shape = make()
    x = rng.normal(1.5, 2, (8,) + shape).astype("float32")
    y = model(x, training=False)
    cotangent = rng.normal(size=y.shape).astype("float32")
    fill(model, rng)
    kept = {"x": x, "cotangent": cotangent, "y": model(x, training=False), "version": tf.__version__}
    # Layer by layer: a model's own list has what is trainable first, where layers stand in a list.
    weights = [weight for layer in model.layers for weight in layer.weights]
    kept["names"] = [weight.name for weight in weights]
    kept.update({f"before {i}": weight.numpy() for i, weight in enumerate(weights)})
    if not isinstance(model, Subclassed):
        model.save(path + ".h5")
        if NEW_LAYOUT:
            model.save(path + ".keras")
    model.predict(x)  # tells the SavedModel what a batch is
    model.save(path + ".savedmodel", save_format="tf")
    shutil.make_archive(path + ".savedmodel", "xztar", path + ".savedmodel")
    shutil.rmtree(path + ".savedmodel")
    for ending in (".weights.h5", ".ckpt") + ((".hdf5",) if NEW_LAYOUT else ()):
        model.save_weights(path + ending)
    os.remove(os.path.join(folder, "checkpoint"))
    if name.startswith("mirrored"):
        kept["y_training"], kept["dx"] = mirrored_step(strategy, model, x, cotangent)
    else:
        kept["y_training"], kept["dx"] = local_step(model, x, cotangent)
        train_folder(model, path + ".train")
    kept.update({f"after {i}": weight.numpy() for i, weight in enumerate(weights)})
    np.savez_compressed(path + ".npz", **kept)
    print(tf.__version__, name, y.shape)


def main(folder, wanted):
    """Two logical CPU devices, and the models that were asked for."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    halves = [tf.config.experimental.VirtualDeviceConfiguration()] * 2
    tf.config.experimental.set_virtual_device_configuration(cpu, halves)
    os.makedirs(folder, exist_ok=True)
    mirrored = tf.distribute.MirroredStrategy(["/cpu:0", "/cpu:1"])
    for make in MODELS:
        if not wanted or make.__name__ in wanted:
            strategy = mirrored if make.__name__.startswith("mirrored") else tf.distribute.get_strategy()
            write(folder, make, strategy)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
