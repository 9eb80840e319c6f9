"""Which weight of a file goes where; what does not fit is named, and nothing changes."""

from __future__ import annotations

import shutil

import h5py
import keras
import numpy as np
import pytest
from keras import layers, ops
from old_files import DATA, near, place
from test_old_files import READS, needs_tensorflow, rebuilt, values

import syncbn
from syncbn import SyncBatchNormalization


def other_model():
    """Where `sequential` has Dense 6, this has 7; the last layer is missing."""
    model = keras.Sequential(
        [keras.Input((5,)), layers.Dense(7, name="wide"), SyncBatchNormalization(name="norm"), layers.Dense(3)]
    )
    for v in model.weights:
        v.assign(np.random.default_rng(0).normal(size=v.shape))
    return model


@pytest.mark.parametrize("ending", [".weights.h5", *READS])
def test_what_does_not_fit_is_named_and_nothing_changes(ending, tmp_path):
    path = place("tf2.2", "sequential", ending, tmp_path)
    for model, message in (
        (other_model(), r"in the file, not in the model: .*gamma"),
        (keras.Sequential([keras.Input((5,)), layers.Dense(7), SyncBatchNormalization(), layers.Dense(3), SyncBatchNormalization(center=False)]),
         r"of other shapes: .*kernel(:0)? \[5, 6\] for .*kernel \[5, 7\].*No weight was changed"),
        (keras.Sequential([keras.Input((5,)), layers.Dense(6), SyncBatchNormalization(renorm=True), layers.Dense(3), SyncBatchNormalization()]),
         r"in the model, not in the file: .*moving_stddev.*beta"),
    ):  # fmt: skip
        before = values(model)
        with pytest.raises(ValueError, match=message):
            syncbn.load_weights(model, path)
        for a, b in zip(values(model), before, strict=True):
            np.testing.assert_array_equal(a, b)


def test_names_that_somebody_chose_decide(tmp_path):
    def named(*names):
        return keras.Sequential([keras.Input((3,)), *(layers.Dense(3, name=name) for name in names)])

    with h5py.File(tmp_path / "w.h5", "w") as file:
        file.attrs["layer_names"] = ["head", "tail"]
        for value, name in enumerate(("head", "tail")):
            file.create_group(name).attrs["weight_names"] = [f"{name}/kernel:0", f"{name}/bias:0"]
            file[f"{name}/{name}/kernel:0"], file[f"{name}/{name}/bias:0"] = np.full((3, 3), value), np.full(3, value)
    for model in (named("head", "tail"), named("tail", "head"), named("dense", "dense_1")):
        syncbn.load_weights(model, tmp_path / "w.h5")
        by_name = {layer.name: float(layer.get_weights()[1][0]) for layer in model.layers}
        assert by_name in ({"head": 0, "tail": 1}, {"dense": 0, "dense_1": 1})
    with pytest.raises(ValueError, match=r"Received: tail, which are in both, at different places"):
        syncbn.load_weights(named("tail", "other"), tmp_path / "w.h5")
    # Made by Keras, names say nothing: where they contradict the order, nobody knows.
    with h5py.File(tmp_path / "w.h5", "a") as file:
        file.move("head", "dense_1")
        file.move("tail", "dense")
        file.attrs["layer_names"] = ["dense_1", "dense"]
    with pytest.raises(ValueError, match=r"Received: dense, dense_1, which are in both"):
        syncbn.load_weights(named("dense", "dense_1"), tmp_path / "w.h5")
    assert syncbn.load_weights(named("dense_3", "dense_4"), tmp_path / "w.h5").layers[0].get_weights()[1][0] == 0


def test_layers_in_a_frozen_block_are_not_taken_for_each_other(tmp_path):
    """Keras 2 writes frozen layers last. Here two layers of one shape fit in both orders."""

    def block(frozen=None, names=("one_7", "one_8")):
        inner = keras.Sequential([keras.Input((3,)), *(layers.Dense(3, name=name) for name in names)], name="block")
        if frozen is not None:
            inner.layers[frozen].trainable = False
        return keras.Sequential([keras.Input((3,)), inner])

    names = [f"dense_{i}/{w}:0" for i in (6, 5) for w in ("kernel", "bias")]  # dense_5 was frozen
    with h5py.File(tmp_path / "w.h5", "w") as file:
        file.attrs["layer_names"] = ["block"]
        file.create_group("block").attrs["weight_names"] = names
        for name in names:
            file[f"block/{name}"] = np.full((3, 3) if "kernel" in name else 3, int(name[6]))
    for model in (block(frozen=0), block(names=("dense_5", "dense_6")), block(names=("dense_8", "dense_9"), frozen=0)):
        syncbn.load_weights(model, tmp_path / "w.h5")
        assert [layer.get_weights()[1][0] for layer in model.layers[0].layers] == [5, 6]
    with pytest.raises(ValueError, match=r"Received: dense_8, dense_9, which fit in two ways"):
        syncbn.load_weights(block(names=("dense_8", "dense_9")), tmp_path / "w.h5")


def test_weights_of_the_model_itself(tmp_path):
    """From TensorFlow 2.6 on they stand in a group of their own; before, Keras forgot them."""

    def make():
        model = rebuilt("subclassed")
        model._tracker.unlock()
        model.own = model.add_weight(shape=(2,), name="own")
        return model

    path = shutil.copy(DATA / "tf2.2" / "subclassed.weights.h5", tmp_path / "w.h5")
    with pytest.raises(ValueError, match=r"in the model, not in the file: .*own\."):
        syncbn.load_weights(make(), path)
    with h5py.File(path, "a") as file:
        group = file.create_group("top_level_model_weights")
        group.attrs["weight_names"], group["own:0"] = ["own:0"], np.array([3.0, 4.0])
    np.testing.assert_array_equal(ops.convert_to_numpy(syncbn.load_weights(make(), path).own), [3, 4])
    with pytest.raises(ValueError, match=r"in the file, not in the model: own:0"):
        syncbn.load_weights(rebuilt("subclassed"), path)


def test_normalization_computes_with_what_was_loaded(tmp_path):
    """It has a copy of its weights. Keras 3 still writes Keras 2's layout, under this ending."""
    x = np.random.default_rng(0).normal(3, 5, size=(20, 3)).astype("float32")
    source, target = (keras.Sequential([keras.Input((3,)), layers.Normalization()]) for _ in range(2))
    source.layers[0].adapt(x)
    source.save(tmp_path / "n.h5")
    syncbn.load_weights(target, tmp_path / "n.h5")
    near(target(x), ops.convert_to_numpy(source(x)), 1e-6)


@needs_tensorflow
def test_two_models_in_a_checkpoint(tmp_path):
    import tensorflow as tf

    held = {name: tf.Module() for name in ("student", "teacher")}
    for value, module in enumerate(held.values()):
        module.kernel, module.bias = tf.Variable(np.full((3, 2), value, "float32")), tf.Variable(np.zeros(2, "float32"))
    tf.train.Checkpoint(**held, step=tf.Variable(3)).write(str(tmp_path / "both"))
    with pytest.raises(ValueError, match=r"one model that fits\. Received: .*both, where student, teacher fit"):
        syncbn.load_weights(built_dense(), tmp_path / "both")

    class Both(keras.Model):
        def __init__(self):
            super().__init__()
            self.student, self.teacher = built_dense(), built_dense()
            self.built = True

    model = syncbn.load_weights(Both(), tmp_path / "both")
    assert [float(layer.get_weights()[0][0, 0]) for layer in (model.student, model.teacher)] == [0, 1]


def built_dense():
    layer = layers.Dense(2)
    layer.build((None, 3))
    return layer
