"""Whole models that Keras 2 wrote, as `.h5` or SavedModel, become Keras 3 models. Nothing from a file is run or unpickled."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import keras
from keras.src.legacy.saving import legacy_h5_format, saving_options, saving_utils  # not public: load_model drops a list of axes
from keras.src.saving.saving_lib import safe_get_h5_group
from keras.src.saving.serialization_lib import SafeModeScope

from syncbn import policy_migration as texts
from syncbn.keras.layer import SyncBatchNormalization

OURS, OLD_NAMES = "SyncBatchNormalization", ("BatchNormalization", "BatchNormalizationV1", "BatchNormalizationV2")
REGISTERED = {"module": "syncbn", "registered_name": "syncbn>SyncBatchNormalization"}
RENAMED = {"depthwise_kernel": "kernel"}
NOT_SEPARABLE = ("kernel_initializer", "kernel_regularizer", "kernel_constraint")
DROPPED = (("time_major", False), ("groups", 1))
VALUE = "VARIABLE_VALUE"


def load_legacy(path: Any, *, convert: bool = False, custom_objects: dict[str, Any] | None = None) -> Any:
    """The Keras 3 model of a file that Keras 2 wrote: `.h5`, or the folder of a SavedModel. It needs no tf_keras.

    `tf.keras.layers.experimental.SyncBatchNormalization` becomes `syncbn.SyncBatchNormalization`, with its axes, renorm and
    statistics. `BatchNormalization` stays Keras's, because the files do not say `synchronized`; with convert=True it becomes
    ours. The model has the outputs that it had, and is not compiled. Files are read in Keras's safe mode: a Lambda layer's code
    is refused. A SavedModel is read with TensorFlow.

    Args:
        path: of the file or folder.
        convert: whether `BatchNormalization` becomes ours too; needed where it has several axes.
        custom_objects: further classes and functions that the file names.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a file of another kind, a subclassed model, layers that Keras 3 does not know.

    Source: the formats of tf.keras 2.5 to 2.21, read as `tf_keras` 2.21 writes them.

    Example:
        >>> import syncbn
        >>> model = syncbn.load_legacy("written by Keras 2.h5")
        Traceback (most recent call last):
        ...
        FileNotFoundError: written by Keras 2.h5
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(path)
    if path.is_dir():
        return _from_saved_model(path, convert, custom_objects)
    if path.suffix == ".keras":
        raise texts.not_legacy(path, "a `.keras` file", texts.KERAS_2_MENDS["keras"] + ".")
    return _from_h5(path, convert, custom_objects)


# ------------------------------------------------------------------------------------------------------------ the model


def _model(config: dict[str, Any], convert: bool, custom_objects: dict[str, Any] | None) -> Any:
    """The model of a configuration, without its weights."""
    known = {**(custom_objects or {}), OURS: _Ours}
    with saving_options.keras_option_scope(use_legacy_config=True), SafeModeScope(True):
        return saving_utils.model_from_config(_modern(config, convert), custom_objects=known)


class _Ours:
    """What Keras's legacy loader makes our layer with; it drops `axis` where that is a list."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SyncBatchNormalization:
        rest = {key: v for key, v in config.items() if key != "axes"}
        return SyncBatchNormalization.from_config({**rest, "axis": config["axes"]})


def _modern(value: Any, convert: bool) -> Any:
    """A configuration of Keras 2 in the words that Keras 3's legacy loader knows."""
    if isinstance(value, list):
        return [_modern(v, convert) for v in value]
    if not isinstance(value, dict):
        return value
    name, config = value.get("class_name"), value.get("config")
    if name in ("__tuple__", "TensorShape"):
        return _modern(value.get("items"), convert)
    if name == "Policy" and isinstance(config, dict):
        return config.get("name")
    value = {key: _modern(v, convert) for key, v in value.items() if key not in ("shared_object_id", "build_input_shape")}
    if name in (OURS, *OLD_NAMES) and isinstance(config, dict):
        value = {**value, **_batch_norm(name, value["config"], convert)}
    if name in ("Functional", "Model") and isinstance(config, dict) and isinstance(config.get("layers"), list):
        value["config"] = _counted_from_0(value["config"])
    if isinstance(config, dict):
        value["config"] = _portable(name, value["config"])
    return value


def _portable(name: Any, config: dict[str, Any]) -> dict[str, Any]:
    """A layer's configuration without what Keras 3 has no argument for; of a wrapped layer it asks where the class is from."""
    separable = str(name).startswith("SeparableConv")
    config = {key: v for key, v in config.items() if (key, v) not in DROPPED and not (separable and key in NOT_SEPARABLE)}
    for key in ("layer", "backward_layer", "cell"):
        inner = config.get(key)
        if isinstance(inner, dict) and inner.get("class_name") == OURS:
            rest = {name: v for name, v in inner["config"].items() if name != "axes"}
            config[key] = {**REGISTERED, "class_name": OURS, "config": {**rest, "axis": inner["config"]["axes"]}}
        elif isinstance(inner, dict) and "class_name" in inner:
            config[key] = {"module": "keras.layers", "registered_name": None, **inner}
    return config


def _counted_from_0(graph: dict[str, Any]) -> dict[str, Any]:
    """A functional model's graph. Keras 2 counts the calls of models inside it from 1, where they have an Input of their own;
    Keras 3 from 0, but functional models among the outputs from 1."""
    inside = {"Sequential": set(), "Functional": set()}  # type: dict[str, set[str]]
    for layer in graph["layers"]:
        kind = "Functional" if layer.get("class_name") == "Model" else layer.get("class_name")
        layers = layer.get("config", {}).get("layers") if kind in inside else None
        if layers and layers[0].get("class_name") == "InputLayer":
            inside[kind].add(layer.get("name") or layer["config"]["name"])
    both = inside["Sequential"] | inside["Functional"]
    layers = [{**layer, "inbound_nodes": _less_1(layer.get("inbound_nodes", []), both)} for layer in graph["layers"]]
    return {**graph, "layers": layers, "output_layers": _less_1(graph["output_layers"], inside["Sequential"])}


def _less_1(value: Any, names: set[str]) -> Any:
    """References [name, call, tensor, …] to these layers, one call earlier."""
    if isinstance(value, dict):
        return {key: _less_1(v, names) for key, v in value.items()}
    if not isinstance(value, list):
        return value
    if len(value) in (3, 4) and isinstance(value[0], str) and value[0] in names and isinstance(value[1], int):
        return [value[0], value[1] - 1, *_less_1(value[2:], names)]
    return [_less_1(v, names) for v in value]


def _batch_norm(name: str, config: dict[str, Any], convert: bool) -> dict[str, Any]:
    """A batch norm's class and configuration."""
    axis = config.get("axis", -1)
    # Keras 2 notes an integer as a list, and gives its parameters one dimension whichever was given.
    axis = axis[0] if isinstance(axis, list) and len(axis) == 1 else axis
    if name == OURS or convert:
        rest = {key: v for key, v in config.items() if key not in ("axis", "batch_input_shape")}
        return {"class_name": OURS, "config": {**rest, "axes": axis}}
    if isinstance(axis, list):
        raise texts.several_axes(config.get("name", ""), axis)
    return {"class_name": "BatchNormalization", "config": {**config, "axis": axis}}


def _kind(path: Path, config: Any) -> None:
    """Raises where a model's configuration cannot bring it back."""
    name = config.get("class_name") if isinstance(config, dict) else None
    inner = config.get("config") if isinstance(config, dict) else None
    if not isinstance(inner, dict | list) or not (isinstance(inner, list) or "layers" in inner):
        raise texts.not_legacy(
            path, f"a model of the class {name!r}, which is subclassed", texts.KERAS_2_MENDS["subclassed"] + "."
        )


# ------------------------------------------------------------------------------------------------------------------- .h5


def _from_h5(path: Path, convert: bool, custom_objects: dict[str, Any] | None) -> Any:
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise texts.not_legacy(path, "which is no HDF5 file", texts.KERAS_2_MENDS["other"] + ".") from error
    with file:
        text = file.attrs.get("model_config")
        if text is None:
            raise texts.not_legacy(path, "which holds weights alone", texts.KERAS_2_MENDS["weights"] + ".")
        config = json.loads(text)
        _kind(path, config)
        model = _model(config, convert, custom_objects)
        legacy_h5_format.load_weights_from_hdf5_group(safe_get_h5_group(file, "model_weights"), model)
    return model


# ------------------------------------------------------------------------------------------------------------ SavedModel


def _from_saved_model(path: Path, convert: bool, custom_objects: dict[str, Any] | None) -> Any:
    if not (path / "saved_model.pb").exists():
        raise texts.not_legacy(path, "a folder without saved_model.pb", texts.KERAS_2_MENDS["other"] + ".")
    metadata = path / "keras_metadata.pb"
    if not metadata.exists():
        raise texts.not_legacy(path, "a SavedModel without keras_metadata.pb", texts.KERAS_2_MENDS["no config"] + ".")
    try:
        config = next(_nodes_named("root", metadata.read_bytes()), None)
    except (IndexError, UnicodeDecodeError, ValueError) as error:
        raise texts.not_legacy(path, "whose keras_metadata.pb cannot be read", texts.KERAS_2_MENDS["no config"] + ".") from error
    _kind(path, config)
    model = _model(config, convert, custom_objects)  # type: ignore[arg-type]
    _give_variables(path, model)
    return model


def _nodes_named(wanted: str, message: bytes) -> Iterator[Any]:
    """The JSON of the nodes of this path: repeated message 1, with the path as its field 3 and the JSON as 5."""
    for number, node in _fields(message):
        if number == 1 and isinstance(node, bytes):
            parts = dict(_fields(node))
            text = parts.get(5)
            if parts.get(3) == wanted.encode() and isinstance(text, bytes):
                yield json.loads(text)


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protocol buffer, nothing of its schema known: numbers, and bytes for all that has a length."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        if tag & 7 == 0:
            value, at = _varint(message, at)
            yield tag >> 3, value
        elif tag & 7 == 2:
            size, at = _varint(message, at)
            yield tag >> 3, message[at : at + size]
            at += size
        elif tag & 7 in (1, 5):
            at += 8 if tag & 7 == 1 else 4
        else:
            raise ValueError(f"wire type {tag & 7}")


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _give_variables(path: Path, model: Any) -> None:
    """The values of a SavedModel's checkpoint, found by walking its object graph beside the model."""
    import tensorflow as tf
    from tensorflow.core.protobuf import trackable_object_graph_pb2

    reader = tf.train.load_checkpoint(str(path / "variables" / "variables"))
    graph = trackable_object_graph_pb2.TrackableObjectGraph()
    graph.ParseFromString(reader.get_tensor("_CHECKPOINTABLE_OBJECT_GRAPH"))
    waiting = {id(v): v for v in model.weights}

    def children(node: Any) -> dict[str, Any]:
        return {child.local_name: graph.nodes[child.node_id] for child in node.children}

    def give(layer: Any, node: Any) -> None:
        below = children(node)
        if isinstance(layer, keras.Model) and hasattr(layer, "layers"):
            with_weights = [inner for inner in layer.layers if inner.weights]
            for i, inner in enumerate(with_weights):
                if f"layer_with_weights-{i}" in below:
                    give(inner, below[f"layer_with_weights-{i}"])
            return
        for name, child in below.items():
            held: Any = getattr(layer, RENAMED.get(name, "") if not hasattr(layer, name) else name, None)
            keys = [a.checkpoint_key for a in child.attributes if a.name == VALUE]
            if id(held) in waiting and keys:
                value = reader.get_tensor(keys[0])
                if tuple(value.shape) == tuple(held.shape):
                    held.assign(value)
                    del waiting[id(held)]
            elif isinstance(held, keras.layers.Layer):
                give(held, child)

    give(model, graph.nodes[0])
    if waiting:
        raise texts.variables_do_not_fit(path, [v.path for v in waiting.values()])
