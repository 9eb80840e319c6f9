"""Run by tests/keras/test_legacy.py: writes what Keras 2 wrote, and what its models compute."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import tensorflow as tf
import tf_keras as keras
from tf_keras import layers

Sync = layers.experimental.SyncBatchNormalization
RENORM = {"renorm": True, "renorm_momentum": 0.7}
CLIPPING = {"renorm_clipping": {"rmin": 0.5, "rmax": 2.0, "dmax": 1.0}}


def sequential():
    return keras.Sequential(
        [
            layers.Input((4, 5, 3)),
            layers.Conv2D(4, 3, padding="same"),
            Sync(momentum=0.5, epsilon=0.1),
            layers.ReLU(),
            layers.BatchNormalization(synchronized=True, scale=False, beta_regularizer="l2"),
            layers.Flatten(),
            layers.Dense(2, activation="softmax"),
        ]
    )


def renorm():
    return keras.Sequential(
        [
            layers.Input((4,)),
            Sync(**RENORM, **CLIPPING),
            layers.Dense(3),
            layers.BatchNormalization(synchronized=True, **RENORM, **CLIPPING),
        ]
    )


def several_axes():
    return keras.Sequential([layers.Input((4, 5, 3)), Sync(axis=[1, 3], **RENORM), Sync(axis=[-1]), Sync(axis=1)])


def functional():
    """Nested, shared and called twice."""
    x = first = keras.Input((3,))
    inner = keras.Sequential([layers.Input((3,)), layers.Dense(3), Sync(name="in_sequential")], name="inner")
    deferred = keras.Sequential([layers.Dense(3), layers.BatchNormalization(name="in_deferred")], name="deferred")
    y = z = keras.Input((3,))
    nested = keras.Model(y, layers.BatchNormalization(name="in_nested")(layers.Dense(3)(z)), name="nested")
    shared = Sync(name="shared")
    x = shared(inner(shared(x)))
    x = nested(deferred(nested(inner(x))))
    return keras.Model(first, [layers.Add()([x, first]), Sync(name="last")(x)])


def convolutions():
    """Of the kinds whose configuration or names Keras 3 changed."""
    return keras.Sequential(
        [
            layers.Input((6, 6, 3)),
            layers.DepthwiseConv2D(3, use_bias=False),
            layers.BatchNormalization(),
            layers.SeparableConv2D(4, 3),
            layers.ReLU(6.0),
            layers.Conv2DTranspose(3, 3),
            Sync(),
        ]
    )


def recurrent():
    return keras.Sequential(
        [layers.Input((4, 3)), layers.Bidirectional(layers.SimpleRNN(3, return_sequences=True)), layers.TimeDistributed(Sync())]
    )


def plain_several_axes():
    return keras.Sequential([layers.Input((4, 5, 3)), layers.BatchNormalization(axis=[1, 3], name="two")])


MODELS = [sequential, renorm, several_axes, functional, convolutions, recurrent, plain_several_axes]


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.norm = Sync()

    def call(self, x):
        return self.norm(x)


def write(folder):
    rng = np.random.default_rng(0)
    for make in MODELS:
        model, name = make(), make.__name__
        for v in model.weights:
            v.assign(rng.uniform(0.5, 1.5, v.shape) * (rng.choice([-1, 1], v.shape) if v.trainable else 1))
        x = rng.normal(1, 2, (4, *model.input_shape[1:])).astype("float32")
        model.save(folder / f"{name}.h5")
        model.save(folder / name)
        kept = {"x": x}
        for training in (False, True):
            kept |= {f"y{i} {training}": y.numpy() for i, y in enumerate(tf.nest.flatten(model(x, training=training)))}
            for layer in model._flatten_layers():
                if hasattr(layer, "moving_mean"):
                    kept |= {f"{layer.name}/{i} {training}": w for i, w in enumerate(layer.get_weights())}
        np.savez(folder / f"{name}.npz", **kept)
    model = sequential()
    model.save(folder / "new format.keras")
    model.save_weights(folder / "alone.h5")
    mixed = keras.Sequential([layers.Input((4, 5, 3)), layers.Conv2D(4, 3, padding="same"), Sync(), Sync(momentum=0.5)])
    mixed.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in mixed.get_weights()])
    mixed.save_weights(folder / "keras2.weights.h5")
    np.savez(folder / "keras2 weights.npz", *mixed.get_weights())
    subclassed = Subclassed()
    subclassed(np.zeros((2, 3), "float32"))
    subclassed.save(folder / "subclassed")
    tf.saved_model.save(tf.Module(), str(folder / "no keras"))
    code = f"lambda x: (open({str(folder / 'it ran')!r}, 'w'), x)[1]"
    four = keras.Sequential([layers.Input((3,)), *(layers.BatchNormalization(name=name) for name in "abcd")])
    four.save(folder / "four plain.h5")
    evil = keras.Sequential([layers.Input((3,)), layers.Lambda(eval(code))])
    (folder / "it ran").unlink(missing_ok=True)
    evil.save(folder / "evil.h5")
    evil.save(folder / "evil")
    (folder / "it ran").unlink(missing_ok=True)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
