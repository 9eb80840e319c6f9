"""The contract of the engines, one per framework: what replicas send each other, and how gradients flow.

    moments(x, *, axes, mask=None, group=None, layer=None) -> Moments
    normalize(x, moments, scale, offset, *, axes, epsilon, mask=None, group=None, activation=None, residual=None, layer=None) -> y
    train_step(x, weight, bias, statistics, *, axes, epsilon, mask=None, group=None, activation=None, residual=None, layer=None)
        -> (y, new statistics)

`moments` measures the global batch: one value per channel, the same bits on every replica, without gradient, by one collective.
`normalize` is y = activation(scale·(x − mean)/√(variance + epsilon) + offset + residual). Its gradient for x includes the path
through the moments, by one collective; its gradients for scale and offset are this replica's own sums, which the trainer reduces
as it does every other gradient (where JAX types a parameter as replicated they are the totals, from the same message).
`train_step` is a training step that asks for nothing between the two. `default_train_step` makes it from the other verbs; an
engine writes its own where that takes fewer launches.

x         any rank ≥ 2, any float dtype; `axes` are its channel axes, sorted, C channels in all
mask      bool, of x's rank, 1 on the channel axes, each other axis full or 1; True marks what counts
scale     [C], of `arithmetic_dtype(x)`, and so is offset; both may differ between replicas
weight    as scale, and bias as offset; torch's also may be None (1 and 0) or of another float dtype
group     which replicas communicate: see `groups.Group`
layer     the layer's name or None, for errors that name it; an engine may have none
y         x's shape and dtype

A layer may also ask `supports_jit()`: whether what is made now can be compiled as a whole; and `should_update_statistics`,
`record_or_replay`, `materialize` and `ensure_channels`, which are here for the engines that have nothing to add to them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from syncbn import maths


class Moments(NamedTuple):
    """What the global batch measures.

    count: how many values a channel has in the group (a scalar; [C] where JAX shards the channels), or None where the moments
        are constants: in inference nothing is sent in either pass.
    mean, variance: [C], biased, float64 where framework and device have it; elsewhere the mean is a pair (hi, lo) of
        float32, which `mean_hi` and `mean_lo` take apart. 0 and 1 where the count is 0.
    replicas: how many replicas the batch comes from.
    average: with groups, where all groups' moments are at hand: (count, mean, variance) averaged over groups by count,
        with which the moving statistics are updated.

    An engine may return a class of its own that has these names and more, for example the resolved group.
    """

    count: Any
    mean: Any
    variance: Any
    replicas: int = 1
    average: tuple[Any, Any, Any] | None = None

    @property
    def mean_hi(self) -> Any:
        """The mean as one array: where there is no float64, the mean rounded to float32."""
        return self.mean[0] if isinstance(self.mean, tuple) else self.mean

    @property
    def mean_lo(self) -> Any:
        """What the rounding took from the mean; None where there is float64."""
        return self.mean[1] if isinstance(self.mean, tuple) else None


class Statistics(NamedTuple):
    """Moving statistics, and how one training step updates them.

    mean, variance: [C], float.
    weight: of the new value, in [0, 1]: moving = moving·(1 − weight) + batch·weight. None for 1/batches, a cumulative average.
    unbiased: whether the batch's variance is multiplied by n/(n − 1) first.
    batches: an integer scalar that counts the updates, or None. Without it a weight of None is 0.
    assigned: of a result: the variables hold the new values already, because a launch wrote them or nothing was to change. Then
        the other fields may be None (`ASSIGNED`).
    """

    mean: Any
    variance: Any
    weight: float | None
    unbiased: bool = False
    batches: Any = None
    assigned: bool = False


ASSIGNED = Statistics(None, None, None, assigned=True)


class Operators(NamedTuple):
    """What shared arithmetic needs of a framework: operators as `jax.numpy` has them, and cast(array, dtype)."""

    where: Callable[..., Any]
    maximum: Callable[..., Any]
    isfinite: Callable[..., Any]
    all: Callable[..., Any]
    cast: Callable[..., Any]


def _of_batch(moments: Any) -> tuple[Any, Any, Any]:
    """(count, mean, variance) for the moving statistics. By its fields: torch 2.6 compiles no property of a named tuple."""
    mean = moments.mean[0] if isinstance(moments.mean, tuple) else moments.mean
    return moments.average or (moments.count, mean, moments.variance)


def are_usable(moments: Any, may_update: Any, operators: Operators) -> Any:
    """Whether a step with these moments updates the moving statistics: False, or a bool array.

    Not at count 0, nor, on several replicas, if the moments are not finite. may_update: of `should_update_statistics`.
    """
    if may_update is False:
        return False
    count, mean, variance = _of_batch(moments)
    usable = count > 0
    if moments.replicas > 1:
        # Every replica sees the same statistics, so all skip the same steps. One replica does as its framework does.
        finite = operators.isfinite(mean + variance)
        # A count a channel says that JAX shards the channels: asking all of them would cost a message.
        usable = usable & (finite if len(count.shape) else operators.all(finite))
    return usable if may_update is True else usable & may_update


def updated(statistics: Statistics, moments: Any, usable: Any, operators: Operators) -> Statistics:
    """The statistics after a step with these moments. usable: of `are_usable`."""
    if usable is False:
        return ASSIGNED
    count, mean, variance = _of_batch(moments)
    wide, weight, batches = variance.dtype, statistics.weight, statistics.batches
    if batches is not None:
        batches = batches + operators.cast(usable, batches.dtype)
    if weight is None:
        weight = 0.0 if batches is None else 1 / operators.cast(operators.maximum(batches, 1), wide)
    if statistics.unbiased:
        variance = variance * (operators.cast(count, wide) / operators.cast(operators.maximum(count - 1, 1), wide))

    def moved(old: Any, batch: Any) -> Any:
        new = maths.moving_average(operators.cast(old, wide), batch, 1 - weight)
        return operators.where(usable, operators.cast(new, old.dtype), old)

    # Not by `_replace`, which torch 2.6 does not compile.
    mean, variance = moved(statistics.mean, mean), moved(statistics.variance, variance)
    return Statistics(mean, variance, statistics.weight, statistics.unbiased, batches)


def default_train_step(
    moments: Callable[..., Any], normalize: Callable[..., Any], may_update: Callable[..., Any], operators: Operators
) -> Callable[..., tuple[Any, Statistics | None]]:
    """The verb `train_step` of an engine, made from its other verbs. may_update: its `should_update_statistics`."""

    def train_step(
        x: Any,
        weight: Any,
        bias: Any,
        statistics: Statistics | None,
        *,
        axes: tuple[int, ...],
        epsilon: float,
        mask: Any = None,
        group: Any = None,
        activation: Any = None,
        residual: Any = None,
        layer: str | None = None,
    ) -> tuple[Any, Statistics | None]:
        """(y, the statistics after this step)."""
        where = {"axes": axes, "mask": mask, "group": group, "layer": layer}
        measured = moments(x, **where)
        if statistics is not None:
            # Asked about a tensor that lies in memory: compiled code would write the count there first.
            lies_in_memory = statistics.mean if statistics.batches is None else statistics.batches
            usable = are_usable(measured, may_update(lies_in_memory, False), operators)
            statistics = updated(statistics, measured, usable, operators)
        given = {"epsilon": epsilon, "activation": activation, "residual": residual}
        return normalize(x, measured, weight, bias, **given, **where), statistics

    return train_step


def should_update_statistics(like: Any, renorm: bool) -> Any:
    """Whether moving statistics may be updated in this pass, a bool or a tensor: not where it is a recomputation."""
    return True


def record_or_replay(find: Callable[[], Any]) -> Any:
    """find(), or what it found in the pass that is recomputed."""
    return find()


def materialize(*vectors: Any) -> Any:
    """The same vectors, which no compiler works out anew in the backward pass: what they were made of may have changed."""
    return vectors


def ensure_channels(x: Any, shape: Sequence[int | None], axes: tuple[int, ...]) -> Any:
    """x with the rank and the channels of this shape known: frameworks whose graphs leave sizes unknown compare them later."""
    return x


def check_variables(name: str, *variables: Any) -> None:
    """Raises where the variables of the layer of this name cannot hold what training replicas assign to them."""
