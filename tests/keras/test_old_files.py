"""Files that TensorFlow 2.2 to 2.15 wrote, tried one by one: whole models, weights, checkpoints."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import warnings

import h5py
import keras
import numpy as np
import oracle
import pytest
import rebuilt_models
from keras import layers, ops
from old_files import DATA, PACKED, VERSIONS, Computed, files, near, place, step
from versions import KERAS_HAS_RENORM

import syncbn
from syncbn import SyncBatchNormalization

TENSORFLOW = keras.backend.backend() == "tensorflow"
needs_tensorflow = pytest.mark.skipif(not TENSORFLOW, reason="one framework a process")
READS = (PACKED, ".ckpt.index") if TENSORFLOW else ()
# In these versions SyncBatchNormalization divides by the wrong count where the channels are not last, or are several axes.
WRONG_COUNT = ("tf2.2", "tf2.3", "tf2.4")
MODELS = {make.__name__: make for make in rebuilt_models.MODELS}
STATISTICS = ("moving_mean", "moving_variance", "moving_stddev", "renorm_mean", "renorm_stddev")


def rebuilt(name):
    return MODELS[name.removeprefix("mirrored_")]()


def values(model):
    return [ops.convert_to_numpy(v) for v in model.weights]


def has_weights(model, expected, names):
    """In Keras 2's order, layer by layer."""
    found = [v for layer in model.layers for v in layer.weights]
    assert [v.name for v in found] == [name.split("/")[-1].split(":")[0] for name in names]
    for got, value, name in zip(found, expected, names, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(got).reshape(value.shape), value, err_msg=name)


def load(path, **arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return syncbn.load_legacy(path, **arguments)


# ------------------------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize(("version", "name", "ending"), files(".h5", *READS[:1]))
def test_whole_model_computes_what_it_did(version, name, ending, tmp_path):
    old = Computed(version, name)
    path = place(version, name, ending, tmp_path)
    if name == "subclassed":
        with pytest.raises(ValueError, match=r"class 'Subclassed', which is subclassed.*syncbn\.load_weights\(model, path\)"):
            syncbn.load_legacy(path)
        return
    model = load(path)
    has_weights(model, old.weights("before"), old.names)
    near(model(old.x, training=False), old.arrays["y"], 1e-5, "inference")
    y, dx = step(model, old.x, old.cotangent)
    if name == "other_axes" and version in WRONG_COUNT:
        assert np.abs(y - old.arrays["y_training"]).max() > 0.1, "TensorFlow is right here: move the test"
        expected = truth_of_other_axes(old)
    else:
        expected = {key: old.arrays[key] for key in ("y_training", "dx")} | {"after": unbiased_undone(name, old)}
    near(y, expected["y_training"], 1e-5, "training")
    near(dx, expected["dx"], 1e-5, "input gradient")
    for got, after, weight in zip(values(model), expected["after"], old.names, strict=True):
        near(got.reshape(after.shape), after, 1e-5, weight)


def truth_of_other_axes(old):
    """Two layers, by the oracle in float64."""
    x, weights = old.x, [w.astype("float64") for w in old.weights("before")]
    after, norms = list(weights), []
    for i, axes in enumerate([(1,), (1, 3)]):
        gamma, beta, mean, variance = weights[4 * i : 4 * i + 4]
        norms.append(oracle.BatchNorm([x], axes=axes))
        (x,) = norms[-1].forward(gamma.ravel(), beta.ravel())
        _, new_mean, new_variance = norms[-1].moving()
        for at, value, new in ((2, mean, new_mean), (3, variance, new_variance)):
            after[4 * i + at] = oracle.moving_average(value.ravel(), new, 0.99).reshape(value.shape)
    dx = old.cotangent
    for norm, gamma in zip(reversed(norms), (weights[4], weights[0]), strict=True):
        ((dx,), _, _) = norm.backward([dx], gamma.ravel())
    return {"y_training": x, "dx": dx, "after": after}


def unbiased_undone(name, old):
    """Weights after the step. Keras 2's fused plain layer keeps an unbiased variance, Keras 3's none."""
    after = old.weights("after")
    if name == "functional":
        at = old.names.index(next(n for n in old.names if n.endswith("batch_normalization/moving_variance:0")))
        before, count = old.weights("before")[at], 8 * 6 * 6
        after[at] = before * 0.99 + (after[at] - before * 0.99) * (count - 1) / count
    return after


@pytest.mark.parametrize("convert", [False, True])
def test_which_layers_become_ours(convert):
    model = load(DATA / "tf2.2" / "functional.h5", convert=convert)
    assert {layer.name: type(layer) for layer in model.layers if isinstance(layer, layers.BatchNormalization)} == {
        "stem_conv_bn": SyncBatchNormalization,
        "batch_normalization": SyncBatchNormalization if convert else layers.BatchNormalization,
    }
    ours = model.get_layer("stem_conv_bn")
    assert ours.renorm_clipping == {"rmin": 0.4, "rmax": 2.5, "dmax": 4.0}
    assert (ours.renorm, ours.renorm_momentum, ours.gamma.shape) == (True, 0.7, (4,))


def test_a_plain_layer_with_two_axes_becomes_ours_with_a_warning():
    with pytest.warns(UserWarning, match=r"takes one axis\. Received: the layer 'two_axes' with axis=\[1, 3\]") as told:
        model = syncbn.load_legacy(DATA / "tf2.2" / "axis_lists.h5")
    assert told[0].filename == __file__
    one, two = (layer for layer in model.layers if isinstance(layer, SyncBatchNormalization))
    assert (one.gamma.shape, two.gamma.shape) == ((3,), (1, 4, 1, 3))
    assert one.beta_constraint is not None
    assert one.gamma_regularizer is not None


def test_loaded_models_take_any_batch_and_save_as_keras_3(tmp_path):
    model = load(DATA / "tf2.2" / "page.h5")  # built by a batch of 8
    assert model.input_shape == (None, 8)
    x = np.random.default_rng(0).normal(size=(3, 8)).astype("float32")
    model.save(tmp_path / "new.keras")
    np.testing.assert_array_equal(*(ops.convert_to_numpy(m(x)) for m in (keras.models.load_model(tmp_path / "new.keras"), model)))
    assert load(DATA / "tf2.2" / "functional.h5")(np.zeros((1, 8, 8, 3), "float32")).shape == (1, 2)


def edited(source, target, change):
    """A copy of a whole `.h5`, its configuration changed."""
    shutil.copy(source, target)
    with h5py.File(target, "a") as file:
        config = json.loads(file.attrs["model_config"])
        change(config)
        file.attrs["model_config"] = json.dumps(config)
    return target


def test_words_of_keras_2_keep_their_meaning(tmp_path):
    """`hard_sigmoid` has another slope in Keras 3; its loader drops lists of axes."""
    x = np.linspace(-4, 4, 40, dtype="float32").reshape(8, 5)

    def activation(config):
        config["config"]["layers"][2] = {"class_name": "Activation", "config": {"name": "a", "activation": "hard_sigmoid"}}

    model = load(edited(DATA / "tf2.2" / "sequential.h5", tmp_path / "a.h5", activation))
    inner = keras.Model(model.inputs, [model.layers[1].output, model.layers[2].output])
    before, after = (ops.convert_to_numpy(y) for y in inner(x))
    near(after, np.clip(0.2 * before + 0.5, 0, 1), 1e-6)

    def softmax(config):
        config["config"]["layers"].insert(1, {"class_name": "Softmax", "config": {"name": "s", "axis": [1, 2]}})

    model = load(edited(DATA / "tf2.2" / "first_layer.h5", tmp_path / "s.h5", softmax))
    assert list(model.layers[1].axis) == [1, 2]


def test_unknown_layers_are_named(tmp_path):
    def unknown(config):
        config["config"]["layers"][2]["class_name"] = "Mine"

    path = edited(DATA / "tf2.2" / "sequential.h5", tmp_path / "m.h5", unknown)
    with pytest.raises(ValueError, match=r"a layer of the class 'Mine'\. Give it in `custom_objects`; or build"):
        load(path)

    class Mine(layers.ReLU):
        pass

    assert type(load(path, custom_objects={"Mine": Mine}).layers[2]) is Mine

    class Counting(layers.Layer):
        """Makes a variable of a value, which Keras does not put off."""

        def __init__(self, max_value, negative_slope, threshold, **arguments):
            super().__init__(**arguments)
            self.seen = keras.Variable(0.0, trainable=False, name="seen")

    with pytest.raises(ValueError, match=r"in the model, not in the file: .*seen"):
        load(path, custom_objects={"Mine": Counting})


# ----------------------------------------------------------------------------------------------------- the page's table

PAGE = {
    "model.h5": ("tf2.2", "functional", ".h5"),
    "saved_model": ("tf2.2", "functional", PACKED),
    "subclassed": ("tf2.2", "subclassed", PACKED),
    "weights.h5": ("tf2.2", "functional", ".weights.h5"),
    "weights.ckpt": ("tf2.2", "functional", ".ckpt.index"),
    "training": ("tf2.2", "functional", ".train"),
    "new.weights.h5": ("tf2.15", "nested", ".weights.h5"),
    "tf.keras": ("tf2.15", "nested", ".keras"),
    "new.keras": ("tf2.2", "functional", ".h5"),
}
ROWS = re.findall(r"^\|.*\| `(.*?\"(.*?)\".*?)` \|", (DATA.parents[1] / "docs" / "migration.md").read_text(), re.M)


def test_every_file_is_in_the_table():
    assert {name for _, name in ROWS if name in PAGE} == set(PAGE)


@pytest.mark.parametrize(("code", "name"), [row for row in ROWS if row[1] in PAGE])
def test_each_row_of_the_page_does_what_it_says(code, name, tmp_path, monkeypatch):
    version, which, ending = PAGE[name]
    if not TENSORFLOW and ending in (PACKED, ".ckpt.index", ".train"):
        pytest.skip("one framework a process")
    monkeypatch.chdir(tmp_path)
    if name == "new.keras":
        load(DATA / version / f"{which}{ending}").save(name)
    elif ending == PACKED:
        place(version, which, ending, tmp_path / name)
    else:
        for path in (DATA / version).glob(f"{which}{ending.removesuffix('.index')}*"):
            target = name + path.name.removeprefix(which + ending.removesuffix(".index"))
            (shutil.copytree if path.is_dir() else shutil.copy)(path, target)
    known = {"keras": keras, "syncbn": syncbn, "model": rebuilt(which)}
    exec(code, known)
    old = Computed(version, which)
    has_weights(known["model"], old.weights("after" if name == "training" else "before"), old.names)
    if name != "training":
        near(known["model"](old.x, training=False), old.arrays["y"], 1e-5)
    norms = [layer for layer in known["model"]._flatten_layers() if isinstance(layer, layers.BatchNormalization)]
    assert sum(isinstance(norm, SyncBatchNormalization) for norm in norms) == (2 if "convert" in code or which == "nested" else 1)


# ------------------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize(("version", "name", "ending"), files(".h5", ".weights.h5", ".hdf5", *READS))
def test_weights_load_into_a_model_in_code(version, name, ending, tmp_path):
    old, model = Computed(version, name), rebuilt(name)
    assert syncbn.load_weights(model, place(version, name, ending, tmp_path)) is model
    has_weights(model, old.weights("before"), old.names)
    near(model(old.x, training=False), old.arrays["y"], 1e-5)


@needs_tensorflow
@pytest.mark.parametrize(("version", "name", "_"), files(".train"))
def test_a_folder_of_training_loads(version, name, _):
    """Of model, optimizer and step, where the model is an object among others; after the step."""
    old, model = Computed(version, name), rebuilt(name)
    syncbn.load_weights(model, DATA / version / f"{name}.train")
    has_weights(model, old.weights("after"), old.names)


def test_every_version_is_there():
    assert VERSIONS == ["tf2.2", "tf2.3", "tf2.4", "tf2.6", "tf2.9", "tf2.12", "tf2.15"]
    assert {str(Computed(v, "nested").arrays["version"]) for v in VERSIONS} == {f"{v[2:]}.0" for v in VERSIONS}
    assert {name.removeprefix("mirrored_") for v, name, _ in files(".npz") if v == "tf2.2"} == set(MODELS)


@pytest.mark.parametrize("name", ["weights", "model.keras", "best.ckpt", "x.index"])
def test_the_content_tells_the_kind(name, tmp_path):
    shutil.copy(DATA / "tf2.2" / "functional.weights.h5", tmp_path / name)
    model = syncbn.load_weights(rebuilt("functional"), tmp_path / name)
    has_weights(model, Computed("tf2.2", "functional").weights("before"), Computed("tf2.2", "functional").names)
    with pytest.raises(ValueError, match=r"which is an HDF5 file of weights alone\. Build the model in code"):
        syncbn.load_legacy(tmp_path / name)


@needs_tensorflow
@pytest.mark.parametrize("ending", ["", ".index", ".data-00000-of-00001"])
def test_any_name_of_a_checkpoint(ending):
    old, model = Computed("tf2.2", "page"), rebuilt("page")
    syncbn.load_weights(model, f"{DATA}/tf2.2/page.ckpt{ending}")
    has_weights(model, old.weights("before"), old.names)
    with pytest.raises(ValueError, match=r"which is a TensorFlow checkpoint, of weights alone\. Build the model in code"):
        syncbn.load_legacy(f"{DATA}/tf2.2/page.ckpt{ending}")


@needs_tensorflow
def test_a_moved_folder_of_training(tmp_path):
    """`checkpoint` may say where the folder was; it may not lead out of it."""
    shutil.copytree(DATA / "tf2.2" / "functional.train", tmp_path / "here")
    (tmp_path / "here" / "checkpoint").write_text('model_checkpoint_path: "/gone/run/ckpt-1"\nall_model_checkpoint_paths: "x"\n')
    old = Computed("tf2.2", "functional")
    for path in (tmp_path / "here", tmp_path / "here" / "checkpoint"):
        has_weights(syncbn.load_weights(rebuilt("functional"), path), old.weights("after"), old.names)


@pytest.mark.parametrize("ending", [".h5", ".weights.h5", *READS])
def test_converted_models_take_weights(ending, tmp_path):
    old, model = Computed("tf2.2", "functional"), rebuilt("functional")
    if KERAS_HAS_RENORM:  # one of its layers has it on
        syncbn.revert(model)
    syncbn.convert(model)
    syncbn.load_weights(model, place("tf2.2", "functional", ending, tmp_path))
    has_weights(model, old.weights("before"), old.names)
    assert sum(isinstance(layer, SyncBatchNormalization) for layer in model.layers) == 2


@needs_tensorflow
@pytest.mark.parametrize("ending", [".h5", *READS])
def test_loading_and_training_under_a_strategy(ending, tmp_path, world):
    """Replicas with 2 examples each make the step that TensorFlow made with 8."""
    import tensorflow as tf

    old, path = Computed("tf2.2", "mirrored_sequential"), place("tf2.2", "mirrored_sequential", ending, tmp_path)
    with world.strategy.scope():
        models = [syncbn.load_weights(rebuilt("sequential"), path)]
        models += [syncbn.load_legacy(path)] if ending != ".ckpt.index" else []
    for model in models:
        for v, before in zip(model.weights, old.weights("before"), strict=True):
            copies = world.strategy.experimental_local_results(v.value)
            assert len(copies) == world.replicas
            for copy in copies:
                np.testing.assert_array_equal(copy, before)

        def train(x, cotangent, model=model):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = model(x, training=True)
            return y, tape.gradient(y, x, cotangent)

        parts = (np.array_split(values, world.replicas) for values in (old.x, old.cotangent))
        ys, dxs = zip(*world.run(train, *parts), strict=True)
        near(np.concatenate(ys), old.arrays["y_training"], 1e-5)
        near(np.concatenate(dxs), old.arrays["dx"], 1e-5)
        for got, after, name in zip(values(model), old.weights("after"), old.names, strict=True):
            near(got, after, 1e-5, name)


# -------------------------------------------------------------------------------------------------- other backends

HIDDEN = """
import sys
sys.modules["tensorflow"] = None
sys.path.insert(0, {tests!r})
import keras, syncbn, rebuilt_models
from old_files import Computed, near, place
old = Computed("tf2.2", "functional")
data = {data!r}
model = syncbn.load_legacy(data + "/functional.h5")
near(keras.ops.convert_to_numpy(model(old.x, training=False)), old.arrays["y"], 1e-5)
syncbn.load_weights(rebuilt_models.functional(), data + "/functional.weights.h5")
place("tf2.2", "functional", ".savedmodel.tar.xz", {folder!r})
for call in (lambda: syncbn.load_weights(model, data + "/functional.ckpt"), lambda: syncbn.load_weights(model, {folder!r}),
             lambda: syncbn.load_legacy({folder!r})):
    try:
        call()
    except ImportError as error:
        assert "`tensorflow` is not installed" in str(error) and 'pip install "syncbn[tensorflow]"' in str(error), error
    else:
        raise AssertionError("no error")
assert not any(name.startswith("tensorflow.") for name in sys.modules)
print(keras.backend.backend())
"""


@needs_tensorflow
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_without_tensorflow(backend, tmp_path, monkeypatch):
    pytest.importorskip(backend)
    monkeypatch.setenv("KERAS_BACKEND", backend)
    code = HIDDEN.format(tests=str(DATA.parent / "keras"), data=str(DATA / "tf2.2"), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == backend, done.stderr[-3000:]
