"""How replicas talk and gradients flow: one module per framework, each with the same two verbs.

    moments(x, *, axes, mask=None, group=None) -> Moments
    normalize(x, moments, scale, offset, *, axes, epsilon, mask=None, group=None, activation=None, residual=None) -> y

`moments` measures the global batch: one value per channel, the same bits on every replica, without gradient, by one collective.
`normalize` is y = activation(scale·(x − mean)/√(variance + epsilon) + offset + residual). Its gradient for x includes the path
through the moments, by one collective; its gradients for scale and offset are this replica's own sums, which the trainer reduces
as it does every other gradient (where JAX types a parameter as replicated they are the totals, from the same message).

x         any rank ≥ 2, any float dtype; `axes` are its channel axes, sorted, C channels in all
mask      bool, of x's rank, 1 on the channel axes, each other axis full or 1; True marks what counts
scale     [C], of `arithmetic_dtype(x)`, and so is offset; both may differ between replicas
group     which replicas meet: see `syncbn.policy.Group`
y         x's shape and dtype

A layer may also ask `supports_jit()`: whether what is made now can be compiled as a whole; and `may_move`, `found_once`,
`realized` and `speak_as`, which are here for the engines that have nothing to add to them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Moments(NamedTuple):
    """What the global batch measures.

    count: how many values a channel has in the group (a scalar; [C] where JAX shards the channels), or None where the moments
        are constants: in inference nothing is sent in either pass.
    mean, variance: [C], biased, float64 where framework and device have it; elsewhere the mean is a pair (hi, lo) of
        float32. 0 and 1 where the count is 0.
    replicas: how many replicas met.
    average: with groups, where all groups' moments are at hand: (count, mean, variance) averaged over groups by count,
        from which moving statistics are kept.
    """

    count: Any
    mean: Any
    variance: Any
    replicas: int = 1
    average: tuple[Any, Any, Any] | None = None


def may_move(count: Any, renorm: bool) -> Any:
    """Whether moving statistics may move in this pass, a bool or a tensor: not where it is a recomputation."""
    return True


def found_once(find: Callable[[], Any]) -> Any:
    """find(), or what it found in the pass that is recomputed."""
    return find()


def realized(*vectors: Any) -> Any:
    """The same vectors, which no compiler works out anew in the backward pass: what they were made of may have moved."""
    return vectors


def speak_as(name: str) -> None:
    """Says whose messages come next."""
