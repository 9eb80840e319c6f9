"""`convert` and `revert` for torch: a batch norm object changes its class and stays otherwise the same."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer

from syncbn.class_swap import (
    check_all_known,
    check_revertible,
    known_ancestor,
    listed,
    qualified,
    warn_if_none,
    why_unknown,
)
from syncbn.torch._private import _BatchNorm, _LazyNormBase
from syncbn.torch.arguments import is_weight
from syncbn.torch.groups import check_one_group
from syncbn.torch.lazy import LazySyncBatchNorm
from syncbn.torch.module import RENORM_BUFFERS, SyncBatchNorm
from syncbn.validation import check_group_size, is_epsilon

Filter = Callable[[str, Any], bool] | None


class SyncBatchNormAct(SyncBatchNorm):
    """Takes the place of timm's `BatchNormAct2d`: its dropout and activation follow the batch norm."""

    def forward(self, input: Tensor, mask: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """Normalises, then `drop`, then `act`."""
        y = super().forward(input, mask, residual)
        for name in ("drop", "act"):
            if name in self._modules:
                y = getattr(self, name)(y)
        return y


OURS = (SyncBatchNorm, LazySyncBatchNorm, SyncBatchNormAct)
TORCHS_OWN: dict[type, type] = {
    nn.BatchNorm1d: SyncBatchNorm,
    nn.BatchNorm2d: SyncBatchNorm,
    nn.BatchNorm3d: SyncBatchNorm,
    nn.SyncBatchNorm: SyncBatchNorm,
    nn.LazyBatchNorm1d: LazySyncBatchNorm,
    nn.LazyBatchNorm2d: LazySyncBatchNorm,
    nn.LazyBatchNorm3d: LazySyncBatchNorm,
}
BY_RANK = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}

# Classes whose modules cannot be converted any more: name, package, and the state of the model. They are found by name, because
# importing them is slow. Where a class was not imported there is no model of it.
STATES = {
    "OptimizedModule": ("torch._dynamo", "compiled"),
    "ScriptModule": ("torch.jit", "scripted"),
    "DataParallel": ("torch.nn.parallel", "wrapped"),
    "FullyShardedDataParallel": ("torch.distributed.fsdp", "wrapped"),
    "FSDPModule": ("torch.distributed.fsdp", "sharded"),
}
QUANTISED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized")

# What to do about each state.
REMEDIES = {
    "compiled": "Take the model that was given to torch.compile, and compile the result",
    "scripted": "Take the Python model that was scripted, and export the result",
    "quantised": "Take the model from before quantisation, and quantise the result",
    "wrapped": "Take the bare model (`model.module`), and wrap the result",
    "sharded": "Build the model again, and shard the result with fully_shard",
}

# Attributes of an instance that no batch norm of torch has.
OWN_ATTRIBUTES = ("renorm", "renorm_clipping", "renorm_momentum", "_activation", "group_size", "_name_in_model", "_class_before")


def convert(model: nn.Module, arguments: dict[str, Any], filter: Filter, on_unknown: str) -> nn.Module:
    """See `syncbn.convert`."""
    arguments = {**arguments, "group_size": check_group_size(arguments["group_size"])}
    check_one_group(arguments["process_group"], arguments["group_size"])
    _check_state("syncbn.convert", model)
    known = _known()
    found = list(_batch_norms(model, filter))
    chosen, unknown = [], []
    for name, module in found:
        ancestor = known_ancestor(type(module), known)
        if "forward" in vars(module) or (ancestor is None and not isinstance(module, SyncBatchNorm)):
            unknown.append((name, why_unknown(module, [*known, *OURS], "forward")))
        else:
            chosen.append((name, module, known[ancestor] if ancestor else type(module)))
    check_all_known(unknown, on_unknown)
    _check_settings(chosen)
    bare = [(name, "track_running_stats=False") for name, m, _ in chosen if arguments["renorm"] and m.running_mean is None]
    if bare:
        raise ValueError(
            f"renorm=True starts from the moving statistics, so they must be kept. Received: {listed(bare)}. Leave these layers "
            "out with `filter`, or convert with renorm=False."
        )
    warn_if_none(found, "syncbn.convert", "batch norms", filter is not None)
    for _, module, ours in chosen:
        if type(module) is not ours:
            vars(module)["_class_before"] = type(module)
            module.__class__ = ours
            if not module.num_features and ours is SyncBatchNorm:
                # In torch's lazy layers it is 0 where a checkpoint made their parameters.
                module.num_features = next((len(v) for v in (module.weight, module.running_mean) if v is not None), 0)
        _set_arguments(module, **arguments)
    return model


def revert(model: nn.Module, filter: Filter, example: Any) -> nn.Module:
    """See `syncbn.revert`."""
    _check_state("syncbn.revert", model)
    found = [(name, module) for name, module in _batch_norms(model, filter) if isinstance(module, SyncBatchNorm)]
    warn_if_none(found, "syncbn.revert", "synchronised batch norms", filter is not None)
    beyond = [(name, f"a {qualified(type(m))}") for name, m in found if type(m) not in OURS]
    beyond += [(name, f"activation={m.activation!r}") for name, m in found if m.activation is not None]
    check_revertible(beyond, "torch's batch norm")
    for module, target in _targets(model, found, example).items():
        for name in RENORM_BUFFERS:
            module._buffers.pop(name, None)
            module._non_persistent_buffers_set.discard(name)
        for name in OWN_ATTRIBUTES:
            vars(module).pop(name, None)
        if issubclass(target, nn.SyncBatchNorm):
            vars(module).setdefault("process_group", None)
        else:
            vars(module).pop("process_group", None)
        module.__class__ = target
    return model


def _known() -> dict[type, type]:
    """Each class that can be converted, and the synchronised one; timm's where timm is imported."""
    timm = sys.modules.get("timm.layers.norm_act")
    with_act = {getattr(timm, name): SyncBatchNormAct for name in ("BatchNormAct2d", "SyncBatchNormAct") if hasattr(timm, name)}
    return {**TORCHS_OWN, **with_act}


def _batch_norms(model: nn.Module, filter: Filter) -> Iterator[tuple[str, Any]]:
    """Every batch norm, once, by its first name."""
    keras = sys.modules.get("keras")
    kinds: tuple[type, ...] = (_BatchNorm, nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d)
    if keras is not None:
        kinds += (keras.layers.BatchNormalization,)
    for name, module in model.named_modules():
        if isinstance(module, kinds) and (filter is None or filter(name, module)):
            yield name, module


def _check_state(function: str, model: nn.Module) -> None:
    """Raises where the model is compiled, scripted, quantised or wrapped."""
    states: dict[type, str | None] = {}
    for name, module in model.named_modules():
        cls = type(module)
        if cls not in states:
            states[cls] = _state(cls)
        state = "compiled" if module._compiled_call_impl is not None else states[cls]
        if state:
            where = f"the submodule {name!r}, a {qualified(cls)}" if name else f"a {qualified(cls)}"
            raise ValueError(f"{function} takes a plain model. Received: {where}, which is {state}. {REMEDIES[state]}.")


def _state(cls: type) -> str | None:
    if cls.__module__.startswith(QUANTISED):
        return "quantised"
    for c in cls.__mro__:
        where, state = STATES.get(c.__name__, ("", ""))
        if state and c.__module__.startswith(where):
            return state
    return None


def _check_settings(chosen: list[tuple[str, Any, type]]) -> None:
    """Raises for what the constructor refuses too."""
    wrong = [(name, f"momentum={m.momentum!r}") for name, m, _ in chosen if not (m.momentum is None or is_weight(m.momentum))]
    wrong += [(name, f"eps={m.eps!r}") for name, m, _ in chosen if not is_epsilon(m.eps)]
    if wrong:
        raise ValueError(
            "`momentum` must be None or lie in [0, 1], and `eps` must be a finite number, 0 or more. Received: "
            f"{listed(wrong)}. Set other values on these layers first."
        )


def _set_arguments(module: Any, process_group: Any, group_size: int | None, renorm: bool) -> None:
    """Sets the arguments that were given. The others stay."""
    if process_group is not None:
        module.process_group, module.group_size = process_group, None
    if group_size is not None:
        module.process_group, module.group_size = None, group_size
    if renorm and not module.renorm:
        module.renorm = True
        for name, value in zip(RENORM_BUFFERS, _renorm_start(module), strict=True):
            module.register_buffer(name, value)


@torch.no_grad()
def _renorm_start(module: Any) -> tuple[Tensor, Tensor, Tensor]:
    """moving_stddev, renorm_mean and renorm_stddev, computed from the running statistics."""
    mean, variance = module.running_mean, module.running_var
    if isinstance(module, _LazyNormBase) and module.has_uninitialized_params():
        made = [UninitializedBuffer(device=mean.device, dtype=mean.dtype) for _ in RENORM_BUFFERS]  # type: ignore[call-arg]
        return made[0], made[1], made[2]
    stddev = torch.sqrt(variance + module.eps)
    return stddev, mean.clone(), stddev.clone()


def _targets(model: nn.Module, found: list[tuple[str, Any]], example: Any) -> dict[Any, type]:
    """The class that each module gets: its former class, or the class for the rank of its inputs."""
    targets: dict[Any, type] = {}
    not_converted = []
    for name, module in found:
        before = getattr(module, "_class_before", None)
        if before is None:
            not_converted.append((name, module))
        elif issubclass(before, _LazyNormBase) and not isinstance(module, _LazyNormBase):
            targets[module] = before.cls_to_become
        else:
            targets[module] = before
    if not not_converted:
        return targets
    ranks = _ranks_seen(model, [m for _, m in not_converted], example) if example is not None else {}
    unclear = []
    for name, module in not_converted:
        seen = ranks.get(module, set())
        classes = {BY_RANK.get(rank) for rank in seen}
        implied = classes.pop() if len(classes) == 1 else None
        if implied is not None:
            targets[module] = implied
        else:
            unclear.append((name, f"inputs of ranks {sorted(seen)}" if seen else "no input seen"))
    if unclear:
        raise ValueError(
            "A SyncBatchNorm that no conversion made becomes BatchNorm1d, 2d or 3d by the rank of its inputs, which must be "
            f"known. Received: {listed(unclear)}. Give an input of the model that reaches them: syncbn.revert(model, example=x)."
        )
    return targets


@torch.no_grad()
def _ranks_seen(model: nn.Module, modules: list[Any], example: Any) -> dict[Any, set[int]]:
    """The ranks of the inputs that reach each module when the model runs on the example in eval mode."""
    ranks: dict[Any, set[int]] = {}
    modes = {m: m.training for m in model.modules()}
    hooks = [m.register_forward_pre_hook(lambda m, args: ranks.setdefault(m, set()).add(args[0].ndim)) for m in modules]
    try:
        model.eval()
        model(*example) if isinstance(example, tuple) else model(example)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return ranks
