"""The 28 cases of the GPU benchmarks, and how they are timed."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

import torch

SHAPES = [
    (32, 64, 112, 112),
    (32, 256, 56, 56),
    (32, 512, 28, 28),
    (32, 1024, 14, 14),
    (32, 2048, 7, 7),
    (2, 256, 200, 336),
    (4, 64, 32, 32),
]
COPY_BANDWIDTH = 4.24e12  # bytes a second, read and written, of one H200


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

    def floor(self, bandwidth: float = COPY_BANDWIDTH) -> float:
        """µs to move 8 tensors: forward reads x twice and writes y, backward reads x and dy twice and writes dx."""
        return 8 * self.megabytes() * 1e12 / bandwidth

    def fold(self) -> Any:
        from syncbn.torch.triton.tiling import Fold

        n, c, h, w = self.shape
        return Fold(n * h * w, c, 1) if self.layout == "NHWC" else Fold(n, c, h * w)


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
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    del graph
    return statistics.median(times)
