"""Keras layers and models, on any backend: a batch norm object changes its class, and keeps all else."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import keras
from keras import activations, layers, ops

from syncbn import policy
from syncbn import policy_migration as texts
from syncbn.class_swap import known_ancestor, qualified, why_unknown
from syncbn.keras.layer import SyncBatchNormalization

Filter = Callable[[str, Any], bool] | None
KNOWN = (layers.BatchNormalization,)
RENORM_STATISTICS = ("moving_stddev", "renorm_mean", "renorm_stddev")
ABSENT = object()


@dataclass
class Before:
    """What a layer was: its class, and each attribute that the exchange set, or ABSENT."""

    cls: type
    attributes: dict[str, Any]


def convert(model: Any, arguments: dict[str, Any], filter: Filter, on_unknown: str) -> Any:
    """See `syncbn.convert`."""
    if arguments["process_group"] is not None:
        raise texts.torch_only(arguments["process_group"])
    size = policy.group_size(arguments["group_size"])
    chosen, unknown = [], []
    for name, layer in _batch_norms(model, filter):
        ours = isinstance(layer, SyncBatchNormalization)
        if "call" in vars(layer) or not (ours or known_ancestor(type(layer), KNOWN)):
            unknown.append((name, why_unknown(layer, KNOWN, "call")))
        else:
            chosen.append(layer)
    if unknown and on_unknown == "error":
        raise ValueError(texts.unknown_batch_norms(unknown))
    if unknown and on_unknown == "warn":
        warnings.warn(texts.unknown_batch_norms(unknown), stacklevel=3)
    if not chosen and not unknown:
        warnings.warn(texts.no_batch_norm("syncbn.convert", "batch norms", filter is not None), stacklevel=3)
    # What every layer of ours has; to make one for each would take most of the time.
    pattern = dict(vars(SyncBatchNormalization(name="pattern")))
    for layer in chosen:
        if not isinstance(layer, SyncBatchNormalization):
            _become_ours(layer, pattern)
        if size is not None:
            layer.group_size = size
        if arguments["renorm"] and not layer.renorm:
            _start_renorm(layer)
    _forget_traces(model)
    return model


def revert(model: Any, filter: Filter, example: Any) -> Any:
    """See `syncbn.revert`."""
    found = [(name, layer) for name, layer in _batch_norms(model, filter) if isinstance(layer, SyncBatchNormalization)]
    if not found:
        warnings.warn(texts.no_batch_norm("syncbn.revert", "batch norms of ours", filter is not None), stacklevel=3)
    beyond = [(name, why) for name, layer in found if (why := _beyond_keras(layer))]
    if beyond:
        raise texts.no_place(beyond, "keras.layers.BatchNormalization")
    for _, layer in found:
        _become_theirs(layer)
    _forget_traces(model)
    return model


def _batch_norms(model: Any, filter: Filter) -> list[tuple[str, Any]]:
    """Every batch norm, once; a layer has a path once it is built."""
    # Not public: what Keras itself walks models with, lists, wrappers and composite layers included.
    found = [(layer.path or layer.name, layer) for layer in model._flatten_layers() if isinstance(layer, KNOWN)]
    return [(name, layer) for name, layer in found if filter is None or filter(name, layer)]


def _become_ours(layer: Any, pattern: dict[str, Any]) -> None:
    """The attributes of ours that theirs lacks, or keeps in another form, then the class."""
    attributes = vars(layer)
    given = {key: v for key, v in pattern.items() if key not in attributes}
    saved = {key: attributes.get(key, ABSENT) for key in (*given, "renorm", "renorm_clipping", "supports_jit")}
    clipping = attributes.pop("renorm_clipping")  # a property of ours
    attributes.update(given, _before=Before(type(layer), saved))
    _change_class(layer, SyncBatchNormalization)
    layer.renorm_clipping = clipping if layer.renorm else None
    if layer.built:
        shape = [None] * layer.input_spec.ndim
        for axis, size in layer.input_spec.axes.items():
            shape[axis] = size
        layer._learn_shape(tuple(shape))
        for statistic in (layer.moving_mean, layer.moving_variance):
            _agree(statistic)


def _replicas(variable: Any) -> tuple[Any, ...]:
    """A variable's copies under a strategy of TensorFlow's; none elsewhere."""
    copies = getattr(variable.value, "values", None)
    return copies if isinstance(copies, tuple) else ()


def _agree(statistic: Any) -> None:
    """One value on all replicas, the mean: a layer that did not synchronise moved each replica's own."""
    values = [ops.convert_to_tensor(copy) for copy in _replicas(statistic)]
    if any(bool(ops.any(v != values[0])) for v in values[1:]):
        statistic.assign(ops.mean(ops.stack(values), 0))


def _as_if_converted(layer: Any) -> Before:
    """What a layer that was made as ours would have been."""
    ours, theirs = vars(SyncBatchNormalization(name=layer.name)), vars(layers.BatchNormalization(name=layer.name))
    kept = {"renorm": layer.renorm, "renorm_clipping": layer.renorm_clipping, "supports_jit": True}
    return Before(layers.BatchNormalization, {**{key: ABSENT for key in ours if key not in theirs}, **kept})


def _start_renorm(layer: Any) -> None:
    """Renorm from now on; the statistics of a built layer start from its moving ones."""
    layer.renorm = True
    if not layer.built:
        return
    layer._tracker.unlock()
    # Beside the statistics that are there: made outside of their strategy's scope, a variable would be moved by every replica.
    strategy = layer.moving_mean.value.distribute_strategy.scope() if _replicas(layer.moving_mean) else contextlib.nullcontext()
    with strategy, layer._open_name_scope():
        layer._add_renorm_statistics()
    layer._lock_state()
    stddev = ops.sqrt(ops.cast(layer.moving_variance, layer.moving_stddev.dtype) + layer.epsilon)
    layer.moving_stddev.assign(stddev)
    # Copies: JAX gives an array's memory away once a step.
    layer.renorm_stddev.assign(ops.copy(stddev))
    layer.renorm_mean.assign(ops.copy(layer.moving_mean))


def _become_theirs(layer: Any) -> None:
    """The attributes that were there, then the class that was there; `BatchNormalization` where no conversion made the layer."""
    attributes = vars(layer)
    before = attributes.pop("_before", None) or _as_if_converted(layer)
    if layer.built and layer.renorm and not before.attributes["renorm"]:
        for name in RENORM_STATISTICS:
            layer._untrack_variable(attributes[name])
    shape = attributes.pop("_built_for", None)
    attributes.pop("_channel_axes", None)
    for key, value in before.attributes.items():
        if value is not ABSENT:
            attributes[key] = value
        elif not (before.attributes["renorm"] and key in RENORM_STATISTICS):
            attributes.pop(key, None)
    _change_class(layer, before.cls)
    if shape is not None:
        # What Keras's own `build` would have noted.
        axis = layer.axis % len(shape)
        layer.input_spec = layers.InputSpec(ndim=len(shape), axes={layer.axis: shape[axis]})
        attributes["_reduction_axes"] = [a for a in range(len(shape)) if a != axis]


def _beyond_keras(layer: Any) -> str | None:
    """What a layer of ours does that Keras's cannot."""
    if type(layer) is not SyncBatchNormalization:
        return f"a {qualified(type(layer))}"
    if isinstance(layer.axis, tuple):
        return f"axis={list(layer.axis)}"
    if layer.adjustment is not None:
        return "adjustment"
    if layer.activation is not activations.linear:
        return f"activation={activations.serialize(layer.activation)!r}"
    bounds = (layer.renorm_clipping or {}).values()
    return "renorm_clipping that is no number" if any(not isinstance(v, int | float | None) for v in bounds) else None


def _change_class(layer: Any, cls: type) -> None:
    layer.__class__ = cls
    # Keras wraps `build` when an object is made, round the method of the class that it then has.
    for cell in layer.build.__closure__ or ():
        held = cell.cell_contents
        if inspect.ismethod(held) and held.__name__ == "build" and held.__self__ is layer:
            cell.cell_contents = MethodType(cls.build, layer)  # type: ignore[attr-defined]
            return
    raise texts.keras_changed(layer.name)


def _forget_traces(model: Any) -> None:
    """A compiled model has functions that were made of the layers as they were."""
    for part in model._flatten_layers():
        if isinstance(part, keras.Model):
            part.train_function = part.test_function = part.predict_function = None
            if part.compiled and part.jit_compile:
                part.jit_compile = True  # which Keras refuses, with a warning, where a layer does not support it
