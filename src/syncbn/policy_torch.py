"""What several files of the torch part check, and the activations that it applies itself."""

from __future__ import annotations

from typing import Any

from syncbn.policy import Activation

ACTIVATIONS = {
    "relu": Activation("relu"),
    "silu": Activation("silu"),
    "leaky_relu": Activation("leaky_relu", 0.01),
}


def check_activation(value: Any) -> Activation | None:
    """What the engine applies itself; None for a callable, which runs after it. Raises for another name."""
    if value is None or callable(value):
        return None
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise ValueError(
            f"`activation` must be None, a callable or one of {sorted(ACTIVATIONS)}. Received: activation={value!r}. Give "
            "another activation as a callable, for example torch.nn.GELU()."
        )
    return ACTIVATIONS[value]


def check_one_group(process_group: Any, group_size: int | None) -> None:
    """Raises where two arguments say which replicas communicate."""
    if process_group is not None and group_size is not None:
        raise ValueError(
            f"Only one of `process_group` and `group_size` may be given: each says which replicas communicate. Received: both, "
            f"with group_size={group_size}. Drop one of them."
        )


# What convert.py and fold.py still call these.
activation, one_way_to_group = check_activation, check_one_group
