"""Synchronised batch normalization as a function of JAX, TensorFlow or PyTorch arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from syncbn import validation
from syncbn.groups import Axes, axis_names

# The packages of arrays that have an engine.
_NAMES = {"jax": "JAX", "tensorflow": "TensorFlow", "torch": "PyTorch"}


class _Dialect(NamedTuple):
    """The operators that are needed here, under the names of one framework.

    cast(value, dtype), of an array or of what can be made one; fill(channels, value, dtype), an array of one value.
    """

    cast: Callable[[Any, Any], Any]
    fill: Callable[[int, float, Any], Any]
    boolean: Any
    operators: Any
    isfinite: Callable[[Any], Any]


def sync_batch_norm(
    x: Any,
    scale: Any = None,
    offset: Any = None,
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
        x: an array of any rank from 2 up and any float dtype: a jax.Array, tf.Tensor or torch.Tensor. A NumPy array is taken as
            JAX's where `axis_name` is given, or where scale or offset is a jax.Array. With `axis_name` x may be one example of
            rank 1, [C], as in `jax.vmap` over a batch.
        scale, offset: one value per channel: [C], or, for several channel axes, x's shape with 1 in all other axes. They may
            differ between replicas. None for 1 and 0.
        axis: the channel axis, or several. A list of one axis is that axis.
        epsilon: added to the variance; 0 or more. With 0 a constant channel gives NaN on JAX and TensorFlow, 0 on PyTorch, as in
            their own batch norms.
        mask: bool or integer, of x's shape without the channel axes (or 1 there), each other axis full or 1. True, or not 0,
            marks what counts. A masked element is normalised too. One that is not finite is read as 0.
        axis_name: JAX: the mapped axis, or axes, along which the replicas lie. None for one device, or for global arrays. Inside
            a `shard_map` or `pmap` None gives local statistics, and a warning; () says that they are meant.
        axis_index_groups: JAX: a partition of the indices along it into groups with statistics of their own. Groups may differ
            in size.
        process_group: PyTorch: the ranks that exchange statistics; None for all. TensorFlow takes the replicas of its strategy.

    Returns:
        (y, mean, variance, count). y has x's shape and dtype. mean and variance have scale's shape, in float32 or wider; the
        variance is biased. count, exact, is the number of values per channel in the global batch, or in this replica's group.
        The last three carry no gradient.

    Raises:
        TypeError: x of no known framework, or no float; a mask of floats; an axis that is no integer; a keyword that is not
            known, or of another framework.
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
    framework = _framework(x, scale, offset, axis_name)
    group = _group(framework, axis_name, axis_index_groups, process_group)
    engine, dialect = _engine(framework), _dialect(framework, x)
    if framework == "jax":
        x = dialect.operators.asarray(x)
    elif framework == "tensorflow":
        # Custom gradients take no variables.
        x = dialect.operators.convert_to_tensor(x)
    kind = str(x.dtype)
    validation.check_float_dtype(kind, "float" in kind)
    shape = tuple(x.shape)
    entries = validation.check_axis(axis)
    # Along a named axis there are more examples than this one.
    axes = validation.channel_axes(entries, shape, least_rank=1 if isinstance(group, Axes) and group.names else 2)
    parameters = [size if i in axes else 1 for i, size in enumerate(shape)] if isinstance(entries, tuple) else [shape[axes[0]]]
    scale = _vector("scale", scale, 1.0, parameters, engine.arithmetic_dtype(x), dialect, shape)
    offset = _vector("offset", offset, 0.0, parameters, engine.arithmetic_dtype(x), dialect, shape)
    if mask is not None:
        validation.check_mask_dtype(str(getattr(mask, "dtype", "bool")))
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


def _framework(x: Any, scale: Any, offset: Any, axis_name: Any) -> str:
    """The framework whose array x is. A NumPy array may be any framework's: `axis_name`, scale and offset tell JAX."""
    packages = _packages(x)
    found = next((name for name in packages if name in _NAMES), None)
    if found is None and "numpy" in packages and (axis_name is not None or "jax" in {*_packages(scale), *_packages(offset)}):
        return "jax"
    if found is None:
        raise TypeError(
            f"`x` must be an array of JAX, TensorFlow or PyTorch. Received: {type(x).__module__}.{type(x).__qualname__}. Convert "
            "it first, for example with jax.numpy.asarray."
        )
    return found


def _engine(framework: str) -> Any:
    """The engine's module. By statements, which torch.compile traces; `importlib.import_module` it does not."""
    if framework == "torch":
        from syncbn.torch import engine as of_torch

        return of_torch
    if framework == "jax":
        from syncbn.jax import engine as of_jax

        return of_jax
    from syncbn.tensorflow import engine as of_tensorflow

    return of_tensorflow


def _packages(value: Any) -> list[str]:
    """The packages of a value's classes. A jax.Array's are jaxlib or jax."""
    names = [base.__module__.split(".")[0] for base in type(value).__mro__]
    return ["jax" if name == "jaxlib" else name for name in names]


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
            "`axis_index_groups` must come with `axis_name`: they number the devices along it. Received: "
            f"axis_name={axis_name!r}. Give `axis_name`, or drop `axis_index_groups`."
        )
    if axis_name is None:
        return None
    return Axes(names, None if groups is None else tuple(tuple(members) for members in groups))


def _mend(given: Any, shape: tuple[int, ...]) -> str:
    """What to do about one value a channel of another axis than the last, or about another shape."""
    others = [i for i, size in enumerate(shape) if i and [size] == list(given)]
    return f"Give axis={others[0]} if the channels are there." if others else "Reshape it."


def _vector(
    name: str, value: Any, default: float, parameters: list[int], dtype: Any, dialect: _Dialect, shape: tuple[int, ...]
) -> Any:
    """One value per channel as [C]; of None the default's."""
    channels = math.prod(parameters)
    if value is None:
        return dialect.fill(channels, default, dtype)
    value = dialect.cast(value, dtype)
    if tuple(value.shape) != (channels,) and tuple(value.shape) != tuple(parameters):
        raise ValueError(
            f"`{name}` must have one value a channel: shape {' or '.join(dict.fromkeys([str([channels]), str(parameters)]))}. "
            f"Received: shape {tuple(value.shape)} for x of shape {shape}. {_mend(value.shape, shape)}"
        )
    return dialect.operators.reshape(value, [channels])


def _dialect(framework: str, x: Any) -> _Dialect:
    if framework == "jax":
        import jax.numpy as jnp

        return _Dialect(jnp.asarray, lambda n, value, dtype: jnp.full([n], value, dtype), bool, jnp, jnp.isfinite)
    if framework == "torch":
        import torch

        on = x.device
        return _Dialect(
            # What is a tensor stays where it is: a parameter on another device is the caller's fault, and torch says so.
            lambda v, dtype: (v if isinstance(v, torch.Tensor) else torch.as_tensor(v, device=on)).to(dtype),
            lambda n, value, dtype: torch.full([n], value, dtype=dtype, device=on),
            torch.bool,
            torch,
            torch.isfinite,
        )
    import tensorflow as tf

    return _Dialect(
        lambda v, dtype: tf.cast(v, dtype),
        lambda n, value, dtype: tf.fill([n], tf.cast(value, dtype)),
        tf.bool,
        tf,
        tf.math.is_finite,
    )
