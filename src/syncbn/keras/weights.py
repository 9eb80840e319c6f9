"""`.weights.h5` of any of the batch norms: Keras derives a file's keys from the names of classes."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
from keras import layers

from syncbn import policy_migration as texts

# One name for the batch norms of all classes: in files, and of the classes while a file is written or read.
NAME, KEY = "BatchNormalization", "batch_normalization"
ENDING = ".weights.h5"


def load_weights(model: Any, path: Any) -> Any:
    """Loads a `.weights.h5` into a Keras model, whichever batch norm classes wrote it and whichever the model has.

    `model.load_weights` looks for `batch_normalization` or `sync_batch_normalization`, by the class of the model's own layers,
    and fails where the file has the other. This takes one for the other, checks every name and shape before anything is
    loaded, and returns the model. A file in which both kinds stand side by side fits a model that mixes them in the same way.

    Args:
        model: a Keras 3 model that is built.
        path: of a file that `save_weights` of Keras 3, or of tf_keras ≥ 2.12, wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another kind; a model that is not built; weights that do not fit, by name. The model is unchanged.

    Example:
        >>> import keras, os, syncbn, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "plain.weights.h5")
        >>> plain = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization()])
        >>> plain.save_weights(path)
        >>> ours = keras.Sequential([keras.Input((3,)), syncbn.SyncBatchNormalization()])
        >>> syncbn.load_weights(ours, path) is ours
        True
    """
    path = Path(path)
    if not isinstance(model, layers.Layer):
        raise texts.not_a_model("syncbn.load_weights", model)
    if not path.exists():
        raise FileNotFoundError(path)
    if not path.name.endswith(ENDING):
        raise texts.not_weights(path, f"which does not end in {ENDING}")
    if not model.built:
        raise texts.not_built(model.name)
    with tempfile.TemporaryDirectory() as folder:
        given, own = Path(folder, f"given{ENDING}"), Path(folder, f"own{ENDING}")
        mixed = _renamed_copy(path, given)
        with _one_name(model, apply=not mixed):
            model.save_weights(own)
            _compare(path, _entries(given), _entries(own))
            try:
                model.load_weights(given)
            except Exception as error:
                model.load_weights(own)
                raise texts.not_weights(path, f"which Keras does not load: {error}") from error
    return model


def _renamed_copy(source: Path, target: Path) -> bool:
    """A copy in which every batch norm has the one name; True, and no renaming, where the file mixes the names in one place."""
    try:
        file = h5py.File(source, "r")
    except OSError as error:
        raise texts.not_weights(source, "which is no HDF5 file") from error
    with file, h5py.File(target, "w") as copy:
        for key in file:
            if file.get(key, getlink=True).__class__ is h5py.HardLink:
                file.copy(key, copy, expand_external=False)
        if "vars" not in copy:
            raise texts.not_weights(source, "which has no group `vars`")
        keys: list[str] = []
        copy.visit(keys.append)
        containers = [item for key in keys if _is_container(item := copy[key])]
        found = [{key: match for key in c if (match := _batch_norm_key(key))} for c in containers]
        if any(len({match[1] for match in c.values()}) > 1 for c in found):
            return True
        for container, matches in zip(containers, found, strict=True):
            for key, match in matches.items():
                if match[1] != KEY:
                    container.move(key, KEY + match[2])
    return False


def _is_container(item: Any) -> bool:
    """A list of layers, whose keys are class names; a layer has a group `vars`, and keys that are attributes."""
    return isinstance(item, h5py.Group) and "vars" not in item and item.name.rpartition("/")[2] != "vars"


def _batch_norm_key(key: str) -> re.Match[str] | None:
    return re.fullmatch(r"((?:sync_)?batch_normalization)((?:_\d+)?)", key)


@contextmanager
def _one_name(model: Any, apply: bool) -> Iterator[None]:
    """While this lasts, the classes of the model's batch norms have one name."""
    found = [layer for layer in model._flatten_layers() if apply and isinstance(layer, layers.BatchNormalization)]
    classes = [type(layer) for layer in found]
    named = {cls: type(NAME, (cls,), {}) for cls in classes}
    try:
        for layer in found:
            layer.__class__ = named[type(layer)]
        yield
    finally:
        for layer, cls in zip(found, classes, strict=True):
            layer.__class__ = cls


def _entries(path: Path) -> dict[str, list[tuple[int, ...]]]:
    """The shapes of each layer's variables, by the layer's key; those of an optimizer are not the model's."""
    entries: dict[str, list[tuple[int, ...]]] = {}

    def visit(key: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and not key.startswith("optimizer/"):
            entries.setdefault(key.rpartition("/vars/")[0], []).append(tuple(item.shape))

    with h5py.File(path, "r") as file:
        file.visititems(visit)
        names = {key: file[f"{key}/vars".lstrip("/")].attrs.get("name", "") for key in entries}
    return {f"{key} ({names[key]})" if names[key] else key: shapes for key, shapes in entries.items()}


def _compare(path: Path, given: dict[str, Any], own: dict[str, Any]) -> None:
    """Raises, by name, where the file's weights are not the model's."""

    def by_key(entries: dict[str, Any]) -> dict[str, tuple[str, Any]]:
        return {said.partition(" (")[0]: (said, shapes) for said, shapes in entries.items()}

    in_file, in_model = by_key(given), by_key(own)
    missing = [in_model[key][0] for key in in_model if key not in in_file]
    unused = [in_file[key][0] for key in in_file if key not in in_model]
    other = [
        f"{said} {shapes} for {in_model[key][1]}"
        for key, (said, shapes) in in_file.items()
        if key in in_model and shapes != in_model[key][1]
    ]
    if missing or unused or other:
        raise texts.weights_do_not_fit(path, missing, unused, other)
