"""Whole models that Keras 2 wrote, as `.h5` or SavedModel, become Keras 3 models. Nothing from a file is run or unpickled."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import h5py
from keras import layers

from syncbn.keras import _private, checkpoints, files, keras2_hdf5, legacy_config, matching, protobuf
from syncbn.keras.layer import SyncBatchNormalization

IN_CODE = "Build the model in code, and load the weights of the same file with syncbn.load_weights(model, path)"
MENDS = {
    files.KERAS_2_WEIGHTS: IN_CODE,
    files.KERAS_3_WEIGHTS: IN_CODE,
    files.CHECKPOINT: IN_CODE,
    files.ARCHIVE: "A file of Keras 3 loads with keras.models.load_model; one of tf_keras must be written again as `.h5`",
    None: "Give the path of such a file",
}


def load_legacy(path: Any, *, convert: bool = False, custom_objects: dict[str, Any] | None = None) -> Any:
    """The Keras 3 model of a file that Keras 2 wrote: `.h5`, or the folder of a SavedModel. It needs no tf_keras.

    `tf.keras.layers.experimental.SyncBatchNormalization` becomes `syncbn.SyncBatchNormalization`, with its axes, renorm and
    statistics. `BatchNormalization` stays Keras's, because the files do not say `synchronized`; with convert=True it becomes
    ours. Plain layers that stay under a `tf.distribute` strategy with several replicas give a warning. One with several axes,
    which Keras 3 does not have, always becomes ours, with a warning. So does one with renorm where Keras has none, before 3.14.
    A `/` in a layer's name becomes `_`. The model computes what it did, and is not compiled. No code of a file runs. The kind of
    a file is told by its content.
    A SavedModel is read with TensorFlow.

    Args:
        path: of the file or folder.
        convert: whether `BatchNormalization` becomes ours too.
        custom_objects: further classes and functions that the file names.

    Raises:
        FileNotFoundError: nothing there.
        ImportError: a SavedModel, and TensorFlow is not installed.
        ValueError: a file of another kind, or broken; a subclassed model; layers that Keras 3 does not have; weights that are not
            the model's.

    Source: the formats of TensorFlow 2.2 to 2.15 and tf_keras.

    Example:
        >>> import syncbn
        >>> model = syncbn.load_legacy("written by Keras 2.h5")
        Traceback (most recent call last):
        ...
        FileNotFoundError: written by Keras 2.h5
    """

    def refuse(received: str, mend: str = MENDS[None]) -> files.FileError:
        return not_legacy(path, received, mend)

    kind, place = files.identify(Path(path), refuse)
    if kind == files.SAVED_MODEL:
        checkpoints.require_tensorflow(path, kind)
        with files.reading(refuse):
            config = _whole(protobuf.model_config(place), refuse)
            return _load(path, config, convert, custom_objects, lambda model: checkpoints.match(model, files.variables(place)))
    if kind == files.KERAS_2_MODEL:
        with files.reading(refuse), h5py.File(place, "r") as file:
            config = _whole(json.loads(file.attrs["model_config"]), refuse)
            return _load(path, config, convert, custom_objects, lambda model: keras2_hdf5.match_whole(model, file))
    if kind == files.TORCH:
        raise files.of_torch("syncbn.load_legacy", path)
    raise refuse(f"which is {kind or 'of another kind'}", MENDS[kind])


def _load(path: Any, config: Any, convert: bool, custom_objects: Any, match: Any) -> Any:
    """The model with its values, once all of them fit: before that it takes no memory."""
    try:
        model, notes = legacy_config.build(config, convert, custom_objects or {})
        found = match(model)
        matching.check(path, model, found)
    except BaseException:
        legacy_config.forget()
        raise
    legacy_config.allocate()
    matching.assign(model, found)
    for note in [*notes, *_not_synchronised(model)]:
        warnings.warn(note, stacklevel=3)
    return model


def _not_synchronised(model: Any) -> list[str]:
    """The text of a warning, where plain batch norms stay in a model of several TensorFlow replicas."""
    found = [layer for layer in _private.flatten_layers(model) if isinstance(layer, layers.BatchNormalization)]
    plain = [layer for layer in found if not isinstance(layer, SyncBatchNormalization) and not layer.synchronized]
    strategy = getattr(plain[0].moving_mean.value, "distribute_strategy", None) if plain else None
    if strategy is None or strategy.num_replicas_in_sync == 1:
        return []
    names = ", ".join(repr(layer.name) for layer in plain[:3])
    return [
        "The files of Keras 2 do not say whether a BatchNormalization was synchronised, so it stays plain: each replica uses its "
        f"own statistics. Received: {len(plain)} such layers ({names}{', …' if len(plain) > 3 else ''}) under a strategy with "
        f"{strategy.num_replicas_in_sync} replicas. Give convert=True, or call syncbn.convert(model), to synchronise them."
    ]


def _whole(config: Any, refuse: Any) -> Any:
    """The configuration; raises where it cannot bring the model back."""
    if config is None:
        raise refuse("a SavedModel in which there is no Keras model", f"For inference use keras.layers.TFSMLayer. {IN_CODE}")
    name, inner = config["class_name"], config.get("config")
    if not isinstance(inner, list) and not (isinstance(inner, dict) and "layers" in inner):
        raise refuse(f"a model of the class {name!r}, which is subclassed, so that the file has no configuration of it", IN_CODE)
    return config


def not_legacy(path: Any, received: str, mend: str) -> files.FileError:
    """A file of another kind."""
    return files.FileError(
        "syncbn.load_legacy reads whole models that Keras 2 wrote as `.h5` or as a SavedModel, of the Sequential or functional "
        f"kind. Received: {path}, {received}. {mend}."
    )
