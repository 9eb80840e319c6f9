"""Weights of any file that Keras 2 or 3 wrote, for a model that stands."""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path
from typing import Any

import h5py
from keras import layers

from syncbn import validation
from syncbn.keras import checkpoints, files, keras2_hdf5, keras3_weights, matching

IN_ARCHIVE = "model.weights.h5"


def load_weights(model: Any, path: Any) -> Any:
    """See `syncbn.load_weights`."""

    def refuse(received: str) -> files.FileError:
        return not_weights(path, received)

    if not isinstance(model, layers.Layer):
        takes = "a Keras 3 layer or model"
        raise validation.foreign_model("syncbn.load_weights", takes, model, validation.FOREIGN_TO_LOADING)
    kind, place = files.identify(Path(path), refuse)
    if kind in (files.CHECKPOINT, files.SAVED_MODEL):
        checkpoints.require_tensorflow(path, kind)
    if kind in (None, files.TORCH):
        raise files.of_torch("syncbn.load_weights", path) if kind else refuse("which is of another kind")
    if not model.built:
        raise not_built(model.name)
    with files.reading(refuse):
        _load(model, path, kind, place)
    return model


def _load(model: Any, path: Any, kind: str, place: Path) -> None:
    if kind == files.KERAS_3_WEIGHTS:
        keras3_weights.load(model, path, place)
    elif kind == files.ARCHIVE:
        with zipfile.ZipFile(place) as archive, tempfile.TemporaryDirectory() as folder:
            keras3_weights.load(model, path, Path(archive.extract(IN_ARCHIVE, folder)))
    elif kind == files.CHECKPOINT:
        _assign(model, path, checkpoints.match(model, place))
    elif kind == files.SAVED_MODEL:
        _assign(model, path, checkpoints.match(model, files.variables(place)))
    else:
        with h5py.File(place, "r") as file:
            match = keras2_hdf5.match if kind == files.KERAS_2_WEIGHTS else keras2_hdf5.match_whole
            _assign(model, path, match(model, file))


def _assign(model: Any, path: Any, found: matching.Match) -> None:
    matching.check(path, model, found)
    matching.assign(model, found)


def not_weights(path: Any, received: str) -> files.FileError:
    """A file that holds no weights that can be read."""
    return files.FileError(
        "syncbn.load_weights reads the weights of Keras 2 and 3 in HDF5 files, TensorFlow checkpoints and SavedModels. Received: "
        f"{path}, {received}. Give the path of such a file, or of a checkpoint without `.index`. No weight was changed."
    )


def not_built(name: str) -> ValueError:
    """A model without weights yet."""
    return ValueError(
        f"A model must be built before weights are loaded into it. Received: {name}, which is not. Call it on some data, or give "
        "it an Input."
    )
