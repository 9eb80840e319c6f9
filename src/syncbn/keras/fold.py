"""Keras models for inference: batch norms folded into the layer before them."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import activations, layers, ops
from keras.src.models.functional import Functional  # not public: what keras.Model(inputs, outputs) returns

from syncbn import policy_migration as texts
from syncbn.class_swap import known_ancestor
from syncbn.keras.layer import SyncBatchNormalization

# Where each kernel has the channels of the output; separable and transposed ones apart.
LAST = (layers.Dense, layers.Conv1D, layers.Conv2D, layers.Conv3D)
TRANSPOSED = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)
SEPARABLE = (layers.SeparableConv1D, layers.SeparableConv2D)
BEFORE = (*LAST, *TRANSPOSED, *DEPTHWISE, *SEPARABLE)


def fold(model: Any) -> Any:
    """See `syncbn.fold`."""
    if not isinstance(model, keras.Sequential) and not _is_functional(model):
        raise texts.fold_subclassed(model.name, type(model).__name__)
    folded: dict[int, Any] = {}  # the batch norm of each layer that takes one in
    gone: dict[int, Any] = {}
    for layer, norm in _pairs(model):
        folded[id(layer)], gone[id(norm)] = norm, layer

    def copy(layer: Any) -> Any:
        if isinstance(layer, keras.Sequential) or _is_functional(layer):
            return fold(layer)
        config = layer.get_config()
        if id(layer) in gone:
            # A layer that does nothing but what the batch norm did last keeps its name and place.
            activation = getattr(layer, "activation", activations.linear)
            return layers.Activation(activation, name=layer.name, dtype=layer.dtype_policy)
        return type(layer).from_config({**config, "use_bias": True} if id(layer) in folded else config)

    names = {norm.name for norm in folded.values()}

    def call(layer: Any, *args: Any, **named: Any) -> Any:
        # A batch norm takes a mask; what stands in its place does not.
        return layer(args[0]) if layer.name in names else layer(*args, **named)

    graph = {} if isinstance(model, keras.Sequential) else {"call_function": call}
    new = keras.models.clone_model(model, clone_function=copy, **graph)
    _give_weights(model, new, folded, gone)
    return new


def _is_functional(model: Any) -> bool:
    """Of that class itself: a subclass may call its layers otherwise than its graph says."""
    return type(model) is Functional


def _give_weights(model: Any, new: Any, folded: dict[int, Any], gone: dict[int, Any]) -> None:
    for layer in model.layers:
        if id(layer) in folded:
            new.get_layer(layer.name).set_weights(_folded_weights(layer, folded[id(layer)]))
        elif layer.weights and id(layer) not in gone and not isinstance(layer, keras.Sequential) and not _is_functional(layer):
            new.get_layer(layer.name).set_weights(layer.get_weights())


def _pairs(model: Any) -> list[tuple[Any, Any]]:
    """Each layer and the batch norm that alone takes its output, both called once."""
    if isinstance(model, keras.Sequential):
        found = list(zip(model.layers, model.layers[1:], strict=False))
        once = {id(layer): 1 for layer in model.layers}
    else:
        found, once = [], {}
        outputs = {id(t) for t in keras.tree.flatten(model.outputs)}
        consumers: dict[int, int] = {}
        nodes = [node for depth in model._nodes_by_depth.values() for node in depth]
        for node in nodes:
            once[id(node.operation)] = once.get(id(node.operation), 0) + 1
            for t in node.input_tensors:
                consumers[id(t)] = consumers.get(id(t), 0) + 1
        for node in nodes:
            if isinstance(node.operation, layers.BatchNormalization) and len(node.input_tensors) == 1:
                (x,) = node.input_tensors
                if consumers[id(x)] == 1 and id(x) not in outputs:
                    found.append((x._keras_history.operation, node.operation))
    return [(layer, norm) for layer, norm in found if once[id(layer)] == once[id(norm)] == 1 and _fits(layer, norm)]


def _fits(layer: Any, norm: Any) -> bool:
    """Whether the batch norm's channels are the layer's, and all of both is known."""
    if type(layer) not in BEFORE or layer.activation is not activations.linear:
        return False
    if not isinstance(norm, SyncBatchNormalization) and known_ancestor(type(norm), (layers.BatchNormalization,)) is None:
        return False
    if type(norm) is not SyncBatchNormalization and isinstance(norm, SyncBatchNormalization):
        return False
    if isinstance(norm.axis, tuple) or "call" in vars(norm) or "call" in vars(layer) or not (layer.built and norm.built):
        return False
    rank = len(layer.output.shape)
    first = getattr(layer, "data_format", "channels_last") == "channels_first"
    return norm.axis % rank == (1 if first else rank - 1)


def _folded_weights(layer: Any, norm: Any) -> list[np.ndarray]:
    """W ← s·W, b ← beta + s·(b − mean), s = gamma / √(variance + epsilon), in float64."""

    def wide(v: Any, otherwise: float = 0.0) -> Any:
        return otherwise if v is None else np.asarray(ops.convert_to_numpy(v), np.float64)

    s = wide(norm.gamma, 1.0) / np.sqrt(wide(norm.moving_variance) + norm.epsilon)
    b = wide(norm.beta) + s * (wide(layer.bias) - wide(norm.moving_mean))
    *others, kernel = [wide(w) for w in layer.weights if w is not layer.bias]
    if isinstance(layer, DEPTHWISE):
        scaled = kernel * s.reshape(kernel.shape[-2:])
    elif isinstance(layer, TRANSPOSED):
        scaled = kernel * s[:, None]  # [… , out, in]
    else:
        scaled = kernel * s
    return [*others, scaled, b]
