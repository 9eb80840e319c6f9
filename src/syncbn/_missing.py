"""What is said where a framework is not installed, or a package that a command needs: which extra to install."""

from __future__ import annotations

import importlib.util
from typing import Any, NoReturn

# What to do about a package that is missing, where the extra of what asks for it would not bring it.
MENDS = {
    "keras": 'Run pip install "syncbn[tensorflow]"; on the JAX or PyTorch backend pip install keras.',
    "tensorflow": 'Run pip install "syncbn[tensorflow]". For Keras on another backend set KERAS_BACKEND to jax or torch first.',
    "jax": 'Run pip install "syncbn[jax]". For Keras on another backend set KERAS_BACKEND to tensorflow or torch first.',
    "torch": 'Run pip install "syncbn[torch]".',
}


def is_installed(package: str) -> bool:
    """Whether a package can be found, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # ValueError: a module that was made by hand, without a spec
        return False


def error(asked: str, package: str, extra: str) -> ModuleNotFoundError:
    """The error of a missing package: what was asked for, such as `syncbn.SyncBatchNorm`, and the extra of syncbn to install."""
    mend = MENDS.get(package, f'Run pip install "syncbn[{extra}]".')
    return ModuleNotFoundError(
        f"{asked} needs the package `{package}`. Received: a Python environment without it. {mend}", name=package
    )


def explained(asked: str, found: ImportError, extra: str) -> ImportError:
    """What is said in place of an import's own error."""
    package = (found.name or "").partition(".")[0]
    if isinstance(found, ModuleNotFoundError) and package not in ("", "syncbn"):
        return error(asked, package, extra)
    return ImportError(
        f'{asked} needs the versions that the extra "{extra}" of syncbn names. Received: {found}. '
        f'Run pip install --upgrade "syncbn[{extra}]".',
        name=found.name,
    )


class StandIn:
    """Stands for a public name whose framework is missing: a call, a subclass or a read of it raises.

    The name itself can be imported and listed, so that `help`, completion and star imports work with one framework alone.
    """

    def __init__(self, asked: str, found: ImportError):
        self.__asked, self.__found = asked, found

    def __raise(self) -> NoReturn:
        raise type(self.__found)(*self.__found.args, name=self.__found.name) from self.__found.__cause__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.__raise()

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        self.__raise()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            # What `inspect`, `copy` and `doctest` ask of everything.
            raise AttributeError(f"{self!r} has no attribute {name!r}")
        self.__raise()

    def __instancecheck__(self, instance: Any) -> bool:
        return False

    def __subclasscheck__(self, cls: type) -> bool:
        return False

    def __repr__(self) -> str:
        return f"<{self.__asked}, which cannot be imported>"
