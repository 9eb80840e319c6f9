"""`fold` for Keras: batch norms folded into the layer before them, for inference."""

from __future__ import annotations

import tempfile
from collections import Counter, defaultdict
from typing import Any

import keras
import numpy as np
from keras import activations, layers, ops

from syncbn.class_swap import known_ancestor
from syncbn.keras import _private
from syncbn.keras.converted import is_exactly_ours
from syncbn.keras.matching import refresh_normalizations

# Layers by the axis on which their kernels have the output channels.
LAST = (layers.Dense, layers.Conv1D, layers.Conv2D, layers.Conv3D)
TRANSPOSED = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)
SEPARABLE = (layers.SeparableConv1D, layers.SeparableConv2D)
BEFORE = (*LAST, *TRANSPOSED, *DEPTHWISE, *SEPARABLE)
_FUNCTIONAL = _private.functional_class()


def fold(model: Any) -> Any:
    """See `syncbn.fold`."""
    if not _has_graph(model):
        raise ValueError(
            "syncbn.fold takes a Sequential or functional Keras model, whose graph it reads. Received: "
            f"{model.name}, a {type(model).__name__}. Fold the Sequential or functional models in it."
        )
    folded: dict[int, Any] = {}  # by layer: the batch norm that is folded into it
    gone: dict[int, Any] = {}  # by batch norm: that layer
    for layer, norm in _pairs(model):
        folded[id(layer)], gone[id(norm)] = norm, layer

    # By layer. A copy may have another name.
    copies: defaultdict[int, list[Any]] = defaultdict(list)

    def copy(layer: Any) -> Any:
        if _has_graph(layer):
            return fold(layer)
        if id(layer) in gone:
            # A layer with the batch norm's name and activation takes its place.
            activation = getattr(layer, "activation", activations.linear)
            return layers.Activation(activation, name=layer.name, dtype=layer.dtype_policy)
        config = layer.get_config()
        # Keras's safe mode is against functions of foreign files.
        with _private.SafeModeScope(False):
            new = type(layer).from_config({**config, "use_bias": True} if id(layer) in folded else config)
        copies[id(layer)].append(new)
        return new

    names = {norm.name for norm in folded.values()}

    def call(layer: Any, *args: Any, **named: Any) -> Any:
        # A batch norm takes a mask. The layer in its place does not.
        return layer(args[0]) if layer.name in names else layer(*args, **named)

    graph = {} if type(model) is keras.Sequential else {"call_function": call}
    new = keras.models.clone_model(model, clone_function=copy, **graph)
    for layer in model.layers:
        for its_copy in copies[id(layer)]:
            _set_state(its_copy, layer, folded.get(id(layer)))
    refresh_normalizations(new)
    return new


def _has_graph(model: Any) -> bool:
    """Whether it is of Keras's own class of Sequential or functional models: a subclass may call its layers in another way."""
    return type(model) in (keras.Sequential, _FUNCTIONAL)


def _set_state(new: Any, layer: Any, norm: Any) -> None:
    """Gives a copy the layer's weights, with the batch norm folded into them unless it is None, and the layer's vocabulary."""
    if norm is not None:
        new.set_weights(_folded_weights(layer, norm))
    elif layer.weights:
        new.set_weights(layer.get_weights())
    # What Keras's files hold besides weights: the tables of lookup layers.
    if hasattr(layer, "save_assets"):
        with tempfile.TemporaryDirectory() as folder:
            layer.save_assets(folder)
            new.load_assets(folder)


def _pairs(model: Any) -> list[tuple[Any, Any]]:
    """Each layer and the batch norm that is the only reader of its output, both called once."""
    if type(model) is keras.Sequential:
        found = list(zip(model.layers, model.layers[1:], strict=False))
        once = Counter(map(id, model.layers))
    else:
        found, once = [], Counter()
        outputs = {id(t) for t in keras.tree.flatten(model.outputs)}
        consumers: dict[int, int] = {}
        nodes = _private.nodes(model)
        for node in nodes:
            once[id(node.operation)] += 1
            for t in node.input_tensors:
                consumers[id(t)] = consumers.get(id(t), 0) + 1
        for node in nodes:
            if isinstance(node.operation, layers.BatchNormalization) and len(node.input_tensors) == 1:
                (x,) = node.input_tensors
                if consumers[id(x)] == 1 and id(x) not in outputs:
                    found.append((_private.producer(x), node.operation))
    return [(layer, norm) for layer, norm in found if once[id(layer)] == once[id(norm)] == 1 and _fits(layer, norm)]


def _fits(layer: Any, norm: Any) -> bool:
    """Whether the batch norm has the layer's channels, and the behaviour of both is known."""
    if type(layer) not in BEFORE or layer.activation is not activations.linear:
        return False
    if not is_exactly_ours(norm) and known_ancestor(type(norm), (layers.BatchNormalization,)) is None:
        return False
    if isinstance(norm.axis, tuple) or "call" in vars(norm) or "call" in vars(layer) or not (layer.built and norm.built):
        return False
    # LoRA and quantization give a layer more weights.
    if len(layer.weights) != (2 if isinstance(layer, SEPARABLE) else 1) + (layer.bias is not None):
        return False
    rank = len(layer.output.shape)
    first = getattr(layer, "data_format", "channels_last") == "channels_first"
    return norm.axis % rank == (1 if first else rank - 1)


def _folded_weights(layer: Any, norm: Any) -> list[np.ndarray]:
    """W ← s·W and b ← beta + s·(b − mean), with s = gamma / √(variance + epsilon), in float64."""

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
