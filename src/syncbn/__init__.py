"""Batch normalization whose statistics come from all replicas that train a model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from syncbn import _missing, _moved, _registration

if TYPE_CHECKING:
    from syncbn.conversion import convert, fold, revert
    from syncbn.keras import SyncBatchNormalization, load_legacy
    from syncbn.loading import load_weights
    from syncbn.tensorflow.compiled_step import compiled_step
    from syncbn.torch import EmptySteps, SyncBatchNorm, checkpoint_contexts, debug, local_statistics

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
    "load_weights": "syncbn.loading",
    "local_statistics": "syncbn.torch",
    "revert": "syncbn.conversion",
}
# Public modules, which are attributes too. Not in `__all__`: a star import would hide the user's `torch`.
_MODULES = ("functional", "keras", "torch")
# The package that a home needs, and the extra that installs it.
_NEEDS = {
    "syncbn.keras": ("keras", "tensorflow"),
    "syncbn.tensorflow.compiled_step": ("tensorflow", "tensorflow"),
    "syncbn.torch": ("torch", "torch"),
}


def _is_available(home: str) -> bool:
    return home not in _NEEDS or _missing.is_installed(_NEEDS[home][0])


def _public() -> list[str]:
    """The names whose framework is installed."""
    return sorted(["__version__", *(name for name, home in _HOMES.items() if _is_available(home))])


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return _public()
    home = f"syncbn.{name}" if name in _MODULES else _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    package, extra = _NEEDS.get(home, ("", ""))
    asked = f"syncbn.{name}"
    if not _is_available(home):
        return _missing.StandIn(asked, _missing.error(asked, package, extra))
    try:
        module = importlib.import_module(home)
    except ImportError as error:
        # The framework is there, and what it needs is not: Keras without the package of its backend.
        found = _missing.explained(asked, error, extra)
        found.__cause__ = error
        return _missing.StandIn(asked, found)
    return module if name in _MODULES else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_public(), *(name for name in _MODULES if _is_available(f"syncbn.{name}"))})


_registration.install()
