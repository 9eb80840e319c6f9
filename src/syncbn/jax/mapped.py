"""The verbs `moments` and `normalize` for the replicas along named axes (`shard_map`, `pmap`, `vmap`), or for one replica.

JAX has float64 only where it is enabled, so a mean is a pair (hi, lo) of the arithmetic's dtype.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from syncbn import maths
from syncbn.contract import Moments
from syncbn.jax._private import equal_along, varying_axes
from syncbn.jax.axes import Replicas, is_local, vary
from syncbn.jax.sums import Terms, column_sums, deviations, products
from syncbn.jax.xla import materialised, rounded, summed

# The name of the moments for policies of `jax.checkpoint`. Where moments are saved, recomputation sends nothing.
MOMENTS = "syncbn_moments"
# A pivot k is the mean of one value in so many, which saves a pass over x. The mean of any m of n values has (k − mean)² ≤
# (n/m)·variance (Jensen), in whatever order they are: sums about it lose five bits at most. An array that devices share has no
# such pivot: some devices hold nothing of its beginning, and XLA would send it to them.
VALUES_PER_PIVOTS_VALUE = 16


def arithmetic_dtype(x: jax.Array) -> Any:
    """The dtype in which an input is normalised: float64 for float64, else float32."""
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


class Layout(NamedTuple):
    """Where the channels of an input are. Hashable."""

    axes: tuple[int, ...]
    shape: tuple[int, ...]

    def sum(self, v: jax.Array) -> jax.Array:
        """The sum over all axes but the channels: [C]. XLA sums by a tree, so no blocks are needed."""
        return jnp.sum(v, self.summed()).reshape(-1)

    def sums(self, terms: Terms, *arrays: jax.Array, about: jax.Array, local: bool) -> Any:
        """The sums of each of `terms`: [C] each. local: one device holds all of the arrays."""
        last = self.axes == tuple(range(self.axes[0], len(self.shape)))
        if local and last and about.size:
            names = frozenset[str]().union(*map(varying_axes, arrays))
            return column_sums(*[v.reshape(-1, about.size) for v in arrays], vary(about, names), terms=terms)
        return summed(*[self.sum(v) for v in terms(*arrays, self.spread(about))])

    def summed(self) -> list[int]:
        """The axes that are not channel axes."""
        return [i for i in range(len(self.shape)) if i not in self.axes]

    def some(self) -> tuple[slice, ...]:
        """The values of each channel whose mean is the pivot: the beginning of the longest axis."""
        if not self.summed():
            return ()
        # A symbolic size cannot be compared.
        longest = max(self.summed(), key=lambda i: self.shape[i] if isinstance(self.shape[i], int) else 0)
        return *[slice(None)] * longest, slice(-(-self.shape[longest] // VALUES_PER_PIVOTS_VALUE))

    def spread(self, v: jax.Array) -> jax.Array:
        """[C] with 1 in every other axis."""
        return v.reshape([n if i in self.axes else 1 for i, n in enumerate(self.shape)])

    def values(self) -> jax.Array:
        """How many values a channel has. A size may be symbolic while Keras infers shapes, or in an export."""
        return jnp.asarray(math.prod(n for i, n in enumerate(self.shape) if i not in self.axes))


def moments(x: jax.Array, axes: tuple[int, ...], mask: jax.Array | None, replicas: Replicas) -> Moments:
    """Measures the batch of all replicas by one gather of (n, k, r, m2); above 64 replicas by two sums."""
    sampled = mask is None and is_local(x)
    x = materialised(lax.stop_gradient(vary(x, frozenset(replicas.names) if replicas.checked else frozenset())))
    n, k, r, m2 = _local_moments(x, Layout(axes, x.shape), mask, sampled)
    if replicas.gathered:
        counts, *rest = _merge_gathered(replicas, n, k, r, m2, mask is None)
    else:
        counts, *rest = _merge_by_two_sums(replicas, n, k, r, m2)
    # A message has one type. So where a mesh axis cuts the channels, counts would be typed as varying along it.
    counts = equal_along(counts, varying_axes(counts) - varying_axes(n))
    # One by one: JAX before 0.7 names no tuple.
    measured = tuple(checkpoint_name(v, MOMENTS) for v in (counts, *rest))
    average = None if replicas.table is None else _average(*measured)
    count, hi, lo, variance = (v[replicas.own_group()] for v in measured)
    return Moments(count[0], (hi, lo), variance, replicas.size, average)


def _local_moments(x: jax.Array, layout: Layout, mask: jax.Array | None, sampled: bool) -> tuple[jax.Array, ...]:
    """(n, k, r, m2) of this replica: an integer count, and three [C] of the arithmetic's dtype.

    k + r is the mean, and k is the mean rounded. sampled: the sums are about the mean of some values only.
    """
    wide = arithmetic_dtype(x)
    if mask is None:
        n = layout.values()
    else:
        n = jnp.sum(jnp.broadcast_to(mask, [1 if i in layout.axes else size for i, size in enumerate(x.shape)]), dtype=int)
    at_least_one = jnp.maximum(n, 1).astype(wide)
    k = _pivot(x.astype(wide), layout) if sampled else rounded(layout.sum(_where(mask, x.astype(wide))) / at_least_one)
    # What deviates by 0 counts for nothing.
    counted = x if mask is None else jnp.where(mask, x.astype(wide), layout.spread(k))
    s, q = layout.sums(deviations, counted, about=k, local=sampled)
    # The pivot of the sums may be far from the means of all replicas, so the message is about this replica's mean.
    k, r = maths.two_sum(k, s / at_least_one)
    return n, k, r, maths.local_m2(n.astype(wide), s, q, maximum=jnp.maximum)


def _pivot(x: jax.Array, layout: Layout) -> jax.Array:
    part = x[layout.some()]
    of_part = Layout(layout.axes, part.shape)
    return rounded(of_part.sum(part) / jnp.maximum(of_part.values(), 1).astype(x.dtype))


def _merge_gathered(
    replicas: Replicas, n: jax.Array, k: jax.Array, r: jax.Array, m2: jax.Array, as_many: bool
) -> tuple[jax.Array, ...]:
    """(count, hi, lo, variance), a row per group, from every replica's own. as_many: all replicas have this count."""
    # Counts above 2²⁴ are not exact in float32. An integer's bits in a float message may be a denormal, which adding flushes
    # to 0. So the floats are sent as the bits of integers.
    bits = jnp.int64 if k.dtype == jnp.float64 else jnp.int32
    floats = lax.bitcast_convert_type(jnp.concatenate([k, r, m2]), bits)
    rows, members = replicas.by_group(replicas.gather(jnp.concatenate([n.astype(bits)[None], floats])))
    counts = jnp.full_like(rows[..., :1], n) if as_many else rows[..., :1]  # a constant, which XLA can make use of
    counts = counts if members is True else jnp.where(members[..., None], counts, 0)
    ks, rs, m2s = jnp.split(lax.bitcast_convert_type(rows[..., 1:], k.dtype), 3, axis=-1)
    # The k of a replica with the largest count: the mean of a few values may be √(N/n) standard deviations away from the mean.
    pivot = ks[:, :1] if as_many else jnp.take_along_axis(ks, jnp.argmax(counts, 1, keepdims=True), 1)
    _, (hi, lo), variance = maths.merge(
        counts.astype(k.dtype), ks, rs, m2s, pivot, add=lambda v: v.sum(1, keepdims=True), maximum=jnp.maximum, where=jnp.where
    )
    return counts.sum(1), hi[:, 0], lo[:, 0], variance[:, 0]


def _merge_by_two_sums(replicas: Replicas, n: jax.Array, k: jax.Array, r: jax.Array, m2: jax.Array) -> tuple[jax.Array, ...]:
    """The same by two sums whose length does not depend on the number of replicas: of the mean, then of squares about it."""
    unit, count = 4096, n.astype(k.dtype)
    parts = jnp.stack([n // unit, n % unit]).astype(k.dtype)  # each part's sum is exact
    own = replicas.own_group()
    first = replicas.sum_by_group(jnp.concatenate([parts, count * (k + r)]), own)
    counts = first[:, :1].astype(n.dtype) * unit + first[:, 1:2].astype(n.dtype)
    totals = jnp.maximum(counts, 1).astype(k.dtype)
    m = rounded(first[:, 2:] / totals)
    rest = (k - m[own]) + r
    second = replicas.sum_by_group(jnp.concatenate([count * rest, m2 + count * rest * rest]), own)
    lo, around = jnp.split(second / totals, 2, axis=1)
    variance = maths.variance_or_one(counts.astype(k.dtype), around - lo * lo, maximum=jnp.maximum)
    return counts, *maths.two_sum(m, lo), variance


def _average(counts: jax.Array, hi: jax.Array, lo: jax.Array, variances: jax.Array) -> tuple[Any, Any, Any]:
    """(count, mean, variance) averaged over groups by count; a group with count 0 is left out."""
    total = counts.sum()
    weights = counts.astype(hi.dtype) / jnp.maximum(total, 1).astype(hi.dtype)
    mean = jnp.where(counts > 0, weights * (hi + lo), 0.0).sum(0)
    return total, mean, jnp.where(counts > 0, weights * variances, 0.0).sum(0)


class Plan(NamedTuple):
    """The static part of one normalization."""

    layout: Layout
    epsilon: float
    replicas: Replicas
    dtype: Any  # of the output, and so of its gradient
    local: bool  # whether one device holds all of x
    scale_is_total: bool  # whether the gradient of a replicated scale is the total over replicas
    offset_is_total: bool


class Measured(NamedTuple):
    """Moments in the form that the gradients need: n a float, the mean in two parts."""

    n: jax.Array  # a scalar, or [C] as the others are
    hi: jax.Array
    lo: jax.Array
    variance: jax.Array


def normalize(
    x: jax.Array,
    moments: Moments,
    scale: jax.Array,
    offset: jax.Array,
    axes: tuple[int, ...],
    epsilon: float,
    mask: jax.Array | None,
    replicas: Replicas,
    dtype: Any,
) -> jax.Array:
    """scale·(x − mean)/√(variance + epsilon) + offset, rounded to `dtype`. The backward pass takes one sum over replicas."""
    wide, layout = arithmetic_dtype(x), Layout(axes, x.shape)
    lo = 0.0 if moments.mean_lo is None else moments.mean_lo
    hi, lo, variance = (jnp.asarray(v, wide) for v in (moments.mean_hi, lo, moments.variance))
    scale, offset = jnp.asarray(scale, wide), jnp.asarray(offset, wide)
    if moments.count is None:
        plan = Plan(layout, epsilon, replicas, dtype, True, False, False)
        return _affine(plan, x, Measured(jnp.zeros([], wide), hi, lo, variance), scale, offset)
    names = frozenset(replicas.names) if replicas.checked else frozenset()
    everything = names.union(*(varying_axes(v) for v in (x, scale, offset)))
    # Before the custom gradient: along other axes than `names`, JAX sums the gradient of a replicated value, as a trainer would.
    x, scale, offset = vary(x, everything), _parameter(scale, everything, names), _parameter(offset, everything, names)
    measured = Measured(moments.count.astype(wide), hi, lo, variance)
    measured = Measured(*(vary(v, everything - names) for v in measured))
    replicated = [replicas.checked and not varying_axes(v) & names for v in (scale, offset)]
    plan = Plan(layout, epsilon, replicas, dtype, is_local(x), *replicated)
    return _normalized(plan, x, mask, replicas.place(), measured, scale, offset)


def _parameter(v: jax.Array, everything: frozenset[str], names: frozenset[str]) -> jax.Array:
    """v, typed as x is. Along `names` a parameter varies along all axes or along none."""
    return vary(v, everything if varying_axes(v) & names else everything - names)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalized(
    plan: Plan, x: jax.Array, mask: jax.Array | None, place: Any, measured: Measured, scale: jax.Array, offset: jax.Array
) -> jax.Array:
    return _forward(plan, x, mask, place, measured, scale, offset)[0]


def _forward(
    plan: Plan, x: jax.Array, mask: jax.Array | None, place: Any, measured: Measured, scale: jax.Array, offset: jax.Array
) -> tuple[jax.Array, Any]:
    x = materialised(x)
    y = _affine(plan, x, _attach(plan, x, mask, place, measured), scale, offset)
    return y, (x, mask, place, measured, scale)


def _backward(plan: Plan, saved: Any, dy: jax.Array) -> tuple[Any, ...]:
    """The gradients, made of differentiable operators. The moments, which came in as constants, are attached to x again."""
    x, mask, place, measured, scale = saved
    # A vjp may be given an array of NumPy, which adds up in float32. Its dtype stays: a wider one takes longer to read.
    dy = materialised(jnp.asarray(dy))
    layout, replicas = plan.layout, plan.replicas
    n, hi, lo, variance = _attach(plan, x, mask, place, measured)
    rstd = lax.rsqrt(variance + plan.epsilon)
    sum_dy, sum_dy_x = layout.sums(products, dy, x, about=hi, local=plan.local)
    dscale = maths.scale_gradient(lo, rstd, sum_dy, sum_dy_x)
    if plan.scale_is_total:
        own, total = replicas.sums(jnp.concatenate([sum_dy, dscale]), place)
        (sum_g, sum_g_x_hat), (all_dy, all_dscale) = jnp.split(jnp.tile(scale, 2) * own, 2), jnp.split(total, 2)
    else:
        message = [scale * sum_dy, scale * dscale] + [sum_dy] * plan.offset_is_total
        own, total = replicas.sums(jnp.concatenate(message), place)
        sum_g, sum_g_x_hat = jnp.split(own, len(message))[:2]
        all_dy, all_dscale = jnp.split(total, len(message))[-1], dscale
    a, b = maths.moment_path_coefficients(n, lo, rstd, sum_g, sum_g_x_hat, maximum=jnp.maximum)
    rest = x.astype(scale.dtype) - layout.spread(hi)
    through = _where(mask, layout.spread(a) * rest + layout.spread(b))
    dx = (layout.spread(scale * rstd) * dy.astype(scale.dtype) + through).astype(x.dtype)
    return (
        dx,
        None,
        None,
        None,
        all_dscale if plan.scale_is_total else dscale,
        all_dy if plan.offset_is_total else sum_dy,
    )


_normalized.defvjp(_forward, _backward)


def _affine(plan: Plan, x: jax.Array, measured: Measured, scale: jax.Array, offset: jax.Array) -> jax.Array:
    rstd = lax.rsqrt(measured.variance + plan.epsilon)
    a, b = (plan.layout.spread(v) for v in maths.affine_coefficients(measured.lo, rstd, scale, offset))
    return ((x.astype(scale.dtype) - plan.layout.spread(measured.hi)) * a + b).astype(plan.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attach(plan: Plan, x: jax.Array, mask: jax.Array | None, place: Any, measured: Measured) -> Measured:
    """The moments unchanged, with their true derivative for x, itself differentiable. Only the derivative sends a message."""
    return measured


@_attach.defjvp
def _attach_jvp(plan: Plan, primals: Any, tangents: Any) -> tuple[Measured, Measured]:
    x, mask, place, measured = primals
    layout = plan.layout
    attached = _attach(plan, x, mask, place, measured)
    dx = _where(mask, tangents[0].astype(measured.lo.dtype))
    rest = (x.astype(dx.dtype) - layout.spread(measured.hi)) - layout.spread(attached.lo)
    own, _ = plan.replicas.sums(jnp.concatenate([layout.sum(dx), 2 * layout.sum(rest * dx)]), place)
    dmean, dvariance = (v / jnp.maximum(measured.n, 1) for v in jnp.split(own, 2))
    found = Measured(jnp.zeros_like(measured.n), jnp.zeros_like(measured.hi), dmean, dvariance)
    # JAX before 0.7 wants the very type of each moment, which varies more in a second derivative.
    return attached, Measured(*(vary(t, varying_axes(v)) for t, v in zip(found, attached, strict=True)))


def _where(mask: jax.Array | None, v: jax.Array) -> jax.Array:
    return v if mask is None else jnp.where(mask, v, jnp.zeros([], v.dtype))
