"""Where the host's time goes, with PyTorch on GPUs; on several GPUs the exchange is included.

µs of the host for one layer out of 20 in a row, forward and backward; the GPU's part is far smaller. Each line does more than the one
before it, so that differences say what a step costs.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from baselines import ONE_REPLICA, OURS, torch_adapters
from gpu_cases import start, where, world
from gpu_kernels import without_launches
from timing import case_name

SHAPE, DEPTH, ROUNDS = (4, 64, 8, 8), 20, 40
WITHOUT = "syncbn without launches"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=2, help="each gives two rows per layer, forward and backward")


class Function(torch.autograd.Function):
    """As ours, saving as much; `allocates` as much too, or nothing."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, allocates: bool) -> Any:
        ctx.allocates = allocates
        if not allocates:
            ctx.save_for_backward(x, weight, bias, weight)
            return x.view_as(x)
        stats = torch.empty(129, dtype=torch.float64, device=x.device)
        ctx.save_for_backward(x, weight, bias, stats)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, dy: Any) -> Any:
        x, weight, bias, _ = ctx.saved_tensors
        if not ctx.allocates:
            return dy, weight, bias, None
        torch.empty(320, dtype=torch.float32, device=x.device)
        return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias), None


_apply = super(torch.autograd.Function, Function).apply


class Applies(torch.nn.BatchNorm2d):
    """A layer that is such a function."""

    allocates = False

    def forward(self, x: Any) -> Any:
        return _apply(x, self._parameters["weight"], self._parameters["bias"], self.allocates)


class Allocates(Applies):
    allocates = True


class Nothing(torch.nn.Module):
    def forward(self, x: Any) -> Any:
        return x


def host_times(layer: Callable[[], torch.nn.Module]) -> tuple[float, float]:
    """(forward, backward)."""
    x = torch.randn(*SHAPE, device="cuda", requires_grad=True)
    dy = torch.randn_like(x)
    chain = torch.nn.Sequential(*[layer() for _ in range(DEPTH)]).cuda()
    there, back = [], []
    for turn in range(ROUNDS + 5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        y = chain(x)
        middle = time.perf_counter()
        torch.autograd.backward(y, dy)
        end = time.perf_counter()
        torch.cuda.synchronize()
        if turn >= 5:
            there.append((middle - start) * 1e6 / DEPTH)
            back.append((end - middle) * 1e6 / DEPTH)
    return statistics.median(there), statistics.median(back)


def measure(given: argparse.Namespace, record: Callable[..., Any]) -> None:
    device, C = start(), SHAPE[1]
    adapters = torch_adapters(world() > 1)
    ours = partial(adapters[OURS].make, SHAPE)
    host_times(ours)
    layers: dict[str, Callable[[], torch.nn.Module]] = {
        "a module that does nothing": Nothing,
        "an empty autograd function": lambda: Applies(C),
        "and its allocations": lambda: Allocates(C),
        WITHOUT: ours,
        **{name: partial(adapter.make, SHAPE) for name, adapter in adapters.items() if name != ONE_REPLICA},
    }
    name = f"{case_name(SHAPE)}, {DEPTH} in a row"
    record = partial(record, case=name, unit="µs", **where(device, "triton", "numpy"))
    for _ in range(given.rounds):
        for subject in layers:
            with without_launches() if subject == WITHOUT else contextlib.nullcontext():
                forward, backward = host_times(layers[subject])
            record(measure="host time per layer, forward", subject=subject, values=forward)
            record(measure="host time per layer, backward", subject=subject, values=backward)
            print(f"{subject:28} forward {forward:6.1f}  backward {backward:6.1f}  both {forward + backward:6.1f}", flush=True)
