"""The models of tests/data/make_tf2_files.py as a user of Keras 3 writes them, to load weights into."""

from __future__ import annotations

import keras
from keras import layers

from syncbn import SyncBatchNormalization as Sync

CLIPPING = {"rmin": 0.4, "rmax": 2.5, "dmax": 4.0}


def page():
    return keras.Sequential([keras.Input((8,)), layers.Dense(16), Sync()])


def sequential():
    return keras.Sequential(
        [keras.Input((5,)), layers.Dense(6), Sync(momentum=0.8), layers.ReLU(), layers.Dense(3), Sync(center=False)]
    )


def first_layer():
    return keras.Sequential([keras.Input((4, 3)), Sync(epsilon=1e-4), layers.Flatten(), layers.Dense(2)])


def functional():
    first = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, use_bias=False, name="stem_conv")(first)
    ours = Sync(renorm=True, renorm_clipping=CLIPPING, renorm_momentum=0.7, name="stem_conv_bn")(x)
    x = layers.Concatenate()([layers.ReLU()(ours), layers.BatchNormalization(scale=False)(x)])
    return keras.Model(first, layers.Dense(2)(layers.GlobalAveragePooling2D()(x)))


def axis_lists():
    first = keras.Input((4, 6, 3))
    x = Sync(axis=[3], gamma_regularizer="l2", beta_constraint="non_neg")(first)
    return keras.Model(first, Sync(axis=[1, 3], name="two_axes")(x))


def other_axes():
    return keras.Sequential([keras.Input((4, 6, 3)), Sync(axis=1, name="first"), Sync(axis=[1, 3], name="two")])


def nested():
    """The layers in `frozen` are not frozen here: files may not depend on it."""
    first = keras.Input((6, 4))
    block = keras.Sequential([keras.Input((6, 4)), layers.Conv1D(4, 3, padding="same"), Sync(), layers.ReLU()], name="block")
    frozen = keras.Sequential([layers.Dense(4), Sync(), layers.Dense(3)], name="frozen")
    x = layers.TimeDistributed(layers.Dense(4, name="each_step"))(frozen(block(block(first))))
    return keras.Model(first, layers.Dense(2)(layers.GlobalAveragePooling1D()(x)))


class Subclassed(keras.Model):
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
    model = Subclassed()
    model(keras.ops.zeros((1, 5)))
    return model


MODELS = [page, sequential, first_layer, functional, axis_lists, other_axes, nested, subclassed]
