"""Theirs to ours and back, old files, and out of training: `convert`, `revert`, `fold`; one module a framework."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

from syncbn import policy_migration as policy

Model = TypeVar("Model")
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
    """Turns every batch norm of a torch or Keras model into ours, in place, and returns the model.

    Each layer object stays and changes its class. Parameters, buffers, statistics, names, hooks, sharing, `training`,
    `trainable`, `requires_grad`, dtype, device, an optimizer that holds the parameters and a model's compiled state hold; no
    weight is copied, and state_dict and `.weights.h5` keep their keys and values (the latter's keys follow class names: see
    `syncbn.load_weights`). Layers that are ours already get the arguments that are given.

    torch: `BatchNorm1d/2d/3d`, `SyncBatchNorm`, the lazy ones, and timm's `BatchNormAct2d`, which keeps its dropout and
    activation. Keras, on any backend: `BatchNormalization`, in Sequential, functional, nested and subclassed models. A subclass
    of these that overrides nothing but `__init__` is converted; any other is left to `on_unknown`. Instance norms and others
    stay. Convert before a model is compiled, scripted, quantised or wrapped for distribution, before or after it moved to its
    device. A model without batch norms is returned with a warning.

    Args:
        model: a torch.nn.Module or a Keras layer or model.
        process_group: torch only: the replicas that meet.
        group_size: synchronise among consecutive groups of that many replicas.
        renorm: batch renormalization, whose statistics start from the model's own: mean, √(variance + epsilon).
        filter: takes a layer's name (its dotted name in torch, its path in Keras) and the layer; False leaves it alone.
        on_unknown: "error", "warn" or "skip": what to do about a batch norm of unknown behaviour. It is not changed in any case,
            and with "error" neither is any other.

    Raises:
        TypeError: something that is no torch or Keras model.
        ValueError: a model that must be converted earlier; batch norms that are not known; arguments that do not fit.

    Example:
        >>> import torch, syncbn
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> weight = model[1].weight
        >>> type(syncbn.convert(model)[1]).__name__, model[1].weight is weight
        ('SyncBatchNorm', True)
        >>> type(syncbn.revert(model)[1]).__name__
        'BatchNorm2d'
    """
    policy.on_unknown(on_unknown)
    arguments = {"process_group": process_group, "group_size": group_size, "renorm": renorm}
    return _module("syncbn.convert", model).convert(model, arguments, filter, on_unknown)


def revert(model: Model, *, filter: Callable[[str, Any], bool] | None = None, example: Any = None) -> Model:
    """Turns every batch norm of ours back into the framework's own, in place, and returns the model.

    A converted layer gets the class that it had, whatever was trained or loaded since; renorm's extra statistics, where the
    conversion added them, go. A Keras layer that no conversion made becomes a `BatchNormalization`; a torch module becomes
    `BatchNorm1d`, `2d` or `3d` by the rank of the inputs that it sees when the model runs on `example`, in eval mode and
    without gradient. A model without batch norms of ours is returned with a warning.

    Args:
        model: a torch.nn.Module or a Keras layer or model.
        filter: takes a layer's name and the layer; False leaves it alone.
        example: torch only: an input of the model, or a tuple of its arguments; needed where a module was made as ours.

    Raises:
        TypeError: something that is no torch or Keras model.
        ValueError: a model that is compiled, scripted, quantised or wrapped; a layer that does what the framework's own cannot,
            or whose class is not known. No layer is changed then.

    Example:
        >>> import torch, syncbn
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), syncbn.SyncBatchNorm(8))
        >>> type(syncbn.revert(model, example=torch.zeros(1, 3, 5, 5))[1]).__name__
        'BatchNorm2d'
    """
    return _module("syncbn.revert", model).revert(model, filter, example)


def fold(model: Model) -> Model:
    """A copy for inference, in which batch norms are folded into the convolution or dense layer before them.

    With s = gamma / √(moving variance + epsilon), where y = batch_norm(W·x + b):

        W ← s·W,   b ← beta + s·(b − moving mean)

    formed in float64. Folded is each batch norm, ours or the framework's own, that stands in inference mode and whose input is
    the output of one convolution or dense layer, used once and for nothing else; an activation that the batch norm applies
    stays. All others stay as they are.

    torch: the model must be in eval mode. What follows what is read from torch.fx's trace of the model, or, where it cannot be
    traced, of its parts. Modules with hooks, parametrisations or shared weights stay. Keras: Sequential and functional models,
    and those nested in them; all batch norms count as in inference mode.

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
    """The module of this model's framework. On the torch backend a Keras model is a torch module too: Keras is asked first."""
    keras, torch = sys.modules.get("keras"), sys.modules.get("torch")
    if keras is not None and isinstance(model, keras.layers.Layer):
        return importlib.import_module(f"syncbn.keras.{verb}")
    if torch is not None and isinstance(model, torch.nn.Module):
        return importlib.import_module(f"syncbn.torch.{verb}")
    raise policy.not_a_model(function, model)
