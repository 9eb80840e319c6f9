"""Files that version 0.1.0 wrote: `.keras` models and `.weights.h5` load, and compute what they computed then."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers
from versions import reads_files_of_keras_3_15

import syncbn

FOLDER = Path(__file__).parents[1] / "data" / "version_0_1_0"
BEFORE = np.load(FOLDER / "keras.npz")


def close(got, name):
    np.testing.assert_allclose(keras.ops.convert_to_numpy(got), BEFORE[name], rtol=1e-5, atol=1e-5)


def load(name):
    return keras.saving.load_model(FOLDER / f"keras_{name}.keras")


@pytest.mark.parametrize("name", ["layers", pytest.param("converted", marks=reads_files_of_keras_3_15)])
def test_a_model_of_version_0_1_0_computes_what_it_did(name):
    model = load(name)
    close(model(BEFORE["x"], training=False), name)
    close(model(BEFORE["x"], training=True), f"{name}_training")
    close(model(BEFORE["x"], training=False), f"{name}_after_training")


def test_the_layers_of_a_model_keep_their_arguments():
    several, renorm, listed = load("layers").layers
    assert {type(layer) for layer in (several, renorm, listed)} == {syncbn.SyncBatchNormalization}
    assert (several.axis, renorm.axis, listed.axis) == ((1, 3), -1, -1)
    assert renorm.renorm_clipping == {"rmin": 0.5, "rmax": 2.0, "dmax": 1.0}
    assert [weight.name for weight in renorm.weights[4:]] == ["moving_stddev", "renorm_mean", "renorm_stddev"]
    assert (renorm.activation, listed.activation) == (keras.activations.relu, keras.activations.tanh)
    assert listed.gamma is None
    assert [tuple(weight.shape) for weight in listed.weights] == [(3,)] * 3  # the file has (1, 1, 1, 3)


@pytest.mark.parametrize("batch_norm", [syncbn.SyncBatchNormalization, layers.BatchNormalization])
def test_weights_of_version_0_1_0_load(batch_norm):
    model = keras.Sequential([keras.Input((5, 5, 3)), layers.Conv2D(4, 3), batch_norm(), layers.ReLU(), layers.Conv2D(2, 1)])
    syncbn.load_weights(model, FOLDER / "keras_converted.weights.h5")
    close(model(BEFORE["x"], training=False), "converted_after_training")


@reads_files_of_keras_3_15
def test_a_converted_model_of_version_0_1_0_can_be_reverted():
    model = syncbn.revert(load("converted"))
    assert type(model.layers[1]) is layers.BatchNormalization
    close(model(BEFORE["x"], training=False), "converted")
