"""One TensorFlow replica's arithmetic on the CPU: inputs become [A, C], or to [A, C, B] where channels are not last.

Each pass has two forms. On float32 with the channels last it is one of TensorFlow's fused batch norm operators in inference
mode, which make one pass over memory where plain operators make three; everywhere else it is plain operators.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from syncbn import maths

# TensorFlow sums float32 on the CPU one row after the other: 5e-4 off at 4 million rows. Blocks keep that under 1e-6.
BLOCK_ROWS = 1024
# The fused operators sum so too. They are given the rows of a channel as several channels: for free, up to so many of them.
FREE_CHANNELS = 1024
# Rather too many parts than too few, for a batch of unknown size.
LARGE_BATCH = 128


class ChannelView(NamedTuple):
    """How an input of any rank becomes [A, C], or [A, C, B], and back."""

    axes: tuple[int, ...]
    rank: int

    @property
    def _side_by_side(self) -> bool:
        return self.axes[-1] - self.axes[0] == len(self.axes) - 1

    @property
    def _order(self) -> list[int]:
        """The axes with the channels side by side: moved to the end where they are not."""
        rest = [i for i in range(self.rank) if i not in self.axes]
        return list(range(self.rank)) if self._side_by_side else rest + list(self.axes)

    def of(self, x: tf.Tensor) -> tf.Tensor:
        """x as [A, C], or [A, C, B]."""
        if not self._side_by_side:
            x = tf.transpose(x, self._order)
        first = self.axes[0] if self._side_by_side else self.rank - len(self.axes)
        last = first + len(self.axes)
        after = [size(x, *range(last, self.rank))] if last < self.rank else []
        return tf.reshape(x, [size(x, *range(first)), size(x, *range(first, last)), *after])

    def restore(self, flat: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
        """The inverse of `of`, in the shape of `like`."""
        shape = [size(like, i) for i in range(self.rank)]
        if self._side_by_side:
            return tf.reshape(flat, shape)
        back = [self._order.index(i) for i in range(self.rank)]
        return tf.transpose(tf.reshape(flat, [shape[i] for i in self._order]), back)

    def parts(self, x: tf.Tensor) -> int:
        """Into how many parts the rows of a channel are divided before they are summed: their number is a multiple of it."""
        sizes = [n for i, n in enumerate(x.shape) if i not in self.axes]
        known = math.prod(n for n in sizes if n is not None)
        rows = known * (LARGE_BATCH if None in sizes else 1)
        most = min(rows // BLOCK_ROWS, FREE_CHANNELS // max(1, math.prod(x.shape[i] for i in self.axes)))
        return next((parts for parts in range(most, 0, -1) if known % parts == 0), 1)

    def of_mask(self, mask: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
        """A mask for x, bool of its rank, as [A, 1] or [A, 1, B]."""
        return self.of(tf.broadcast_to(mask, [1 if i in self.axes else size(x, i) for i in range(self.rank)]))


def size(x: tf.Tensor, *dims: int) -> Any:
    """How many elements these dimensions hold: an int where it is known, which spares the graph operators."""
    static = [x.shape[i] for i in dims]
    if None not in static:
        return math.prod(static)
    return tf.reduce_prod(tf.gather(tf.shape(x), [i % x.shape.rank for i in dims]))


def along_channels(v: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """A vector [C] that broadcasts to the flat x."""
    return v if x.shape.rank == 2 else v[:, None]


def local_sums(x: tf.Tensor, mask: tf.Tensor | None, *, axes: tuple[int, ...]) -> tf.Tensor:
    """The message of the forward pass, float64 [1 + 2C]: this replica's n, Σx and Σx²."""
    n, k, s, q = local_moments(x, mask, axes, tf.float64)
    count = tf.cast(n, tf.float64)
    return tf.concat([tf.reshape(count, [1]), *maths.raw_sums(count, tf.cast(k, tf.float64), s, q)], 0)


def local_moments(
    x: tf.Tensor, mask: tf.Tensor | None, axes: tuple[int, ...], wide: tf.DType
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """(n, k, s, q): the count (int64), the pivot k in the arithmetic's dtype, Σ(x − k) and Σ(x − k)² in the wide one.

    mask: bool of x's rank, 1 on the channel axes, or None. The pivot is the replica's own mean, rounded.
    """
    view = ChannelView(axes, x.shape.rank)
    mask = None if mask is None else view.of_mask(mask, x)
    x = _flat(x, view)
    if mask is None:
        n, counted = tf.cast(size(x, 0, *range(2, x.shape.rank)), tf.int64), x
    else:
        n = tf.math.count_nonzero(mask)
        counted = tf.where(mask, x, tf.zeros([], x.dtype))
    k = total(counted, x.dtype) / tf.cast(tf.maximum(n, 1), x.dtype)
    rest = x - along_channels(k, x)
    if mask is not None:
        rest = tf.where(mask, rest, tf.zeros([], x.dtype))
    return n, k, total(rest, wide), total(rest * rest, wide)


def moments_of_sums(messages: list[tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """(count [], mean [C], variance [C]), float64, of the replicas that sent these messages."""
    message = messages[0] if len(messages) == 1 else tf.add_n(messages)
    channels = (message.shape[0] - 1) // 2
    count, sums, squares = tf.split(message, [1, channels, channels])
    return tf.reshape(count, []), *maths.moments_of_sums(count, sums, squares, maximum=tf.maximum)


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
    view = ChannelView(axes, x.shape.rank)
    flat = _flat(x, view)
    hi, lo = split(mean, flat.dtype)
    rstd = tf.math.rsqrt(variance + epsilon)
    a, b = maths.affine_coefficients(lo, rstd, tf.cast(scale, variance.dtype), tf.cast(offset, variance.dtype))
    return tf.cast(view.restore(affine(flat, hi, a, b), x), dtype)


def backward(
    dy: tf.Tensor,
    x: tf.Tensor,
    mask: tf.Tensor | None,
    moments: tuple[Any, ...],
    scale: tf.Tensor,
    exchange: Callable[[tf.Tensor], list[tf.Tensor]] | None,
    *,
    axes: tuple[int, ...],
    epsilon: float,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """(dx, dscale, doffset). exchange: takes [2C], Σscale·dy and Σscale·dy·x_hat, and returns those of all replicas."""
    count, mean, variance = moments
    view = ChannelView(axes, x.shape.rank)
    flat, flat_dy = _flat(x, view), _flat(dy, view)
    hi, lo = split(mean, flat.dtype)
    rstd, scale = tf.math.rsqrt(variance + epsilon), tf.cast(scale, variance.dtype)
    slope, parts = tf.cast(scale * rstd, flat.dtype), view.parts(x)
    scaled, sum_dy, sum_dy_x = affine_gradient(flat_dy, flat, hi, slope, variance.dtype, parts)
    dscale = maths.scale_gradient(lo, rstd, sum_dy, sum_dy_x)
    message = tf.concat([scale * sum_dy, scale * dscale], 0)
    messages = [message] if exchange is None else exchange(message)
    sums = tf.split(messages[0] if len(messages) == 1 else tf.add_n(messages), 2)
    a, b = maths.moment_path_coefficients(tf.cast(count, rstd.dtype), lo, rstd, *sums, maximum=tf.maximum)
    through = affine(flat, hi, a, b)
    if mask is not None:
        through = tf.where(view.of_mask(mask, x), through, tf.zeros([], through.dtype))
    dx = tf.cast(view.restore(scaled + through, x), x.dtype)
    return dx, tf.cast(dscale, flat.dtype), tf.cast(sum_dy, flat.dtype)


def split(mean: Any, dtype: tf.DType) -> tuple[tf.Tensor, tf.Tensor]:
    """The mean as (hi, lo): hi in the arithmetic's dtype, lo what it leaves."""
    if isinstance(mean, tuple):
        return mean
    hi = tf.cast(mean, dtype)
    return hi, mean - tf.cast(hi, mean.dtype)


def _flat(x: tf.Tensor, view: ChannelView) -> tf.Tensor:
    return view.of(tf.cast(x, tf.float64 if x.dtype == tf.float64 else tf.float32))


def total(v: tf.Tensor, wide: tf.DType) -> tf.Tensor:
    """Sums of the flat v over all but the channels, [C], at most `BLOCK_ROWS` rows at a time; their sum in the wide dtype."""
    if v.shape.rank == 3:
        v = tf.reduce_sum(v, 2)
    rows, channels = size(v, 0), v.shape[1]
    block = BLOCK_ROWS
    if isinstance(rows, int):
        if rows <= BLOCK_ROWS:
            return tf.cast(_sum_rows(v), wide)
        # A block that divides the rows needs no operators for a rest.
        block = next((b for b in range(BLOCK_ROWS, BLOCK_ROWS // 4, -1) if rows % b == 0), BLOCK_ROWS)
    blocks = rows // block
    head = tf.reduce_sum(tf.cast(_sum_rows(tf.reshape(v[: blocks * block], [blocks, block, channels])), wide), 0)
    if isinstance(rows, int) and rows == blocks * block:
        return head
    return head + tf.cast(_sum_rows(v[blocks * block :]), wide)


def _sum_rows(v: tf.Tensor) -> tf.Tensor:
    # On the CPU a product with ones is the fastest sum.
    return tf.squeeze(tf.matmul(tf.ones([1, size(v, -2)], v.dtype), v), -2)


def _fused(x: tf.Tensor) -> bool:
    return x.dtype == tf.float32 and x.shape.rank == 2


def _as_image(x: tf.Tensor) -> tf.Tensor:
    # The fused operators take [N, H, W, C].
    return tf.reshape(x, [size(x, 0), 1, 1, x.shape[1]])


def _as_rows(x: tf.Tensor) -> tf.Tensor:
    return tf.reshape(x, [size(x, 0), x.shape[3]])


# The fused operators multiply the scale by 1/√(variance + epsilon): with a half for each that is exactly 1.
_UNIT = {"epsilon": 0.5, "is_training": False}


def affine(x: tf.Tensor, hi: tf.Tensor, a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """a·(x − hi) + b for the flat x and vectors [C]."""
    a, b = tf.cast(a, x.dtype), tf.cast(b, x.dtype)
    if not _fused(x):
        hi, a, b = (along_channels(v, x) for v in (hi, a, b))
        return (x - hi) * a + b
    half = tf.constant(0.5, shape=[x.shape[1]])
    y = tf.raw_ops.FusedBatchNormV3(x=_as_image(x), scale=a, offset=b, mean=hi, variance=half, **_UNIT).y
    return _as_rows(y)


def affine_gradient(
    dy: tf.Tensor, x: tf.Tensor, hi: tf.Tensor, a: tf.Tensor, wide: tf.DType, parts: int
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """(a·dy, Σdy, Σdy·(x − hi)) for flat x and dy; the sums in the wide dtype, of so many parts."""
    if not _fused(x):
        hi, a = (along_channels(v, x) for v in (hi, a))
        return dy * a, total(dy, wide), total(dy * (x - hi), wide)
    channels = x.shape[1]
    if parts > 1:
        # Neighbouring rows side by side, which moves nothing in memory.
        dy, x = (tf.reshape(v, [size(x, 0) // parts, parts * channels]) for v in (dy, x))
        hi, a = tf.tile(hi, [parts]), tf.tile(a, [parts])
    half = tf.constant(0.5, shape=[parts * channels])
    moments = {"reserve_space_1": hi, "reserve_space_2": half, "reserve_space_3": half}
    scaled, sum_dy_x, sum_dy, _, _ = tf.raw_ops.FusedBatchNormGradV3(
        y_backprop=_as_image(dy), x=_as_image(x), scale=a, **moments, **_UNIT
    )
    sums = [tf.cast(v, wide) for v in (sum_dy, sum_dy_x)]
    if parts > 1:
        sums = [tf.reduce_sum(tf.reshape(v, [parts, channels]), 0) for v in sums]
    return tf.reshape(scaled, [size(scaled, 0) * parts, channels]), *sums
