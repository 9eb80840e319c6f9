"""TensorFlow's checkpoints, those of SavedModels included: a graph of objects, walked beside the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras

from syncbn.keras import checkpoint_index, protobuf
from syncbn.keras.files import FileError, UnreadableError, no_tensorflow
from syncbn.keras.matching import RENAMED, Match, Stored, check, pair_layers, plain

GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
WITH_WEIGHTS = "layer_with_weights-"
TRACKED = (keras.Variable, keras.layers.Layer, list, tuple, Mapping)
LAYERS = ("layer-", WITH_WEIGHTS)
# Children of a model, or of what holds it, whose values are not the model's weights.
NOT_WEIGHTS = {"optimizer", "keras_api", "signatures", "save_counter", "_random_generator", "variables", "trainable_variables"}
NOT_WEIGHTS |= {"non_trainable_variables", "regularization_losses", "_rng", "_state_var"}


def require_tensorflow(path: Any, kind: str) -> None:
    """ImportError where TensorFlow is not installed."""
    try:
        import tensorflow  # noqa: F401
    except ImportError as error:
        raise no_tensorflow(path, kind) from error


def match(model: Any, prefix: Path) -> Match:
    """The values of a checkpoint, for a model: of the root, or of the one object below the root that the model fits."""
    checkpoint = Checkpoint(prefix)
    at_root = checkpoint.match(model, 0)
    if _is_whole(prefix, model, at_root):
        return at_root
    children = checkpoint.nodes[0].children.items()
    below = {name: at for name, at in children if name not in NOT_WEIGHTS and not name.startswith(LAYERS)}
    matches = {name: checkpoint.match(model, at) for name, at in below.items()}
    whole = [name for name, found in matches.items() if _is_whole(prefix, model, found)]
    if len(whole) > 1:
        raise several_models(prefix, whole)
    # Where nothing fits, the error names what the nearest lacks.
    return matches[whole[0]] if whole else max([at_root, *matches.values()], key=lambda found: len(found.pairs))


def _is_whole(path: Path, model: Any, found: Match) -> bool:
    try:
        check(path, model, found)
    except FileError:
        return False
    return True


class Checkpoint:
    """A checkpoint's index: which values there are, and which object holds which."""

    def __init__(self, prefix: Path):
        import tensorflow as tf

        self.entries = checkpoint_index.read_index(prefix)
        if GRAPH not in self.entries:
            raise UnreadableError("it names variables, as TensorFlow 1's Saver does, and no objects")
        self.nodes = protobuf.object_graph(checkpoint_index.read_string(self.entries[GRAPH]))
        self.reader = tf.train.load_checkpoint(str(prefix))

    def match(self, model: Any, root: int) -> Match:
        """Values and variables below two objects of the same shape."""
        wanted = {id(v): v for v in model.weights}
        pairs = {id(held): (held, stored) for held, stored in self._walk(model, root, set()) if id(held) in wanted}
        used = {stored.name for _, stored in pairs.values()}
        unused = {s.name: s for s in self._below(root, set()) if s.name not in used}
        return Match(list(pairs.values()), list(unused.values()))

    def _walk(self, held: Any, at: int, seen: set[tuple[int, int]]) -> Iterator[tuple[Any, Stored]]:
        """A thing of the model beside an object of the file: the variables below both."""
        if held is None or (id(held), at) in seen:
            return
        seen.add((id(held), at))
        node = self.nodes[at]
        if node.key:
            yield held, self._stored(node)
        listed = [node.children[name] for name in sorted_layers(node.children)]
        if listed and hasattr(held, "layers"):
            inner = [layer for layer in held.layers if layer.weights]
            names = [self._name(child, inner) for child in listed]
            for layer, place in zip(inner, pair_layers(names, inner), strict=True):
                yield from self._walk(layer, listed[place], seen) if place is not None else ()
        for name, child in node.children.items():
            if not name.startswith(LAYERS) and name not in NOT_WEIGHTS:
                yield from self._walk(_child(held, name), child, seen)

    def _name(self, at: int, layers: Sequence[Any]) -> str | None:
        """A layer's name, from the full name of one of its variables; None for a model in a model."""
        full = next((n.full_name for i in self.nodes[at].children.values() if (n := self.nodes[i]).key), "")
        scopes = plain(full.rpartition("/")[0])
        fitting = [layer.name for layer in layers if scopes == layer.name or scopes.endswith(f"_{layer.name}")]
        return max(fitting, key=len, default=full.split("/")[-2] if "/" in full else None)

    def _below(self, at: int, seen: set[int]) -> Iterator[Stored]:
        """Every weight below an object."""
        if at in seen:
            return
        seen.add(at)
        node = self.nodes[at]
        entry = self.entries.get(node.key)
        # Steps, epochs, and what Keras 2's Normalization has seen are no weights of Keras 3's.
        if entry and not (entry.dtype in checkpoint_index.INTEGERS and entry.shape == ()):
            yield self._stored(node)
        for name, child in node.children.items():
            if name not in NOT_WEIGHTS:
                yield from self._below(child, seen)

    def _stored(self, node: protobuf.Node) -> Stored:
        entry = self.entries[node.key]

        def read() -> Any:
            if entry.dtype not in checkpoint_index.ITEM_SIZES:
                raise UnreadableError(f"{node.key} holds no numbers")
            return self.reader.get_tensor(node.key)

        return Stored(node.key.partition("/.ATTRIBUTES")[0], entry.shape, read)


def sorted_layers(children: Mapping[str, int]) -> list[str]:
    """The layers of a Sequential or functional model that have weights, in order."""
    found = [name for name in children if name.startswith(WITH_WEIGHTS)]
    return sorted(found, key=lambda name: int(name.removeprefix(WITH_WEIGHTS)))


def _child(held: Any, name: str) -> Any:
    """What the model has where the file has a child of this name; attributes, and places in lists and dicts."""
    if isinstance(held, list | tuple):
        return held[int(name)] if name.isdigit() and int(name) < len(held) else None
    if isinstance(held, Mapping):
        return held.get(name)
    if not isinstance(held, keras.layers.Layer):
        return None
    found = getattr(held, name, None)
    return found if isinstance(found, TRACKED) else getattr(held, RENAMED.get(name, name), None)


def several_models(path: Any, names: Sequence[str]) -> FileError:
    """Which of them is meant?"""
    return FileError(
        f"A checkpoint must hold one model that fits. Received: {path}, where {', '.join(names)} fit. Give a keras.Model "
        "that has them as attributes of these names. No weight was changed."
    )
