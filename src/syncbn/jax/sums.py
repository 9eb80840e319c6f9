"""The sums that a pass takes over the positions of each channel.

Channels-last arrays are summed by column. On GPUs XLA does that well only in two stages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from syncbn import xla_sums
from syncbn.jax import _private
from syncbn.jax.xla import summed

# Takes arrays and a value for each channel, about which it works; returns what is summed.
Terms = Callable[..., tuple[jax.Array, ...]]


def deviations(x: jax.Array, about: jax.Array) -> tuple[jax.Array, ...]:
    """x − about and its square, in the dtype of `about`."""
    rest = x.astype(about.dtype) - about
    return rest, rest * rest


def products(dy: jax.Array, x: jax.Array, about: jax.Array) -> tuple[jax.Array, ...]:
    """dy and dy·(x − about), in the dtype of `about`."""
    dy = dy.astype(about.dtype)
    return dy, dy * (x.astype(about.dtype) - about)


def plain_sums(*operands: jax.Array, terms: Terms) -> Any:
    """The sums over axis 0 of what `terms` makes of arrays [rows, C] and, last, a vector [C]."""
    return list(summed(*[v.sum(0) for v in terms(*operands)]))


def sums_in_stages(*operands: jax.Array, terms: Terms) -> Any:
    """The same in two stages, the form for GPUs."""
    rows, channels = operands[0].shape
    if not isinstance(rows, int):  # symbolic, in an export
        return plain_sums(*operands, terms=terms)
    parts = xla_sums.parts_of_rows(rows, channels, half=operands[0].dtype.itemsize == 2)
    first = summed(*[v.reshape(parts, rows // parts, channels).sum(1) for v in terms(*operands)])
    return list(summed(*[v.sum(0) for v in first]))


column_sums = _private.operator_for_cuda("syncbn_column_sums", plain_sums, sums_in_stages, results=2)
