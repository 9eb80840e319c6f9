"""Module paths of version 0.1.0, which pickles of that version name: each is imported as the module that replaced it."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any

MOVED = {
    "syncbn.conversion.keras": "syncbn.keras.convert",
    "syncbn.conversion.torch": "syncbn.torch.convert",
    "syncbn.engines": "syncbn.contract",
    "syncbn.engines.torch_join": "syncbn.torch.join",
    "syncbn.layers": "syncbn",
    "syncbn.layers.keras": "syncbn.keras.layer",
    "syncbn.layers.torch": "syncbn.torch.module",
    "syncbn.layers.torch_lazy": "syncbn.torch.lazy",
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name in MOVED else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        # The import system returns what stands here afterwards, so that there is one class and not two.
        sys.modules[module.__name__] = importlib.import_module(MOVED[module.__name__])


def install() -> None:
    """Makes the old paths importable."""
    # First: the finder of files would take `syncbn.layers.torch` for another copy of `syncbn/torch`.
    sys.meta_path.insert(0, _Finder())
