"""`convert` and `revert` for Keras, on any backend: a batch norm object changes its class and stays otherwise the same."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
from keras import activations, layers, ops

from syncbn.class_swap import (
    check_all_known,
    check_revertible,
    known_ancestor,
    qualified,
    warn_if_none,
    warn_if_rebuilt,
    why_unknown,
)
from syncbn.keras import _private, converted
from syncbn.keras import arguments as arguments_of_layers
from syncbn.keras.layer import SyncBatchNormalization
from syncbn.validation import check_group_size

Filter = Callable[[str, Any], bool] | None
KNOWN = (layers.BatchNormalization,)
RENORM_STATISTICS = ("moving_stddev", "renorm_mean", "renorm_stddev")
ABSENT = object()


@dataclass
class Before:
    """A layer before its conversion: its class, and each attribute that the conversion sets, or ABSENT."""

    cls: type
    attributes: dict[str, Any]

    def has_renorm(self) -> bool:
        """Whether the layer had renorm on. Keras before 3.14 has no such attribute."""
        return self.attributes["renorm"] is not ABSENT and bool(self.attributes["renorm"])


def convert(model: Any, arguments: dict[str, Any], filter: Filter, on_unknown: str) -> Any:
    """See `syncbn.convert`."""
    if arguments["process_group"] is not None:
        raise ValueError(
            f"`process_group` is for torch modules. Received: process_group={arguments['process_group']!r} with a Keras model. "
            "Use `group_size`, or neither: then all replicas of the strategy exchange statistics."
        )
    size = check_group_size(arguments["group_size"])
    chosen, unknown = [], []
    for name, layer in _batch_norms(model, filter):
        ours = isinstance(layer, SyncBatchNormalization)
        if "call" in vars(layer) or not (ours or known_ancestor(type(layer), KNOWN)):
            unknown.append((name, why_unknown(layer, KNOWN, "call")))
        else:
            arguments_of_layers.check_numbers(name, layer)
            chosen.append(layer)
    check_all_known(unknown, on_unknown)
    warn_if_none([*chosen, *unknown], "syncbn.convert", "batch norms", filter is not None)
    # The attributes that every synchronised layer has. Making a layer for each would take most of the time.
    pattern = dict(vars(SyncBatchNormalization(name="pattern")))
    for layer in chosen:
        if not isinstance(layer, SyncBatchNormalization):
            _synchronise(layer, pattern)
        if size is not None:
            layer.group_size = size
        if arguments["renorm"] and not layer.renorm:
            _start_renorm(layer)
    _forget_traces(model)
    warn_if_rebuilt(_rebuilt(model) if chosen else [])
    return model


def revert(model: Any, filter: Filter, example: Any) -> Any:
    """See `syncbn.revert`."""
    found = [(name, layer) for name, layer in _batch_norms(model, filter) if isinstance(layer, SyncBatchNormalization)]
    warn_if_none(found, "syncbn.revert", "synchronised batch norms", filter is not None)
    beyond = [(name, why) for name, layer in found if (why := _beyond_keras(layer))]
    check_revertible(beyond, "keras.layers.BatchNormalization")
    for _, layer in found:
        _restore(layer)
    _forget_traces(model)
    return model


def _batch_norms(model: Any, filter: Filter) -> list[tuple[str, Any]]:
    """The path, or the name until it is built, and the layer: of every batch norm, once."""
    found = [(layer.path or layer.name, layer) for layer in _private.flatten_layers(model) if isinstance(layer, KNOWN)]
    return [(name, layer) for name, layer in found if filter is None or filter(name, layer)]


def _rebuilt(model: Any) -> list[str]:
    """The classes in a model whose configurations hold none of our layers, though their objects do: a file makes plain ones."""
    found = []
    for part in _private.flatten_layers(model):
        if _is_saved_by_its_class(part) and any(
            isinstance(inner, SyncBatchNormalization) for inner in _private.flatten_layers(part)
        ):
            with contextlib.suppress(Exception):  # a configuration that cannot be made cannot be saved either
                if "syncbn>" not in repr(keras.saving.serialize_keras_object(part)["config"]):
                    found.append(qualified(type(part)))
    return sorted(set(found))


def _is_saved_by_its_class(part: Any) -> bool:
    """Whether somebody made a class of layers to be saved: it is registered, or has a `get_config`. Keras's own are known."""
    cls = type(part)
    if _is_of_keras(cls) or isinstance(part, SyncBatchNormalization):
        return False
    owner = next(c for c in cls.__mro__ if "get_config" in vars(c))
    return not _is_of_keras(owner) or keras.saving.get_registered_name(cls) != cls.__name__


def _is_of_keras(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "keras"


def _synchronise(layer: Any, pattern: dict[str, Any]) -> None:
    """Sets the attributes that Keras's layer lacks, or has in another form, then the class."""
    attributes = vars(layer)
    given = {key: v for key, v in pattern.items() if key not in attributes}
    saved = {key: attributes.get(key, ABSENT) for key in (*given, "renorm", "renorm_clipping", "supports_jit")}
    clipping = attributes.pop("renorm_clipping", None)  # a property of our class
    attributes.update(given, _before=Before(type(layer), saved))
    _private.change_class(layer, converted.class_named(type(layer).__name__))
    layer.renorm_clipping = clipping if layer.renorm else None
    if layer.built:
        shape = [None] * layer.input_spec.ndim
        for axis, size in layer.input_spec.axes.items():
            shape[axis] = size
        layer._learn_shape(tuple(shape))
        for statistic in (layer.moving_mean, layer.moving_variance):
            _average_over_replicas(statistic)


def _replicas(variable: Any) -> tuple[Any, ...]:
    """A variable's copies under a strategy of TensorFlow; none elsewhere."""
    copies = getattr(variable.value, "values", None)
    return copies if isinstance(copies, tuple) else ()


def _average_over_replicas(statistic: Any) -> None:
    """Assigns the mean of all replicas' copies. A layer that was not synchronised updated each replica's own."""
    values = [ops.convert_to_tensor(copy) for copy in _replicas(statistic)]
    if any(bool(ops.any(v != values[0])) for v in values[1:]):
        statistic.assign(ops.mean(ops.stack(values), 0))


def _as_if_converted(layer: Any) -> Before:
    """The Keras layer from which a layer that no conversion made would have been converted."""
    ours, keras_own = vars(SyncBatchNormalization(name=layer.name)), vars(layers.BatchNormalization(name=layer.name))
    same = {"renorm": layer.renorm, "renorm_clipping": layer.renorm_clipping, "supports_jit": True}
    same = {key: value if key in keras_own else ABSENT for key, value in same.items()}
    return Before(layers.BatchNormalization, {**{key: ABSENT for key in ours if key not in keras_own}, **same})


def _start_renorm(layer: Any) -> None:
    """Switches renorm on. In a built layer its statistics start from the moving ones."""
    layer.renorm = True
    if not layer.built:
        return
    # In the scope of the other statistics: a variable made outside of it would be updated by every replica.
    strategy = layer.moving_mean.value.distribute_strategy.scope() if _replicas(layer.moving_mean) else contextlib.nullcontext()
    with strategy, _private.more_weights(layer):
        layer._add_renorm_statistics()
    stddev = ops.sqrt(ops.cast(layer.moving_variance, layer.moving_stddev.dtype) + layer.epsilon)
    layer.moving_stddev.assign(stddev)
    # Copies: JAX donates an array's memory once a step.
    layer.renorm_stddev.assign(ops.copy(stddev))
    layer.renorm_mean.assign(ops.copy(layer.moving_mean))


def _restore(layer: Any) -> None:
    """Sets the attributes and the class from before the conversion; without one, those of a `BatchNormalization`."""
    attributes = vars(layer)
    before = attributes.pop("_before", None) or _as_if_converted(layer)
    if layer.built and layer.renorm and not before.has_renorm():
        for name in RENORM_STATISTICS:
            _private.untrack_variable(layer, attributes[name])
    shape = attributes.pop("_built_for", None)
    attributes.pop("_channel_axes", None)
    for key, value in before.attributes.items():
        if value is not ABSENT:
            attributes[key] = value
        elif not (before.has_renorm() and key in RENORM_STATISTICS):
            attributes.pop(key, None)
    _private.change_class(layer, before.cls)
    if shape is not None:
        # Keras's own `build` would have set these.
        axis = layer.axis % len(shape)
        layer.input_spec = layers.InputSpec(ndim=len(shape), axes={layer.axis: shape[axis]})
        attributes["_reduction_axes"] = [a for a in range(len(shape)) if a != axis]


def _beyond_keras(layer: Any) -> str | None:
    """What a synchronised layer does that Keras's cannot, or None."""
    if not converted.is_exactly_ours(layer):
        return f"a {qualified(type(layer))}"
    if isinstance(layer.axis, tuple):
        return f"axis={list(layer.axis)}"
    if layer.adjustment is not None:
        return "adjustment"
    if layer.activation is not activations.linear:
        return f"activation={activations.serialize(layer.activation)!r}"
    if layer.renorm and "_before" not in vars(layer) and not _private.has_renorm():
        return f"renorm=True, which Keras {keras.__version__} does not know: Keras 3.14 and later do"
    bounds = (layer.renorm_clipping or {}).values()
    return "renorm_clipping that is no number" if any(not isinstance(v, int | float | None) for v in bounds) else None


def _forget_traces(model: Any) -> None:
    """Drops the functions of compiled models, which were traced with the former layers."""
    for part in _private.flatten_layers(model):
        if isinstance(part, keras.Model):
            part.train_function = part.test_function = part.predict_function = None
            if part.compiled and part.jit_compile:
                part.jit_compile = True  # Keras warns, and sets False, where a layer does not support it
