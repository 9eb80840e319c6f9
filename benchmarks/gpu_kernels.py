"""The kernels by themselves: the only file of the benchmarks that calls `syncbn.torch.triton`, whose names are not public."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from gpu_cases import Case, event_time, graph_time, tensors

from syncbn.contract import Statistics
from syncbn.torch.triton import backend, launch, ops
from syncbn.torch.triton import plan as plans
from syncbn.torch.triton._private import Launcher
from syncbn.torch.triton.launch import power_of_2
from syncbn.torch.triton.plan import Plan, PlanOptions
from syncbn.torch.triton.tiling import ChannelView, SingleLaunchTile, Tile, partition_tiles, single_launch_tile

__all__ = [
    "SingleLaunchTile",
    "Tile",
    "between_cost",
    "calls",
    "channel_view",
    "default_single_launch_tile",
    "exchange_cost",
    "launches",
    "make",
    "one_launch",
    "partition_tiles",
    "power_of_2",
    "programmatic_launch",
    "without_launches",
]  # fmt: skip

EPSILON = 1e-5
ONE_REPLICA = {"mask": None, "transport": None}


def channel_view(case: Case) -> ChannelView:
    """A case's tensor as the kernels see it."""
    n, c, h, w = case.shape
    return ChannelView(n * h * w, c, 1) if case.layout == "NHWC" else ChannelView(n, c, h * w)


def make(case: Case, tiles, single_launch=False):
    """The plan of one replica's step, compiled."""
    options = PlanOptions(EPSILON, scale=torch.float32, statistics=torch.float32, update=1, single_launch=single_launch)
    return Plan(channel_view(case), case.torch_dtype(), torch.device("cuda", 0), options, tiles)


def default_single_launch_tile(case: Case, way: str) -> SingleLaunchTile | None:
    """The tile of a single launch, forward or backward, as a layer gets it."""
    itemsize = case.torch_dtype().itemsize
    machine = plans.machine_of(torch.device("cuda", 0))
    return single_launch_tile(way, channel_view(case), itemsize, 0 if way == "forward" else itemsize, machine)


def statistics(t):
    """The moving statistics, as a launch updates them."""
    return Statistics(t.running_mean, t.running_var, 0.1, True, t.tracked)


def programmatic_launch(on: bool) -> None:
    """Whether a kernel may start before the one before it has ended."""
    plans.PDL = on


def calls(plan, t):
    """The four launches of a step, each with what it needs at hand."""
    stats, moving = ops.measure(plan, t.x, None), statistics(t)

    def normalize():
        return ops.normalize(plan, t.x, stats, t.weight, t.bias, statistics=moving)

    def sums():
        return ops.gradient_sums(plan, t.x, t.dy, stats, t.weight, t.bias)

    message = sums()[2]

    def input_gradient():
        return ops.input_gradient(plan, t.x, t.dy, message, stats, t.weight, t.bias)[0]

    return lambda: ops.measure(plan, t.x, None), normalize, sums, input_gradient


def one_launch(plan, t):
    """(forward, backward) of a plan, of a single launch each way where it has one."""
    moving = statistics(t)

    def forward():
        return ops.forward(plan, t.x, t.weight, t.bias, statistics=moving, residual=None, **ONE_REPLICA)

    stats = forward()[1]
    return forward, lambda: ops.backward(plan, t.x, t.dy, stats, t.weight, t.bias, saved=None, **ONE_REPLICA)


def launches(case: Case) -> dict[str, float]:
    """µs of each of our launches alone, its input in L2 or not as the step leaves it."""
    t = tensors(case)
    moments, normalize, sums, input_gradient = calls(make(case, {}), t)
    both, back = graph_time(lambda: (moments(), normalize())), graph_time(lambda: (sums(), input_gradient()))
    first, third = graph_time(moments), graph_time(sums)
    found = {"moments": first, "normalize": both - first, "sums": third, "input_gradient": back - third}
    single = make(case, {}, single_launch=True)
    forward, backward = one_launch(single, t)
    if single.forward:
        found["forward"] = graph_time(forward)
    if single.backward:
        found["backward"] = graph_time(backward)
    return found


def between_cost(case: Case) -> float:
    """µs of our step with an NCCL all-reduce of one process between the kernels, as where replicas are on several hosts."""
    t = tensors(case)
    options = PlanOptions(EPSILON, scale=torch.float32, partial_sums=True, reduced_sums=True)
    plan = Plan(channel_view(case), case.torch_dtype(), t.x.device, options)
    given = {"mask": None, "transport": torch.distributed.all_reduce}

    def step() -> None:
        _, message = ops.forward(plan, t.x, t.weight, t.bias, residual=None, statistics=None, **given)
        ops.backward(plan, t.x, t.dy, message, t.weight, t.bias, saved=None, **given)

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
        stats = ops.measure(plan, own.x, None)
        ops.normalize(plan, own.x, stats, own.weight, own.bias)
        _, _, message = ops.gradient_sums(plan, own.x, own.dy, stats, own.weight, own.bias)
        ops.input_gradient(plan, own.x, own.dy, message, stats, own.weight, own.bias)

    with_ = replicas.plan(t[0].x, scale=torch.float32)
    options = PlanOptions(EPSILON, scale=torch.float32)
    without = Plan(channel_view(case), case.torch_dtype(), t[0].x.device, options)
    a = timed(lambda r: step(replicas, with_, r, t[r].x, t[r].dy, t[r].weight, t[r].bias))
    b = timed(lambda r: alone(without, r))
    said = [int(s) for s in replicas.statuses]
    assert not any(said), (said, case)
    return a, b


@contextlib.contextmanager
def without_launches() -> Iterator[None]:
    """Our kernels are not launched: what they would write stays as it was allocated."""
    real = launch.launcher_of
    launch.launcher_of = lambda compiled: Launcher(lambda *arguments: None, (), False)
    try:
        _forget_plans()
        yield
    finally:
        launch.launcher_of = real
        _forget_plans()


def _forget_plans() -> None:
    # A plan keeps the launcher that it was made with.
    backend._plans.clear()
    backend._step_plans.clear()
