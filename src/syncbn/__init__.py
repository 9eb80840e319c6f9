"""Batch normalization whose statistics come from all replicas that train a model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from syncbn import _moved

if TYPE_CHECKING:
    from syncbn.conversion import convert, fold, revert
    from syncbn.keras import SyncBatchNormalization, load_legacy, load_weights
    from syncbn.tensorflow.compiled_step import compiled_step
    from syncbn.torch import EmptySteps, SyncBatchNorm, checkpoint_contexts, debug, local_statistics

__version__ = "0.1.0"

_moved.install()

# Where each public name lives: its module, and with it a framework, is imported when the name is first asked for.
_HOMES = {
    "EmptySteps": "syncbn.torch",
    "SyncBatchNorm": "syncbn.torch",
    "SyncBatchNormalization": "syncbn.keras",
    "checkpoint_contexts": "syncbn.torch",
    "compiled_step": "syncbn.tensorflow.compiled_step",
    "convert": "syncbn.conversion",
    "debug": "syncbn.torch",
    "fold": "syncbn.conversion",
    "load_legacy": "syncbn.keras",
    "load_weights": "syncbn.keras",
    "local_statistics": "syncbn.torch",
    "revert": "syncbn.conversion",
}
# Public modules, which are attributes too. Not in `__all__`: a star import would hide the user's `torch`.
_MODULES = {"functional", "keras", "torch"}

__all__ = [
    "EmptySteps",
    "SyncBatchNorm",
    "SyncBatchNormalization",
    "__version__",
    "checkpoint_contexts",
    "compiled_step",
    "convert",
    "debug",
    "fold",
    "load_legacy",
    "load_weights",
    "local_statistics",
    "revert",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"syncbn.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
