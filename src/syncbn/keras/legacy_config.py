"""Configurations of Keras 2 in the words that Keras 3 knows. Classes are looked up among known ones; nothing is imported."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import keras

from syncbn.keras._private import SafeModeScope, global_state, has_renorm, saving_options, saving_utils
from syncbn.keras.files import FileError
from syncbn.keras.layer import SyncBatchNormalization
from syncbn.keras.matching import plain

OURS, OLD_NAMES = "SyncBatchNormalization", ("BatchNormalization", "BatchNormalizationV1", "BatchNormalizationV2")
# Layers of Keras 3 that run or read what a file names. Keras 2 has none of them.
FOREIGN = ("TFSMLayer", "TorchModuleWrapper", "JaxLayer", "FlaxLayer")
# Arguments that not every layer of Keras 3 takes, with the value that means nothing.
DROPPED = (("time_major", False), ("groups", 1), ("virtual_batch_size", None), ("trainable", True), ("noise_shape", None))
NOT_SEPARABLE = ("kernel_initializer", "kernel_regularizer", "kernel_constraint")
# Layers of Keras's own that take a list of axes.
SEVERAL_AXES = ("LayerNormalization", "Softmax")
HARD_SIGMOID = {"class_name": "function", **dict.fromkeys(("config", "registered_name"), "syncbn>keras_2_hard_sigmoid")}
INNER = ("layer", "backward_layer", "cell")
ENDS = ("input_layers", "output_layers")


def build(config: dict[str, Any], convert: bool, custom_objects: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """The model of a configuration, and texts of warnings. Its variables take no memory before `allocate`; or `forget` them."""
    translator = _Translator(convert, custom_objects, [])
    known = {**custom_objects, OURS: _WithAxes(SyncBatchNormalization)}
    known.update({name: _WithAxes(getattr(keras.layers, name)) for name in SEVERAL_AXES if name not in known})
    translated = translator.root(config)

    def make() -> Any:
        with saving_options.keras_option_scope(use_legacy_config=True), SafeModeScope(True):
            return saving_utils.model_from_config(copy.deepcopy(translated), custom_objects=known)

    try:
        with keras.StatelessScope(initialize_variables=False):
            return make(), translator.warnings
    except Exception as error:
        # What Keras says of a class of the caller's that makes a variable of a value: that needs memory at once.
        if "while in a stateless scope" not in str(error):
            raise
    forget()
    return make(), translator.warnings


def allocate() -> None:
    """Gives initial values to the variables that `build` made."""
    with keras.StatelessScope():
        pass


def forget() -> None:
    """Drops the variables that `build` made."""
    global_state.set_global_attribute("uninitialized_variables", [])


@keras.saving.register_keras_serializable(package="syncbn")
def keras_2_hard_sigmoid(x: Any) -> Any:
    """What Keras 2 called `hard_sigmoid`: clip(0.2·x + 0.5, 0, 1). Keras 3's has another slope."""
    return keras.ops.clip(0.2 * x + 0.5, 0.0, 1.0)


class _WithAxes:
    """What Keras's legacy loader makes a layer with; it drops `axis` where that is a list."""

    def __init__(self, cls: Any):
        self.cls = cls

    def from_config(self, config: dict[str, Any]) -> Any:
        """The layer, `axis` put back."""
        rest = {key: v for key, v in config.items() if key != "axes"}
        return self.cls.from_config({**rest, "axis": config["axes"]} if "axes" in config else rest)


@dataclass
class _Translator:
    """From Keras 2's words to Keras 3's."""

    convert: bool
    custom_objects: Mapping[str, Any]
    warnings: list[str]

    def root(self, item: dict[str, Any]) -> dict[str, Any]:
        """A model's configuration."""
        config = item["config"]
        if isinstance(config, dict) and "build_input_shape" in config and not _has_input(config["layers"]):
            # It was built by its first batch, whose size says nothing of the next.
            shape = [None, *self.value(config["build_input_shape"])[1:]]
            first = {"class_name": "InputLayer", "config": {"batch_input_shape": shape, "name": "first_input"}}
            item = {**item, "config": {**config, "layers": [first, *config["layers"]]}}
        return self.layer(item)

    def value(self, value: Any) -> Any:
        """Anything in a configuration."""
        if isinstance(value, list):
            return [self.value(v) for v in value]
        if not isinstance(value, dict):
            return value
        name, config = value.get("class_name"), value.get("config")
        if name in ("__tuple__", "TensorShape"):
            return self.value(value.get("items"))
        if name in ("Policy", "PolicyV1") and isinstance(config, dict):
            return config.get("name")
        if "__passive_serialization__" in value:
            self.check_class(value)
        value = {key: self.value(v) for key, v in value.items() if key != "shared_object_id"}
        for key in ("activation", "recurrent_activation"):
            if value.get(key) == "hard_sigmoid":
                value[key] = HARD_SIGMOID
        return value

    def layer(self, item: dict[str, Any]) -> dict[str, Any]:
        """A layer, or a model as a layer."""
        name, config = item["class_name"], item["config"]
        if isinstance(config, list):  # as Keras 2.0 wrote a Sequential
            config = {"name": item.get("name", "sequential"), "layers": config}
        rest = {key: self.value(v) for key, v in item.items() if key not in ("class_name", "config", "shared_object_id")}
        if "input_layers" in config:
            kind = name if name in self.custom_objects else "Functional"
            return {**rest, "class_name": kind, "config": self.functional(config)}
        if name == "Sequential":
            return {**rest, "class_name": name, "config": self.sequential(config)}
        self.check_class(item)
        inner: dict[str, Any] = {key: self.inner(config[key]) for key in INNER if isinstance(config.get(key), dict)}
        if isinstance(config.get("cells"), list):
            inner["cells"] = [self.inner(cell) for cell in config["cells"]]
        config = {**self.value({key: v for key, v in config.items() if key not in inner}), **inner}
        if name != "InputLayer":
            config.pop("batch_input_shape", None)
        if "name" in config:
            config["name"] = plain(config["name"])
        if name in (OURS, *OLD_NAMES):
            name, config = self.batch_norm(name, config)
        elif name in SEVERAL_AXES and isinstance(config.get("axis"), list):
            config["axes"] = config.pop("axis")
        separable = name.startswith("SeparableConv")
        config = {key: v for key, v in config.items() if (key, v) not in DROPPED and not (separable and key in NOT_SEPARABLE)}
        return {**rest, "class_name": name, "config": config}

    def check_class(self, item: dict[str, Any]) -> None:
        """FileError where a class is neither a layer of Keras's nor one that the caller gave or registered."""
        name = item.get("class_name")
        if name in (OURS, *OLD_NAMES) or name in self.custom_objects or keras.saving.get_registered_object(name):
            return
        cls = None if name in FOREIGN else getattr(keras.layers, str(name), None)
        if not (isinstance(cls, type) and issubclass(cls, keras.layers.Layer)):
            raise unknown_layer(name)
        if name == "Lambda" and not isinstance(item["config"].get("function"), str):
            raise code_in_lambda(item["config"].get("name"))

    def inner(self, item: dict[str, Any]) -> dict[str, Any]:
        """A layer in a wrapper, of which Keras asks where the class is from."""
        new = self.layer(item)
        name, config = new["class_name"], new["config"]
        if name == OURS:
            rest = {key: v for key, v in config.items() if key != "axes"}
            where = {"module": "syncbn", "registered_name": "syncbn>SyncBatchNormalization"}
            return {**where, "class_name": OURS, "config": {**rest, "axis": config["axes"]}}
        known = name in self.custom_objects or keras.saving.get_registered_object(name)
        return {**new, "module": None if known else "keras.layers", "registered_name": name if known else None}

    def batch_norm(self, name: str, config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """A batch norm's class and configuration."""
        axis = config.pop("axis", -1)
        # Keras 2 notes an integer as a list, and gives its parameters one dimension whichever was given.
        axis = axis[0] if isinstance(axis, list) and len(axis) == 1 else axis
        renorm = bool(config.get("renorm")) and not has_renorm()
        if name != OURS and not self.convert:
            self.warnings += [several_axes(config.get("name", ""), axis)] * isinstance(axis, list)
            self.warnings += [renorm_unknown(config.get("name", ""))] * renorm
        if name == OURS or self.convert or isinstance(axis, list) or renorm:
            return OURS, {**config, "axes": axis}
        return "BatchNormalization", {**config, "axis": axis}

    def sequential(self, config: dict[str, Any]) -> dict[str, Any]:
        """A Sequential; before TensorFlow 2.3 the input's shape stands in its first layer."""
        layers = config["layers"]
        first = layers[0]["config"] if layers else {}
        if "batch_input_shape" in first and layers[0]["class_name"] != "InputLayer":
            given = {"batch_input_shape": first["batch_input_shape"], "dtype": _input_dtype(self.value(first.get("dtype")))}
            layers = [{"class_name": "InputLayer", "config": {**given, "name": f"{first['name']}_input"}}, *layers]
        layers = [self.layer(layer) for layer in layers]
        return {"name": plain(config.get("name", "sequential")), "layers": layers}

    def functional(self, graph: dict[str, Any]) -> dict[str, Any]:
        """A functional model's graph, its calls counted as Keras 3 counts them."""
        names = [layer["name"] for layer in graph["layers"]]
        # Keras 2 counts the calls of models from 1 where they have an input of their own, Keras 3 from 0, whose functional models
        # are counted from 1 among the outputs alone.
        calls = [*(layer["inbound_nodes"] for layer in graph["layers"]), *(graph[key] for key in ENDS)]
        first = dict.fromkeys(names, 1)
        for name, call in _references(calls, set(names)):
            first[name] = min(first[name], call)
        new = {name: plain(name) for name in names}
        layers = []
        for layer in graph["layers"]:
            inbound = _renamed(self.value(layer["inbound_nodes"]), new, first)
            translated = self.layer({key: v for key, v in layer.items() if key != "inbound_nodes"})
            layers.append({**translated, "name": new[layer["name"]], "inbound_nodes": inbound})
        ends = {key: _single(_renamed(graph[key], new, first)) for key in ENDS}
        inside = {layer["name"]: -1 for layer in layers if layer["class_name"] == "Functional"}
        ends["output_layers"] = _renamed(ends["output_layers"], {name: name for name in new.values()}, inside)
        config = {key: self.value(v) for key, v in graph.items() if key not in ("layers", *ENDS)}
        return {**config, **ends, "name": plain(config["name"]), "layers": layers}


def _has_input(layers: list[dict[str, Any]]) -> bool:
    """Whether a Sequential's first layer says what its input is."""
    if not layers:
        return False
    config = layers[0]["config"]
    # `batch_shape` is Keras 3's name.
    named = any(key in config for key in ("batch_input_shape", "batch_shape", "input_layers"))
    return named or _has_input(config.get("layers", ()))


def _input_dtype(policy: Any) -> str:
    """The dtype of inputs to a layer of this policy."""
    return policy if isinstance(policy, str) and not policy.startswith(("mixed_", "_")) else "float32"


def _is_reference(value: Any, names: Any) -> bool:
    """[name, call, tensor, …]."""
    return len(value) in (3, 4) and isinstance(value[0], str) and value[0] in names and isinstance(value[1], int)


def _references(value: Any, names: set[str]) -> Iterator[tuple[str, int]]:
    if isinstance(value, list) and _is_reference(value, names):
        yield value[0], value[1]
        value = value[3:]
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _references(inner, names)


def _renamed(value: Any, names: dict[str, str], first: dict[str, int]) -> Any:
    """References with the new names, and calls counted from the first."""
    if isinstance(value, dict):
        return {key: _renamed(v, names, first) for key, v in value.items()}
    if not isinstance(value, list):
        return value
    if _is_reference(value, names):
        name, call, *rest = value
        return [names[name], call - first.get(name, 0), *_renamed(rest, names, first)]
    return [_renamed(v, names, first) for v in value]


def _single(ends: Any) -> Any:
    """Keras 2 notes one input or output as a list of one, and takes and gives it alone."""
    return ends[0] if isinstance(ends, list) and len(ends) == 1 and isinstance(ends[0], list) else ends


def unknown_layer(name: Any) -> FileError:
    """A class that is not looked for."""
    return FileError(
        "A file may name the layers of Keras 3, and classes that you give or have registered. Received: a layer of the class "
        f"{name!r}. Give it in `custom_objects`; or build the model in code, and load its weights with "
        "syncbn.load_weights(model, path)."
    )


def code_in_lambda(name: Any) -> FileError:
    """Marshalled bytecode."""
    return FileError(
        f"No code of a file is run. Received: the Lambda layer {name!r}, which holds code. Build the model in code, and load its "
        "weights with syncbn.load_weights(model, path)."
    )


def renorm_unknown(name: str) -> str:
    """The text of a warning: the same for a plain layer with renorm."""
    return (
        f"keras.layers.BatchNormalization has no renorm before Keras 3.14. Received: the layer {name!r} with renorm=True, and "
        f"Keras {keras.__version__}. It becomes a SyncBatchNormalization, which computes the same on one replica, and meets the "
        "others among several."
    )


def several_axes(name: str, axis: list[int]) -> str:
    """The text of a warning: a plain layer that had to become ours."""
    return (
        f"keras.layers.BatchNormalization of Keras 3 takes one axis. Received: the layer {name!r} with axis={axis}. It becomes a "
        "SyncBatchNormalization, which computes the same on one replica, and synchronises among several."
    )
