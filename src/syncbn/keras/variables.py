"""What the Keras layer's variables start from, what is not one of them, and the shapes that files have for them."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np


class Untracked:
    """Holds a value that Keras must not search for weights: a clipping bound that is a variable is not the layer's."""

    def __init__(self, value: Any):
        self.value = value


def again(initializer: Any) -> Any:
    """The same initializer for another weight: a seeded one must not be called twice."""
    return initializer.clone() if isinstance(initializer, keras.initializers.Initializer) else initializer


def in_shape_of(own: Any, stored: Any) -> Any:
    """A stored value in the shape [C] of the layer's own, where the file has it with 1 in other dimensions."""
    if own is None or len(own.shape) != 1 or sorted(stored.shape) != sorted((*own.shape, *[1] * (len(stored.shape) - 1))):
        return stored
    return np.reshape(stored, own.shape)
