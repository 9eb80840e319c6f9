"""The files in tests/data, and what TensorFlow computed with the models in them."""

from __future__ import annotations

import tarfile
from pathlib import Path

import keras
import numpy as np

DATA = Path(__file__).parent.parent / "data"
VERSIONS = sorted((path.name for path in DATA.glob("tf2.*")), key=lambda name: [int(n) for n in name[2:].split(".")])
PACKED = ".savedmodel.tar.xz"


def names(version):
    return sorted(path.stem for path in (DATA / version).glob("*.npz"))


def files(*endings):
    """(version, model, ending) of every file that there is."""
    return [(v, name, e) for v in VERSIONS for name in names(v) for e in endings if (DATA / v / f"{name}{e}").exists()]


def place(version, name, ending, folder):
    """The path of a file; a SavedModel is unpacked into the folder."""
    path = DATA / version / f"{name}{ending}"
    if ending == PACKED:
        with tarfile.open(path) as archive:
            archive.extractall(folder, filter="data")
        return folder
    return path.with_suffix("") if ending == ".ckpt.index" else path


class Computed:
    """What TensorFlow computed with a model, from its .npz."""

    def __init__(self, version, name):
        with np.load(DATA / version / f"{name}.npz") as held:
            self.arrays = dict(held)
        self.x, self.cotangent = self.arrays["x"], self.arrays["cotangent"]
        self.names = [str(name) for name in self.arrays["names"]]

    def weights(self, when):
        """`before` or `after` the training step."""
        return [self.arrays[f"{when} {i}"] for i in range(len(self.names))]


def near(got, expected, tolerance, what=""):
    got, expected = keras.ops.convert_to_numpy(got), np.asarray(expected)
    assert got.shape == expected.shape, what
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max(), err_msg=what)


def step(model, x, cotangent):
    """Training output, and the input's gradient, on the Keras backend in use; JAX moves no statistics outside of `fit`."""
    if keras.backend.backend() == "torch":
        import torch

        x = torch.tensor(x, requires_grad=True)
        y = model(x, training=True)
        y.backward(torch.tensor(cotangent))
        return keras.ops.convert_to_numpy(y), x.grad.numpy()
    if keras.backend.backend() == "jax":
        import jax

        variables = [v.value for v in model.trainable_variables], [v.value for v in model.non_trainable_variables]
        y, pull, state = jax.vjp(lambda x: model.stateless_call(*variables, x, training=True), x, has_aux=True)
        for variable, value in zip(model.non_trainable_variables, state, strict=True):
            variable.assign(value)
        return np.asarray(y), np.asarray(pull(cotangent)[0])
    import tensorflow as tf

    x = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = model(x, training=True)
    return y.numpy(), tape.gradient(y, x, tf.constant(cotangent)).numpy()
