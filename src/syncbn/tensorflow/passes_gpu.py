"""One TensorFlow replica's arithmetic as XLA clusters: a GPU reads each input once and writes each output once.

A cluster is a `tf.function` that XLA compiles. Plain operators would make three to ten times as many passes over memory, and
each of them costs the host as much as a small layer costs the GPU. The algebra of the [C] vectors stands inside the clusters,
behind a barrier: without it XLA works the vectors out again, in float64, for each element.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import tensorflow as tf

from syncbn import maths, xla_sums
from syncbn.tensorflow._private import barrier, compiled_by_xla

# The pivot is the mean of one value in so many, which saves a pass over x. The mean of any m of n values has
# (k − mean)² ≤ (n/m)·variance (Jensen), however the batch is ordered: sums about it lose five bits at the most.
VALUES_PER_PIVOT_VALUE = 16

# Only how fast a batch of unknown size is summed depends on it.
USUAL_BATCH = 32

# Takes this replica's message and returns tensors, on its device, whose sum is that of all replicas' messages.
Exchange = Callable[[tf.Tensor], list[tf.Tensor]]

# XLA compiles a cluster for each shape of its inputs, for 0.2 to 1 s. So many shapes of one number of channels are compiled.
COMPILED_SHAPES = 16


def cluster(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of tensors as an XLA cluster, or as plain operators where it would be compiled too often.

    Plain operators run for a shape of more than one unknown size, and for the shapes after the first `COMPILED_SHAPES`. The
    unknown size of a batch is compiled: a dataset has one or two batch sizes, but any number of image sizes.
    """
    compiled = tf.function(function, jit_compile=True, autograph=False)

    @wraps(function)
    def call(*arguments: Any, **static: Any) -> Any:
        x = tf.nest.flatten(arguments)[0]
        if compiled_by_xla() or not is_compiled(x, static.get("axes", (0,))):
            return function(*arguments, **static)
        return compiled(*arguments, **static)

    return call


# For a dtype and the channels' axes and sizes: the shapes that were compiled.
_compiled_shapes: dict[Any, set[tuple[Any, ...]]] = {}


def is_compiled(x: tf.Tensor, axes: tuple[int, ...]) -> bool:
    """Whether clusters are compiled for this input; notes its shape among those that are."""
    if None in x.shape[1:]:
        return False
    shapes = _compiled_shapes.setdefault((x.dtype, axes, *(x.shape[i] for i in axes)), set())
    if len(shapes) < COMPILED_SHAPES:
        shapes.add(tuple(x.shape))
    return tuple(x.shape) in shapes


class Layout(NamedTuple):
    """Where the channels of an input are."""

    axes: tuple[int, ...]
    shape: tuple[Any, ...]  # sizes that the trace does not know are tensors

    @classmethod
    def of(cls, x: tf.Tensor, axes: tuple[int, ...]) -> Layout:
        """The layout of x with its channels on these axes."""
        return cls(axes, tuple(tf.shape(x)[i] if n is None else n for i, n in enumerate(x.shape)))

    def sums(self, *values: tf.Tensor) -> list[tf.Tensor]:
        """The sum of each over all but the channels: float64 [C].

        In two stages, of which the first adds in the dtype of the values: XLA makes it one pass over memory for all values, and
        rounding errors do not add up.
        """
        shape, channels, inner = self._in_parts()
        parts = barrier(*[tf.reduce_sum(tf.reshape(v, shape), inner, keepdims=True) for v in values])
        outer = [i for i in range(len(shape)) if i not in channels]
        return [tf.reshape(tf.reduce_sum(tf.cast(part, tf.float64), outer), [-1]) for part in parts]

    def _in_parts(self) -> tuple[list[Any], tuple[int, ...], list[int]]:
        """(shape, channel axes, axes that are summed first) of an input, its rows divided where channels are last."""
        first = self.axes[0]
        batch, image, last = self.shape[:1], self.shape[1:first], self.shape[first:]
        known = isinstance(batch[0], int)
        channels_last = first > 0 and self.axes == tuple(range(first, len(self.shape)))
        if not channels_last or not all(isinstance(n, int) for n in image) or not (known or image):
            return list(self.shape), self.axes, list(range(self.axes[-1] + 1, len(self.shape))) or self.reduced()[-1:]
        # A batch of unknown size is left whole, and taken for one of USUAL_BATCH.
        outer, rows = ([], math.prod(batch + image)) if known else (list(batch), math.prod(image))
        channels = math.prod(last)
        parts = xla_sums.parts_of_rows(rows, channels if known else channels * USUAL_BATCH)
        shape = [*outer, parts, rows // parts, channels]
        return shape, (len(shape) - 1,), [len(shape) - 2]

    def reduced(self) -> list[int]:
        """The axes without channels."""
        return [i for i in range(len(self.shape)) if i not in self.axes]

    def spread(self, v: tf.Tensor) -> tf.Tensor:
        """[C] with 1 in the place of every other axis."""
        return tf.reshape(v, [n if i in self.axes else 1 for i, n in enumerate(self.shape)])

    def values(self) -> tf.Tensor:
        """How many values a channel has, float64."""
        sizes = [self.shape[i] for i in self.reduced()]
        known = math.prod(n for n in sizes if isinstance(n, int))
        return tf.cast(known, tf.float64) * math.prod(tf.cast(n, tf.float64) for n in sizes if not isinstance(n, int))

    def beginning(self, x: tf.Tensor) -> tf.Tensor:
        """The values of x that the pivot is made of: the beginning of the longest axis without channels."""
        if not self.reduced():
            return x
        axis = max(self.reduced(), key=lambda i: self.shape[i] if isinstance(self.shape[i], int) else 0)
        size = (self.shape[axis] + VALUES_PER_PIVOT_VALUE - 1) // VALUES_PER_PIVOT_VALUE
        return x[(*[slice(None)] * axis, slice(size))]


@cluster
def local_sums(x: tf.Tensor, mask: tf.Tensor | None, *, axes: tuple[int, ...]) -> tf.Tensor:
    """The message of the forward pass, float64 [1 + 2C]: this replica's n, Σx and Σx²."""
    layout, x = Layout.of(x, axes), _widened(x)
    if mask is None:
        n, part = layout.values(), layout.beginning(x)
        of_part = Layout.of(part, axes)
        # Divided before they are added, which is one kernel less. Nothing depends on the pivot's last bits.
        k = tf.reduce_sum(part / tf.cast(tf.maximum(of_part.values(), 1), x.dtype), layout.reduced())
    else:
        n = tf.reduce_sum(tf.cast(_full(mask, layout), tf.float64))
        k = tf.reduce_sum(_where(mask, x) / tf.cast(tf.maximum(n, 1), x.dtype), layout.reduced())
    # The k that is subtracted must be the k that is added: rounded to x's dtype.
    (k,) = barrier(tf.reshape(k, [-1]))
    rest = _where(mask, x - layout.spread(k))
    s, q = layout.sums(rest, rest * rest)
    return tf.concat([tf.reshape(n, [1]), *maths.raw_sums(n, tf.cast(k, tf.float64), s, q)], 0)


@cluster
def moments_of_sums(messages: list[tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """(count [], mean [C], variance [C]), float64, of the replicas that sent these messages."""
    message = tf.add_n(messages)
    channels = (message.shape[0] - 1) // 2
    count, total, squares = tf.split(message, [1, channels, channels])
    return tf.reshape(count, []), *maths.moments_of_sums(count, total, squares, maximum=tf.maximum)


@cluster
def normalize(
    x: tf.Tensor,
    mean: Any,
    variance: tf.Tensor,
    scale: tf.Tensor,
    offset: tf.Tensor,
    *,
    axes: tuple[int, ...],
    epsilon: float,
    dtype: tf.DType,
) -> tf.Tensor:
    """scale·(x − mean)/√(variance + epsilon) + offset, rounded to this dtype."""
    layout, wide = Layout.of(x, axes), _widened(x)
    hi, lo = split(mean, wide.dtype)
    rstd = tf.math.rsqrt(variance + epsilon)
    a, b = maths.affine_coefficients(lo, rstd, tf.cast(scale, variance.dtype), tf.cast(offset, variance.dtype))
    hi, a, b = (layout.spread(v) for v in barrier(hi, tf.cast(a, wide.dtype), tf.cast(b, wide.dtype)))
    return tf.cast((wide - hi) * a + b, dtype)


@cluster
def finish_forward(
    x: tf.Tensor,
    messages: list[tf.Tensor],
    scale: tf.Tensor,
    offset: tf.Tensor,
    moving: tuple[tf.Tensor, tf.Tensor],
    *,
    axes: tuple[int, ...],
    epsilon: float,
    dtype: tf.DType,
    weight: float,
    several: bool,
) -> tuple[Any, ...]:
    """(y, (count, mean, variance), (moving mean, moving variance)) from the messages of all replicas.

    The moving statistics stay as they are where nothing was counted, and, with several replicas, where the new ones are not
    finite.
    """
    count, mean, variance = moments_of_sums(messages)
    # The backward pass takes the mean as a pair: it would make it anew in both of its clusters.
    pair = split(mean, _widened(x).dtype)
    y = normalize(x, pair, variance, scale, offset, axes=axes, epsilon=epsilon, dtype=dtype)
    sound = count > 0
    if several:
        sound &= tf.reduce_all(tf.math.is_finite(mean + variance))
    updated = [
        tf.where(sound, maths.moving_average(old, tf.cast(new, old.dtype), 1 - weight), old)
        for old, new in zip(moving, (mean, variance), strict=True)
    ]
    return y, (count, pair, variance), updated


@cluster
def gradient_sums(
    dy: tf.Tensor, x: tf.Tensor, moments: tuple[Any, ...], scale: tf.Tensor, *, axes: tuple[int, ...], epsilon: float
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """(dscale, doffset, message): this replica's Σdy·x_hat and Σdy, and [2C] of Σscale·dy and Σscale·dy·x_hat."""
    _, mean, variance = moments
    layout, x, dy = Layout.of(x, axes), _widened(x), _widened(dy)
    hi, lo = split(mean, x.dtype)
    sum_dy, sum_dy_x = layout.sums(dy, dy * (x - layout.spread(hi)))
    dscale = maths.scale_gradient(lo, tf.math.rsqrt(variance + epsilon), sum_dy, sum_dy_x)
    scale = tf.cast(scale, variance.dtype)
    return tf.cast(dscale, x.dtype), tf.cast(sum_dy, x.dtype), tf.concat([scale * sum_dy, scale * dscale], 0)


@cluster
def input_gradient(
    dy: tf.Tensor,
    x: tf.Tensor,
    mask: tf.Tensor | None,
    moments: tuple[Any, ...],
    scale: tf.Tensor,
    messages: list[tf.Tensor],
    *,
    axes: tuple[int, ...],
    epsilon: float,
) -> tf.Tensor:
    """dx, in x's dtype, from the messages of all replicas."""
    count, mean, variance = moments
    layout, wide = Layout.of(x, axes), _widened(x)
    hi, lo = split(mean, wide.dtype)
    rstd = tf.math.rsqrt(variance + epsilon)
    sums = tf.split(tf.add_n(messages), 2)
    a, b = maths.moment_path_coefficients(tf.cast(count, rstd.dtype), lo, rstd, *sums, maximum=tf.maximum)
    vectors = (hi, *(tf.cast(v, wide.dtype) for v in (tf.cast(scale, variance.dtype) * rstd, a, b)))
    hi, slope, a, b = (layout.spread(v) for v in barrier(*vectors))
    through = _where(mask, (wide - hi) * a + b)
    return tf.cast(_widened(dy) * slope + through, x.dtype)


def forward(
    x: tf.Tensor,
    mask: tf.Tensor | None,
    scale: tf.Tensor,
    offset: tf.Tensor,
    moving: tuple[tf.Tensor, tf.Tensor],
    exchange: Exchange | None,
    **static: Any,
) -> tuple[Any, ...]:
    """A training step's (y, (count, mean, variance), (moving mean, moving variance)); exchange: None for one replica."""
    if exchange is None:
        return _forward_of_one(x, mask, scale, offset, moving, **static)
    messages = exchange(local_sums(x, mask, axes=static["axes"]))
    return finish_forward(x, messages, scale, offset, moving, several=True, **static)


def backward(
    dy: tf.Tensor,
    x: tf.Tensor,
    mask: tf.Tensor | None,
    moments: tuple[Any, ...],
    scale: tf.Tensor,
    exchange: Exchange | None,
    **static: Any,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """(dx, dscale, doffset). exchange: takes [2C], Σscale·dy and Σscale·dy·x_hat, and returns those of all replicas."""
    if exchange is None:
        return _backward_of_one(dy, x, mask, moments, scale, **static)
    dscale, doffset, message = gradient_sums(dy, x, moments, scale, **static)
    return input_gradient(dy, x, mask, moments, scale, exchange(message), **static), dscale, doffset


@cluster
def _forward_of_one(
    x: tf.Tensor, mask: tf.Tensor | None, scale: tf.Tensor, offset: tf.Tensor, moving: tuple[tf.Tensor, tf.Tensor], **static: Any
) -> tuple[Any, ...]:
    messages = [local_sums(x, mask, axes=static["axes"])]
    return finish_forward(x, messages, scale, offset, moving, several=False, **static)


@cluster
def _backward_of_one(
    dy: tf.Tensor, x: tf.Tensor, mask: tf.Tensor | None, moments: tuple[Any, ...], scale: tf.Tensor, **static: Any
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    dscale, doffset, message = gradient_sums(dy, x, moments, scale, **static)
    return input_gradient(dy, x, mask, moments, scale, [message], **static), dscale, doffset


def split(mean: Any, dtype: tf.DType) -> tuple[tf.Tensor, tf.Tensor]:
    """The mean as (hi, lo): hi in the arithmetic's dtype, lo what it leaves."""
    if isinstance(mean, tuple | list):
        return mean[0], mean[1]
    # XLA would take a float64 that was rounded to float32 and back for the float64 itself.
    (hi,) = barrier(tf.cast(mean, dtype))
    return hi, mean - tf.cast(hi, mean.dtype)


def _widened(x: tf.Tensor) -> tf.Tensor:
    return tf.cast(x, tf.float64 if x.dtype == tf.float64 else tf.float32)


def _where(mask: tf.Tensor | None, v: tf.Tensor) -> tf.Tensor:
    return v if mask is None else tf.where(mask, v, tf.zeros([], v.dtype))


def _full(mask: tf.Tensor, layout: Layout) -> tf.Tensor:
    """The mask of x's rank with each axis full but those of the channels."""
    return tf.broadcast_to(mask, [1 if i in layout.axes else n for i, n in enumerate(layout.shape)])
