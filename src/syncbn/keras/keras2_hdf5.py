"""Keras 2's layout of weights in HDF5: the root lists layers, each layer's group lists its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import h5py

from syncbn.keras import hdf5
from syncbn.keras.files import FileError
from syncbn.keras.matching import RENAMED, Match, Stored, number, pair_layers, suits

TOP = "top_level_model_weights"


def match_whole(model: Any, file: Any) -> Match:
    """The values of a file that holds a whole model."""
    return match(model, hdf5.child(file, "model_weights", h5py.Group))


def match(model: Any, root: Any) -> Match:
    """The values of a group in this layout, for a model."""
    in_file = [(name, _weights(hdf5.child(root, name, h5py.Group))) for name in hdf5.names(root, "layer_names")]
    in_file = [(name, weights) for name, weights in in_file if weights]
    in_model = [layer for layer in model.layers if layer.weights]
    places = pair_layers([name for name, _ in in_file], in_model)
    found = [_match_layer(layer, in_file[at][1]) for layer, at in zip(in_model, places, strict=True) if at is not None]
    left = [stored for at, (_, weights) in enumerate(in_file) if at not in places for stored in weights]
    below = {id(v) for layer in in_model for v in layer.weights}
    own = [v for v in model.weights if id(v) not in below]
    if TOP in root:
        found.append(_match_variables(own, _weights(hdf5.child(root, TOP, h5py.Group))))
    return Match([pair for m in found for pair in m.pairs], [*left, *(stored for m in found for stored in m.unused)])


def _match_layer(layer: Any, stored: list[Stored]) -> Match:
    # Keras 2 wrote what is trainable first.
    return _match_variables([*layer.trainable_weights, *layer.non_trainable_weights], stored)


def _match_variables(variables: Sequence[Any], stored: list[Stored]) -> Match:
    """By the weights' own names; in a layer of layers by the names of both. Where these differ, by the places of layers among
    those of their kind, or by order: Keras 2's order depends on which layers were frozen."""
    own = [v.path.split("/") for v in variables]
    given = [_parts(s.name, set(_weights_alone(own))) for s in stored]
    for keys in (_weights_alone, _layers_and_weights):
        if order := _order(keys(own), keys(given)):
            return Match([(v, stored[at]) for v, at in zip(variables, order, strict=True)], [])
    in_order = list(range(len(own))) if _weights_alone(own) == _weights_alone(given) else None
    fitting = []
    for order in (_order(_places_and_weights(own), _places_and_weights(given)), in_order):
        if order and all(suits(stored[at], v) for v, at in zip(variables, order, strict=True)):
            fitting.append(order)
    if fitting and any(order != fitting[0] for order in fitting):
        raise two_ways(sorted({parts[-2] for parts in own}))
    if fitting:
        return Match([(v, stored[at]) for v, at in zip(variables, fitting[0], strict=True)], [])
    return _in_common(variables, stored, own, given)


def _order(own: list[Any], given: list[Any]) -> list[int] | None:
    """Where in `given` each key of `own` is; None where the keys differ, or are not unique."""
    at = {key: i for i, key in enumerate(given)}
    return [at[key] for key in own] if len(at) == len(given) == len(own) and set(own) == set(at) else None


def _in_common(variables: Sequence[Any], stored: list[Stored], own: list[list[str]], given: list[list[str]]) -> Match:
    """What both sides have, of a layer that does not fit: the rest is what the error names."""
    keys = _weights_alone if len(set(_weights_alone(own))) == len(own) else _layers_and_weights
    left = dict(zip(keys(given), stored, strict=True))
    pairs = [(v, left.pop(key)) for v, key in zip(variables, keys(own), strict=True) if key in left]
    taken = {id(s) for _, s in pairs}
    return Match(pairs, [s for s in stored if id(s) not in taken])


def _weights_alone(names: list[list[str]]) -> list[str]:
    return [parts[-1] for parts in names]


def _layers_and_weights(names: list[list[str]]) -> list[str]:
    return ["/".join(parts[-2:]) for parts in names]


def _places_and_weights(names: list[list[str]]) -> list[tuple[str, int, str]]:
    """Each weight with its layer's kind and place: ('dense', 1, 'kernel') where dense_7 is the second."""
    layers = sorted({(*number(parts[-2]), parts[-2]) for parts in names if len(parts) > 1})
    kinds = [kind for kind, _, _ in layers]
    # Converted layers keep their names, so that one kind stands for the other; but no order between the two is known.
    merge = "batch_normalization" not in kinds
    places = {
        name: (kind.removeprefix("sync_") if merge else kind, at - kinds.index(kind)) for at, (kind, _, name) in enumerate(layers)
    }
    return [(*places.get("".join(parts[-2:-1]), ("", 0)), parts[-1]) for parts in names]


def _parts(name: str, known: set[str]) -> list[str]:
    """'block/dense/kernel:0' in parts; a weight that Keras 3 calls otherwise has its new name."""
    *scopes, weight = name.split(":")[0].split("/")
    return [*scopes, weight if weight in known else RENAMED.get(weight, weight)]


def _weights(group: Any) -> list[Stored]:
    return [hdf5.stored(name, hdf5.child(group, name, h5py.Dataset)) for name in hdf5.names(group, "weight_names")]


def two_ways(layers: Sequence[str]) -> FileError:
    """Which of two layers is meant?"""
    return FileError(
        "The layers of a model inside a model are matched by name, else by order, which depends on the layers that were frozen. "
        f"Received: {', '.join(layers)}, which fit in two ways. Give them the names that they have in the file, or set "
        "`trainable` as it was. No weight was changed."
    )
