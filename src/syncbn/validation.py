"""Checks that several modules share. Each raises; one that also converts returns the result."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from syncbn.groups import Axes, Sharded

CLIPPING_KEYS = ("rmin", "rmax", "dmax")
# How torch.utils.checkpoint keeps a record of the first pass.
RECORD_MOMENTS = "Give torch.utils.checkpoint.checkpoint use_reentrant=False, context_fn=syncbn.checkpoint_contexts."


def check_axis(value: Any) -> int | tuple[int, ...]:
    """The channel axis, or axes, as an int or a tuple of ints. A list of one axis is that axis."""
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
    return tuple(int(entry) for entry in entries) if len(entries) > 1 else int(entries[0])


def channel_axes(axis: int | tuple[int, ...], shape: Sequence[int | None], least_rank: int = 2) -> tuple[int, ...]:
    """The channel axes of an input of this shape, sorted, none of them negative."""
    rank = len(shape)
    if rank < least_rank:
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


def check_float_dtype(dtype: str, is_float: bool) -> None:
    """Raises where the input is not of a float dtype."""
    if not is_float:
        raise TypeError(f"The input must be of a float dtype. Received: {dtype}. Cast it first, for example to float32.")


def check_mask_dtype(dtype: str) -> None:
    """Raises where a mask's dtype is neither bool nor an integer: floats are often added to scores, and 0 keeps a value there."""
    if not any(kind in dtype for kind in ("bool", "int")):
        raise TypeError(
            "`mask` must be of dtype bool, or of integers: True, or not 0, marks what counts. Received: a mask of dtype "
            f"{dtype}. Give for example mask > 0.5."
        )


def mask_omits_channels(mask: Sequence[int | None], shape: Sequence[int | None], axes: tuple[int, ...]) -> bool:
    """Whether a mask of this shape leaves the channel axes out, or has 1 there. Raises where it does not broadcast."""
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


def is_epsilon(value: Any) -> bool:
    """Whether a value can be added to the variance."""
    return isinstance(value, Real) and 0 <= float(value) < math.inf


def check_epsilon(value: Any, name: str = "epsilon") -> float:
    """What is added to the variance."""
    if not is_epsilon(value):
        raise ValueError(
            f"`{name}` must be a finite number, 0 or more: it is added to the variance. Received: {name}={value!r}. Give for "
            "example 0.001."
        )
    return float(value)


def check_renorm_clipping(value: Any) -> dict[str, Any] | None:
    """A copy of `renorm_clipping`. Only bounds that are numbers are compared."""
    if value is None:
        return None
    if not isinstance(value, dict) or set(value) - set(CLIPPING_KEYS):
        raise ValueError(
            f"`renorm_clipping` must be a dict with the keys {list(CLIPPING_KEYS)}, each optional. Received: {value!r}. "
            "Drop or rename the other keys."
        )
    for key, bound in value.items():
        if isinstance(bound, str | list | tuple | dict):
            raise ValueError(
                "Each bound of `renorm_clipping` must be a number, a scalar tensor or variable, or a function that returns one. "
                f"Received: {key}={bound!r}. Give for example 3.0."
            )
    rmin, rmax, dmax = (value.get(key) for key in CLIPPING_KEYS)
    if isinstance(rmin, Real) and isinstance(rmax, Real) and not float(rmin) <= float(rmax):
        raise ValueError(f"`renorm_clipping` must have rmin <= rmax. Received: rmin={rmin}, rmax={rmax}. Swap them, or drop one.")
    if isinstance(dmax, Real) and not float(dmax) >= 0:
        raise ValueError(
            f"`renorm_clipping` must have dmax >= 0: d is clipped to [-dmax, dmax]. Received: dmax={dmax}. Give its size."
        )
    return dict(value)


def check_renorm_not_recomputed(recomputed: bool, received: str, mend: str = RECORD_MOMENTS) -> None:
    """Raises where a renorm layer runs again in the backward pass: its statistics have changed since."""
    if recomputed:
        raise RuntimeError(
            "renorm=True must not be recomputed in the backward pass. There r and d would come from statistics that the "
            f"forward pass has updated. Received: {received}. {mend}"
        )


def check_group_size(value: Any) -> int | None:
    """How many consecutive replicas share their statistics."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(
            f"`group_size` must be None or a positive integer, a number of replicas. Received: group_size={value!r}. Leave it "
            "None to synchronise over all of them."
        )
    return int(value)


def number_of_groups(replicas: int, size: int | None) -> int:
    """How many groups of this size the replicas make."""
    if size is None:
        return 1
    if replicas % size:
        raise ValueError(
            f"`group_size` must divide the number of replicas that train. Received: group_size={size} for {replicas} replicas. "
            "Give a divisor of it, or None for all."
        )
    return replicas // size


def check_axis_name(value: Any) -> str | tuple[str, ...] | None:
    """The named axes of a JAX program along which the replicas lie, as None, a name or a tuple of names; () for none of them."""
    if value is None or (isinstance(value, str) and value):
        return value
    names = tuple(value) if isinstance(value, (list, tuple)) else ("",)
    if not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
        raise ValueError(
            "`axis_name` must be None, the name of a mapped axis of a JAX program, or a tuple of different names; () keeps the "
            f"statistics local. Received: axis_name={value!r}. Give the name that jax.shard_map, pmap or vmap has for it."
        )
    return names


def check_no_axis_name(group: Any, framework: str, replicas: int) -> int | None:
    """The group size, or None for all replicas. Raises for a group of JAX's on several replicas of another framework."""
    if isinstance(group, Axes | Sharded) and replicas > 1:
        raise ValueError(
            f"`axis_name` is for JAX: on {framework} replicas are found without it. Received: {group} on {replicas} replicas "
            "that train. Leave `axis_name` out there. Inference runs with it."
        )
    return group if isinstance(group, int) else None


# What to do with a model of another framework, by the package of its class.
FOREIGN = {
    "tf_keras": (
        "Save it as `.h5`: syncbn.load_legacy(path, convert=True) makes a Keras 3 model of the file. Or unset "
        "TF_USE_LEGACY_KERAS, and build the model with `import keras`."
    ),
    **dict.fromkeys(("flax", "equinox", "haiku"), "Call syncbn.functional.sync_batch_norm in its layers."),
}


# The same for `load_weights`, which takes no torch module either.
FOREIGN_TO_LOADING = {"torch": "A torch module loads its own files by load_state_dict.", **FOREIGN}


def foreign_model(function: str, takes: str, model: Any, mends: Mapping[str, str] = FOREIGN) -> TypeError:
    """The error of a model that a function does not take, with what to do about one of its kind."""
    packages = [base.__module__.partition(".")[0] for base in type(model).__mro__]
    mend = next((mends[name] for name in packages if name in mends), "Give the model itself.")
    return TypeError(f"{function} takes {takes}. Received: {type(model).__module__}.{type(model).__qualname__}. {mend}")
