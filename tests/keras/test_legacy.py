"""Files that Keras 2 wrote, and `.weights.h5` of any batch norm."""

from __future__ import annotations

import doctest
import subprocess
import sys
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from keras import layers, ops
from versions import KERAS_HAS_RENORM, needs_keras_renorm

import syncbn
from syncbn import SyncBatchNormalization
from syncbn.keras import legacy_config

# Of Keras's own layer, which has no renorm before 3.14.
RENORM = {"renorm": True} if KERAS_HAS_RENORM else {}


# ----------------------------------------------------------------------------------------------------------- Keras 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What tf_keras writes, in a process of its own."""
    folder = tmp_path_factory.mktemp("keras2")
    writer = Path(__file__).with_name("keras2_writer.py")
    done = subprocess.run([sys.executable, str(writer), str(folder)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def norms(model):
    return [layer for layer in model._flatten_layers() if isinstance(layer, layers.BatchNormalization)]


def near(got, expected, tolerance):
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


OURS = {
    "sequential": [True, False], "renorm": [True, False], "several_axes": [True] * 3, "recurrent": [True],
    "functional": {"in_sequential": True, "in_deferred": False, "in_nested": False, "shared": True, "last": True},
    "convolutions": [False, True], "plain_several_axes": None,
}  # fmt: skip


@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize("kind", ["h5", "SavedModel"])
@pytest.mark.parametrize("name", OURS)
def test_old_model_computes_what_it_did(folder, name, kind, convert):
    path = folder / (f"{name}.h5" if kind == "h5" else name)
    model = syncbn.load_legacy(str(path), convert=convert)
    kinds = {layer.name: type(layer) is SyncBatchNormalization for layer in norms(model)}
    expected = OURS[name] or [True]
    if convert or (name == "renorm" and not KERAS_HAS_RENORM):
        assert all(kinds.values())
    else:
        assert kinds == expected if isinstance(expected, dict) else list(kinds.values()) == expected
    old = np.load(folder / f"{name}.npz")
    # Keras 3's TimeDistributed measures each step apart, Keras 2's all steps together: "recurrent" is compared in inference.
    for training in (False, True) if name != "recurrent" else (False,):
        outputs = keras.tree.flatten(model(old["x"], training=training))
        for i, y in enumerate(outputs):
            near(ops.convert_to_numpy(y), old[f"y{i} {training}"], 1e-5 if training else 1e-6)
        for layer in norms(model):
            for i, w in enumerate(layer.get_weights()):
                expected = old[f"{layer.name}/{i} {training}"]
                if training:
                    # Keras 2's fused layer, which plain BatchNormalization of 4 dimensions is, keeps an unbiased variance.
                    near(w, expected, 0.03 if layer.name.startswith("batch_normalization") else 1e-5)
                else:
                    np.testing.assert_array_equal(w, expected)


def test_a_sequential_model_that_keras_3_wrote(tmp_path):
    model = keras.Sequential([keras.Input((4, 3)), layers.Dense(3), SyncBatchNormalization()])
    model.save(tmp_path / "keras 3.h5")
    x = np.random.default_rng(0).normal(size=(2, 4, 3)).astype("float32")
    np.testing.assert_array_equal(syncbn.load_legacy(tmp_path / "keras 3.h5")(x), model(x))


@pytest.mark.parametrize("kind", ["h5", "SavedModel"])
def test_renorm_where_keras_has_none(folder, kind, monkeypatch):
    monkeypatch.setattr(legacy_config, "has_renorm", lambda: False)
    with pytest.warns(UserWarning, match=r"has no renorm before Keras 3\.14\. Received: the layer 'batch_normalization_1'"):
        model = syncbn.load_legacy(folder / ("renorm.h5" if kind == "h5" else "renorm"))
    assert [type(layer) for layer in norms(model)] == [SyncBatchNormalization] * 2
    old = np.load(folder / "renorm.npz")
    near(ops.convert_to_numpy(model(old["x"], training=True)), old["y0 True"], 1e-5)


PLAIN_UNDER_REPLICAS = {
    "four plain": r"Received: 4 such layers \('a', 'b', 'c', …\) under a strategy with \d replicas\. Give convert=True, or call",
    "functional": r"Received: 2 such layers \('in_nested', 'in_deferred'\) under",
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN_UNDER_REPLICAS)
def test_plain_layers_under_several_replicas_warn_once(folder, world, name, recwarn):
    with world.strategy.scope():
        with pytest.warns(UserWarning, match=PLAIN_UNDER_REPLICAS[name]) as caught:
            syncbn.load_legacy(folder / f"{name}.h5")
        assert len([w for w in caught if "synchronised" in str(w.message)]) == 1
        assert caught[0].filename == __file__
        recwarn.clear()
        syncbn.load_legacy(folder / f"{name}.h5", convert=True)
    syncbn.load_legacy(folder / f"{name}.h5")
    assert not [w for w in recwarn if "such layers" in str(w.message)]


def test_loaded_model_saves_as_keras_3(folder, tmp_path):
    model = syncbn.load_legacy(folder / "functional.h5")
    model.save(tmp_path / "new.keras")
    again = keras.models.load_model(tmp_path / "new.keras")
    x = np.load(folder / "functional.npz")["x"]
    for a, b in zip(again(x), model(x), strict=True):
        np.testing.assert_array_equal(a, b)


REFUSED = {
    "new format.keras": r"a `\.keras` file\. A file of Keras 3 loads with keras\.models\.load_model; one of tf_keras must be written again.*`\.h5`",
    "alone.h5": r"which is an HDF5 file of weights alone\. Build the model in code, and load the weights of the same file with syncbn\.load_weights",
    "subclassed": r"'Subclassed', which is subclassed.*Build the model in code, and load the weights of the same file with syncbn\.load_weights",
    "no keras": r"a SavedModel in which there is no Keras model\. For inference use keras\.layers\.TFSMLayer",
    "garbage.h5": r"which is of another kind\. Give the path of such a file",
    "empty": r"which is of another kind",
    "garbled": r"which cannot be read \(a number has no end\)",
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_other_files_are_refused_with_what_works(folder, name):
    (folder / "garbage.h5").write_bytes(b"no HDF5 at all")
    (folder / "empty").mkdir(exist_ok=True)
    (folder / "garbled").mkdir(exist_ok=True)
    (folder / "garbled" / "saved_model.pb").touch()
    (folder / "garbled" / "keras_metadata.pb").write_bytes(b"\x0a\xff")
    with pytest.raises(ValueError, match=r"syncbn\.load_legacy reads whole models that Keras 2 wrote(.|\n)*" + REFUSED[name]):
        syncbn.load_legacy(folder / name)
    with pytest.raises(FileNotFoundError):
        syncbn.load_legacy(folder / "nothing")


@pytest.mark.parametrize("path", ["evil.h5", "evil"])
def test_code_in_a_file_does_not_run(folder, path):
    with pytest.raises(ValueError, match=r"(?i)lambda"):
        syncbn.load_legacy(folder / path)
    assert not (folder / "it ran").exists()


def test_values_that_are_missing_are_named(folder, tmp_path):
    """A SavedModel whose configuration asks for more than its variables."""
    import shutil

    shutil.copytree(folder / "renorm", tmp_path / "model")
    for file in (folder / "sequential" / "variables").iterdir():
        shutil.copy(file, tmp_path / "model" / "variables")
    with pytest.raises(
        ValueError, match=r"must hold the weights of this model\. Received: .*in the model, not in the file: .*gamma"
    ):
        syncbn.load_legacy(tmp_path / "model")


# -------------------------------------------------------------------------------------------------------- .weights.h5


def model_of(*norm_layers):
    keras.utils.set_random_seed(len(norm_layers))
    parts = [keras.Input((3,))]
    for norm in norm_layers:
        parts += [layers.Dense(3), norm]
    model = keras.Sequential([*parts, keras.Sequential([layers.Dense(2)])])
    rng = np.random.default_rng(len(parts))
    for v in model.weights:
        v.assign(rng.uniform(0.5, 1.5, v.shape))
    return model


Plain, Ours = layers.BatchNormalization, SyncBatchNormalization


class Listed(keras.Model):
    """Batch norms in a list, and one whose attribute has the key's name."""

    def __init__(self, cls):
        super().__init__()
        self.batch_normalization, self.several = cls(), [cls(), layers.Dense(2), cls()]
        self(np.zeros((2, 3), "float32"))

    def call(self, x, training=None):
        x = self.batch_normalization(x)
        for layer in self.several:
            x = layer(x)
        return x


@pytest.mark.parametrize(("wrote", "reads"), [(Plain, Ours), (Ours, Plain), (Plain, Plain), (Ours, Ours)])
@pytest.mark.parametrize("kind", ["Sequential", "subclassed", "converted"])
def test_weights_of_any_batch_norm(kind, wrote, reads, tmp_path):
    if kind == "subclassed":
        source, target = Listed(wrote), Listed(reads)
    else:
        source, target = (model_of(*(cls(**arguments) for arguments in ({}, RENORM))) for cls in (wrote, reads))
    if kind == "converted":
        syncbn.convert(
            target, filter=lambda path, layer: not getattr(layer, "renorm", False)
        ) if reads is Plain else syncbn.revert(target)
    for i, v in enumerate(source.weights):
        v.assign(np.full(v.shape, i + 2.0))
    source.compile("adam", "mse")
    source.save_weights(tmp_path / "of.weights.h5")
    kinds = [type(layer) for layer in norms(target)]
    assert syncbn.load_weights(target, tmp_path / "of.weights.h5") is target
    for a, b in zip(source.weights, target.weights, strict=True):
        np.testing.assert_array_equal(a, b)
    assert [type(layer) for layer in norms(target)] == kinds


def test_weights_where_both_kinds_stand_side_by_side(tmp_path):
    source, target = model_of(Plain(), Ours(), Plain()), model_of(Plain(), Ours(), Plain())
    for i, v in enumerate(source.weights):
        v.assign(np.full(v.shape, i + 2.0))
    source.save_weights(tmp_path / "of.weights.h5")
    syncbn.load_weights(target, tmp_path / "of.weights.h5")
    for a, b in zip(source.weights, target.weights, strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match=r"in the file, not in the model: layers/batch_normalization"):
        syncbn.load_weights(model_of(Ours(), Ours(), Ours()), tmp_path / "of.weights.h5")


def test_weights_of_keras_2(folder):
    x = keras.Input((4, 5, 3))
    model = keras.Model(x, Ours()(Plain()(layers.Conv2D(4, 3, padding="same")(x))))
    syncbn.load_weights(model, folder / "keras2.weights.h5")
    old = np.load(folder / "keras2 weights.npz")
    for a, b in zip(model.get_weights(), [old[key] for key in old], strict=True):
        np.testing.assert_array_equal(a, b.astype("float32"))


@needs_keras_renorm
def test_weights_that_do_not_fit_are_named_and_none_is_loaded(tmp_path):
    source = model_of(Plain(name="first"), Plain(name="second", renorm=True))
    source.save_weights(tmp_path / "of.weights.h5")
    for target, message in (
        (model_of(Ours(name="only")), r"in the file, not in the model: .*layers/batch_normalization_1 \(second\)"),
        (
            model_of(Ours(), Ours(renorm=True), Ours(name="third")),
            r"in the model, not in the file: .*/third",
        ),
        (model_of(Ours(), Ours(name="mine")), r"of other shapes: layers/batch_normalization_1 \(second\).*No weight was changed"),
    ):
        before = [np.array(v) for v in target.weights]
        with pytest.raises(ValueError, match=message):
            syncbn.load_weights(target, tmp_path / "of.weights.h5")
        for a, b in zip(target.weights, before, strict=True):
            np.testing.assert_array_equal(a, b)


class Moody(layers.Layer):
    """Fails after others have loaded."""

    def build(self, shape):
        self.w = self.add_weight(shape=(1,), name="w")

    def call(self, x):
        return x * self.w

    def load_own_variables(self, store):
        if float(store["0"][0]) == 7:
            raise RuntimeError("moody")
        super().load_own_variables(store)


def test_a_load_that_fails_midway_is_undone(tmp_path):
    def make():
        return keras.Sequential([keras.Input((3,)), layers.Dense(3), Ours(), Moody()])

    source, target = make(), make()
    for v in source.weights:
        v.assign(np.full(v.shape, 7.0))
    source.save_weights(tmp_path / "of.weights.h5")
    before = [np.array(v) for v in target.weights]
    with pytest.raises(ValueError, match=r"which cannot be read \(RuntimeError: moody\)"):
        syncbn.load_weights(target, tmp_path / "of.weights.h5")
    for a, b in zip(target.weights, before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_no_weights_file(tmp_path):
    model = model_of(Ours())
    (tmp_path / "text.weights.h5").write_text("no HDF5")
    with h5py.File(tmp_path / "other.weights.h5", "w") as file:
        file["data"] = 1
    for name in ("text.weights.h5", "other.weights.h5"):
        with pytest.raises(
            ValueError, match=r"syncbn\.load_weights reads the weights of Keras 2 and 3.*which is of another kind"
        ):
            syncbn.load_weights(model, tmp_path / name)
    with pytest.raises(FileNotFoundError):
        syncbn.load_weights(model, tmp_path / "nothing.weights.h5")
    model.save_weights(tmp_path / "of.weights.h5")
    with pytest.raises(ValueError, match=r"must be built before weights are loaded into it. Received: later, which is not"):
        syncbn.load_weights(keras.Sequential([Ours()], name="later"), tmp_path / "of.weights.h5")
    with pytest.raises(TypeError, match=r"syncbn\.load_weights takes"):
        syncbn.load_weights(3, tmp_path / "text.weights.h5")


class Composite(keras.Model):
    """Layers in dicts and in lists of lists, a layer made of layers, weights of its own, and a random layer."""

    def __init__(self, cls):
        super().__init__()
        self.norm_1, self.parts = cls(), {"a": layers.Dense(3), "b": [[cls()], [cls(), layers.Dense(3)]]}
        self.attention, self.drop = layers.MultiHeadAttention(2, 2), layers.Dropout(0.5, seed=3)
        self.own = self.add_weight(shape=(3,), name="own")
        self(np.zeros((2, 4, 3), "float32"))

    def get_config(self):
        return {}

    def call(self, x, training=None):
        x = self.parts["a"](self.norm_1(x))
        for layer in (layer for inner in self.parts["b"] for layer in inner):
            x = layer(x)
        return self.drop(self.attention(x, x), training=training) * self.own


@pytest.mark.parametrize("ending", [".weights.h5", ".keras"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_of_any_structure(ending, dtype, tmp_path):
    """Of a compiled model that was trained: optimizer and metrics are in the file, and are left out."""
    keras.config.set_dtype_policy(dtype)
    try:
        source, target = Composite(Plain), Composite(Ours)
    finally:
        keras.config.set_dtype_policy("float32")
    source.compile("adam", "mse", metrics=["mae"])
    source.fit(np.ones((4, 4, 3)), np.ones((4, 4, 3)), verbose=0)
    (source.save_weights if ending == ".weights.h5" else source.save)(tmp_path / f"of{ending}")
    syncbn.load_weights(target, tmp_path / f"of{ending}")
    for a, b in zip(source.weights, target.weights, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(a).astype("float32"), ops.convert_to_numpy(b).astype("float32"))


def with_ones(path):
    """The weights of a file in the shapes that version 0.1.0 gave them for a list of one axis."""
    with h5py.File(path, "r+") as file:
        found = []
        file.visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None)
        for name in found:
            value = file[name][()]
            del file[name]
            file[name] = value.reshape(1, 1, 1, -1)


@pytest.mark.parametrize("wrote", [-1, "version 0.1.0", [1, 3]])
@pytest.mark.parametrize("reads", [-1, [3], [1, 3]])
def test_a_list_of_one_axis_is_an_axis(wrote, reads, tmp_path):
    axes = (-1 if wrote == "version 0.1.0" else wrote, reads)
    source, target = (keras.Sequential([keras.Input((4, 5, 3)), Ours(axis=axis)]) for axis in axes)
    for i, v in enumerate(source.weights):
        v.assign(np.random.default_rng(i).uniform(size=v.shape))
    source.save_weights(tmp_path / "of.weights.h5")
    if wrote == "version 0.1.0":
        with_ones(tmp_path / "of.weights.h5")
    if (wrote == [1, 3]) != (reads == [1, 3]):
        with pytest.raises(ValueError, match="of other shapes"):
            syncbn.load_weights(target, tmp_path / "of.weights.h5")
        return
    syncbn.load_weights(target, tmp_path / "of.weights.h5")
    for a, b in zip(source.weights, target.weights, strict=True):
        np.testing.assert_array_equal(ops.reshape(a, [-1]), ops.reshape(b, [-1]))
    if reads != [1, 3]:
        for v in target.weights:
            v.assign(ops.zeros_like(v))
        target.load_weights(tmp_path / "of.weights.h5")
        for a, b in zip(source.weights, target.weights, strict=True):
            np.testing.assert_array_equal(a, b)


def test_links_out_of_a_weights_file_are_not_followed(tmp_path):
    model = model_of(Ours())
    model.save_weights(tmp_path / "secret.weights.h5")
    with h5py.File(tmp_path / "linked.weights.h5", "w") as file:
        file.create_group("vars")
        file["layers"] = h5py.ExternalLink("secret.weights.h5", "layers")
    with pytest.raises(ValueError, match="in the model, not in the file"):
        syncbn.load_weights(model, tmp_path / "linked.weights.h5")


def test_examples_in_the_docs_run():
    from syncbn import loading
    from syncbn.keras import legacy

    for module in (legacy, loading):
        failed, tried = doctest.testmod(module)
        assert tried
        assert not failed
