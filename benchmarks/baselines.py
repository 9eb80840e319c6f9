"""What is measured: syncbn's layers, and the layers that they are compared with, the baselines.

All are adapters with one interface. `make(shape)` returns a layer for inputs of this shape, as users of its framework hold one: a
torch module, a Keras layer, or for JAX a function `(x, (scale, bias), (mean, variance)) -> (y, new (mean, variance))`.
`convert(model)` returns a torch model with this layer in place of its batch norms. Frameworks are imported where they are used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

OURS = "syncbn"
ONE_REPLICA = "syncbn, one replica"
LOCAL = "BatchNorm2d"
TORCH_SYNC = "torch SyncBatchNorm"
COMPILED, OURS_COMPILED = f"{LOCAL}, compiled", f"{OURS}, compiled"
ADD_RELU = "then add and ReLU"
KERAS_SYNC, KERAS_LOCAL, IN_COMPILED_STEP = "keras synchronized", "keras unsynchronised", "in compiled_step"

MOMENTUM, EPSILON = 0.9, 1e-5


class Adapter(NamedTuple):
    """One implementation."""

    make: Callable[[tuple[int, ...]], Any]
    convert: Callable[[Any], Any] | None = None


def torch_adapters(several: bool) -> dict[str, Adapter]:
    """Torch's local layer and ours; among `several` replicas also torch's synchronised one, and ours of one replica."""
    from torch import nn

    import syncbn

    # The order in which they take turns.
    found = {
        OURS: Adapter(lambda shape: syncbn.SyncBatchNorm(shape[1]), syncbn.convert),
        LOCAL: Adapter(
            lambda shape: nn.BatchNorm2d(shape[1]) if len(shape) == 4 else nn.BatchNorm1d(shape[1]), lambda model: model
        ),
    }
    if several:
        found[TORCH_SYNC] = Adapter(lambda shape: nn.SyncBatchNorm(shape[1]), nn.SyncBatchNorm.convert_sync_batchnorm)
        found[ONE_REPLICA] = Adapter(
            lambda shape: syncbn.SyncBatchNorm(shape[1], group_size=1), lambda model: syncbn.convert(model, group_size=1)
        )
    return found


def keras_adapters(**arguments: Any) -> dict[str, Adapter]:
    """Ours, Keras's synchronised layer, and its unsynchronised one, all with these arguments."""
    import keras

    import syncbn

    return {
        OURS: Adapter(lambda shape: syncbn.SyncBatchNormalization(**arguments)),
        KERAS_SYNC: Adapter(lambda shape: keras.layers.BatchNormalization(synchronized=True, **arguments)),
        KERAS_LOCAL: Adapter(lambda shape: keras.layers.BatchNormalization(**arguments)),
    }


def jax_adapters(axis_name: str | None) -> dict[str, Adapter]:
    """Ours and Flax's, synchronised over `axis_name`, and Flax's local layer. Without an axis nothing is synchronised."""
    if axis_name is None:
        return {OURS: Adapter(lambda shape: _ours(None)), "flax": Adapter(lambda shape: _flax(None))}
    return {
        OURS: Adapter(lambda shape: _ours(axis_name)),
        "flax axis_name": Adapter(lambda shape: _flax(axis_name)),
        "flax unsynchronised": Adapter(lambda shape: _flax(None)),
    }


def _ours(axis_name: str | None) -> Callable[..., Any]:
    from syncbn.functional import sync_batch_norm

    def layer(x: Any, parameters: tuple[Any, Any], statistics: tuple[Any, Any]) -> Any:
        y, mean, var, _ = sync_batch_norm(x, *parameters, epsilon=EPSILON, axis_name=axis_name)
        old_mean, old_var = statistics
        return y, (MOMENTUM * old_mean + (1 - MOMENTUM) * mean, MOMENTUM * old_var + (1 - MOMENTUM) * var)

    return layer


def _flax(axis_name: str | None) -> Callable[..., Any]:
    from flax import linen

    module = linen.BatchNorm(use_running_average=False, momentum=MOMENTUM, epsilon=EPSILON, axis_name=axis_name)

    def layer(x: Any, parameters: tuple[Any, Any], statistics: tuple[Any, Any]) -> Any:
        variables = {"params": dict(zip(("scale", "bias"), parameters, strict=True)),
                     "batch_stats": dict(zip(("mean", "var"), statistics, strict=True))}  # fmt: skip
        y, moved = module.apply(variables, x, mutable=["batch_stats"])
        return y, (moved["batch_stats"]["mean"], moved["batch_stats"]["var"])

    return layer
