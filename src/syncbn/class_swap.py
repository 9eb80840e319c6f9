"""Whether a class may be exchanged: what both frameworks ask of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

# What a class statement leaves in a class besides what its author wrote.
_OF_EVERY_CLASS = {
    "__module__",
    "__qualname__",
    "__doc__",
    "__dict__",
    "__weakref__",
    "__annotations__",
    "__annotate__",
    "__annotate_func__",
    "__annotations_cache__",
    "__conditional_annotations__",
    "__firstlineno__",
    "__static_attributes__",
}


def known_ancestor(cls: type, known: Iterable[type]) -> type | None:
    """The known class that this one behaves as: itself, or one of which it overrides nothing but `__init__`."""
    known = set(known)
    ancestor = next((c for c in cls.__mro__ if c in known), None)
    return ancestor if ancestor is not None and not overridden(cls, ancestor) else None


def overridden(cls: type, ancestor: type) -> list[str]:
    """What a class, or a mixin of its, has that the ancestor has not, `__init__` apart."""
    own = [c for c in cls.__mro__ if c not in ancestor.__mro__]
    return sorted({name for c in own for name in vars(c)} - _OF_EVERY_CLASS - {"__init__"})


def qualified(cls: type) -> str:
    """A class as an error names it."""
    return f"{cls.__module__}.{cls.__qualname__}"


def why_unknown(layer: Any, known: Iterable[type], method: str) -> str:
    """Why an object cannot change its class: its class, or a `forward` (`call`) that was set on the object."""
    cls, known = type(layer), set(known)
    ancestor = next((c for c in cls.__mro__ if c in known), None)
    if ancestor is None:
        return f"a {qualified(cls)}, which is not known"
    names = overridden(cls, ancestor)
    if names:
        return f"a {qualified(cls)}, which overrides {', '.join(names[:4])}{', …' if len(names) > 4 else ''}"
    return f"a {qualified(cls)} with a `{method}` of its own"
