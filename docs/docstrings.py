"""What griffe must know of the docstrings here: `Example:` is a section of code, and `Call arguments:` is a list."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Renames the sections before griffe reads them."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called once for each object."""
        if obj.docstring:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)
            obj.docstring.value = re.sub(r"^Call arguments:$", "Other Parameters: Call arguments:", text, flags=re.M)
