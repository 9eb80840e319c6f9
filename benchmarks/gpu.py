"""Ours beside its peers on a GPU, the 28 cases: `python benchmarks/gpu.py [OUT]`; on several GPUs under torchrun.

Rows: benchmark, what ("graph", "eager", "host", …), peer, case, µs of forward + backward (gradients of the input, gamma and beta).
Each layer runs as a user runs it; "graph" is the same call captured once and replayed, so without host time.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_cases import CASES, Case, graph_time, tensors
from gpu_figures import ALONE, TORCHS
from rows import RESULTS, provenance, write

import syncbn

ALL = "host,graph,compiled,compiled too,fused,kernels,between,exchange,eager"
ADD_RELU = "then add and ReLU"


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


def layers(case: Case) -> dict[str, Callable[[], torch.nn.Module]]:
    """Peers by name. float32 parameters, whatever the input's dtype."""
    C = case.shape[1]
    bn, ours = (lambda: torch.nn.BatchNorm2d(C)), (lambda: syncbn.SyncBatchNorm(C))
    found = {
        "syncbn": ours,
        "BatchNorm2d": bn,
        "BatchNorm2d, compiled": lambda: torch.compile(bn(), dynamic=False),
        "syncbn, compiled": lambda: torch.compile(ours(), dynamic=False),
        f"syncbn, {ADD_RELU}": lambda: Then(ours()),
        f"syncbn, {ADD_RELU} inside": lambda: Fused(C),
        f"BatchNorm2d, {ADD_RELU}, compiled": lambda: torch.compile(Then(bn()), dynamic=False),
        f"syncbn, {ADD_RELU}, compiled": lambda: torch.compile(Then(ours()), dynamic=False),
    }
    if several():
        found[TORCHS] = lambda: torch.nn.SyncBatchNorm(C)
        found[ALONE] = lambda: syncbn.SyncBatchNorm(C, group_size=1)
    return found


def step_of(case: Case, peer: str) -> Callable[[], Any]:
    """One forward and backward pass."""
    t = tensors(case)
    layer = layers(case)[peer]().cuda()
    x = t.x.requires_grad_()
    inputs = [x, *layer.parameters()]
    if ADD_RELU in peer:
        r = torch.randn_like(t.dy).requires_grad_()
        return lambda: torch.autograd.grad(layer(x, r), [*inputs, r], t.dy)
    return lambda: torch.autograd.grad(layer(x), inputs, t.dy)


def measured(case: Case, peer: str) -> bool:
    """Not all peers are timed everywhere: compiling them takes long."""
    if ADD_RELU in peer:
        return case.dtype == "bfloat16" if "compiled" in peer else case.megabytes() >= 25
    return True


def warm(job: tuple[int, str]) -> str | None:
    """Compiles in a process of its own: what it finds lies in the compilers' caches then."""
    try:
        step_of(CASES[job[0]], job[1])()
        torch.cuda.synchronize()
    except Exception as error:
        return repr(error)[:300]
    return None


def host_time(layer: torch.nn.Module, x: torch.Tensor, depth: int = 20, rounds: int = 30) -> float:
    """µs of the host for one layer, forward + backward, in a chain of them; the GPU's part is far smaller."""
    x = x.requires_grad_()
    dy = torch.randn_like(x)
    chain = torch.nn.Sequential(*[layer() for _ in range(depth)]).cuda()
    for _ in range(5):
        chain(x).backward(dy)
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        chain(x).backward(dy)
        times.append((time.perf_counter() - start) * 1e6 / depth)
        torch.cuda.synchronize()
    return statistics.median(times)


def several() -> bool:
    """Whether other replicas run this too."""
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def transport() -> str:
    """How our replicas' messages travel."""
    if not several():
        return "none"
    from syncbn.torch import groups as torch_groups
    from syncbn.torch import peer_memory as torch_lanes

    lane = torch_lanes.lane_of(torch_groups.link_of(None), torch.device("cuda", torch.cuda.current_device()))
    return "all-reduce" if lane is None else "peer memory"


def copy_bandwidth() -> float:
    """Bytes a second, read and written."""
    a, b = (torch.randn(2**30, device="cuda") for _ in range(2))
    # Not in a graph, which may leave it to the copy engine.
    return 2 * 2**32 / (eager_time(lambda: b.copy_(a), 5) * 1e-6)


def kernels(case: Case) -> dict[str, float]:
    """µs of each of our launches alone, its input in L2 or not as the step leaves it."""
    from gpu_tiles import calls, make, one_launch

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
    from syncbn.torch.triton import ops as fused
    from syncbn.torch.triton import plan as plans

    t = tensors(case)
    plan = plans.Plan(case.fold(), case.torch_dtype(), t.x.device, scale=torch.float32, sent=True, raw=True)

    def step() -> None:
        _, message = fused.forward(
            plan, t.x, t.weight, t.bias, 1e-5, keep=None, residual=None, slope=0.0, moving=None, lane=None,
            between=torch.distributed.all_reduce,
        )  # fmt: skip
        _, _, sums = fused.gradient_sums(plan, t.x, t.dy, message, t.weight, t.bias, 1e-5)
        torch.distributed.all_reduce(sums)
        fused.input_gradient(plan, t.x, t.dy, sums, message, t.weight, t.bias, 1e-5)

    return graph_time(step)


def exchange_cost(case: Case, size: int = 2) -> tuple[float, float]:
    """µs of one graph with `size` virtual replicas, with and without the exchange: each replica's whole step."""
    sys.path[:0] = [str(Path(__file__).parent.parent / "tests" / "gpu")]
    from virtual import Replicas, step

    replicas, t = Replicas(size), [tensors(case, seed) for seed in range(size)]

    def timed(plan: Any, steps: Callable[[int], Any]) -> float:
        def all_() -> None:
            replicas.each(steps)
            replicas.join()

        all_()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(10):
                all_()
        times = []
        for _ in range(20):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 100)
        return statistics.median(times)

    from syncbn.torch.triton import ops as fused
    from syncbn.torch.triton import plan as plans

    def alone(plan: Any, rank: int) -> None:
        own = t[rank]
        stats = fused.measure(plan, own.x, None)
        fused.normalize(plan, own.x, stats, own.weight, own.bias, 1e-5)
        sums = fused.gradient_sums(plan, own.x, own.dy, stats, own.weight, own.bias, 1e-5)
        fused.input_gradient(plan, own.x, own.dy, sums[2], stats, own.weight, own.bias, 1e-5)

    with_ = replicas.plan(t[0].x, scale=torch.float32)
    without = plans.Plan(case.fold(), case.torch_dtype(), t[0].x.device, scale=torch.float32)
    a = timed(with_, lambda r: step(replicas, with_, r, t[r].x, t[r].dy, t[r].weight, t[r].bias))
    b = timed(without, lambda r: alone(without, r))
    said = [int(s) for s in replicas.statuses]
    assert not any(said), (said, case)
    return a, b


def main() -> None:
    if "RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
        from syncbn.torch import peer_memory as torch_lanes

        # Every case is captured anew, and a captured graph keeps its lane.
        torch_lanes.LANES = 4 * len(CASES)
    elif "between" in os.environ.get("SYNCBN_BENCHMARK", ALL):
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
        torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    only = os.environ.get("SYNCBN_BENCHMARK", ALL).split(",")
    among_several = [TORCHS, ALONE] if several() else []
    groups = {
        "ours": ["syncbn"],
        "graph": ["syncbn", "BatchNorm2d", *among_several],
        "compiled": ["BatchNorm2d, compiled"],
        "compiled too": ["syncbn, compiled", f"BatchNorm2d, {ADD_RELU}, compiled", f"syncbn, {ADD_RELU}, compiled"],
        "fused": [f"syncbn, {ADD_RELU}", f"syncbn, {ADD_RELU} inside"],
    }
    peers = [p for group in only for p in groups.get(group, [])]
    start, rows = time.time(), []
    # A part of the name, to try something out.
    chosen = [i for i, case in enumerate(CASES) if os.environ.get("SYNCBN_CASES", "") in case.name]
    jobs = [(i, p) for i, case in enumerate(CASES) if i in chosen for p in peers if measured(case, p) and not several()]
    with multiprocessing.get_context("spawn").Pool(max(1, (os.cpu_count() or 2) - 2)) as pool:
        failed = [e for e in pool.imap_unordered(warm, jobs, chunksize=2) if e]
    print("compiled in", round(time.time() - start), "s", failed[:2], flush=True)
    bandwidth = copy_bandwidth()
    print(f"copy {bandwidth / 1e12:.2f} TB/s on {torch.cuda.get_device_name()}", flush=True)

    def row(what: str, peer: str, case: Case | None, us: float, **more: Any) -> None:
        name = {} if case is None else {"case": case.name, "megabytes": case.megabytes(), "floor": case.floor(bandwidth)}
        rows.append({"benchmark": "gpu", "what": what, "peer": peer, "us": us, **name, **more})

    out = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "gpu.jsonl"
    partial = out.with_suffix(".partial.jsonl")

    def save() -> None:
        """After each case: a run that is cut off leaves what it found, beside what was complete."""
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            write("gpu", [{**r, **more} for r in rows], partial)

    replicas = torch.distributed.get_world_size() if several() else 1
    device = {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "bytes per second": bandwidth}
    more = {"replicas": replicas, "transport": transport(), **device, **provenance("torch", "triton", "numpy")}
    if "host" in only:
        x = torch.randn(4, 64, 8, 8, device="cuda")
        for _ in range(2):
            for name, layer in {
                "BatchNorm2d": lambda: torch.nn.BatchNorm2d(64),
                "syncbn": lambda: syncbn.SyncBatchNorm(64),
            }.items():
                row("host", name, None, host_time(layer, x.clone()))
                print("host", name, round(rows[-1]["us"], 1), flush=True)
    for case in map(CASES.__getitem__, chosen):
        line = []
        for peer in peers:
            if not measured(case, peer):
                continue
            torch._dynamo.reset()
            row("graph", peer, case, graph_time(step_of(case, peer), 5 if case.megabytes() > 20 else 10, 9))
            line.append(f"{peer} {rows[-1]['us']:.1f}")
        if "kernels" in only:
            for kernel, us in kernels(case).items():
                row("kernel", kernel, case, us)
        if "between" in only:
            row("graph", "kernels with NCCL between them, one process", case, between_cost(case))
            line.append(f"with NCCL between {rows[-1]['us']:.1f}")
        if "exchange" in only and case.shape[1] <= 256 and case.megabytes() < 60:
            a, b = exchange_cost(case)
            row("virtual replicas", "with the exchange", case, a)
            row("virtual replicas", "without", case, b)
            line.append(f"exchange {a - b:+.1f} of {b:.1f}")
        print(case.name, f"floor {case.floor(bandwidth):.0f}:", "; ".join(line), flush=True)
        save()
    if "eager" in only:
        for case in CASES[::3]:
            for peer in ("syncbn", "BatchNorm2d"):
                step = step_of(case, peer)
                row("eager", peer, case, eager_time(step))
    save()
    if partial.exists():
        partial.replace(out)
    print("done at", round(time.time() - start))


def eager_time(step: Callable[[], Any], rounds: int = 30) -> float:
    """Median µs by CUDA events, called from Python."""
    for _ in range(5):
        step()
    times = []
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(rounds):
            step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / rounds)
    return statistics.median(times)


if __name__ == "__main__":
    main()
