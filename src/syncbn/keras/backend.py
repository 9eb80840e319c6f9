"""The engine of the Keras backend in use."""

from __future__ import annotations

import importlib
from typing import Any

import keras

from syncbn import policy


def engine() -> Any:
    """The engine of the Keras backend in use; raises for a backend without one."""
    backend = keras.backend.backend()
    if backend not in ("jax", "tensorflow", "torch"):
        raise policy.unknown_backend(backend)
    return importlib.import_module(f"syncbn.{backend}.engine")
