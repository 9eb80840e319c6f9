"""PyTorch's layers on GPUs, the 28 cases: µs of forward + backward (gradients of the input, gamma and beta).

Each layer runs as a user runs it. "In a CUDA graph" is the same call captured once and replayed, so without host time.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import time
from collections.abc import Callable
from typing import Any

import gpu_kernels
import torch
from baselines import ADD_RELU, COMPILED, LOCAL, ONE_REPLICA, OURS, OURS_COMPILED, TORCH_SYNC, torch_adapters
from gpu_cases import CASES, Case, chosen_cases, eager_time, graph_time, start, tensors, where, world
from timing import case_option

import syncbn

IN_GRAPH = "step in a CUDA graph"
SEVERAL = [TORCH_SYNC, ONE_REPLICA]
# Layers that are timed in a graph, by part.
LAYERS = {
    "ours": [OURS],
    "graph": [OURS, LOCAL, *SEVERAL],
    "compiled": [COMPILED],
    "compiled-more": [OURS_COMPILED, f"{LOCAL}, {ADD_RELU}, compiled", f"{OURS}, {ADD_RELU}, compiled"],
    "fused": [f"{OURS}, {ADD_RELU}", f"{OURS}, {ADD_RELU} inside"],
}
PARTS = [*LAYERS, "kernels", "between", "exchange", "eager"]


def options(parser: argparse.ArgumentParser) -> None:
    case_option(parser)
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS[1:], help="what is measured; all but `ours` unless given"
    )


class Then(torch.nn.Module):
    """A layer, then what a residual block has after it."""

    def __init__(self, layer: torch.nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.layer(x) + r)


class Fused(torch.nn.Module):
    """Ours with both inside."""

    def __init__(self, channels: int):
        super().__init__()
        self.layer = syncbn.SyncBatchNorm(channels, activation="relu")

    def forward(self, x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return self.layer(x, residual=r)


def layer_of(case: Case, name: str) -> torch.nn.Module:
    """An adapter's layer, and what its name says is done to it. float32 parameters, whatever the input's dtype."""
    if name == f"{OURS}, {ADD_RELU} inside":
        return Fused(case.shape[1])
    adapters = torch_adapters(world() > 1)
    layer = adapters[name if name in adapters else name.split(",")[0]].make(case.shape)
    layer = Then(layer) if ADD_RELU in name else layer
    return torch.compile(layer, dynamic=False) if name.endswith("compiled") else layer


def step_of(case: Case, name: str) -> Callable[[], Any]:
    """One forward and backward pass."""
    t = tensors(case)
    layer = layer_of(case, name).cuda()
    x = t.x.requires_grad_()
    inputs = [x, *layer.parameters()]
    if ADD_RELU in name:
        r = torch.randn_like(t.dy).requires_grad_()
        return lambda: torch.autograd.grad(layer(x, r), [*inputs, r], t.dy)
    return lambda: torch.autograd.grad(layer(x), inputs, t.dy)


def is_timed(case: Case, name: str) -> bool:
    """Not all layers are timed everywhere: compiling them takes long."""
    if ADD_RELU in name:
        return case.dtype == "bfloat16" if "compiled" in name else case.megabytes() >= 25
    return name not in SEVERAL or world() > 1


def warm(job: tuple[Case, str]) -> str | None:
    """Compiles in a process of its own: what it finds lies in the compilers' caches then."""
    try:
        step_of(*job)()
        torch.cuda.synchronize()
    except Exception as error:
        return repr(error)[:300]
    return None


def compile_ahead(cases: list[Case], names: list[str]) -> None:
    begin = time.time()
    jobs = [(case, name) for case in cases for name in names if is_timed(case, name) and world() == 1]
    with multiprocessing.get_context("spawn").Pool(max(1, (os.cpu_count() or 2) - 2)) as pool:
        failed = [e for e in pool.imap_unordered(warm, jobs, chunksize=2) if e]
    print("compiled in", round(time.time() - begin), "s", failed[:2], flush=True)


def copy_bandwidth() -> float:
    """Bytes a second, read and written."""
    a, b = (torch.randn(2**30, device="cuda") for _ in range(2))
    # Not in a graph, which may leave it to the copy engine.
    return 2 * 2**32 / (eager_time(lambda: b.copy_(a), 5) * 1e-6)


def measure_case(case: Case, parts: list[str], names: list[str], record: Callable[..., Any]) -> None:
    """All that runs in a graph."""
    line = []
    for name in names:
        if is_timed(case, name):
            torch._dynamo.reset()
            us = graph_time(step_of(case, name), 5 if case.megabytes() > 20 else 10, 9)
            record(measure=IN_GRAPH, subject=name, values=us)
            line.append(f"{name} {us:.1f}")
    if "kernels" in parts:
        for kernel, us in gpu_kernels.launches(case).items():
            record(measure="launch in a CUDA graph", subject=kernel, values=us)
    if "between" in parts:
        us = gpu_kernels.between_cost(case)
        record(measure=IN_GRAPH, subject="kernels with NCCL between them, one process", values=us)
        line.append(f"with NCCL between {us:.1f}")
    if "exchange" in parts and case.shape[1] <= 256 and case.megabytes() < 60:
        a, b = gpu_kernels.exchange_cost(case)
        record(measure="step of virtual replicas", subject="with the exchange", values=a)
        record(measure="step of virtual replicas", subject="without", values=b)
        line.append(f"exchange {a - b:+.1f} of {b:.1f}")
    print(case.name, "; ".join(line), flush=True)


def measure(given: argparse.Namespace, record: Callable[..., Any]) -> None:
    parts, cases, device = given.parts, chosen_cases(given), start()
    if "RANK" in os.environ:
        from syncbn.torch import peer_memory

        # Every case is captured anew, and a captured graph keeps its mailbox.
        peer_memory.MAILBOXES = 4 * len(CASES)
    elif "between" in parts:
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
        torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    names = list(dict.fromkeys(name for part in parts for name in LAYERS.get(part, [])))
    compile_ahead(cases, names)
    bandwidth = copy_bandwidth()
    print(f"copy {bandwidth / 1e12:.2f} TB/s on {torch.cuda.get_device_name()}", flush=True)
    run = {**where(device, "triton", "numpy"), "bytes per second": bandwidth}
    record = functools.partial(record, unit="µs", **run)
    for i, case in enumerate(cases):
        of_case = functools.partial(record, case=case.name, megabytes=case.megabytes(), floor=case.floor(bandwidth))
        measure_case(case, parts, names, of_case)
        if "eager" in parts and i % 3 == 0:
            for name in (OURS, LOCAL):
                of_case(measure="step from Python", subject=name, values=eager_time(step_of(case, name)))
