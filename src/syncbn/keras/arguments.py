"""What the Keras layer takes, checked: constructor arguments and call arguments; and arguments as it saves them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import keras
from keras import ops

from syncbn import settings, validation
from syncbn.keras import _private

# What a Keras layer takes besides our own arguments.
KERAS_KEYWORDS = frozenset({"activity_regularizer", "autocast", "dtype", "input_dim", "input_shape"})
# Arguments of torch's and Flax's batch norms, and what stands for them in the words of Keras.
RENAMED = {
    "eps": "Give `epsilon` for `eps`.",
    "num_features": "Drop `num_features`: the channels are the input's.",
    "affine": "Give `scale` and `center` for `affine`.",
    "bias": "Give `center` for `bias`.",
    "process_group": "Give `group_size` for `process_group`.",
    "use_scale": "Give `scale` for `use_scale`.",
    "use_bias": "Give `center` for `use_bias`.",
}
NOT_APPLICABLE = {
    "fused": "the layer always takes its own fast path",
    "virtual_batch_size": "statistics come from the batches of all replicas, or of `group_size` of them",
}


def check_momentum(name: str, value: Any) -> float:
    """A momentum, the weight of the old value."""
    if not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise ValueError(
            f"`{name}` must lie in [0, 1]: it is the weight of the old value. Received: {name}={value!r}. Give for example 0.99."
        )
    return float(value)


def check_numbers(path: str, layer: Any) -> None:
    """Raises where a layer of Keras's has a number that the constructor refuses: a saved model could not be loaded."""
    try:
        validation.check_epsilon(layer.epsilon)
        for name in ("momentum", "renorm_momentum"):
            # Keras knows no renorm before 3.14.
            check_momentum(name, getattr(layer, name, 0.99))
    except ValueError as error:
        # The constructor's text, which has what was received and the mend.
        text = f"The layer {path!r} cannot be converted, and no layer was: {error}"
        raise ValueError(text) from None


def check_keywords(owner: str, received: dict[str, Any]) -> dict[str, Any]:
    """The keywords that the Keras base class may see."""
    received = dict(received)
    for name, why in NOT_APPLICABLE.items():
        value = received.pop(name, None)
        if value not in (None, False):
            raise ValueError(f"`{name}` is not applicable to {owner}: {why}. Received: {name}={value!r}. Drop it.")
    synchronized = received.pop("synchronized", True)
    if not synchronized:
        raise ValueError(
            f"{owner} always synchronises. Received: synchronized={synchronized!r}. For local statistics use "
            "keras.layers.BatchNormalization."
        )
    unknown = sorted(set(received) - KERAS_KEYWORDS)
    if unknown:
        raise ValueError(
            f"{owner} takes no other keywords than its own and {sorted(KERAS_KEYWORDS)}. Received: {unknown}. {_renamed(unknown)}"
        )
    return received


def _renamed(names: Iterable[str]) -> str:
    """What to do about keywords that are not known."""
    return " ".join(RENAMED[name] for name in names if name in RENAMED) or "Drop or rename them."


USE_KERAS_3 = "Unset TF_USE_LEGACY_KERAS, and build the model with `import keras`. syncbn.load_legacy reads files of tf_keras."


def warn_of_legacy_keras() -> None:
    """Warns where `tf.keras` is Keras 2, whose models take no layer of Keras 3."""
    if settings.legacy_keras():
        warnings.warn(
            "SyncBatchNormalization is a layer of Keras 3, which models of tf_keras do not take. Received: "
            f"TF_USE_LEGACY_KERAS, which makes tf_keras of tf.keras. {USE_KERAS_3}",
            stacklevel=3,
        )


def warn_of_half_weights(layer: Any) -> None:
    """Warns, as a layer is built, where its float32 weights meet half-precision weights on several TensorFlow replicas."""
    # Under several replicas alone the layer cannot be compiled with its model.
    if layer.variable_dtype in ("float16", "bfloat16") and not layer.supports_jit:
        warnings.warn(
            "A batch norm has float32 weights, and MirroredStrategy packs the gradients of all weights into one tensor by "
            f"default. They must have one dtype. Received: the dtype policy {layer.variable_dtype!r} on several replicas. Use "
            f"mixed_{layer.variable_dtype}, or MirroredStrategy(cross_device_ops=tf.distribute.ReductionToOneDevice()).",
            stacklevel=2,
        )


def described(layer: Any) -> str:
    """A layer's `repr`. Where tf_keras is imported it says what tf_keras's error, which quotes it, does not."""
    note = f": a layer of Keras 3, which tf_keras does not take. {USE_KERAS_3}" if "tf_keras" in sys.modules else ""
    return f"<{type(layer).__qualname__.rpartition('.')[2]} name={layer.name}, built={layer.built}{note}>"


def check_training(value: Any) -> bool:
    """`training` as a Python bool: it decides which program is built."""
    try:
        return bool(value)
    except Exception as error:
        raise TypeError(
            f"`training` must be known when the layer is called: True, False or None. Received: {value!r}. Call the layer "
            "twice, once for each, and choose between the results."
        ) from error


def given_or_propagated(mask: Any, inputs: Any, axes: tuple[int, ...], training: bool) -> Any:
    """A mask as it was given, as a tensor, or in the inputs' rank if Keras propagates it. None where it is not needed.

    A mask that Keras propagates has the first axes of the inputs, whatever the channel axes are.
    """
    if mask is None or _private.in_symbolic_scope():
        # While Keras infers shapes, tensors do not carry their masks.
        return None
    mask, kept = ops.convert_to_tensor(mask), _private.get_keras_mask(inputs)
    validation.check_mask_dtype(keras.backend.standardize_dtype(mask.dtype))
    if kept is None or tuple(kept.shape) != tuple(mask.shape):
        return mask
    full = ops.expand_dims(mask, tuple(range(len(mask.shape), len(inputs.shape))))
    if all(full.shape[a] == 1 for a in axes):
        return full
    if training:
        raise ValueError(
            "A mask that Keras propagates must not cover a channel axis, because all channels have one count. Received: a mask "
            f"of shape {tuple(mask.shape)} with an input of shape {tuple(inputs.shape)} and the channels on {list(axes)}. Give "
            "the layer another `axis`, or call it with a `mask` of your own."
        )
    return None


def check_input_shape(shape: Sequence[int | None], built: Sequence[int | None], axes: tuple[int, ...]) -> None:
    """Raises where an input does not have the rank and the channels that the layer was built for."""
    if len(shape) != len(built) or any(shape[a] not in (None, built[a]) for a in axes):
        raise ValueError(
            f"The input must have the rank and the number of channels that the layer was built for. Received: shape "
            f"{tuple(shape)}, built for {tuple(built)} with the channels on {list(axes)}. Make another layer for this input."
        )


def check_adjustment(value: Any) -> Any:
    """A callable, or None."""
    if value is not None and not callable(value):
        raise TypeError(
            f"`adjustment` must be a callable that takes the input's shape. Received: adjustment={value!r}. Give for example "
            "lambda shape: (1.0, 0.0)."
        )
    return value


def check_adjustment_shape(name: str, shape: Sequence[int | None], input_shape: Sequence[int | None], per_channel: bool) -> None:
    """Raises where a result of `adjustment` does not broadcast to the input. per_channel: it is [C], on any channel axis."""
    from_last = zip(reversed(tuple(shape)), reversed(tuple(input_shape)), strict=False)
    fits = len(shape) <= len(input_shape) and all(n is None or s in (None, 1, n) for s, n in from_last)
    if not (fits or per_channel):
        raise ValueError(
            "`adjustment` must return (scale, bias), each of a shape that broadcasts to the input's, or one value per channel. "
            f"Received: {name} of shape {tuple(shape)} for an input of shape {tuple(input_shape)}. Reshape it."
        )


def serialized_bound(key: str, value: Any) -> Any:
    """A bound of `renorm_clipping` as a file holds it: a number, None, or the description of a callable."""
    if callable(value):
        return serialized(f"renorm_clipping[{key!r}]", value)
    return value if value is None else float(ops.convert_to_numpy(value))


def serialized(name: str, value: Any) -> Any:
    """A callable as a file holds it."""
    registered = value if isinstance(value, type) or hasattr(value, "__name__") else type(value)
    _check_registered(name, value, registered)
    return keras.saving.serialize_keras_object(value)


def _check_registered(name: str, value: Any, registered: Any) -> None:
    """Raises where a file could not bring a callable back. registered: the function, or the class of the object."""
    if isinstance(registered, type) and not hasattr(registered, "from_config"):
        raise ValueError(
            f"`{name}` can only be saved or cloned where Keras can make it again. Received: {value!r}, whose class has no "
            "`from_config`. Give the class the methods `get_config` and, as a classmethod, `from_config`."
        )
    if keras.saving.get_registered_object(keras.saving.get_registered_name(registered)) is not registered:
        raise ValueError(
            f"`{name}` can only be saved or cloned where it is registered with Keras. Received: {value!r}. Decorate the "
            "function, or its class, with @keras.saving.register_keras_serializable()."
        )
