"""Frameworks that are not installed: the folders of the tests, which have their names, must not be taken for them."""

from __future__ import annotations

import importlib.machinery
import sys
from pathlib import Path

TESTS = Path(__file__).parent
for framework in ("jax", "keras", "tensorflow", "torch"):
    elsewhere = [path for path in sys.path if Path(path) != TESTS]
    if framework not in sys.modules and importlib.machinery.PathFinder.find_spec(framework, elsewhere) is None:
        sys.modules[framework] = None
