"""What PyTorch's suites on GPUs share: the 28 cases, how they are timed, and where they run."""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from timing import chosen

SHAPES = [
    (32, 64, 112, 112),
    (32, 256, 56, 56),
    (32, 512, 28, 28),
    (32, 1024, 14, 14),
    (32, 2048, 7, 7),
    (2, 256, 200, 336),
    (4, 64, 32, 32),
]


class Case(NamedTuple):
    """One tensor: per GPU, written N×C×H×W whatever the layout."""

    dtype: str
    layout: str
    shape: tuple[int, int, int, int]

    @property
    def name(self) -> str:
        return f"{self.dtype} {self.layout} {'×'.join(map(str, self.shape))}"

    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def megabytes(self) -> float:
        """The size of the input."""
        n, c, h, w = self.shape
        return n * c * h * w * self.torch_dtype().itemsize / 1e6

    def floor(self, bandwidth: float) -> float:
        """µs to move 8 tensors: forward reads x twice and writes y, backward reads x and dy twice and writes dx."""
        return 8 * self.megabytes() * 1e12 / bandwidth


CASES = [Case(dtype, layout, shape) for dtype in ("bfloat16", "float32") for layout in ("NCHW", "NHWC") for shape in SHAPES]


class Tensors(NamedTuple):
    x: torch.Tensor
    dy: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    running_mean: torch.Tensor
    running_var: torch.Tensor
    tracked: torch.Tensor


def tensors(case: Case, seed: int = 0) -> Tensors:
    """Random data on the GPU; the mean is not 0."""
    g = torch.Generator("cuda").manual_seed(seed)
    format_ = torch.channels_last if case.layout == "NHWC" else torch.contiguous_format
    c = case.shape[1]
    draw = lambda *size: torch.randn(*size, device="cuda", generator=g)  # noqa: E731
    x = (draw(*case.shape) + 1).to(case.torch_dtype()).contiguous(memory_format=format_)
    dy = draw(*case.shape).to(case.torch_dtype()).contiguous(memory_format=format_)
    zeros, ones = torch.zeros(c, device="cuda"), torch.ones(c, device="cuda")
    return Tensors(x, dy, draw(c), draw(c), zeros, ones, torch.zeros((), dtype=torch.int64, device="cuda"))


def chosen_cases(given: argparse.Namespace) -> list[Case]:
    return chosen(CASES, given.cases, lambda case: case.name)


def graph_time(step: Any, calls: int = 10, replays: int = 5) -> float:
    """Median µs of one call in a CUDA graph that holds `calls` of them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Not "global": NCCL's own thread looks after its events meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(calls):
            step()
    graph.replay()
    return event_time(graph.replay, calls, replays)


def eager_time(step: Callable[[], Any], rounds: int = 30) -> float:
    """Median µs of one call from Python."""
    for _ in range(5):
        step()

    def calls() -> None:
        for _ in range(rounds):
            step()

    return event_time(calls, rounds, 5)


def event_time(work: Callable[[], Any], calls: int, times: int) -> float:
    """µs by CUDA events, the median of so many times, of one of the calls that `work` holds."""
    found = []
    for _ in range(times):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) * 1e3 / calls)
    return statistics.median(found)


def start() -> torch.device:
    """This process's device, and its group under torchrun."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if on_gpu else "gloo", **({"device_id": device} if on_gpu else {}))
    return device


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def where(device: torch.device, *packages: str) -> dict[str, Any]:
    """What all rows of a run say: replicas, how their messages travel, device and versions."""
    on_gpu = device.type == "cuda"
    return {
        "replicas": world(),
        "transport": transport(device),
        "device": torch.cuda.get_device_name() if on_gpu else None,
        "cuda": torch.version.cuda,
        "versions": ("torch", *packages),
    }


def transport(device: torch.device) -> str:
    """How our replicas' messages travel."""
    if world() == 1:
        return "none"
    from syncbn.torch.groups import communicator_of
    from syncbn.torch.peer_memory import mailbox_of

    return "all-reduce" if mailbox_of(communicator_of(None), device) is None else "peer memory"
