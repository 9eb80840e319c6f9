"""Batch normalization whose statistics come from all replicas that train a model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from syncbn.conversion import convert, fold, revert
    from syncbn.conversion.legacy import load_legacy
    from syncbn.conversion.weights import load_weights
    from syncbn.engines.torch_context import checkpoint_contexts, local_statistics
    from syncbn.engines.torch_debug import debug
    from syncbn.engines.torch_join import EmptySteps
    from syncbn.layers.keras import SyncBatchNormalization
    from syncbn.layers.torch import SyncBatchNorm

__version__ = "0.1.0"

# Where each public name lives: its module, and with it a framework, is imported when the name is first asked for.
_HOMES = {
    "EmptySteps": "syncbn.engines.torch_join",
    "SyncBatchNorm": "syncbn.layers.torch",
    "SyncBatchNormalization": "syncbn.layers.keras",
    "checkpoint_contexts": "syncbn.engines.torch_context",
    "convert": "syncbn.conversion",
    "debug": "syncbn.engines.torch_debug",
    "fold": "syncbn.conversion",
    "load_legacy": "syncbn.conversion.legacy",
    "load_weights": "syncbn.conversion.weights",
    "local_statistics": "syncbn.engines.torch_context",
    "revert": "syncbn.conversion",
}

__all__ = [
    "EmptySteps",
    "SyncBatchNorm",
    "SyncBatchNormalization",
    "__version__",
    "checkpoint_contexts",
    "convert",
    "debug",
    "fold",
    "load_legacy",
    "load_weights",
    "local_statistics",
    "revert",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
