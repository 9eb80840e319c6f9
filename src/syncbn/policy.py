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


class Axes(NamedTuple):
    """The replicas along named axes of a JAX program, in their order, in groups: consecutive ones of a size, or a partition."""

    names: tuple[str, ...]
    groups: int | tuple[tuple[int, ...], ...] | None = None


class Sharded(NamedTuple):
    """The replicas among which a JAX mesh shards a global array: its mesh axes for the batch and for the channels, if any."""

    mesh: Any
    batch: str
    channels: str | None = None
    size: int | None = None


# A group as the layer knows it: every replica (None), consecutive replicas (how many), this one alone, or JAX's ways to say.
Group = int | Alone | Axes | Sharded | None


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
        f"SyncBatchNormalization must run on a Keras backend that has an engine: jax, tensorflow, torch. Received: {backend!r}. "
        "Set KERAS_BACKEND to one of them before Keras is imported."
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


def axis_name(value: Any) -> str | tuple[str, ...] | None:
    """The named axes of a JAX program over which replicas meet, as None, a name or a tuple of names."""
    if value is None or (isinstance(value, str) and value):
        return value
    names = tuple(value) if isinstance(value, (list, tuple)) else ()
    if not names or not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
        raise ValueError(
            "`axis_name` must be None, the name of a mapped axis of a JAX program, or a tuple of different names. Received: "
            f"axis_name={value!r}. Give the name that jax.shard_map, pmap or vmap has for it."
        )
    return names


def axes_of(name: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """`axis_name` as a tuple."""
    return (name,) if isinstance(name, str) else tuple(name or ())


def group(name: str | tuple[str, ...] | None, size: int | None) -> int | Axes | None:
    """What a layer's `axis_name` and `group_size` mean."""
    return size if name is None else Axes(axes_of(name), size)


def partition(groups: Any, replicas: int) -> tuple[tuple[int, ...], ...]:
    """`axis_index_groups`: every replica in one group; they may differ in size."""
    found = tuple(tuple(int(i) for i in group) for group in groups)
    if sorted(i for group in found for i in group) != list(range(replicas)) or not all(found):
        raise ValueError(
            f"`axis_index_groups` must be a partition of the indices 0 to {replicas - 1}: each in one group, no group empty. "
            f"Received: {[list(group) for group in found]}. Add what is missing, drop what stands twice."
        )
    return found


def unbound_axis(name: str, bound: Sequence[str]) -> ValueError:
    """An axis that the program does not map here."""
    return ValueError(
        f"`axis_name` must name an axis that is mapped where the layer trains. Received: {name!r}, where the mapped axes of a "
        f"mesh are {sorted(bound)}. Call inside jax.shard_map, pmap or vmap(axis_name={name!r}), or leave `axis_name` out."
    )


def mixed_axes(names: Sequence[str], mesh: Sequence[str]) -> ValueError:
    """Mesh axes and vmap's together."""
    return ValueError(
        "`axis_name` must name axes of a mesh, or axes of vmap, not both: JAX cannot reduce over them together. Received: "
        f"{tuple(names)}, of which {sorted(mesh)} are a mesh's. Name one kind, or reshape the batch."
    )


def axis_name_elsewhere(group: Axes | Sharded, backend: str, replicas: int) -> ValueError:
    """A JAX axis on several replicas of another framework."""
    return ValueError(
        f"`axis_name` is for JAX: on {backend} replicas are found without it. Received: {group} on {replicas} "
        "replicas that train. Leave `axis_name` out there; inference runs as it is."
    )


def groups_of_unknown_replicas(size: int) -> ValueError:
    """`group_size` where a JAX program does not say which replicas there are."""
    return ValueError(
        "`group_size` must come with a way to tell the replicas that train: `axis_name`, or a keras.distribution with a batch "
        f"axis that is not a channel axis. Received: group_size={size} without. Give `axis_name`, set a distribution, or leave "
        "`group_size` None."
    )


def indivisible_batch(batch: int, replicas: int) -> ValueError:
    """A global array that a mesh cannot cut into equal shards."""
    return ValueError(
        f"The batch must be divisible by the number of replicas that the distribution has. Received: a batch of {batch} for "
        f"{replicas} replicas. Drop the remainder, or pad the batch and mask the padding."
    )


def groups_without_axis() -> ValueError:
    """`axis_index_groups` alone."""
    return ValueError(
        "`axis_index_groups` must come with `axis_name`: they number the devices along it. Received: axis_name=None. Give "
        "`axis_name`, or drop `axis_index_groups`."
    )


def keyword_of_another_framework(name: str, owner: str, received: str) -> TypeError:
    """A keyword of `sync_batch_norm` that this framework's arrays do not take."""
    return TypeError(
        f"`{name}` is for {owner} arrays. Received: it with an array of {received}. Drop it, or give the array that it is for."
    )


def unknown_array(kind: str) -> TypeError:
    """An array of no framework that has an engine."""
    return TypeError(
        f"`x` must be an array of JAX, TensorFlow or PyTorch. Received: {kind}. Convert it first, for example with "
        "jax.numpy.asarray."
    )


def parameter_shape(name: str, shape: Sequence[int | None], expected: Sequence[int]) -> ValueError:
    """A scale or offset of another length than the channels."""
    return ValueError(
        f"`{name}` must have one value a channel: shape [{math.prod(expected)}] or {list(expected)}. Received: shape "
        f"{tuple(shape)}. Reshape it."
    )
