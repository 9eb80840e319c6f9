"""What the argument `adjustment` of the Keras layer returns, and how it is applied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from keras import ops

from syncbn.keras import arguments


class Adjustment(NamedTuple):
    """The (scale, bias) of one step, in y = (x_hat·scale + bias)·gamma + beta.

    scale, bias: [C] where both are constant outside the channel axes: then the engine applies them. Otherwise of the input's
        rank: then plain operators apply them to what the engine returns.
    """

    scale: Any
    bias: Any
    per_channel: bool

    @classmethod
    def of(cls, function: Callable[..., Any], inputs: Any, axes: tuple[int, ...], dtype: Any) -> Adjustment:
        """Calls the function, checks what it returns and casts it. axes: the channel axes of the inputs."""
        named = zip(("scale", "bias"), function(tuple(ops.shape(inputs))), strict=True)
        values = [_aligned(name, ops.convert_to_tensor(value), inputs.shape, axes) for name, value in named]
        scale, bias = (ops.cast(value, dtype) for value in values)
        if any(n != 1 for v in values for i, n in enumerate(v.shape) if i not in axes):
            return cls(scale, bias, False)
        channels = [n if i in axes else 1 for i, n in enumerate(inputs.shape)]
        scale, bias = (ops.reshape(ops.broadcast_to(v, channels), [-1]) for v in (scale, bias))
        return cls(scale, bias, True)

    def scale_and_offset(self, gamma: Any, beta: Any) -> tuple[Any, Any]:
        """What the engine takes in place of gamma and beta, [C]."""
        # Plain operators add beta, because they multiply what the engine returns. gamma's gradient stays the engine's.
        return (self.scale * gamma, self.bias * gamma + beta) if self.per_channel else (gamma, ops.zeros_like(beta))

    def applied(self, normalized: Any, gamma: Any, beta: Any, axes: tuple[int, ...]) -> Any:
        """(x_hat·scale + bias)·gamma + beta by plain operators. normalized: x_hat·gamma. gamma, beta: [C]."""
        along = [n if i in axes else 1 for i, n in enumerate(normalized.shape)]
        y = normalized * self.scale + (self.bias * ops.reshape(gamma, along) + ops.reshape(beta, along))
        # Raises where a size that a graph did not know was more than the input's.
        return ops.reshape(y, ops.shape(normalized))


def _aligned(name: str, value: Any, shape: Any, axes: tuple[int, ...]) -> Any:
    """The value with the input's rank. [C] lies along the channels, wherever they are; other shapes end where the input's do."""
    rank = len(shape)
    per_channel = len(axes) == 1 and tuple(value.shape) == (shape[axes[0]],)
    missing = [i for i in range(rank) if i not in axes] if per_channel else list(range(rank - len(value.shape)))
    arguments.check_adjustment_shape(name, value.shape, shape, per_channel)
    return ops.expand_dims(value, missing) if missing else value
