"""The kernels by themselves: the only file of the benchmarks that calls `syncbn.torch.triton`, whose names are not public."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from gpu_cases import Case, event_time, graph_time, tensors

from syncbn.torch.triton import ops as fused
from syncbn.torch.triton import plan as plans
from syncbn.torch.triton.launch import Launch, power_of_2
from syncbn.torch.triton.tiling import Fold, Tile

__all__ = ["Tile", "between_cost", "calls", "exchange_cost", "fold", "launches", "make", "one_launch", "power_of_2",
           "programmatic_launch", "without_launches"]  # fmt: skip

EPSILON = 1e-5
SINGLE = {"keep": None, "slope": 0.0, "lane": None}


def fold(case: Case) -> Fold:
    """A case's tensor as the kernels see it."""
    n, c, h, w = case.shape
    return Fold(n * h * w, c, 1) if case.layout == "NHWC" else Fold(n, c, h * w)


def make(case: Case, tiles, at_once=False):
    """The plan of one replica's step, compiled."""
    how = {"scale": torch.float32, "moving": torch.float32, "moves": 1, "tiles": tiles, "at_once": at_once}
    return plans.Plan(fold(case), case.torch_dtype(), torch.device("cuda", 0), **how)


def programmatic_launch(on: bool) -> None:
    """Whether a kernel may start before the one before it has ended."""
    plans.PDL = on


def calls(plan, t):
    """The four launches of a step, each with what it needs at hand."""
    stats = fused.measure(plan, t.x, None)
    moving = fused.Moving(t.running_mean, t.running_var, t.tracked, 0.1)

    def normalize():
        return fused.normalize(plan, t.x, stats, t.weight, t.bias, EPSILON, moving=moving)

    def sums():
        return fused.gradient_sums(plan, t.x, t.dy, stats, t.weight, t.bias, EPSILON)

    message = sums()[2]

    def input_gradient():
        return fused.input_gradient(plan, t.x, t.dy, message, stats, t.weight, t.bias, EPSILON)

    return lambda: fused.measure(plan, t.x, None), normalize, sums, input_gradient


def one_launch(plan, t):
    """(forward, backward) of a plan that is resident."""
    moving = fused.Moving(t.running_mean, t.running_var, t.tracked, 0.1)

    def forward():
        return fused.forward(plan, t.x, t.weight, t.bias, EPSILON, moving=moving, residual=None, **SINGLE)

    stats = forward()[1]
    return forward, lambda: fused.backward(
        plan, t.x, t.dy, stats, t.weight, t.bias, EPSILON, saved=None, dresidual=None, **SINGLE
    )


def launches(case: Case) -> dict[str, float]:
    """µs of each of our launches alone, its input in L2 or not as the step leaves it."""
    t = tensors(case)
    moments, normalize, sums, input_gradient = calls(make(case, {}), t)
    both, back = graph_time(lambda: (moments(), normalize())), graph_time(lambda: (sums(), input_gradient()))
    first, third = graph_time(moments), graph_time(sums)
    found = {"moments": first, "normalize": both - first, "sums": third, "input_gradient": back - third}
    held = make(case, {}, at_once=True)
    if held.resident:
        found |= dict(zip(("forward", "backward"), map(graph_time, one_launch(held, t)), strict=True))
    return found


def between_cost(case: Case) -> float:
    """µs of our step with an NCCL all-reduce of one process between the kernels, as where replicas are on several hosts."""
    t = tensors(case)
    plan = plans.Plan(fold(case), case.torch_dtype(), t.x.device, scale=torch.float32, sent=True, raw=True)

    def step() -> None:
        _, message = fused.forward(
            plan, t.x, t.weight, t.bias, EPSILON, **SINGLE, residual=None, moving=None, between=torch.distributed.all_reduce
        )
        _, _, sums = fused.gradient_sums(plan, t.x, t.dy, message, t.weight, t.bias, EPSILON)
        torch.distributed.all_reduce(sums)
        fused.input_gradient(plan, t.x, t.dy, sums, message, t.weight, t.bias, EPSILON)

    return graph_time(step)


def exchange_cost(case: Case, size: int = 2) -> tuple[float, float]:
    """µs of one graph with `size` virtual replicas, with and without the exchange: each replica's whole step."""
    sys.path[:0] = [str(Path(__file__).parent.parent / "tests" / "gpu")]
    from virtual import Replicas, step

    replicas, t = Replicas(size), [tensors(case, seed) for seed in range(size)]

    def timed(steps: Callable[[int], object]) -> float:
        def all_() -> None:
            replicas.each(steps)
            replicas.join()

        all_()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(10):
                all_()
        return event_time(graph.replay, 10, 20)

    def alone(plan, rank: int) -> None:
        own = t[rank]
        stats = fused.measure(plan, own.x, None)
        fused.normalize(plan, own.x, stats, own.weight, own.bias, EPSILON)
        sums = fused.gradient_sums(plan, own.x, own.dy, stats, own.weight, own.bias, EPSILON)
        fused.input_gradient(plan, own.x, own.dy, sums[2], stats, own.weight, own.bias, EPSILON)

    with_ = replicas.plan(t[0].x, scale=torch.float32)
    without = plans.Plan(fold(case), case.torch_dtype(), t[0].x.device, scale=torch.float32)
    a = timed(lambda r: step(replicas, with_, r, t[r].x, t[r].dy, t[r].weight, t[r].bias))
    b = timed(lambda r: alone(without, r))
    said = [int(s) for s in replicas.statuses]
    assert not any(said), (said, case)
    return a, b


@contextlib.contextmanager
def without_launches() -> Iterator[None]:
    """Our kernels are not launched: what they would write stays as it was allocated."""
    real = Launch.__call__
    Launch.__call__ = lambda self, stream, *arguments: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        Launch.__call__ = real  # type: ignore[method-assign]
