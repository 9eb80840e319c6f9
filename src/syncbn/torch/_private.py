"""Names of PyTorch that are not public, in one place: why each is needed, and what stands for one that has vanished."""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

# What a batch norm is, for torch and for what converts models: the base class of all of them; and that of the lazy ones.
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase

__all__ = ["MISSING", "_BatchNorm", "_LazyNormBase"]

# The paths that this version of torch does not have. A test holds it empty.
MISSING: list[str] = []


def _find(path: str, instead: Any) -> Any:
    """What a dotted path of torch names, or `instead`."""
    module, *names = path.split(":")
    try:
        return functools.reduce(getattr, names[0].split("."), importlib.import_module(module))
    except (ImportError, AttributeError):
        MISSING.append(path.replace(":", "."))
        return instead


def _raises(path: str, need: str) -> Callable[..., Any]:
    """Stands for a name that nothing public replaces."""

    def missing(*arguments: Any, **named: Any) -> Any:
        raise RuntimeError(
            f"syncbn needs {path} of PyTorch: it {need}. Received: PyTorch {torch.__version__}, which does not have it. Install "
            "PyTorch 2.11 to 2.13, with which syncbn was tested."
        )

    return missing


def _find_or_raise(path: str, need: str) -> Any:
    return _find(path, _raises(path.replace(":", "."), need))


# Only a recomputation of activation checkpointing runs a forward pass inside a backward pass: -1 where there is none.
current_graph_task_id = _find_or_raise("torch:_C._current_graph_task_id", "tells a recomputed block from its first pass")

# None outside of torch.jit.trace; the public question costs three calls.
tracing_state = _find("torch:_C._get_tracing_state", lambda: torch.jit.is_tracing() or None)

# Tensors of torch.func and of batched gradients have no memory that a kernel could read. If torch no longer tells, the kernels
# are left out: slower, and right.
are_functorch_transforms_active = _find("torch:_C._are_functorch_transforms_active", lambda: True)
is_dead_tensor_wrapper = _find("torch:_C._functorch.is_dead_tensor_wrapper", lambda x: True)
is_legacy_batchedtensor = _find("torch:_C._functorch.is_legacy_batchedtensor", lambda x: True)

# A compiled graph holds a process group by its name.
resolve_process_group = _find_or_raise(
    "torch.distributed.distributed_c10d:_resolve_process_group", "finds the process group of a compiled layer"
)

# `debug` needs a store that all ranks reach; torch hands out no public one.
default_store = _find_or_raise("torch.distributed.distributed_c10d:_get_default_store", "connects the ranks for syncbn.debug")

# Communicating operators mutate, by their signatures, a tensor that autograd has saved.
preserve_version_counter = _find_or_raise(
    "torch.autograd:_unsafe_preserve_version_counter", "lets compiled layers order their messages"
)

# Memory that the GPUs of one host map from each other: empty(…) and rendezvous(…). Without it, messages go by the all-reduce.
symmetric_empty = _find_or_raise("torch.distributed._symmetric_memory:empty", "allocates memory that other GPUs can map")
symmetric_rendezvous = _find_or_raise("torch.distributed._symmetric_memory:rendezvous", "maps the memory of other GPUs")


def timeout_of(process_group: Any) -> datetime.timedelta:
    """How long the members of a process group wait for each other. Torch has no public way to ask."""
    with contextlib.suppress(AttributeError, IndexError):
        return process_group._get_backend(process_group._device_types[0]).options._timeout
    return dist.default_pg_timeout


def backend_name(process_group: Any, device: torch.device) -> str:
    """The backend that serves a device, of several that a process group may have; public is only that of the whole group."""
    with contextlib.suppress(AttributeError):
        return process_group._get_backend(device).name()
    return dist.get_backend(process_group)


def all_gather_in_graph(v: torch.Tensor, size: int, name: str) -> torch.Tensor:
    """[size · n]: every rank's v [n], as an operator that a compiled graph can hold. The public collective breaks the graph."""
    operators = torch.ops._c10d_functional
    return operators.wait_tensor(operators.all_gather_into_tensor(v, size, name))
