"""The engine of the Keras backend in use."""

from __future__ import annotations

import importlib
from typing import Any

import keras


def engine() -> Any:
    """The engine of the Keras backend in use; raises for a backend without one."""
    backend = keras.backend.backend()
    if backend not in ("jax", "tensorflow", "torch"):
        raise NotImplementedError(
            "SyncBatchNormalization must run on a Keras backend that has an engine: jax, tensorflow, torch. Received: "
            f"{backend!r}. Set KERAS_BACKEND to one of them before Keras is imported."
        )
    return importlib.import_module(f"syncbn.{backend}.engine")
