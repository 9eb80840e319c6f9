"""Batch normalization whose statistics come from all replicas that train a model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from syncbn.layers.keras import SyncBatchNormalization

__version__ = "0.1.0"

# Where each public name lives: its module, and with it a framework, is imported when the name is first asked for.
_HOMES = {"SyncBatchNormalization": "syncbn.layers.keras"}

__all__ = ["SyncBatchNormalization", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
