"""Files of converted models: they have the keys of the classes that were there, and load with and without syncbn."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers, ops
from versions import KERAS_HAS_RENORM

import syncbn
from syncbn import SyncBatchNormalization

WARNING = (
    r"whose class builds its layers brings back plain batch norms.*Received: \S*{}\. Call syncbn\.convert on the model after"
)


@keras.saving.register_keras_serializable("tests")
class Backbone(keras.Model):
    """Functional, with a configuration of its own."""

    def __init__(self, units=4, **named):
        inputs = keras.Input((6,))
        self.units = units
        x = layers.BatchNormalization()(layers.Dense(units)(inputs))
        super().__init__(inputs, layers.Dense(2)(layers.BatchNormalization(scale=False)(layers.Dense(3)(x))), **named)

    def get_config(self):
        return {"units": self.units}


@keras.saving.register_keras_serializable("tests")
class Parts(keras.Model):
    """Layers as attributes, in a list and in a dict."""

    def __init__(self, units=4, **named):
        super().__init__(**named)
        self.units = units
        self.dense, self.norm = layers.Dense(units), layers.BatchNormalization()
        self.listed = [layers.BatchNormalization(), layers.Dense(3), layers.BatchNormalization(momentum=0.5)]
        self.named = {"a": layers.BatchNormalization(center=False), "b": layers.Dense(2)}

    def call(self, x, training=None):
        x = self.norm(self.dense(x), training=training)
        for layer in (*self.listed, *self.named.values()):
            x = layer(x)
        return x

    def get_config(self):
        return {"units": self.units}


class OnlyInit(layers.BatchNormalization):
    """Whose name gives keys of their own."""

    def __init__(self, momentum=0.5, **named):
        super().__init__(momentum=momentum, **named)


def functional():
    inputs = keras.Input((6,))
    x = layers.Dense(3)(layers.BatchNormalization()(layers.Dense(4)(inputs)))
    inner = keras.Sequential([keras.Input((3,)), layers.Dense(3), layers.BatchNormalization(**RENORM)])
    return keras.Model(inputs, layers.BatchNormalization(axis=1)(layers.TimeDistributed(inner)(x[:, None])[:, 0]))


def only_init():
    return keras.Sequential([keras.Input((6,)), OnlyInit(), layers.BatchNormalization(), layers.Dense(2), OnlyInit()])


MODELS = {"registered subclass": Backbone, "attributes and lists": Parts, "functional": functional, "another name": only_init}
# Of Keras's own layer, which has no renorm before 3.14.
RENORM = {"renorm": True} if KERAS_HAS_RENORM else {}
X = np.random.default_rng(0).normal(1, 2, (5, 6)).astype("float32")


def norms(model):
    return [layer for layer in model._flatten_layers() if isinstance(layer, layers.BatchNormalization)]


def ours(model):
    return [isinstance(layer, SyncBatchNormalization) for layer in norms(model)]


def randomised(make):
    model = make()
    model(X)
    rng = np.random.default_rng(3)
    for v in model.weights:
        v.assign(rng.uniform(0.5, 1.5, v.shape))
    return model


def converted(model, **arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return syncbn.convert(model, **arguments)


def same(model, other):
    for a, b in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(
        ops.convert_to_numpy(model(X)), ops.convert_to_numpy(other(X)), rtol=2e-5, atol=2e-5 * float(ops.max(ops.abs(other(X))))
    )


@pytest.mark.parametrize("kind", MODELS)
def test_a_whole_file_loads_and_can_be_converted_again(kind, tmp_path):
    model = converted(randomised(MODELS[kind]))
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    same(again, model)
    rebuilt = kind in ("registered subclass", "attributes and lists")
    assert ours(again) == [not rebuilt] * len(ours(model))
    assert all(ours(converted(again)))
    same(again, model)
    again.save(tmp_path / "again.keras")
    same(keras.models.load_model(tmp_path / "again.keras"), model)


@pytest.mark.parametrize("which", [None, lambda path, layer: layer.name.endswith(tuple("13579"))], ids=["all", "some"])
@pytest.mark.parametrize("kind", MODELS)
def test_weights_load_in_both_directions(kind, which, tmp_path):
    """By Keras's own load_weights, with some of the layers converted too: their order among the others stays."""
    plain, model = randomised(MODELS[kind]), converted(randomised(MODELS[kind]), filter=which)
    assert any(ours(model))
    for v in model.weights:
        v.assign(ops.convert_to_numpy(v) + 1)
    model.save_weights(tmp_path / "ours.weights.h5")
    plain.save_weights(tmp_path / "plain.weights.h5")
    for name, source in (("ours", model), ("plain", randomised(MODELS[kind]))):
        for target in (MODELS[kind](), converted(MODELS[kind]()), converted(MODELS[kind](), filter=which)):
            target(X)
            target.load_weights(tmp_path / f"{name}.weights.h5")
            same(target, source)


@pytest.mark.parametrize("kind", ["registered subclass", "attributes and lists", "functional"])
def test_a_file_loads_without_us(kind, tmp_path):
    model = converted(randomised(MODELS[kind]))
    model.save(tmp_path / "model.keras")
    text = Path(__file__).read_text().partition("\nclass OnlyInit")[0]
    text = "\n".join(line for line in text.splitlines() if "syncbn" not in line and "pytest" not in line)
    code = f"""{text}
sys.modules["syncbn"] = None
model = keras.models.load_model({str(tmp_path / "model.keras")!r})
found = [layer for layer in model._flatten_layers() if isinstance(layer, layers.BatchNormalization)]
assert all(type(layer) is layers.BatchNormalization for layer in found) and len(found) == {len(ours(model))}
np.savez({str(tmp_path / "values.npz")!r}, *model.get_weights())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=os.environ)
    assert done.returncode == 0, done.stderr[-3000:]
    values = np.load(tmp_path / "values.npz")
    for a, b in zip(model.get_weights(), [values[key] for key in values], strict=True):
        np.testing.assert_array_equal(a, b)


def test_arguments_of_ours_stay(tmp_path):
    model = converted(randomised(functional), group_size=2, renorm=True)
    norms(model)[0].activation = keras.activations.tanh
    model.save(tmp_path / "model.keras")
    first, *others = norms(keras.models.load_model(tmp_path / "model.keras"))
    assert [layer.group_size for layer in (first, *others)] == [2] * len(ours(model))
    assert (first.activation, first.renorm, others[0].activation) == (keras.activations.tanh, True, keras.activations.linear)


def test_a_converted_layer_says_what_it_is():
    (layer,) = norms(converted(keras.Sequential([layers.BatchNormalization(name="bn")])))
    assert repr(layer) == "<SyncBatchNormalization name=bn, built=False>"
    assert type(layer).__qualname__ == "SyncBatchNormalization"
    clone = type(layer).from_config(layer.get_config())
    assert type(clone) is type(layer)
    # Keras's own constructor takes it, also before 3.14, which knows no renorm.
    assert not {"group_size", "renorm", "renorm_momentum", "renorm_clipping"} & set(layer.get_config())
    assert layers.BatchNormalization.from_config(layer.get_config()).momentum == layer.momentum


def listed(*norm_layers):
    return keras.Sequential([keras.Input((6,)), *norm_layers])


def test_files_of_version_0_1_0_load(tmp_path):
    """It wrote converted layers under the key of our class: also beside plain ones."""
    plain, ours_then = layers.BatchNormalization, SyncBatchNormalization
    for kinds in ([plain, ours_then, plain], [ours_then] * 3):
        source = listed(*(cls() for cls in kinds))
        for i, v in enumerate(source.weights):
            v.assign(np.full(v.shape, i + 2.0))
        source.save_weights(tmp_path / "of.weights.h5")
        target = listed(*(plain() for _ in kinds))
        at = [layer.name for layer, cls in zip(target.layers, kinds, strict=True) if cls is ours_then]
        converted(target, filter=lambda path, layer, at=at: layer.name in at)
        syncbn.load_weights(target, tmp_path / "of.weights.h5")
        same(target, source)
    with pytest.raises(
        ValueError, match=r"Received: a file without one for the converted layer .*Load it with syncbn\.load_weights\("
    ):
        target.load_weights(tmp_path / "of.weights.h5")


@pytest.mark.parametrize("kind", ["registered subclass", "attributes and lists"])
def test_convert_warns_where_a_class_rebuilds_its_layers(kind):
    model = MODELS[kind]()
    with pytest.warns(UserWarning, match=WARNING.format(type(model).__name__)) as found:
        syncbn.convert(model)
    assert found[0].filename == __file__
    outer = keras.Sequential([keras.Input((6,)), MODELS[kind]()])
    with pytest.warns(UserWarning, match=WARNING.format(type(model).__name__)):
        syncbn.convert(outer)


class Unsaved(keras.Model):
    """Nobody has said how to save it."""

    def __init__(self):
        super().__init__()
        self.norm = layers.BatchNormalization()

    def call(self, x):
        return self.norm(x)


@keras.saving.register_keras_serializable("tests")
class Wrapper(layers.Layer):
    """Whose configuration holds its layer's."""

    def __init__(self, layer, **named):
        super().__init__(**named)
        self.layer = layer

    def call(self, x):
        return self.layer(x)

    def get_config(self):
        return {**super().get_config(), "layer": keras.saving.serialize_keras_object(self.layer)}


@keras.saving.register_keras_serializable("tests")
class Head(keras.Model):
    """Own layers beside a batch norm that is not converted."""

    def __init__(self, **named):
        super().__init__(**named)
        self.dense = layers.Dense(2)

    def call(self, x):
        return self.dense(x)

    def get_config(self):
        return {}


@pytest.mark.parametrize(
    "make",
    [functional, Unsaved, lambda: keras.Sequential([Wrapper(layers.BatchNormalization())]), lambda: keras.Sequential([Head(), layers.BatchNormalization()])],
    ids=["functional", "of no configuration", "configuration of its layers", "nothing converted in it"],
)  # fmt: skip
def test_convert_does_not_warn_of_other_models(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(ours(syncbn.convert(make())))


def test_a_name_from_a_file_is_a_name():
    config = {**converted(listed(layers.BatchNormalization())).layers[0].get_config(), "former": "os.system('x')"}
    cls = type(keras.models.clone_model(converted(listed(layers.BatchNormalization()))).layers[0])
    assert type(cls.from_config(config)).__name__ == "BatchNormalization"
