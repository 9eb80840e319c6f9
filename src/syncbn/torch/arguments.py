"""What the torch module's arguments must be: checks that the module and its conversion share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from numbers import Real
from typing import Any, ParamSpec

import torch
from torch import Tensor

from syncbn.groups import Activation
from syncbn.validation import check_mask_dtype, mask_omits_channels

# Those that the engine applies itself, with torch's slope.
ACTIVATIONS = {
    "relu": Activation("relu"),
    "silu": Activation("silu"),
    "leaky_relu": Activation("leaky_relu", 0.01),
}

Parameters = ParamSpec("Parameters")


def refuse_epsilon(constructor: Callable[Parameters, None]) -> Callable[Parameters, None]:
    """The constructor, which names torch's `eps` where it was given Keras's `epsilon`."""

    @functools.wraps(constructor)
    def checked(*given: Parameters.args, **named: Parameters.kwargs) -> None:
        if "epsilon" in named:
            raise TypeError(
                f"The torch module's argument is `eps`, as in torch.nn.BatchNorm2d. Received: epsilon={named['epsilon']!r}. "
                "Rename it."
            )
        constructor(*given, **named)

    return checked


def check_input(x: Tensor, channels: int, needs_variance: bool) -> None:
    """Raises where an input is not [N, channels, …]; or, `needs_variance`, has one value a channel, which has no variance."""
    # Where torch's own layer has words for it, in those, which programs may look for.
    shape = x.shape
    if len(shape) < 2:
        raise ValueError(f"expected at least 2D input (got {len(shape)}D input)")
    if shape[1] == 0:
        raise ValueError("SyncBatchNorm number of input channels should be non-zero")
    if shape[1] != channels:
        mend = f"Make a layer with num_features={shape[1]}."
        if len(shape) > 2 and shape[-1] == channels:
            mend = "The channels come second: move them there, for example with x.movedim(-1, 1)."
        raise ValueError(
            f"The input must have the layer's number of channels on dim 1. Received: shape {tuple(shape)} for num_features="
            f"{channels}. {mend}"
        )
    if needs_variance and x.numel() == channels:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {list(shape)}")


def check_mask(mask: Tensor, shape: torch.Size) -> Tensor:
    """The mask as bool, of the input's rank, for an input of this shape with the channels on dim 1."""
    check_mask_dtype(str(mask.dtype))
    if mask_omits_channels(mask.shape, shape, (1,)):
        mask = mask.unsqueeze(1)
    return mask.to(torch.bool)


def check_activation(value: Any) -> Activation | None:
    """What the engine applies itself; None for a callable, which runs after it. Raises for another name."""
    if isinstance(value, type):
        raise ValueError(
            f"`activation` must be an instance of a module, not its class. Received: activation={value.__name__}. Give "
            f"{value.__name__}()."
        )
    if value is None or callable(value):
        return None
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise ValueError(
            f"`activation` must be None, a callable or one of {sorted(ACTIVATIONS)}. Received: activation={value!r}. Give "
            "another activation as a callable, for example torch.nn.GELU()."
        )
    return ACTIVATIONS[value]


def is_weight(value: Any) -> bool:
    """Whether a value can be the weight of the new value in a running average."""
    return isinstance(value, Real) and 0 <= float(value) <= 1


def check_weight(name: str, value: Any) -> Any:
    """A momentum in torch's convention."""
    if not is_weight(value):
        raise ValueError(
            f"`{name}` must lie in [0, 1]: it is the weight of the new value. Received: {name}={value!r}. Give for example 0.01."
        )
    return value
