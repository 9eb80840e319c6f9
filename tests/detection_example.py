"""Runs examples/torch_detection.py, also beside a build of torch that torchvision's compiled operators do not fit."""

from __future__ import annotations

import runpy
from pathlib import Path

from vision import allow_detection

allow_detection()
runpy.run_path(str(Path(__file__).parent.parent / "examples" / "torch_detection.py"), run_name="__main__")
