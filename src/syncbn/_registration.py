"""Registers the Keras layer, so that `keras.models.load_model` finds it, whether Keras is imported before syncbn or after it."""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import threading
from types import ModuleType
from typing import Any


def install() -> None:
    """Registers at once where Keras is imported, else as soon as it is."""
    if sys.modules.get("keras") is not None:
        _register()
    else:
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    # An import of Keras must not fail because of us. What is wrong is said where our layer is used.
    with contextlib.suppress(Exception):
        importlib.import_module("syncbn.keras")


class _Finder(importlib.abc.MetaPathFinder):
    """Finds Keras as the other finders do, and has it followed by our registration. It imports nothing by itself."""

    def __init__(self) -> None:
        self._busy = threading.local()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != "keras" or getattr(self._busy, "on", False):
            return None
        self._busy.on = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._busy.on = False
        if spec is not None and spec.loader is not None:
            self._follow(spec.loader)
        return spec

    def _follow(self, loader: Any) -> None:
        """Sets the loader's `exec_module`, on this object alone: it stays of its class, which tools ask for."""
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            with contextlib.suppress(ValueError):
                sys.meta_path.remove(self)
            _register()

        with contextlib.suppress(AttributeError):  # a loader without attributes: then the name's first use registers
            loader.exec_module = exec_module
