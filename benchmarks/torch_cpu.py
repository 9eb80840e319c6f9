"""PyTorch on the CPU: forward + backward of one layer, on one process and on two over gloo; and host time per layer.

One process is compared with torch's local layer. Two are compared with torch's local layer and two bare all-reduces.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import socket
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from baselines import OURS, Adapter, torch_adapters
from rows import quantiles
from timing import case_name, case_option, chosen, in_turns, rounds_option, seconds
from torch import nn

from syncbn.torch import cpu, engine

SHAPES = [(32, 64, 56, 56), (8, 256, 14, 14), (64, 512)]
REPLICAS = (1, 2)


def options(parser: argparse.ArgumentParser) -> None:
    case_option(parser)
    rounds_option(parser, 15)


def measure(given: argparse.Namespace, record: Callable[..., Any]) -> None:
    record = functools.partial(record, unit="s", versions=("torch", "numpy"), dtype="float32")
    for row in times(chosen(SHAPES, given.cases, case_name), given.rounds) + host_times():
        record(**row)


class Wrapped(nn.Module):
    """A layer that runs by `call(layer, x)`."""

    def __init__(self, layer: Any, call: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.layer, self.call = layer, call
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Any) -> Any:
        return self.call(self.layer, x)


def by_reference(layer: Any, x: Any) -> Any:
    """On the reference kernels."""
    serves, cpu.serves = cpu.serves, lambda x, mask: False
    y = layer(x)
    cpu.serves = serves
    return y


class Bare(torch.autograd.Function):
    """Two all-reduces of the sizes of ours at the same places: what any synchronised layer pays."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        ctx.channels = x.shape[1]
        dist.all_reduce(torch.zeros(1 + 2 * ctx.channels, dtype=torch.float64))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Any) -> Any:
        dist.all_reduce(torch.zeros(2 * ctx.channels, dtype=torch.float64))
        return dx


def adapters(replicas: int) -> dict[str, Adapter]:
    ours, local = torch_adapters(False).values()
    if replicas == 1:
        return {OURS: ours, "torch local": local}
    return {
        OURS: ours,
        "torch local + 2 bare all_reduces": Adapter(
            lambda shape: Wrapped(local.make(shape), lambda layer, x: layer(Bare.apply(x)))
        ),
        "syncbn, reference kernels": Adapter(lambda shape: Wrapped(ours.make(shape), by_reference)),
    }


def times(shapes: list[tuple[int, ...]], rounds: int) -> list[dict[str, Any]]:
    """Seconds per step, two threads in all."""
    rows = []
    for replicas in REPLICAS:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        answers = context.Queue()
        given = [(rank, replicas, address, shapes, rounds, answers) for rank in range(replicas)]
        processes = [context.Process(target=_measure, args=arguments) for arguments in given]
        for process in processes:
            process.start()
        rows += answers.get(timeout=600)
        for process in processes:
            process.join(30)
    return rows


def _measure(rank: int, replicas: int, address: str, shapes: list[tuple[int, ...]], rounds: int, answers: Any) -> None:
    torch.set_num_threads(2 // replicas)
    if replicas > 1:
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=replicas)
    rows = []
    for shape in shapes:
        torch.manual_seed(rank)
        x, dy = torch.randn(shape).requires_grad_(), torch.randn(shape)
        repeats = 2 if np.prod(shape) > 1_000_000 else 40

        def step_of(adapter: Adapter, shape: Any = shape, x: Any = x, dy: Any = dy) -> Callable[[], Any]:
            layer = adapter.make(shape)
            return lambda: torch.autograd.grad(layer(x), [x, layer.weight, layer.bias], dy)

        # Each step is timed by itself, so that what else the machine does spoils few of them.
        def timed(step: Callable[[], Any], repeats: int = repeats) -> list[float]:
            if replicas > 1:
                dist.barrier()
            return [seconds(step) for _ in range(repeats)]

        steps = {name: step_of(adapter) for name, adapter in adapters(replicas).items()}
        in_turns(steps, 2, timed)
        found = {name: list(chain(*taken)) for name, taken in in_turns(steps, rounds, timed).items()}
        common = {"case": case_name(shape), "measure": "step", "shape": shape, "replicas": replicas, "rounds": rounds}
        rows += [{"subject": name, **common, "values": spread(taken)} for name, taken in found.items()]
    if rank == 0:
        answers.put(rows)
    if replicas > 1:
        dist.destroy_process_group()


def spread(taken: list[float]) -> dict[str, float]:
    return {"best": min(taken), **quantiles(taken)}


def host_times(layers: int = 20, rounds: int = 200) -> list[dict[str, Any]]:
    """Host time per layer in a chain of small layers on one process: what Python and autograd cost."""
    torch.set_num_threads(1)
    shape = (2, 4)
    ours, local = torch_adapters(False).values()

    def step_of(adapter: Adapter, through_autograd: bool = False) -> Callable[[], None]:
        norms = [adapter.make(shape) for _ in range(layers)]
        x, dy = torch.randn(shape).requires_grad_(), torch.randn(shape)

        def step() -> None:
            y = x
            for norm in norms:
                y = norm(y)
            y.backward(dy)

        def step_through_autograd() -> None:
            native, engine.can_use_native = engine.can_use_native, lambda *given: False
            step()
            engine.can_use_native = native

        # Our own function, as with several replicas.
        return step_through_autograd if through_autograd else step

    steps = {OURS: step_of(ours), "syncbn, through its own function": step_of(ours, True), "torch local": step_of(local)}
    found = in_turns(steps, rounds, lambda step: seconds(step) / layers)
    common = {
        "case": f"{case_name(shape)}, {layers} in a row",
        "measure": "host time per layer",
        "shape": shape,
        "rounds": rounds,
    }
    return [{"subject": name, **common, "values": spread(taken)} for name, taken in found.items()]
