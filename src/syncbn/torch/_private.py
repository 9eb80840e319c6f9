"""Names of PyTorch that are not public, in one place: why each is needed, and what stands for one that has vanished."""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
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
            "PyTorch 2.13, with which syncbn was tested."
        )

    return missing


def _find_or_raise(path: str, need: str) -> Any:
    return _find(path, _raises(path.replace(":", "."), need))


# Which backward pass this code runs in: -1 where it runs in none.
current_graph_task_id = _find_or_raise("torch:_C._current_graph_task_id", "tells a recomputed block from its first pass")

# State of a thread that autograd's own threads take over during a backward pass; threading.local and contextvars they do not.
# Without the first name nothing is local. Without the last, which is the newest, the key stays in a thread, with False.
is_key_in_tls = _find("torch:_C._is_key_in_tls", lambda key: False)
get_obj_in_tls = _find("torch:_C._get_obj_in_tls", lambda key: False)
stash_obj_in_tls = _find_or_raise("torch:_C._stash_obj_in_tls", "tells a backward pass that it runs in syncbn.local_statistics()")
remove_obj_from_tls = _find("torch:_C._remove_obj_from_tls", lambda key: stash_obj_in_tls(key, False))

# The Python code by which autograd comes to run a block again: the backward pass of an autograd function (a reentrant checkpoint,
# and those of other libraries), and the hook of a checkpoint that is not reentrant. And the code that starts a backward pass.
_function_backward = _find("torch.autograd.function:BackwardCFunction.apply", None)
_checkpoint_hook = _find("torch.utils.checkpoint:_checkpoint_hook.__init__", None)
_run_backward = _find("torch.autograd.graph:_engine_run_backward", None)


def _codes(function: Any, name: str | None = None) -> list[Any]:
    """The code of a function, or of a function of this name that it defines."""
    code = getattr(function, "__code__", None)
    if name is None or code is None:
        return [code]
    found = [constant for constant in code.co_consts if getattr(constant, "co_name", "") == name]
    if not found:
        MISSING.append(f"{function.__module__}.{function.__qualname__}.{name}")
    return found or [None]


_REPEATS = frozenset([*_codes(_function_backward), *_codes(_checkpoint_hook, "unpack_hook")])
_STARTS = frozenset(_codes(_run_backward))


def is_recomputing() -> bool:
    """Whether this forward pass runs a block again. What a hook calls runs in a backward pass too, but for the first time.

    Without one of the names above, every forward pass in a backward pass is taken for a recomputation.
    """
    if current_graph_task_id() == -1:
        return False
    if None in _REPEATS or None in _STARTS:
        return True
    frame: Any = sys._getframe(1)
    # The code that started the backward pass is no part of it.
    while frame is not None and frame.f_code not in _STARTS:
        if frame.f_code in _REPEATS:
            return True
        frame = frame.f_back
    return False


# Selective checkpoints see the operators of a block by a dispatch mode, in its first pass and in its recomputation. If torch no
# longer tells, a layer in such a checkpoint may have wrong gradients. Other modes make fake tensors, or trace.
count_dispatch_modes = _find("torch:_C._len_torch_dispatch_stack", lambda: 0)
_dispatch_modes = _find("torch.utils._python_dispatch:_get_current_dispatch_mode_stack", list)
_without_dispatch_modes = _find("torch.utils._python_dispatch:_disable_current_modes", lambda: contextlib.nullcontext(()))
# No mode is an instance of an empty tuple.
_SELECTIVE = (
    _find("torch.utils.checkpoint:_CachingTorchDispatchMode", ()),
    _find("torch.utils.checkpoint:_CachedTorchDispatchMode", ()),
)


def is_in_selective_checkpoint() -> bool:
    """Whether a selective checkpoint sees the operators that run now."""
    return count_dispatch_modes() > 0 and any(isinstance(mode, _SELECTIVE) for mode in _dispatch_modes())


@contextlib.contextmanager
def outside_selective_checkpoints() -> Iterator[None]:
    """No selective checkpoint sees the operators that run inside. Other modes do."""
    with _without_dispatch_modes() as modes, contextlib.ExitStack() as others:
        for mode in reversed(modes):
            if not isinstance(mode, _SELECTIVE):
                others.enter_context(mode)
        yield


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

# Whether the forward and the backward graph of compiled code may change the same input. Torch 2.6 keeps the last change alone.
# Not private, but what the messages' order rests on; 2.11 is the first version after it that was run.
CHANGES_INPUTS_IN_BOTH_PASSES = torch.__version__ >= "2.11"

# A build without CUDA does not have the next two.
# The handle of the current stream without a stream object, which costs the host as much as a launch.
current_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", lambda index: torch.cuda.current_stream(index).cuda_stream)
# The same question as the public one, without a Python function around it.
is_current_stream_capturing = getattr(torch._C, "_cuda_isCurrentStreamCapturing", torch.cuda.is_current_stream_capturing)

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
