"""What `syncbn doctor` says: which path runs for torch here and why, and whether its numbers are right."""

from __future__ import annotations

import importlib.util
from typing import Any


def report() -> tuple[list[tuple[str, str]], bool]:
    """(lines of a name and what was found, whether all is well). Started alone or under torchrun, on every replica.

    Synchronises a known batch over the replicas that it is started with and compares moments, output and gradient with plain
    batch norm in float64 on the whole batch.
    """
    if importlib.util.find_spec("torch") is None:
        return [("torch", "not installed")], False
    import torch

    from syncbn.torch.dispatch import asked_for, cuda_kernels

    device = _join()
    lines = [("torch", torch.__version__), ("triton", _version("triton")), ("SYNCBN_KERNELS", asked_for())]
    if device.type == "cuda":
        lines.append(
            ("device", f"{torch.cuda.get_device_name(device)}, compute capability {torch.cuda.get_device_capability(device)}")
        )
    lines += [("replicas", _replicas()), ("kernels", _path(device, cuda_kernels())), ("exchange", _exchange(device))]
    wrong = _errors(device)
    lines += [
        (f"error of {name}", f"{error:.1e} ({'right' if error <= limit else 'WRONG'}: at most {limit:.0e})")
        for name, error, limit in wrong
    ]
    return lines, all(error <= limit for _, error, limit in wrong)


def _version(package: str) -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _join() -> Any:
    """This replica's device; joins the others where there are any."""
    import os

    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ and dist.is_available() and not dist.is_initialized():
        # NCCL refuses two ranks on one GPU.
        enough = cuda and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= torch.cuda.device_count()
        dist.init_process_group("nccl" if enough else "gloo")
    return device


def _replicas() -> str:
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return "1 (not started by torchrun)"
    return f"{dist.get_world_size()} over {dist.get_backend()}"


def _path(device: Any, kernels: Any) -> str:
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


def _exchange(device: Any) -> str:
    from syncbn.torch import peer_memory
    from syncbn.torch.groups import communicator_of

    communicator = communicator_of(None)
    if communicator is None:
        return "none: there is one replica"
    if peer_memory.mailbox_of(communicator, device) is not None:
        return "peer memory, inside the kernels"
    why = "" if peer_memory.ENABLED else " (SYNCBN_PEER_MEMORY=0)"
    return f"one all-reduce of the group's backend each way{why}"


def _errors(device: Any) -> list[tuple[str, float, float]]:
    """(quantity, largest error over the replicas relative to the largest value, what is allowed)."""
    import torch
    import torch.distributed as dist

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
    pairs = [
        ("running_mean", layer.running_mean, 0.1 * flat.mean(1)),
        ("running_var", layer.running_var, 0.9 + 0.1 * flat.var(1)),
        ("output", y.detach(), right.detach()[mine]),
        ("input gradient", x.grad, whole.grad[mine]),
    ]
    found = torch.tensor(
        [float((got.double().cpu() - want).abs().max() / want.abs().max()) for _, got, want in pairs], device=device
    )
    if many:
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return [(name, float(error), 1e-5) for (name, _, _), error in zip(pairs, found, strict=True)]
