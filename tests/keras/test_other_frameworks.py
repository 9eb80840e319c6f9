"""What is said where torch's words, torch's files, or tf_keras meet the Keras layer."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile

import keras
import pytest

import syncbn


@pytest.mark.parametrize(
    ("given", "mend"),
    [
        ({"eps": 1e-3}, "Give `epsilon` for `eps`."),
        (
            {"num_features": 3, "affine": True},
            "Give `scale` and `center` for `affine`. Drop `num_features`: the channels are the input's.",
        ),
        ({"nothing": 1}, "Drop or rename them."),
    ],
)
def test_words_of_torch_are_translated(given, mend):
    for make in (syncbn.SyncBatchNormalization, lambda **named: syncbn.SyncBatchNormalization.from_config(named)):
        with pytest.raises((ValueError, TypeError), match="takes no other keywords") as error:
            make(**given)
        assert str(error.value).endswith(f"Received: {sorted(given)}. {mend}")


def write_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", pickle.dumps({}))


def write_pickle(path):
    path.write_bytes(pickle.dumps({"weight": [1.0]}, 2))


def write_safetensors(path):
    header = json.dumps({"weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))


@pytest.mark.parametrize("write", [write_zip, write_pickle, write_safetensors])
def test_files_of_torch_are_told(write, tmp_path):
    path = tmp_path / "model.pt"
    write(path)
    model = keras.Sequential([keras.Input((3,)), syncbn.SyncBatchNormalization()])
    text = (
        r"reads files of Keras and TensorFlow\. Received: .*model\.pt, a file of PyTorch, .*load_state_dict.*layer\.set_weights\."
    )
    for load in (lambda: syncbn.load_weights(model, path), lambda: syncbn.load_legacy(path)):
        with pytest.raises(ValueError, match=text):
            load()


def test_other_zips_and_texts_are_no_files_of_torch(tmp_path):
    model = keras.Sequential([keras.Input((3,)), syncbn.SyncBatchNormalization()])
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("model/data.txt", "")
    (tmp_path / "text").write_text("function{}")
    for name in ("a.zip", "text"):
        with pytest.raises(ValueError, match="reads the weights of Keras 2 and 3"):
            syncbn.load_weights(model, tmp_path / name)


TF_KERAS = """
import warnings
import {module} as old
import syncbn

model = old.Sequential([old.layers.Input((3,)), old.layers.BatchNormalization()])
for act in (lambda: syncbn.convert(model), lambda: syncbn.load_weights(model, "of.h5"), lambda: syncbn.revert(model)):
    try:
        act()
    except TypeError as error:
        text = str(error)
        assert "Received: tf_keras." in text and text.endswith("and build the model with `import keras`."), text
        assert "Save it as `.h5`: syncbn.load_legacy(path, convert=True)" in text
    else:
        raise AssertionError("no error")
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    layer = syncbn.SyncBatchNormalization(name="bn")
found = [w for w in found if "TF_USE_LEGACY_KERAS" in str(w.message)]
assert len(found) == {warned}, found
assert all("is a layer of Keras 3" in str(w.message) and w.filename == "<string>" for w in found)
try:
    old.Sequential([layer])
except TypeError as error:
    text = str(error)
assert "<SyncBatchNormalization name=bn, built=False: a layer of Keras 3, which tf_keras does not take. Unset TF_USE" in text, text
"""


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="tf_keras is TensorFlow's")
@pytest.mark.parametrize(("module", "legacy"), [("tensorflow.keras", "1"), ("tf_keras", "0")])
def test_tf_keras_is_told_apart(module, legacy):
    code = TF_KERAS.format(module=module, warned=int(legacy)).replace(
        "import tensorflow.keras as old", "import tensorflow; old = tensorflow.keras"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "TF_USE_LEGACY_KERAS": legacy},
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_repr_is_as_keras_has_it():
    if "tf_keras" not in sys.modules:
        assert repr(syncbn.SyncBatchNormalization(name="bn")) == "<SyncBatchNormalization name=bn, built=False>"
