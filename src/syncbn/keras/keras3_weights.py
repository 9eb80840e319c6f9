"""`.weights.h5` of Keras 3, and of TensorFlow 2.12 and later: groups named after attributes, and after classes in lists."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from keras import layers, ops

from syncbn.keras import _private, hdf5
from syncbn.keras.files import UnreadableError
from syncbn.keras.layer import SyncBatchNormalization
from syncbn.keras.matching import do_not_fit, fits, number, numbers

# TensorFlow 2.12's name for the list `layers`; numbers have gaps there.
OLD_LAYERS = "_layer_checkpoint_dependencies"
NOT_WEIGHTS = ("optimizer", "metrics")
PLAIN, OURS = "batchnormalization", "syncbatchnormalization"
Values = dict[str, Any]


def load(model: Any, path: Any, place: Path) -> None:
    """Loads a file of this layout into a model; the model is unchanged where it does not fit, or the load fails."""
    with h5py.File(place, "r") as file:
        groups = list(_walk(file, model, set()))
        _check(path, model, groups)
        read = [(held, _read(held, group)) for held, group in groups]
    before = [(held, {key: np.array(ops.convert_to_numpy(v)) for key, v in _own(held).items()}) for held, _ in read]
    try:
        for held, values in read:
            held.load_own_variables(values)
    except Exception:
        for held, values in before:
            with contextlib.suppress(Exception):
                held.load_own_variables(values)
        raise


def _check(path: Any, model: Any, groups: list[tuple[Any, Any]]) -> None:
    """FileError, by name, where the file's values are not the model's."""
    found = {id(held) for held, _ in groups}
    # Not public: what Keras itself walks models with, lists, wrappers and composite layers included.
    missing = [layer.path or layer.name for layer in _private.flatten_layers(model) if _own(layer) and id(layer) not in found]
    unused = [_said(group) for held, group in groups if held is None]
    other = []
    for held, group in groups:
        own = {} if held is None else {key: tuple(v.shape) for key, v in _own(held).items()}
        given = {key: tuple(getattr(item, "shape", ())) for key, item in hdf5.inside(group["vars"]).items()}
        norm = isinstance(held, layers.BatchNormalization)
        if held is not None and not (set(own) == set(given) and all(fits(given[key], own[key], norm) for key in own)):
            other.append(f"{_said(group)} {list(map(list, given.values()))} for {list(map(list, own.values()))}")
    if missing or unused or other:
        raise do_not_fit(path, missing, unused, other)


def _read(held: Any, group: Any) -> Values:
    own = _own(held)
    items = hdf5.inside(group["vars"])
    return {key: numbers(hdf5.stored(f"{group.name}/{key}", item), own[key].shape) for key, item in items.items()}


def _walk(group: Any, held: Any, seen: set[Any]) -> Iterator[tuple[Any, Any]]:
    """Each group that has values, with the object of the model that they are for; links are not followed."""
    address = h5py.h5o.get_info(group.id).addr
    if address in seen:
        raise UnreadableError(f"{group.name} stands in it more than once")
    seen.add(address)
    groups = {key: item for key, item in hdf5.inside(group).items() if isinstance(item, h5py.Group)}
    if len(groups.pop("vars", ())):
        yield held if hasattr(held, "load_own_variables") else None, group
    for key, item in groups.items():
        if key not in NOT_WEIGHTS:
            yield from _walk(item, _child(held, key, groups, group.name), seen)


def _child(held: Any, key: str, keys: Mapping[str, Any], parent: str) -> Any:
    """What a key of the file is in the model: an attribute; in a list, the n-th of a class."""
    if isinstance(held, Mapping):
        held = list(held.values())
    if not isinstance(held, list | tuple | set):
        return getattr(held, "layers" if key == OLD_LAYERS else key, None)
    kind, place = _number(key)
    kinds = {_number(other)[0] for other in keys}
    # Version 0.1.0 wrote a converted layer under our class's key, so that in its files the plain key does not count one.
    apart = {PLAIN, OURS} <= kinds and OURS not in map(_kind, held)
    alike = [item for item in held if _is_a(item, kind, kinds, apart)]
    if parent.endswith(OLD_LAYERS):
        alike = [item for item in alike if getattr(item, "weights", ())]
        place = sorted(_number(other) for other in keys if _number(other)[0] == kind).index((kind, place))
    return alike[place] if place < len(alike) else None


def _number(key: str) -> tuple[str, int]:
    kind, place = number(key)
    return kind.replace("_", ""), place


def _is_a(item: Any, kind: str, kinds: set[str], apart: bool) -> bool:
    """Whether keys of this kind count an item. One kind of batch norm stands for the other, unless both are in the list."""
    if apart and isinstance(item, SyncBatchNormalization):
        return kind == OURS
    if _kind(item) == kind or not isinstance(item, layers.BatchNormalization):
        return _kind(item) == kind
    return kind in (PLAIN, OURS) and not {PLAIN, OURS} <= kinds and _kind(item) not in kinds


def _kind(item: Any) -> str:
    return "container" if isinstance(item, list | tuple | dict | set) else type(item).__name__.lower()


def _own(held: Any) -> Values:
    values: Values = {}
    held.save_own_variables(values)
    return values


def _said(group: Any) -> str:
    """A group's key, with its layer's name where Keras noted it."""
    name = group["vars"].attrs.get("name", "")
    key = group.name.strip("/") or "the model itself"
    return f"{key} ({name})" if name else key
