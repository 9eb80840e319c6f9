"""Defaults, legal values and the text of every error that a user can see: rule, what was received, mend."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

CLIPPING_KEYS = ("rmin", "rmax", "dmax")

# What a Keras layer takes besides our own arguments.
KERAS_KEYWORDS = frozenset({"activity_regularizer", "autocast", "dtype", "input_dim", "input_shape"})

NOT_APPLICABLE = {
    "fused": "the layer always takes its own fast path",
    "virtual_batch_size": "statistics come from the batches of all replicas, or of `group_size` of them",
}


class Alone:
    """The group of one replica that talks to nobody."""


ALONE = Alone()

# A group as the layer knows it: every replica (None), consecutive replicas (how many), or this one alone.
Group = int | Alone | None


class Activation(NamedTuple):
    """An activation that engines apply themselves: its name, and leaky_relu's slope."""

    name: str
    slope: float = 0.0


def axis(value: Any) -> int | tuple[int, ...]:
    """The channel axis, or axes, as an int or a tuple of ints."""
    several = isinstance(value, Iterable) and not isinstance(value, (str, bytes))
    entries = tuple(value) if several else (value,)
    for entry in entries:
        if isinstance(entry, bool) or not isinstance(entry, Integral):
            raise TypeError(
                f"`axis` must be an integer or a list of integers. Received: axis={value!r}. Give the position of the "
                "channel axis, for example -1, or of several, for example [1, 3]."
            )
    if not entries:
        raise ValueError(f"`axis` must name at least one axis. Received: axis={value!r}. Give for example -1.")
    return tuple(int(entry) for entry in entries) if several else int(entries[0])


def channel_axes(axis: int | tuple[int, ...], shape: Sequence[int | None]) -> tuple[int, ...]:
    """The channel axes of an input of this shape, sorted, none of them negative."""
    rank = len(shape)
    if rank < 2:
        raise ValueError(
            f"The input must have a batch axis and a channel axis, so rank 2 at least. Received: shape {tuple(shape)}. "
            "Add the missing axis."
        )
    entries = axis if isinstance(axis, tuple) else (axis,)
    for entry in entries:
        if not -rank <= entry < rank:
            raise ValueError(
                f"`axis` must lie in [{-rank}, {rank}) for an input of rank {rank}. Received: axis={axis!r}, input shape "
                f"{tuple(shape)}. Give an axis that the input has."
            )
    found = sorted(entry % rank for entry in entries)
    if len(set(found)) < len(found):
        raise ValueError(
            f"`axis` must not name an axis twice. Received: axis={axis!r} for an input of rank {rank}. Drop one of them."
        )
    for entry in found:
        if shape[entry] is None:
            raise ValueError(
                f"The number of channels must be known when the layer is built. Received: input shape {tuple(shape)} with "
                f"axis={axis!r}. Give the input a static size there, or another `axis`."
            )
    return tuple(found)


def input_shape(shape: Sequence[int | None], built: Sequence[int | None], axes: tuple[int, ...]) -> None:
    """Raises where an input does not have the rank and the channels that the layer was built for."""
    if len(shape) != len(built) or any(shape[a] not in (None, built[a]) for a in axes):
        raise ValueError(
            f"The input must have the rank and the number of channels that the layer was built for. Received: shape "
            f"{tuple(shape)}, built for {tuple(built)} with the channels on {list(axes)}. Make a layer of its own for this input."
        )


def floating(dtype: str, is_float: bool) -> None:
    """Raises where the input is not of a float dtype."""
    if not is_float:
        raise TypeError(f"The input must be of a float dtype. Received: {dtype}. Cast it first, for example to float32.")


def mask_omits_channels(mask: Sequence[int | None], shape: Sequence[int | None], axes: tuple[int, ...]) -> bool:
    """Whether the mask leaves the channel axes out, or has 1 there; raises where it does not broadcast to the input."""
    rest = [size for i, size in enumerate(shape) if i not in axes]
    left_out = len(mask) == len(rest)
    expected = rest if left_out else [1 if i in axes else size for i, size in enumerate(shape)]
    fits = len(mask) == len(expected) and all(m in (None, 1) or size in (None, m) for m, size in zip(mask, expected, strict=True))
    if not fits:
        raise ValueError(
            "`mask` must have the input's shape without the channel axes, or with 1 there, and each other axis full or 1. "
            f"Received: mask of shape {tuple(mask)} for an input of shape {tuple(shape)} with the channels on {list(axes)}. "
            "Reshape the mask."
        )
    return left_out


def fraction(name: str, value: Any) -> float:
    """A momentum."""
    if not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise ValueError(
            f"`{name}` must lie in [0, 1]: it is the weight of the old value. Received: {name}={value!r}. Give for example 0.99."
        )
    return float(value)


def epsilon(value: Any) -> float:
    """What is added to the variance."""
    if not isinstance(value, Real) or not 0 < float(value) < math.inf:
        raise ValueError(
            f"`epsilon` must be positive: it keeps the division by the standard deviation from failing. Received: "
            f"epsilon={value!r}. Give for example 0.001."
        )
    return float(value)


def clipping(value: Any) -> dict[str, Any] | None:
    """`renorm_clipping` as a dict of our own; bounds that are numbers are checked here."""
    if value is None:
        return None
    if not isinstance(value, dict) or set(value) - set(CLIPPING_KEYS):
        raise ValueError(
            f"`renorm_clipping` must be a dict with the keys {list(CLIPPING_KEYS)}, each optional. Received: {value!r}. "
            "Drop or rename the other keys."
        )
    rmin, rmax, dmax = (value.get(key) for key in CLIPPING_KEYS)
    if isinstance(rmin, Real) and isinstance(rmax, Real) and not float(rmin) <= float(rmax):
        raise ValueError(f"`renorm_clipping` must have rmin <= rmax. Received: rmin={rmin}, rmax={rmax}. Swap them, or drop one.")
    if isinstance(dmax, Real) and not float(dmax) >= 0:
        raise ValueError(
            f"`renorm_clipping` must have dmax >= 0: d is clipped to [-dmax, dmax]. Received: dmax={dmax}. Give its size."
        )
    return dict(value)


def group_size(value: Any) -> int | None:
    """How many consecutive replicas share their statistics."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(
            f"`group_size` must be None or a positive integer, a number of replicas. Received: group_size={value!r}. Leave it "
            "None to synchronise over all of them."
        )
    return int(value)


def groups(replicas: int, size: int | None) -> int:
    """How many groups of this size the replicas make."""
    if size is None:
        return 1
    if replicas % size:
        raise ValueError(
            f"`group_size` must divide the number of replicas that train. Received: group_size={size} for {replicas} replicas. "
            "Give a divisor of it, or None for all."
        )
    return replicas // size


def keywords(owner: str, received: dict[str, Any]) -> dict[str, Any]:
    """The keywords that the Keras base class may see."""
    received = dict(received)
    for name, why in NOT_APPLICABLE.items():
        value = received.pop(name, None)
        if value not in (None, False):
            raise ValueError(f"`{name}` is not applicable to {owner}: {why}. Received: {name}={value!r}. Drop it.")
    if not received.pop("synchronized", True):
        raise ValueError(
            f"{owner} always synchronises. Received: synchronized=False. For local statistics use "
            "keras.layers.BatchNormalization."
        )
    unknown = sorted(set(received) - KERAS_KEYWORDS)
    if unknown:
        raise ValueError(
            f"{owner} takes no other keywords than its own and {sorted(KERAS_KEYWORDS)}. Received: {unknown}. Drop or rename "
            "them."
        )
    return received


def training(value: Any) -> bool:
    """`training` as a Python bool: it decides which program is built."""
    try:
        return bool(value)
    except Exception as error:
        raise TypeError(
            f"`training` must be known when the layer is called: True, False or None. Received: {value!r}. Call the layer "
            "twice, once for each, and choose between the results."
        ) from error


def adjusted_shape(name: str, shape: Sequence[int | None], input_shape: Sequence[int | None], axes: tuple[int, ...]) -> None:
    """Raises where a result of `adjustment` is neither one value, nor one a channel."""
    channels = [input_shape[a] for a in axes]
    broad = [size if i in axes else 1 for i, size in enumerate(input_shape)]
    per_channel = len(axes) == 1 and len(shape) == 1 and shape[0] in (None, channels[0])
    with_ones = len(shape) == len(broad) and all(s in (None, b) for s, b in zip(shape, broad, strict=True))
    if len(shape) and not per_channel and not with_ones:
        raise ValueError(
            f"`adjustment` must return (scale, bias), each a scalar, of shape {channels} where there is one channel axis, or of "
            f"shape {broad}. Received: {name} of shape {tuple(shape)} for an input of shape {tuple(input_shape)}. Reshape it."
        )


def unregistered(name: str, value: Any) -> ValueError:
    """A callable that no file could bring back."""
    return ValueError(
        f"`{name}` can only be saved where it is registered with Keras. Received: {value!r}. Decorate the function, or its "
        "class with `get_config`, with @keras.saving.register_keras_serializable()."
    )


def cross_replica() -> RuntimeError:
    """Training where no replica is."""
    return RuntimeError(
        "SyncBatchNormalization must train inside a replica. Received: a call with training=True in cross-replica context of a "
        "tf.distribute strategy. Call the model inside strategy.run(...), or use model.fit."
    )


def parameter_server() -> RuntimeError:
    """A strategy whose workers do not run in step."""
    return RuntimeError(
        "SyncBatchNormalization must run under a strategy whose replicas train in step. Received: ParameterServerStrategy, "
        "whose workers never meet. Use MirroredStrategy or MultiWorkerMirroredStrategy, or keras.layers.BatchNormalization."
    )


def unknown_backend(backend: str) -> NotImplementedError:
    """A Keras backend without an engine."""
    return NotImplementedError(
        f"SyncBatchNormalization must run on a Keras backend that has an engine: tensorflow. Received: {backend!r}. Set "
        "KERAS_BACKEND=tensorflow before Keras is imported."
    )


REMAT_SCOPE = "a layer made in a keras.RematScope"
OUTSIDE_REMAT = "Make it outside the scope, or with renorm=False."
RECORD_MOMENTS = "Give torch.utils.checkpoint.checkpoint use_reentrant=False, context_fn=syncbn.checkpoint_contexts."


def recomputed_renorm(received: str = REMAT_SCOPE, mend: str = OUTSIDE_REMAT) -> RuntimeError:
    """Recomputation would use statistics that the first pass has already moved."""
    return RuntimeError(
        "renorm=True must not be recomputed in the backward pass: r and d would come from statistics that the forward pass has "
        f"moved. Received: {received}. {mend}"
    )


# ---------------------------------------------------------------------------------------------------------------- torch

TORCH_ACTIVATIONS = {
    "relu": Activation("relu"),
    "silu": Activation("silu"),
    "leaky_relu": Activation("leaky_relu", 0.01),
}


def torch_activation(value: Any) -> Activation | None:
    """What the engine applies itself; None for a callable, which runs after it."""
    if value is None or callable(value):
        return None
    if not isinstance(value, str) or value not in TORCH_ACTIVATIONS:
        raise ValueError(
            f"`activation` must be None, a callable or one of {sorted(TORCH_ACTIVATIONS)}. Received: activation={value!r}. Give "
            "another activation as a callable, for example torch.nn.GELU()."
        )
    return TORCH_ACTIVATIONS[value]


def new_value_weight(name: str, value: Any) -> float:
    """A momentum in torch's convention."""
    if not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise ValueError(
            f"`{name}` must lie in [0, 1]: it is the weight of the new value. Received: {name}={value!r}. Give for example 0.01."
        )
    return float(value)


def one_way_to_group(process_group: Any, group_size: int | None) -> None:
    """Raises where two arguments say who meets."""
    if process_group is not None and group_size is not None:
        raise ValueError(
            f"Only one of `process_group` and `group_size` may be given: each says which replicas meet. Received: both, with "
            f"group_size={group_size}. Drop one of them."
        )


def not_in_group(group: Any) -> ValueError:
    """A process group of other ranks."""
    return ValueError(
        f"`process_group` must be a torch.distributed process group that this rank is in. Received: {group!r}. Give each rank "
        "its own group, or use `group_size`."
    )


def renorm_needs_statistics() -> ValueError:
    """Nothing to correct towards."""
    return ValueError(
        "renorm=True corrects towards the moving statistics, so they must be kept. Received: track_running_stats=False. Set it "
        "to True, or renorm=False."
    )


def torch_input(shape: Sequence[int], channels: int) -> None:
    """Raises where an input is not [N, channels, …]."""
    # The first two in the words of torch's own layer, which programs may look for.
    if len(shape) < 2:
        raise ValueError(f"expected at least 2D input (got {len(shape)}D input)")
    if shape[1] == 0:
        raise ValueError("SyncBatchNorm number of input channels should be non-zero")
    if shape[1] != channels:
        raise ValueError(
            f"The input must have the layer's number of channels on dim 1. Received: shape {tuple(shape)} for num_features="
            f"{channels}. Make a layer with num_features={shape[1]}."
        )


def residual_shape(residual: Sequence[int], shape: Sequence[int]) -> None:
    """Raises where a residual is not of the input's shape."""
    if tuple(residual) != tuple(shape):
        raise ValueError(
            f"`residual` must have the input's shape. Received: residual of shape {tuple(residual)} for an input of shape "
            f"{tuple(shape)}. Expand or reshape it."
        )


def one_value_per_channel(shape: Sequence[int]) -> ValueError:
    """Torch's own sentence: a variance needs two values."""
    return ValueError(f"Expected more than 1 value per channel when training, got input size {list(shape)}")


def replayed_too_often() -> RuntimeError:
    """A recomputation that is not the first pass over again."""
    return RuntimeError(
        "A checkpointed block must call the same layers in its recomputation as in its first pass. Received: more calls than "
        "were recorded. Make the block depend on its arguments alone."
    )


def _as_said(said: dict[str, Any]) -> str:
    return (
        f"{said['direction']} of {said['layer']} (message {said['call']}, {said['channels']} channels, "
        f"training={said['training']})"
    )


def ranks_differ(said_by_rank: dict[int, dict[str, Any]]) -> RuntimeError:
    """Ranks that are about to send different messages."""
    heard = "; ".join(f"rank {rank}: {_as_said(said)}" for rank, said in said_by_rank.items())
    return RuntimeError(
        f"All ranks must run the same synchronised layers in the same order. Received: {heard}. Let every rank take the same "
        "path (an empty batch is fine), or run what one rank does alone in syncbn.local_statistics()."
    )


def absent_ranks(said: dict[str, Any], absent: Sequence[int], seconds: float) -> RuntimeError:
    """Ranks that did not come to the meeting."""
    return RuntimeError(
        f"All ranks must run the same synchronised layers in the same order. Received: nothing from ranks {list(absent)} within "
        f"{seconds:g} s, while this one came to the {_as_said(said)}. Look for what those ranks do instead, or raise the timeout "
        "of the process group."
    )
