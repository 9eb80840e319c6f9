"""What Keras 3 does not publish and this package needs. A name that a version of Keras lacks raises where it is used."""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Iterator
from types import MethodType
from typing import Any

import keras


def vanished(name: str) -> RuntimeError:
    """The error of a name that this version of Keras lacks."""
    return RuntimeError(
        f"syncbn.keras needs `{name}`, which is not public in Keras. Received: Keras {keras.__version__}, which lacks it. "
        "Install Keras 3.15, or a later version of syncbn."
    )


class Missing:
    """Stands for a private name that was not found: any use raises."""

    def __init__(self, name: str):
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise vanished(self._name)

    def __getattr__(self, name: str) -> Any:
        raise vanished(self._name)


def _find(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return Missing(f"{module}.{name}")


def _member(owner: Any, name: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError as error:
        raise vanished(f"{type(owner).__name__}.{name}") from error


# Whether Keras only infers shapes. Then no replica runs, and a message would wait for ever. Keras has no public name for it.
in_symbolic_scope = _find("keras.src.backend.common.symbolic_scope", "in_symbolic_scope")
# Keras 3's reader of Keras 2's `.h5`. The public load_model drops a list of axes.
saving_options = _find("keras.src.legacy.saving", "saving_options")
saving_utils = _find("keras.src.legacy.saving", "saving_utils")
# Where Keras lists the variables that it has not made yet: those of a model that is refused must be forgotten.
global_state = _find("keras.src.backend.common", "global_state")
# Refuses code from a file. The public switch is global to the process.
SafeModeScope = _find("keras.src.saving.serialization_lib", "SafeModeScope")
# The mask that Keras keeps beside a tensor.
get_keras_mask = _find("keras.src.backend", "get_keras_mask")


def functional_class() -> type:
    """The class of keras.Model(inputs, outputs), which has no public name."""
    found = _find("keras.src.models.functional", "Functional")
    if isinstance(found, type):
        return found
    inputs = keras.Input((1,), name="inputs")
    return type(keras.Model(inputs, inputs, name="model"))


def flatten_layers(model: Any) -> list[Any]:
    """The model and every layer in it, lists, wrappers and composite layers included: what Keras itself walks models with."""
    return _member(model, "_flatten_layers")()


def nodes(model: Any) -> list[Any]:
    """Each call of a layer in a functional model. Keras has no public form of the graph."""
    return [node for depth in _member(model, "_nodes_by_depth").values() for node in depth]


def producer(tensor: Any) -> Any:
    """The layer whose output a symbolic tensor is."""
    return _member(tensor, "_keras_history").operation


def remat_mode(layer: Any) -> Any:
    """The keras.RematScope in which a layer was made, or None. No public name tells it. Keras 3.8 has no such scope."""
    return _member(layer, "_remat_mode") if hasattr(keras, "RematScope") else None


def has_renorm() -> bool:
    """Whether Keras's own batch norm knows renorm, which came with 3.14."""
    return "renorm" in inspect.signature(keras.layers.BatchNormalization.__init__).parameters


def backend_mesh(mesh: Any) -> Any:
    """JAX's mesh of a Keras `DeviceMesh`, which older versions of Keras do not hold."""
    if hasattr(mesh, "backend_mesh"):
        return mesh.backend_mesh
    return _find("keras.src.backend.jax.distribution_lib", "_to_jax_mesh")(mesh)


@contextlib.contextmanager
def more_weights(layer: Any) -> Iterator[None]:
    """While this lasts, a layer that is built may get weights. Keras allows that in `build` only."""
    _member(layer, "_tracker").unlock()
    with _member(layer, "_open_name_scope")():
        yield
    _member(layer, "_lock_state")()


def untrack_variable(layer: Any, variable: Any) -> None:
    """Takes a weight out of a layer's lists. Keras has no public way to drop one."""
    _member(layer, "_untrack_variable")(variable)


def change_class(layer: Any, cls: type) -> None:
    """Gives a layer another class, and the wrapper of its `build` the method of that class.

    Keras wraps `build` when it makes an object, round the method of the class that the object has then.
    """
    for cell in layer.build.__closure__ or ():
        method = cell.cell_contents
        if inspect.ismethod(method) and method.__name__ == "build" and method.__self__ is layer:
            cell.cell_contents = MethodType(cls.build, layer)  # type: ignore[attr-defined]
            layer.__class__ = cls
            return
    raise RuntimeError(
        "A layer changes its class only where Keras wraps its `build` as versions 3.8 to 3.15 do. Received: the layer "
        f"{layer.name} of Keras {keras.__version__}, wrapped in another way. Install Keras 3.15, or set no `build` on the layer."
    )
