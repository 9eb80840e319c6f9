"""`convert`, `revert` and `fold`: each calls the function of the model's framework."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

from syncbn.validation import foreign_model

Model = TypeVar("Model")
ON_UNKNOWN = ("error", "warn", "skip")
# Pickles of version 0.1.0 name modules below this one: `syncbn._moved` finds them.
__path__: list[str] = []


def convert(
    model: Model,
    *,
    process_group: Any = None,
    group_size: int | None = None,
    renorm: bool = False,
    filter: Callable[[str, Any], bool] | None = None,
    on_unknown: str = "error",
) -> Model:
    """Makes every batch norm of a torch or Keras model a synchronised one, in place, and returns the model.

    Each layer object stays and changes its class. It computes what it did, with the statistics of all replicas in training:

        y = weight · (x − mean) / √(variance + epsilon) + bias

    No weight is copied. Names, hooks, sharing, `training`, `trainable`, `requires_grad`, dtypes and devices stay, and so does
    an optimizer that holds the parameters. `state_dict` and Keras's files keep their keys and values. Layers that are
    synchronised already get the given arguments. A Keras layer gets a subclass of `SyncBatchNormalization` that has the former
    class's name, from which Keras makes the keys. A model whose class builds its layers must be converted again after loading.

    torch: `BatchNorm1d/2d/3d`, `SyncBatchNorm`, their lazy forms, and timm's `BatchNormAct2d` with its dropout and activation.
    Keras, on any backend: `BatchNormalization` in Sequential, functional, nested and subclassed models. A subclass that
    overrides only `__init__` is converted too. Any other is left to `on_unknown`. Instance norms and other layers stay.

    Convert a model before torch.compile, and before it is scripted, quantised or sharded. It may be on its device already, and
    wrapped in DistributedDataParallel. On a torch module the class method `SyncBatchNorm.convert_sync_batchnorm` does the same.

    Args:
        model: a torch.nn.Module or a Keras layer or model. Without batch norms it is returned with a warning.
        process_group: torch only: the ranks that exchange statistics. Not together with group_size.
        group_size: number of consecutive replicas that share their statistics; None for all.
        renorm: batch renormalization. Its statistics start from the model's mean and √(variance + epsilon).
        filter: takes a layer's name and the layer; False leaves the layer out. The name is dotted in torch, a path in Keras. In a
            Keras model that is not built it is the layer's own name.
        on_unknown: "error", "warn" or "skip": what to do about a batch norm of unknown behaviour. Such a layer is never
            changed. With "error" no other layer is changed either.

    Raises:
        TypeError: something that is no torch or Keras model.
        ValueError: a model that must be converted earlier; unknown batch norms; arguments, or settings of a batch norm, that
            do not fit. No layer is changed then.

    Source: docs/decisions/0005-conversion-by-class.md.

    Example:
        >>> import torch, syncbn
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> weight = model[1].weight
        >>> type(syncbn.convert(model)[1]).__name__, model[1].weight is weight
        ('SyncBatchNorm', True)
        >>> type(syncbn.revert(model)[1]).__name__
        'BatchNorm2d'
    """
    if on_unknown not in ON_UNKNOWN:
        raise ValueError(
            f'`on_unknown` must be one of {list(ON_UNKNOWN)}. Received: on_unknown={on_unknown!r}. Give "error" to be told of '
            "each batch norm that stays."
        )
    arguments = {"process_group": process_group, "group_size": group_size, "renorm": renorm}
    return _module("syncbn.convert", model).convert(model, arguments, filter, on_unknown)


def revert(model: Model, *, filter: Callable[[str, Any], bool] | None = None, example: Any = None) -> Model:
    """Gives every synchronised batch norm the framework's own class again, in place, and returns the model.

    A converted layer gets the class that it had, whatever was trained or loaded since. The extra statistics of renorm are
    removed where the conversion added them. A layer that was created as a synchronised one becomes a `BatchNormalization` in
    Keras. In torch it becomes `BatchNorm1d`, `2d` or `3d`, by the rank of its inputs. They are seen when the model runs on
    `example`, in eval mode and without gradient.

    Args:
        model: a torch.nn.Module or a Keras layer or model. Without synchronised batch norms it is returned with a warning.
        filter: takes a layer's name and the layer; False leaves the layer out.
        example: torch only: an input of the model, or a tuple of its arguments. Needed where no conversion made a module.

    Raises:
        TypeError: something that is no torch or Keras model.
        ValueError: a compiled, scripted, quantised or sharded model; a layer that does more than the framework's own, or whose
            class is not known. No layer is changed then.

    Source: docs/decisions/0005-conversion-by-class.md.

    Example:
        >>> import torch, syncbn
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), syncbn.SyncBatchNorm(8))
        >>> type(syncbn.revert(model, example=torch.zeros(1, 3, 5, 5))[1]).__name__
        'BatchNorm2d'
    """
    return _module("syncbn.revert", model).revert(model, filter, example)


def fold(model: Model) -> Model:
    """Returns a copy for inference, with each batch norm folded into the convolution or dense layer before it.

    With s = gamma / √(moving variance + epsilon), where y = batch_norm(W·x + b):

        W ← s·W,   b ← beta + s·(b − moving mean)

    computed in float64 and stored in the dtype of W. A batch norm is folded where it is in inference mode and its input is the
    output of one convolution or dense layer. Both must be called once, and nothing else may use that output. It may be a
    synchronised batch norm or the framework's own. An activation of the batch norm stays. All other layers stay as they are.

    torch: the model must be in eval mode. The order of layers is read from torch.fx's trace of the model, or of the parts that
    can be traced. Modules with hooks, parametrisations or shared weights stay. torch.fx does not see a branch on
    `isinstance(x, torch.Tensor)` or on `torch.is_grad_enabled()`: compare the outputs where a model has one.
    Keras: Sequential and functional models, and such models nested in them. All batch norms count as in inference mode.

    Args:
        model: a torch.nn.Module, or a Sequential or functional Keras model.

    Raises:
        TypeError: something that is no torch or Keras model.
        ValueError: a torch model in training mode; a subclassed Keras model.

    Source: Jacob et al. 2018 (arXiv:1712.05877), section 3.2.

    Example:
        >>> import torch, syncbn
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), syncbn.SyncBatchNorm(8), torch.nn.ReLU()).eval()
        >>> [type(m).__name__ for m in syncbn.fold(model)]
        ['Conv2d', 'Folded', 'ReLU']
    """
    return _module("syncbn.fold", model, "fold").fold(model)


def _module(function: str, model: Any, verb: str = "convert") -> ModuleType:
    """The module for the model's framework. On the torch backend a Keras model is a torch module too: Keras is asked first."""
    keras, torch = sys.modules.get("keras"), sys.modules.get("torch")
    if keras is not None and isinstance(model, keras.layers.Layer):
        return importlib.import_module(f"syncbn.keras.{verb}")
    if torch is not None and isinstance(model, torch.nn.Module):
        return importlib.import_module(f"syncbn.torch.{verb}")
    raise foreign_model(function, "a torch.nn.Module or a Keras 3 layer or model", model)
