"""PyTorch: which kernels run here and why, and a known batch over the replicas that were started."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch
import torch.distributed as dist

from syncbn.doctor import Report, merged, version


def report() -> Report:
    """Synchronises a known batch over the ranks, and compares with plain batch norm in float64 on the whole batch.

    Every rank of torchrun must call it. The report holds the lines of all ranks.
    """
    from syncbn.torch.dispatch import asked_for, cuda_kernels

    # A wrong setting raises before the ranks meet: on all of them.
    lines = [("torch", torch.__version__), ("triton", version("triton")), ("SYNCBN_KERNELS", asked_for())]
    device = _join()
    lines += [
        ("replicas", _replicas()),
        ("host", platform.node()),
        ("device", _name(device)),
        ("kernels", _path(device, cuda_kernels())),
        ("exchange", _exchange(device)),
    ]
    errors = _errors(device)
    if not (dist.is_available() and dist.is_initialized()):
        return Report(lines, 1, errors)
    each: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(each, lines)
    found = Report(merged(each), len(each), errors)
    if _JOINED:
        dist.destroy_process_group()
    return found


# Whether this module made the process group.
_JOINED: list[bool] = []


def _name(device: torch.device) -> str:
    if device.type != "cuda":
        return "CPU"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"


def _join() -> torch.device:
    """This replica's device; joins the others where there are any."""
    cuda = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ and dist.is_available() and not dist.is_initialized():
        # NCCL refuses two ranks on one GPU.
        enough = cuda and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= torch.cuda.device_count()
        dist.init_process_group("nccl" if enough else "gloo")
        _JOINED.append(True)
    return device


def _replicas() -> str:
    if not (dist.is_available() and dist.is_initialized()):
        return "1 (torchrun starts several)"
    return f"{dist.get_world_size()} over {dist.get_backend()}"


def _path(device: torch.device, kernels: Any) -> str:
    if device.type != "cuda":
        return "torch operators on the CPU: there is no CUDA device"
    if kernels is None:
        return "torch operators: Triton is not there, or SYNCBN_KERNELS=eager"
    if not kernels.runs_on(device.index):
        return "torch operators: the GPU is older than sm_80"
    return "Triton, on CUDA tensors" + launcher_note()


def launcher_note() -> str:
    """What is to be said of how kernels are launched: nothing where it is the fast way."""
    import triton

    from syncbn.torch.triton import _private

    if _private.has_known_launcher():
        return ""
    known = " or ".join(version.rstrip(".") for version in _private.KNOWN_VERSIONS)
    return f" (by Triton's own launcher, which is slower: Triton is {triton.__version__}, not {known})"


def _exchange(device: torch.device) -> str:
    from syncbn.torch import peer_memory
    from syncbn.torch.groups import communicator_of

    communicator = communicator_of(None)
    if communicator is None:
        return "none: there is one replica"
    if peer_memory.mailbox_of(communicator, device) is not None:
        return "peer memory, inside the kernels"
    why = "" if peer_memory.ENABLED else " (SYNCBN_PEER_MEMORY=0)"
    return f"one all-reduce of the group's backend each way{why}"


def _errors(device: torch.device) -> dict[str, float]:
    """The largest error of each quantity over the replicas, relative to the largest value."""
    import syncbn

    many = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if many else (0, 1)
    generator = torch.Generator().manual_seed(0)
    # Replicas differ in size, mean and spread.
    xs = [torch.randn(2 + r, 8, 5, 5, generator=generator) * (1 + r) + 3 * r for r in range(world)]
    dys = [torch.randn(x.shape, generator=generator) for x in xs]
    layer = syncbn.SyncBatchNorm(8).to(device)
    x = xs[rank].to(device, copy=True).requires_grad_()
    y = layer(x)
    y.backward(dys[rank].to(device))
    whole = torch.cat(xs).double().requires_grad_()
    right = torch.nn.functional.batch_norm(whole, None, None, None, None, True, 0.0, layer.eps)
    right.backward(torch.cat(dys).double())
    start = sum(map(len, xs[:rank]))
    mine = slice(start, start + len(x))
    flat = whole.detach().transpose(0, 1).flatten(1)
    assert whole.grad is not None
    assert x.grad is not None
    pairs: dict[str, tuple[Any, Any]] = {
        "running_mean": (layer.running_mean, 0.1 * flat.mean(1)),
        "running_var": (layer.running_var, 0.9 + 0.1 * flat.var(1)),
        "output": (y.detach(), right.detach()[mine]),
        "input gradient": (x.grad, whole.grad[mine]),
    }
    errors = [float((got.double().cpu() - want).abs().max() / want.abs().max()) for got, want in pairs.values()]
    found = torch.tensor(errors, device=device)
    if many:
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return dict(zip(pairs, found.tolist(), strict=True))
