"""Synchronised batch normalization as a function of JAX, TensorFlow or PyTorch arrays."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from syncbn import validation
from syncbn.groups import Axes, axis_names

# The package of an array's class, and the engine for it.
_ENGINES = {"jax": "jax", "jaxlib": "jax", "tensorflow": "tensorflow", "torch": "torch"}
_NAMES = {"jax": "JAX", "tensorflow": "TensorFlow", "torch": "PyTorch"}


class _Dialect(NamedTuple):
    """The operators that are needed here, under the names of one framework."""

    cast: Callable[[Any, Any], Any]
    boolean: Any
    operators: Any
    isfinite: Callable[[Any], Any]


def sync_batch_norm(
    x: Any,
    scale: Any,
    offset: Any,
    *,
    axis: int | Iterable[int] = -1,
    epsilon: float = 1e-3,
    mask: Any = None,
    axis_name: str | tuple[str, ...] | None = None,
    axis_index_groups: Any = None,
    process_group: Any = None,
) -> tuple[Any, Any, Any, Any]:
    """Normalises with the statistics of the batches of all replicas together, as in training.

        y = scale · (x − mean) / √(variance + epsilon) + offset

    with the global batch's mean and biased variance. The replicas exchange one message in the forward pass and one in the
    backward pass. The gradient for x includes the path through the moments. Those for scale and offset are this replica's own,
    which the trainer sums like all other gradients. In a `jax.shard_map` with check_vma=True, and for global arrays, they are
    the totals. The function keeps no moving statistics: update them with the mean and variance that it returns. A batch that
    is empty or masked on every replica has mean 0, variance 1 and count 0. Keep the old statistics then.

    Args:
        x: an array of any rank from 2 up and any float dtype: a jax.Array, tf.Tensor or torch.Tensor.
        scale, offset: one value per channel: [C], or, for several channel axes, x's shape with 1 in all other axes. They may
            differ between replicas.
        axis: the channel axis, or several. A list of one axis is that axis.
        epsilon: added to the variance; 0 or more.
        mask: bool, of x's shape without the channel axes (or 1 there), each other axis full or 1. True marks what counts. A
            masked element is normalised too. One that is not finite is read as 0.
        axis_name: JAX: the mapped axis, or axes, along which the replicas lie. None for one device, or for global arrays.
        axis_index_groups: JAX: a partition of the indices along it into groups with statistics of their own. Groups may differ
            in size.
        process_group: PyTorch: the ranks that exchange statistics; None for all. TensorFlow takes the replicas of its strategy.

    Returns:
        (y, mean, variance, count). y has x's shape and dtype. mean and variance have scale's shape, in float32 or wider; the
        variance is biased. count, exact, is the number of values per channel in the global batch, or in this replica's group.
        The last three carry no gradient.

    Raises:
        TypeError: x of no known framework, or no float; a keyword of another framework.
        ValueError: shapes, axes or groups that do not fit; an `axis_name` that is not mapped.

    Source: Ioffe and Szegedy 2015 (arXiv:1502.03167), with the moments of all replicas.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from syncbn.functional import sync_batch_norm
        >>> x = jnp.array([[[1.0], [3.0]], [[5.0], [7.0]]])  # 2 replicas × 2 values × 1 channel
        >>> norm = lambda x: sync_batch_norm(x, jnp.ones(1), jnp.zeros(1), axis_name="replica")
        >>> y, mean, variance, count = jax.vmap(norm, axis_name="replica")(x)
        >>> print(mean.ravel(), variance.ravel(), count)
        [4. 4.] [5. 5.] [4 4]
    """
    framework = _framework(x)
    group = _group(framework, axis_name, axis_index_groups, process_group)
    engine, dialect = importlib.import_module(f"syncbn.{framework}.engine"), _dialect(framework)
    kind = str(x.dtype)
    validation.check_float_dtype(kind, "float" in kind)
    shape = tuple(x.shape)
    entries = validation.check_axis(axis)
    axes = validation.channel_axes(entries, shape)
    parameters = [size if i in axes else 1 for i, size in enumerate(shape)] if isinstance(entries, tuple) else [shape[axes[0]]]
    scale = _vector("scale", scale, parameters, engine.arithmetic_dtype(x), dialect)
    offset = _vector("offset", offset, parameters, engine.arithmetic_dtype(x), dialect)
    if mask is not None:
        mask = dialect.cast(mask, dialect.boolean)
        if validation.mask_omits_channels(tuple(mask.shape), shape, axes):
            for a in axes:
                mask = dialect.operators.unsqueeze(mask, a) if framework == "torch" else dialect.operators.expand_dims(mask, a)
        # A NaN in the padding would spread otherwise: NaN · 0 is NaN.
        x = dialect.operators.where(mask | dialect.isfinite(x), x, dialect.operators.zeros_like(x))
    where = {"axes": axes, "mask": mask, "group": group}
    moments = engine.moments(x, **where)
    y = engine.normalize(x, moments, scale, offset, epsilon=validation.check_epsilon(epsilon), **where)
    mean = moments.mean_hi if moments.mean_lo is None else moments.mean_hi + moments.mean_lo
    reshape = dialect.operators.reshape
    return y, reshape(mean, parameters), reshape(moments.variance, parameters), moments.count


def _framework(x: Any) -> str:
    for base in type(x).__mro__:
        engine = _ENGINES.get(base.__module__.split(".")[0])
        if engine:
            return engine
    raise TypeError(
        f"`x` must be an array of JAX, TensorFlow or PyTorch. Received: {type(x).__module__}.{type(x).__qualname__}. Convert it "
        "first, for example with jax.numpy.asarray."
    )


def _group(framework: str, axis_name: Any, groups: Any, process_group: Any) -> Any:
    """The engine's `group`, from the keywords of this framework."""
    of = {"axis_name": ("jax", axis_name), "axis_index_groups": ("jax", groups), "process_group": ("torch", process_group)}
    for name, (owner, value) in of.items():
        if value is not None and framework != owner:
            raise TypeError(
                f"`{name}` is for {_NAMES[owner]} arrays. Received: it with an array of {_NAMES[framework]}. Drop it, or give "
                "the array that it is for."
            )
    if framework != "jax":
        return process_group
    names = axis_names(validation.check_axis_name(axis_name))
    if not names and groups is not None:
        raise ValueError(
            "`axis_index_groups` must come with `axis_name`: they number the devices along it. Received: axis_name=None. Give "
            "`axis_name`, or drop `axis_index_groups`."
        )
    return Axes(names, None if groups is None else tuple(tuple(members) for members in groups)) if names else None


def _vector(name: str, value: Any, parameters: list[int], dtype: Any, dialect: _Dialect) -> Any:
    """One value per channel as [C]."""
    value = dialect.cast(value, dtype)
    channels = math.prod(parameters)
    if list(value.shape) not in ([channels], parameters):
        raise ValueError(
            f"`{name}` must have one value a channel: shape [{channels}] or {parameters}. Received: shape {tuple(value.shape)}. "
            "Reshape it."
        )
    return dialect.operators.reshape(value, [channels])


def _dialect(framework: str) -> _Dialect:
    if framework == "jax":
        jnp = importlib.import_module("jax.numpy")
        return _Dialect(jnp.asarray, bool, jnp, jnp.isfinite)
    if framework == "torch":
        torch = importlib.import_module("torch")
        return _Dialect(lambda v, dtype: torch.as_tensor(v).to(dtype), torch.bool, torch, torch.isfinite)
    tf = importlib.import_module("tensorflow")
    return _Dialect(lambda v, dtype: tf.cast(v, dtype), tf.bool, tf, tf.math.is_finite)
