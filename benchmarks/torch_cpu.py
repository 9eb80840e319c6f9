"""PyTorch on the CPU: one layer forward + backward, on one process beside torch's local layer, on two over gloo too."""

from __future__ import annotations

import multiprocessing
import socket
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from rows import quantiles

SHAPES = [(32, 64, 56, 56), (8, 256, 14, 14), (64, 512)]


def local(channels: int, rank: int) -> Any:
    """Torch's layer that does not synchronise."""
    import torch.nn as nn

    return nn.BatchNorm2d(channels) if rank == 4 else nn.BatchNorm1d(channels)


def ours(channels: int, rank: int) -> Any:
    import syncbn

    return syncbn.SyncBatchNorm(channels)


def ours_by_eager(channels: int, rank: int) -> Any:
    """Our layer on the reference kernels."""
    import torch.nn as nn

    import syncbn
    from syncbn.torch import cpu as native
    from syncbn.torch import dispatch as choice

    serves = native.serves

    class ByEager(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = syncbn.SyncBatchNorm(channels)
            self.weight, self.bias = self.layer.weight, self.layer.bias

        def forward(self, x: Any) -> Any:
            choice.native.serves = lambda x, mask: False
            y = self.layer(x)
            choice.native.serves = serves
            return y

    return ByEager()


def local_with_bare_all_reduces(channels: int, rank: int) -> Any:
    """Torch's local layer, and two all-reduces of the sizes of ours at the same places: what any synchronised layer pays."""
    import torch
    import torch.distributed as dist
    import torch.nn as nn

    class Bare(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            dist.all_reduce(torch.zeros(1 + 2 * channels, dtype=torch.float64))
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, dx: Any) -> Any:
            dist.all_reduce(torch.zeros(2 * channels, dtype=torch.float64))
            return dx

    class WithBare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = local(channels, rank)
            self.weight, self.bias = self.layer.weight, self.layer.bias

        def forward(self, x: Any) -> Any:
            return self.layer(Bare.apply(x))

    return WithBare()


PEERS: dict[int, dict[str, Callable[..., Any]]] = {
    1: {"syncbn": ours, "torch local": local},
    2: {
        "syncbn": ours,
        "torch local + 2 bare all_reduces": local_with_bare_all_reduces,
        "syncbn, reference kernels": ours_by_eager,
    },
}


def times(rounds: int) -> list[dict[str, Any]]:
    """Rows of seconds per step; peers take turns within each round, in an order that rotates. Two threads in all."""
    rows = []
    for replicas in PEERS:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        answers = context.Queue()
        processes = [context.Process(target=_measure, args=(r, replicas, address, rounds, answers)) for r in range(replicas)]
        for process in processes:
            process.start()
        rows += answers.get(timeout=600)
        for process in processes:
            process.join(30)
    return rows


def _measure(rank: int, replicas: int, address: str, rounds: int, answers: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(2 // replicas)
    if replicas > 1:
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=replicas)
    rows = []
    for shape in SHAPES:
        torch.manual_seed(rank)
        x, dy = torch.randn(shape).requires_grad_(), torch.randn(shape)
        layers = {name: make(shape[1], len(shape)) for name, make in PEERS[replicas].items()}

        def step(layer: Any, x: Any = x, dy: Any = dy) -> None:
            torch.autograd.grad(layer(x), [x, layer.weight, layer.bias], dy)

        # Each step is timed by itself, so that what else the machine does spoils few of them.
        repeats = 2 if np.prod(shape) > 1_000_000 else 40
        seconds: dict[str, list[float]] = {name: [] for name in layers}
        order = list(layers)
        for turn in range(rounds + 2):
            for name in order:
                if replicas > 1:
                    dist.barrier()
                for _ in range(repeats):
                    start = time.perf_counter()
                    step(layers[name])
                    if turn > 1:
                        seconds[name].append(time.perf_counter() - start)
            order = order[1:] + order[:1]
        common = {"quantity": "seconds per step", "dtype": "float32", "shape": shape, "replicas": replicas, "rounds": rounds}
        rows += [{"peer": name, **common, "best": min(taken), **quantiles(taken)} for name, taken in seconds.items()]
    if rank == 0:
        answers.put(rows)
    if replicas > 1:
        dist.destroy_process_group()


def host_microseconds(layers: int = 20, rounds: int = 200) -> list[dict[str, Any]]:
    """Rows of host time a layer in a chain of small layers on one process: what Python and autograd cost."""
    import torch

    import syncbn

    torch.set_num_threads(1)

    def chain(make: Callable[[], Any], through_autograd: bool) -> Callable[[], None]:
        norms = [make() for _ in range(layers)]
        x, dy = torch.randn(2, 4).requires_grad_(), torch.randn(2, 4)
        if through_autograd:
            for norm in norms:
                norm._suits_torchs_own = lambda x: False  # our own function, as with several replicas

        def step() -> None:
            y = x
            for norm in norms:
                y = norm(y)
            y.backward(dy)

        return step

    peers = {
        "syncbn": chain(lambda: syncbn.SyncBatchNorm(4), False),
        "syncbn, through its own function": chain(lambda: syncbn.SyncBatchNorm(4), True),
        "torch local": chain(lambda: torch.nn.BatchNorm1d(4), False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(rounds):
        for name, step in peers.items():
            start = time.perf_counter()
            step()
            seconds[name].append((time.perf_counter() - start) / layers)
    common = {"quantity": "host seconds per layer", "dtype": "float32", "shape": (2, 4), "replicas": 1, "rounds": rounds}
    return [{"peer": name, **common, "best": min(taken), **quantiles(taken)} for name, taken in seconds.items()]
