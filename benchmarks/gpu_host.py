"""Where the host's time goes: `python benchmarks/gpu_host.py [OUT]`; on several GPUs under torchrun, the exchange included.

µs of the host for one layer out of 20 in a row, forward and backward; the GPU's part is far smaller. Each line does more than the one
before it, so that differences say what a step costs.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rows import provenance

import syncbn
from syncbn.torch.triton.launch import Launch

SHAPE, DEPTH, ROUNDS = (4, 64, 8, 8), 20, 40


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


@contextlib.contextmanager
def without_launches() -> Iterator[None]:
    """Our kernels are not launched: what they would write stays as it was allocated."""
    real = Launch.__call__
    Launch.__call__ = lambda self, stream, *arguments: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        Launch.__call__ = real  # type: ignore[method-assign]


def measure(layer: Callable[[], torch.nn.Module]) -> tuple[float, float]:
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


def main() -> None:
    if "RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    C, rows = SHAPE[1], []
    ours = lambda: syncbn.SyncBatchNorm(C)  # noqa: E731
    measure(ours)
    layers: list[tuple[str, Callable[[], torch.nn.Module]]] = [
        ("a module that does nothing", Nothing),
        ("an empty autograd function", lambda: Applies(C)),
        ("and its allocations", lambda: Allocates(C)),
        ("syncbn without launches", ours),
        ("syncbn", ours),
        ("BatchNorm2d", lambda: torch.nn.BatchNorm2d(C)),
    ]
    if torch.distributed.is_initialized():
        layers.append(("torch SyncBatchNorm", lambda: torch.nn.SyncBatchNorm(C)))
    for _ in range(2):
        for name, layer in layers:
            with without_launches() if "without" in name else contextlib.nullcontext():
                forward, backward = measure(layer)
            rows.append({"benchmark": "gpu host", "what": name, "forward": forward, "backward": backward})
            print(f"{name:28} forward {forward:6.1f}  backward {backward:6.1f}  both {forward + backward:6.1f}", flush=True)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        replicas = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        more = {**provenance("torch", "triton", "numpy"), "device": torch.cuda.get_device_name(), "replicas": replicas}
        out = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parent / "results" / "gpu-host.jsonl")
        Path(out).write_text("".join(json.dumps({**row, **more}) + "\n" for row in rows))


if __name__ == "__main__":
    main()
