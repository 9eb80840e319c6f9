"""How an input with its channels on any axes becomes [N, C, …] and back, without a copy where there is such a view."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor


class ChannelView:
    """The channels on dim 1: as it is where they are there, [rows, C] where they come last, [A, C, B] between.

    axes: the channel axes, sorted. Channels that lie apart are moved to the end, which copies.
    """

    def __init__(self, axes: tuple[int, ...], shape: Sequence[int]):
        self.axes, self.shape, self.rank = axes, shape, len(shape)
        self.is_needed = axes != (1,)
        self._apart = axes[-1] - axes[0] != len(axes) - 1

    def of(self, x: Tensor) -> Tensor:
        """x as the kernels take it."""
        if not self.is_needed:
            return x
        if self._apart:
            x = x.permute(self._order())
        return x.reshape(self._sizes(x.shape))

    def of_mask(self, mask: Tensor | None) -> Tensor | None:
        """A mask of x's rank, 1 on the channel axes, as [N, 1, …]."""
        if mask is None or not self.is_needed:
            return mask
        mask = mask.expand([1 if i in self.axes else n for i, n in enumerate(self.shape)])
        if self._apart:
            mask = mask.permute(self._order())
        return mask.reshape(self._sizes(mask.shape))

    def restore(self, y: Tensor) -> Tensor:
        """Back to the shape of x."""
        if not self.is_needed:
            return y
        if not self._apart:
            return y.reshape(list(self.shape))
        order = self._order()
        return y.reshape([self.shape[i] for i in order]).permute([order.index(i) for i in range(self.rank)])

    def _order(self) -> list[int]:
        return [i for i in range(self.rank) if i not in self.axes] + list(self.axes)

    def _sizes(self, shape: Sequence[Any]) -> list[int]:
        first = self.rank - len(self.axes) if self._apart else self.axes[0]
        last = first + len(self.axes)
        sizes = [math.prod(part) for part in (shape[:first], shape[first:last], shape[last:])]
        return sizes[:2] if last == self.rank else sizes
