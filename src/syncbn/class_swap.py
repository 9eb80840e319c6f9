"""Whether an object may get another class: what the conversions of both frameworks share."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sequence
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
    """The known class whose behaviour this class has: itself, or one of which it overrides nothing but `__init__`."""
    known = set(known)
    ancestor = next((c for c in cls.__mro__ if c in known), None)
    return ancestor if ancestor is not None and not overridden(cls, ancestor) else None


def overridden(cls: type, ancestor: type) -> list[str]:
    """The names that a class and its mixins define beyond the ancestor, `__init__` apart."""
    own = [c for c in cls.__mro__ if c not in ancestor.__mro__]
    return sorted({name for c in own for name in vars(c)} - _OF_EVERY_CLASS - {"__init__"})


def qualified(cls: type) -> str:
    """A class's module and name, for an error."""
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


def listed(found: Iterable[tuple[str, str]]) -> str:
    """Layers, each a name and a reason, for an error."""
    return "; ".join(f"{name or 'the model itself'} ({why})" for name, why in found)


def callers_level() -> int:
    """For the function that asks: the `stacklevel` of a warning that names the first line outside of this library."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("syncbn."):
        level, frame = level + 1, frame.f_back
    return level


def check_all_known(unknown: Sequence[tuple[str, str]], on_unknown: str) -> None:
    """Raises or warns, as `on_unknown` says, where batch norms of unknown behaviour were found."""
    if not unknown or on_unknown == "skip":
        return
    text = (
        "Only a batch norm whose behaviour is known can change its class: no subclass that overrides more than `__init__`. "
        f'Received: {listed(unknown)}. Leave them out with `filter` or on_unknown="skip", or use the framework\'s own classes.'
    )
    if on_unknown == "error":
        raise ValueError(text)
    warnings.warn(text, stacklevel=callers_level())


def warn_if_none(found: Sequence[Any], function: str, wanted: str, filtered: bool) -> None:
    """Warns where a model holds nothing to convert or revert."""
    if not found:
        which = "that `filter` takes" if filtered else "at all"
        text = f"{function} expects a model that holds {wanted}. Received: a model with none {which}. It is returned unchanged."
        warnings.warn(text, stacklevel=callers_level())


def warn_if_rebuilt(classes: Sequence[str]) -> None:
    """Warns where a file brings back no synchronised layer: these classes build their layers themselves."""
    if classes:
        text = (
            "A file of a model whose class builds its layers brings back plain batch norms, with all weights. "
            f"Received: {', '.join(classes)}. Call syncbn.convert on the model after loading, as after building."
        )
        warnings.warn(text, stacklevel=callers_level())


def check_revertible(beyond: Sequence[tuple[str, str]], target: str) -> None:
    """Raises where layers do what the framework's own class cannot."""
    if beyond:
        raise ValueError(
            f"Only what {target} can do can be reverted. Received: {listed(beyond)}. Use a separate layer for it, or leave the "
            "layer out with `filter`."
        )
