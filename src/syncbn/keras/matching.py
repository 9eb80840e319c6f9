"""Which value of a file belongs to which variable; nothing is assigned before all of them fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from keras import layers

from syncbn.keras import _private
from syncbn.keras.files import FileError, UnreadableError

# A list of one axis gave these weights the input's rank in some versions, and one dimension in others.
BATCH_NORM_WEIGHTS = {
    "gamma",
    "beta",
    "moving_mean",
    "moving_variance",
    "moving_stddev",
    "renorm_mean",
    "renorm_stddev",
}
# Keras 3's names, of weights and attributes, for what Keras 2 called otherwise.
RENAMED = {"depthwise_kernel": "kernel", "mean": "adapt_mean", "variance": "adapt_variance"}


class Stored(NamedTuple):
    """A value in a file: its name there, its shape, and how to read it."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Any]


class Match(NamedTuple):
    """What was found for a model: variables with their values, and the values that no variable takes."""

    pairs: list[tuple[Any, Stored]]
    unused: list[Stored]


def plain(name: str) -> str:
    """A layer's name as Keras 3 allows it."""
    return name.replace("/", "_")


def number(name: str) -> tuple[str, int]:
    """('dense', 2) of 'dense_2': Keras numbers the layers of a class, and keys of files, so."""
    kind, _, digits = name.rpartition("_")
    return (kind, int(digits)) if kind and digits.isdecimal() else (name, 0)


def pair_layers(in_file: Sequence[str | None], in_model: Sequence[Any]) -> list[int | None]:
    """For each layer of the model, the place in the file of its own: by name where both have the same names, else by order.

    A name in `in_file` is None where it is not known. Where the order and the names that somebody chose contradict each other,
    FileError.
    """
    own = [plain(layer.name) for layer in in_model]
    named = [name and plain(name) for name in in_file]
    chosen = {name for name, layer in zip(own, in_model, strict=True) if not _is_automatic(name, layer)}
    same = None not in named and sorted(map(str, named)) == sorted(own) and len(set(own)) == len(own)
    crossed = [b for a, b in zip(named, own, strict=False) if a != b and b in named]
    if same and all(name in chosen for name in crossed):
        return [named.index(name) for name in own]
    if len(named) != len(own):
        return [named.index(name) if name in named else None for name in own]
    if same or any(name in chosen for name in crossed):
        raise order_of_names(crossed)
    return list(range(len(own)))


def _is_automatic(name: str, layer: Any) -> bool:
    """Whether Keras made the name of the class."""
    made_of = {type(layer).__name__.lower()}
    if isinstance(layer, layers.BatchNormalization):
        made_of |= {"batchnormalization", "syncbatchnormalization"}
    return number(name)[0].replace("_", "") in made_of


def fits(shape: Sequence[int], wanted: Sequence[int], batch_norm: bool) -> bool:
    """Whether a value of this shape is a variable's; a batch norm's may have 1 in all other dimensions."""
    if tuple(shape) == tuple(wanted):
        return True
    short, long = sorted((tuple(shape), tuple(wanted)), key=len)
    return batch_norm and len(short) == 1 and sorted(long) == sorted((*short, *[1] * (len(long) - 1)))


def suits(stored: Stored, variable: Any) -> bool:
    """Whether a value can be a variable's."""
    return fits(stored.shape, variable.shape, variable.name in BATCH_NORM_WEIGHTS)


def check(path: Any, model: Any, match: Match) -> None:
    """FileError, by name, where the values are not the model's."""
    found = {id(variable) for variable, _ in match.pairs}
    missing = [v.path for v in model.weights if id(v) not in found]
    other = [
        f"{stored.name} {list(stored.shape)} for {v.path} {list(v.shape)}" for v, stored in match.pairs if not suits(stored, v)
    ]
    unused = [stored.name for stored in match.unused]
    if missing or unused or other:
        raise do_not_fit(path, missing, unused, other)


def assign(model: Any, match: Match) -> None:
    """Reads every value, then assigns them."""
    values = [(variable, numbers(stored, variable.shape)) for variable, stored in match.pairs]
    for variable, value in values:
        variable.assign(value)
    refresh_normalizations(model)


def refresh_normalizations(model: Any) -> None:
    """To be called after the weights of a model were set: a `Normalization` layer computes with a copy of its own."""
    for layer in _private.flatten_layers(model):
        if isinstance(layer, layers.Normalization):
            layer.finalize_state()


def numbers(stored: Stored, shape: Sequence[int]) -> np.ndarray:
    """A value, read, in the shape of its variable."""
    value = np.asarray(stored.read())
    if value.dtype.kind not in "fiub" and value.dtype.name != "bfloat16":
        raise UnreadableError(f"{stored.name} holds {value.dtype}, no numbers")
    return value.reshape(shape)


def do_not_fit(path: Any, missing: Iterable[str], unused: Iterable[str], other: Iterable[str]) -> FileError:
    """Names on one side alone, and other shapes."""
    parts = [
        f"{what}: {', '.join(names)}"
        for what, names in (
            ("in the model, not in the file", list(missing)),
            ("in the file, not in the model", list(unused)),
            ("of other shapes", list(other)),
        )
        if names
    ]
    return FileError(
        f"The file must hold the weights of this model. Received: {path}, where these do not fit: {'; '.join(parts)}. Build the "
        "model that wrote the file, with the same layers and the same `renorm`. No weight was changed."
    )


def order_of_names(names: Iterable[str]) -> FileError:
    """Layers that stand at other places than their names say."""
    return FileError(
        "Layers are matched by their names where file and model have the same, else by their order. Received: "
        f"{', '.join(names)}, which are in both, at different places. Give the model's layers the names that they have in the "
        "file. No weight was changed."
    )
