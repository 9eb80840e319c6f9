"""`fold` for torch: batch norms folded into the layer before them, for inference."""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from syncbn.class_swap import known_ancestor
from syncbn.torch._private import _BatchNorm
from syncbn.torch.convert import SyncBatchNormAct, _known
from syncbn.torch.module import SyncBatchNorm

# The rank of the input for which dim 1 is the channels, and the dim of the weight that is the output channels.
BEFORE: dict[type, tuple[int, int]] = {
    nn.Linear: (2, 0),
    nn.Conv1d: (3, 0),
    nn.Conv2d: (4, 0),
    nn.Conv3d: (5, 0),
    nn.ConvTranspose1d: (3, 1),
    nn.ConvTranspose2d: (4, 1),
    nn.ConvTranspose3d: (5, 1),
}
ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU, "leaky_relu": nn.LeakyReLU}


@fx.wrap
def check_rank(input: Tensor, rank: int) -> Tensor:
    """The input, if it has this rank. A function that torch.fx does not look into and TorchScript can compile."""
    if input.dim() != rank:
        raise ValueError(
            "A batch norm that was folded into the layer before it takes that layer's output with the channels on dim 1, so "
            f"of rank {rank}. Received: shape {list(input.shape)}. Reshape the input of that layer, or run the model "
            "from before folding."
        )
    return input


class Folded(nn.Module):
    """Takes the place of a batch norm, and checks that its channels were on dim 1, as in the layer before it."""

    def __init__(self, rank: int):
        super().__init__()
        self.rank = rank

    def forward(self, input: Tensor) -> Tensor:
        """The input."""
        return check_rank(input, self.rank)


def fold(model: nn.Module) -> nn.Module:
    """See `syncbn.fold`."""
    if model.training:
        raise ValueError(
            "syncbn.fold takes a model in eval mode, because in training the statistics are the batch's. Received: a model in "
            "training mode. Call model.eval() first."
        )
    model = copy.deepcopy(model)
    modules = dict(model.named_modules())
    names: dict[Any, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    uses = Counter(id(p) for module in modules.values() for p in module._parameters.values() if p is not None)
    for layer, norm in list(_pairs(model)):
        once = len(names[layer]) == len(names[norm]) == 1 and names[norm][0] != ""
        shared = any(uses[id(p)] > 1 for p in layer._parameters.values() if p is not None)
        if once and not shared and _is_plain(layer) and _is_plain(norm):
            _fold_into(layer, norm)
            parent, _, name = names[norm][0].rpartition(".")
            setattr(modules[parent], name, _what_follows(norm, BEFORE[type(layer)][0]))
    return model


class _Tracer(fx.Tracer):
    """Treats batch norms of any class as one call."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _BatchNorm) or super().is_leaf_module(m, module_qualified_name)


def _pairs(module: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Each layer and the batch norm that is the only reader of its output, both called once in each trace.

    The traces are the module's, or, where it cannot be traced, those of its parts.
    """
    whole = _traced(module)
    if whole is None or not _tells(whole, module):
        for child in module.children():
            yield from _pairs(child)
        return
    others = [set(_pairs_in(graph, module)) if _tells(graph, module) else set() for graph in _traces_without_arguments(module)]
    yield from (pair for pair in _pairs_in(whole, module) if all(pair in pairs for pairs in others))


def _traced(module: nn.Module, absent: dict[str, Any] | None = None) -> fx.Graph | None:
    """The trace, where arguments have these values, or None: a model may do anything with a proxy of a tensor."""
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        # Of a value that torch.fx cannot compare. Nobody runs the trace.
        warnings.simplefilter("ignore")
        return _Tracer().trace(module, absent)
    return None


def _tells(graph: fx.Graph, module: nn.Module) -> bool:
    """Whether a trace tells what a call runs. It is of the class's `forward`, and takes every name of `**named` for given."""
    reads_names = any(node.op == "placeholder" and node.target.startswith("*") and node.users for node in graph.nodes)
    return "forward" not in vars(module) and not reads_names


def _traces_without_arguments(module: nn.Module) -> Iterator[fx.Graph]:
    """The traces where arguments are absent: each alone, all, and all but one.

    A proxy stands for a tensor that was given, so `if labels is not None` is always true of it.
    """
    found = [p for p in inspect.signature(module.forward).parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    # The input is always there, unless it has a default.
    named = [p for i, p in enumerate(found) if i or p.default is not p.empty]
    absent = {p.name: None if p.default is p.empty else p.default for p in named}
    alone = [{name: value} for name, value in absent.items()]
    but_one = [{n: v for n, v in absent.items() if n != name} for name in absent]
    graphs = [_traced(module, given) for given in [*alone, absent, *but_one] if given]
    # What cannot be traced so cannot do without these arguments.
    yield from (graph for graph in graphs if graph is not None)


def _pairs_in(graph: fx.Graph, module: nn.Module) -> Iterator[tuple[Any, Any]]:
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    read = {node.target.rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    at = dict(module.named_modules())
    for node in graph.nodes:
        if node.op != "call_module" or node.kwargs or len(node.args) != 1 or not isinstance(node.args[0], fx.Node):
            continue
        norm, before = at[node.target], node.args[0]
        if not isinstance(norm, _BatchNorm) or before.op != "call_module" or len(before.users) != 1:
            continue
        if calls[node.target] == calls[before.target] == 1 and not read & {node.target, before.target}:
            layer = at[before.target]
            if type(layer) in BEFORE and _is_known(norm) and _channels(layer) == norm.num_features:
                yield layer, norm


def _channels(layer: Any) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _is_known(norm: Any) -> bool:
    """Whether it is a batch norm of known behaviour, in inference mode."""
    known = type(norm) in (SyncBatchNorm, SyncBatchNormAct) or known_ancestor(type(norm), _known()) is not None
    return known and not norm.training and norm.running_mean is not None and "forward" not in vars(norm)


def _is_plain(module: Any) -> bool:
    """Whether neither hooks, nor weight norm, nor a `forward` of its own change the module."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and "forward" not in vars(module)


@torch.no_grad()
def _fold_into(layer: Any, norm: Any) -> None:
    """W ← s·W and b ← beta + s·(b − mean), with s = gamma / √(variance + epsilon), in float64."""
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    s = torch.rsqrt(variance + norm.eps) * (1 if norm.weight is None else norm.weight.double())
    b = -mean if layer.bias is None else layer.bias.double() - mean
    b = s * b + (0 if norm.bias is None else norm.bias.double())
    weight, dim = layer.weight, BEFORE[type(layer)][1]
    if dim == 0:
        folded = weight.double() * s.view(-1, *[1] * (weight.ndim - 1))
    else:
        # A transposed convolution's weight is [in, out / groups, …], with the groups along `in`.
        groups = s.view(layer.groups, 1, -1, *[1] * (weight.ndim - 2))
        folded = (weight.double().view(layer.groups, -1, *weight.shape[1:]) * groups).view(weight.shape)
    layer.weight = nn.Parameter(folded.to(weight.dtype), requires_grad=weight.requires_grad)
    layer.bias = nn.Parameter(b.to(weight.dtype), requires_grad=weight.requires_grad)


def _what_follows(norm: Any, rank: int) -> nn.Module:
    """The check, then the batch norm's activation and dropout."""
    after: list[nn.Module] = [norm._modules[name] for name in ("drop", "act") if name in norm._modules]
    activation = getattr(norm, "activation", None)
    if isinstance(activation, str):
        after.append(ACTIVATIONS[activation]())
    elif activation is not None:
        after.insert(0, activation if isinstance(activation, nn.Module) else _Applied(activation))
    return nn.Sequential(Folded(rank), *after) if after else Folded(rank)


class _Applied(nn.Module):
    """A module that calls a function."""

    def __init__(self, function: Any):
        super().__init__()
        self.function = function

    def forward(self, input: Tensor) -> Tensor:
        return self.function(input)
