"""Weights of any file that Keras 2 or 3 wrote, for a model that stands."""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path
from typing import Any

import h5py
from keras import layers

from syncbn.keras import checkpoints, files, keras2_hdf5, keras3_weights, matching

IN_ARCHIVE = "model.weights.h5"


def load_weights(model: Any, path: Any) -> Any:
    """Loads weights into a Keras model, from any file of Keras 2 or 3, whichever batch norm classes wrote it and the model has.

    A file's kind is told by its content, whatever its name. Layers are matched by name where model and file have the same names,
    else by order; in a checkpoint along its tree of objects. Every name and shape is checked before any weight is changed.
    Optimizer states are left out.

    | file | how layers are matched |
    |---|---|
    | HDF5 of Keras 2, weights alone or a whole model | names of layers, else order; names of weights |
    | TensorFlow checkpoint: its prefix, its `.index`, or a folder with a file `checkpoint` | attributes; order of layers |
    | SavedModel, of a subclassed model too | as a checkpoint |
    | `.weights.h5` or `.keras` of Keras 3, or of TensorFlow ≥ 2.12 | classes of layers, and order among the same class |

    Args:
        model: a Keras 3 model that is built.
        path: of the file or folder. Checkpoints and SavedModels are read with TensorFlow.

    Raises:
        FileNotFoundError: nothing there.
        ImportError: a checkpoint or a SavedModel, and TensorFlow is not installed.
        ValueError: a file of another kind, or broken; a model that is not built; weights that do not fit, by name. The model is
            unchanged.

    Source: the formats of TensorFlow 2.2 to 2.15, tf_keras, and Keras 3.

    Example:
        >>> import keras, os, syncbn, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "plain.weights.h5")
        >>> plain = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization()])
        >>> plain.save_weights(path)
        >>> ours = keras.Sequential([keras.Input((3,)), syncbn.SyncBatchNormalization()])
        >>> syncbn.load_weights(ours, path) is ours
        True
    """

    def refuse(received: str) -> files.FileError:
        return not_weights(path, received)

    if not isinstance(model, layers.Layer):
        raise TypeError(
            f"syncbn.load_weights takes a Keras 3 layer or model. Received: {type(model).__module__}.{type(model).__qualname__}. "
            "A torch module loads its own files by load_state_dict."
        )
    kind, place = files.identify(Path(path), refuse)
    if kind in (files.CHECKPOINT, files.SAVED_MODEL):
        checkpoints.require_tensorflow(path, kind)
    if kind is None:
        raise refuse("which is of another kind")
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
