"""A search for tiles: the 28 cases on the GPU at hand. What it finds goes into `tiling.CHOICES`.

A row per tile that was tried: µs of a launch with the launch before it, or of a single launch. Then the errors of
the default tiles, and the step with the best tiles, with and without programmatic launch.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
import time

import torch
from gpu_cases import chosen_cases, graph_time, start, tensors, where
from gpu_kernels import (
    EPSILON,
    SingleLaunchTile,
    Tile,
    calls,
    channel_view,
    default_single_launch_tile,
    make,
    one_launch,
    partition_tiles,
    power_of_2,
    programmatic_launch,
)
from timing import case_option

# Reductions: (positions, channels, warps, programs per processor or 0 for one program per channel, unroll[, stages]).
# fmt: off
# Channels last: here (channels, elements, warps, programs, unroll[, stages]).
LAST = [
    (64, 2048, 4, 4, 1), (64, 2048, 4, 6, 1), (64, 2048, 4, 6, 2), (64, 4096, 8, 3, 1), (64, 2048, 8, 3, 1),
    (64, 2048, 8, 3, 2), (64, 1024, 4, 8, 2), (64, 1024, 4, 6, 4), (32, 2048, 4, 4, 1), (32, 2048, 4, 6, 1),
    (32, 2048, 4, 6, 2), (32, 4096, 8, 3, 1), (32, 1024, 4, 6, 2), (32, 1024, 4, 8, 2), (32, 512, 4, 8, 4),
    (32, 2048, 8, 4, 2), (16, 2048, 4, 6, 1), (16, 1024, 4, 8, 2), (16, 2048, 8, 3, 2), (16, 2048, 4, 4, 2),
    (64, 4096, 4, 3, 1, 5), (64, 2048, 4, 3, 1, 5), (64, 4096, 8, 3, 1, 5), (32, 2048, 4, 4, 1, 3),
    (64, 4096, 4, 1, 1, 5), (64, 4096, 4, 2, 1, 4), (32, 2048, 4, 1, 1, 5), (32, 2048, 4, 2, 1, 5),
]
# Planes of 512 positions or more, and what is also tried where there are 8,192 in all or fewer; then smaller planes.
PLANES = [
    (1024, 1, 4, 8, 1), (2048, 1, 4, 4, 1), (2048, 1, 4, 8, 1), (2048, 1, 4, 16, 1), (4096, 1, 8, 4, 1), (4096, 1, 8, 8, 1),
    (2048, 1, 8, 4, 2), (1024, 1, 4, 8, 2), (2048, 1, 4, 6, 2), (1024, 2, 4, 8, 1), (512, 4, 4, 8, 1), (512, 4, 4, 6, 2),
    (512, 2, 4, 8, 2), (1024, 2, 4, 6, 2), (1024, 4, 8, 4, 1), (8192, 1, 16, 2, 1), (512, 1, 4, 8, 4), (512, 1, 2, 16, 2),
    (1024, 1, 4, 12, 2), (2048, 1, 4, 4, 1, 4), (1024, 1, 4, 8, 1, 3),
]
FEW_PLANES = [
    (4096, 1, 8, 0, 1), (2048, 1, 4, 0, 1), (2048, 1, 8, 0, 2), (4096, 1, 16, 0, 1), (1024, 1, 4, 0, 2), (4096, 1, 4, 0, 1),
]
SMALL_PLANES = [
    (256, 8, 4, 8, 1), (256, 8, 4, 6, 2), (128, 8, 4, 8, 2), (128, 8, 4, 12, 1), (512, 4, 4, 8, 1), (1024, 2, 4, 8, 1),
    (128, 8, 4, 8, 1), (64, 16, 4, 8, 1), (64, 16, 4, 8, 2), (256, 4, 4, 8, 1), (256, 4, 4, 8, 2), (64, 8, 2, 16, 1),
    (128, 4, 2, 16, 2), (64, 8, 2, 12, 2), (64, 8, 4, 16, 1),
    (256, 8, 4, 0, 1), (256, 8, 8, 0, 1), (256, 4, 4, 0, 1), (512, 4, 4, 0, 1), (512, 2, 4, 0, 1), (1024, 2, 4, 0, 1),
    (2048, 1, 4, 0, 1), (512, 1, 2, 0, 2), (1024, 1, 4, 0, 2), (2048, 1, 8, 0, 1),
]
# Pointwise kernels: (positions, channels, warps), for channels last, planes and small planes.
POINTWISE_LAST = [(64, 64, 4), (32, 128, 4), (16, 256, 4), (8, 512, 4), (16, 128, 4), (32, 64, 4), (64, 128, 8), (16, 64, 4), (8, 256, 4)]
POINTWISE_PLANES = [(1024, 1, 4), (2048, 1, 4), (4096, 1, 4), (4096, 1, 8), (8192, 1, 8), (512, 4, 4), (1024, 2, 4), (1024, 4, 8)]
POINTWISE_SMALL = [
    (256, 8, 4), (64, 32, 4), (128, 16, 4), (512, 4, 4), (64, 16, 4), (1024, 2, 4), (256, 4, 4), (256, 16, 8), (2048, 1, 4),
]
# fmt: on
WAYS, BESIDE = ("forward", "backward"), "a launch and its neighbour in a CUDA graph"


def options(parser: argparse.ArgumentParser) -> None:
    case_option(parser)


def steps_for(view, T, K, programs_per_processor):
    steps = -(-view.A * view.B // T)
    splits = max(1, min(steps, round(132 * programs_per_processor / -(-view.C // K))))
    return -(-steps // splits)


def reductions(view, itemsize):
    J, vector = view.A * view.B, 16 // itemsize
    if view.B == 1:
        found = [(max(elements // K, 1), min(K, power_of_2(view.C)), *rest) for K, elements, *rest in LAST]
        few = [
            (512, vector, 8, 0, 1),
            (512, vector, 8, 0, 2),
            (1024, vector, 8, 0, 1),
            (1024, vector // 2, 8, 0, 1),
            (256, vector, 4, 0, 2),
        ]
    else:
        found, few = (PLANES, FEW_PLANES) if view.B >= 512 else (SMALL_PLANES, [])
    tiles = []
    for T, K, warps, waves, unroll, *stages in [*found, *(few if J <= 8192 else [])]:
        T = min(T, power_of_2(J))
        tiles.append(Tile(T, K, warps, steps_for(view, T, K, waves) if waves else -(-J // T), unroll, *stages))
    return list(dict.fromkeys(tiles))


def pointwises(view):
    cap = power_of_2(view.C)
    found = POINTWISE_LAST if view.B == 1 else POINTWISE_PLANES if view.B >= 512 else POINTWISE_SMALL
    tiles = [
        Tile(min(T, power_of_2(view.A * view.B)), min(K, cap), w, steps)
        for T, K, w in found
        for steps in ((1, 2) if view.B == 1 and T * K == 4096 else (1,))
    ]
    return list(dict.fromkeys(tiles))


def singles(case, way):
    """Tiles of a single launch: the one that a layer gets, and its neighbours."""
    default, view = default_single_launch_tile(case, way), channel_view(case)
    if default is None:
        return []
    found, J = [default], view.A * view.B
    for K, values, warps in itertools.product((1, 2) if view.B > 1 else (8, 16, 32, 64), (512, 1024, 2048), (2, 4, 8)):
        programs = 132 // -(-view.C // K)
        if 128 * warps <= values <= 512 * warps and power_of_2(view.C) >= K:
            found += [
                SingleLaunchTile(values // K, K, warps, *partition_tiles(-(-J // (values // K)), max(1, min(31, programs)), room))
                for room in (8, 16, 24)
            ]
    return list(dict.fromkeys(found))


def candidates(case):
    view = channel_view(case)
    r, p = reductions(view, case.torch_dtype().itemsize), pointwises(view)
    single = {way: singles(case, way) for way in WAYS}
    return {"moments": r, "sums": r, "normalize": p, "input_gradient": p, **single}


def warm(job):
    """Compiles in a process of its own."""
    case, tiles, on = job
    programmatic_launch(on)
    try:
        make(case, tiles, any(way in tiles for way in WAYS))
    except Exception as error:  # a tile that does not compile is no candidate
        return repr(error)[:200]


def errors_of(plan, t):
    """Largest relative errors against float64."""
    moments, normalize, sums, input_gradient = calls(plan, t)
    stats, y, (dw, db, _), dx = moments(), normalize(), sums(), input_gradient()
    x = t.x.double().requires_grad_()
    w, b = t.weight.double().requires_grad_(), t.bias.double().requires_grad_()
    right = torch.nn.functional.batch_norm(x, None, None, w, b, True, 0.1, EPSILON)
    right.backward(t.dy.double())
    rel = lambda got, want: ((got.double() - want).abs().max() / want.abs().max()).item()  # noqa: E731
    dims = [0, *range(2, x.dim())]
    C = plan.view.C
    var = x.detach().var(dims, unbiased=False)
    return {
        "variance": ((stats[C : 2 * C] - var) / var).abs().max().item(),
        "y": rel(y, right.detach()),
        "dx": rel(dx, x.grad),
        "dw": rel(dw, w.grad),
        "db": rel(db, b.grad),
    }


def time_of(case, kind, tile, t):
    """µs; None for a tile that does not compile."""
    try:
        plan = make(case, {kind: tile}, kind in WAYS)
    except Exception:
        return None
    if kind in WAYS:
        return graph_time(one_launch(plan, t)[WAYS.index(kind)], 6, 5)
    m, n, s, g = calls(plan, t)
    # After the kernel that comes before it, and that leaves it its input in L2 or not.
    before = {"moments": (g, m), "sums": (n, s), "normalize": (m, n), "input_gradient": (s, g)}[kind]
    return graph_time(lambda: [f() for f in before], 6, 5)


def search(case, record):
    """The best tile of each kind."""
    t, best = tensors(case), {}
    for kind, tiles in candidates(case).items():
        times = []
        for tile in tiles:
            us = time_of(case, kind, tile, t)
            if us is not None:
                times.append((us, tile))
                record(measure=BESIDE, unit="µs", subject=kind, values=us, tile=tile._asdict())
        if times:
            best[kind] = min(times)[1]
            print(case.name, kind, round(min(times)[0], 2), *best[kind], flush=True)
    for name, error in errors_of(make(case, {}), t).items():
        record(measure="largest relative error", unit="1", subject=name, values=error)
    return {kind: tile for kind, tile in best.items() if kind not in WAYS}


def measure(given, record):
    begin, cases, record = time.time(), chosen_cases(given), functools.partial(record, **where(start(), "triton"))
    with multiprocessing.get_context("spawn").Pool(14) as pool:
        jobs = [(case, {kind: tile}, True) for case in cases for kind, tiles in candidates(case).items() for tile in tiles]
        print(len(jobs), "candidates", flush=True)
        failed = [e for e in pool.imap_unordered(warm, jobs, chunksize=8) if e]
        print("compiled in", round(time.time() - begin), "s; failed", len(failed), failed[:3], flush=True)
        programmatic_launch(True)
        best = {case: search(case, functools.partial(record, case=case.name)) for case in cases}
        print("swept at", round(time.time() - begin), flush=True)
        list(pool.imap_unordered(warm, [(case, best[case], on) for case in cases for on in (True, False)], chunksize=2))
    for case in cases:
        t = tensors(case)
        for on in (True, False):
            programmatic_launch(on)
            all_four = calls(make(case, best[case]), t)
            us = graph_time(lambda: [f() for f in all_four], 4, 5)
            details = {"programmatic launch": on, "launches each way": 2}
            record(case=case.name, measure="step in a CUDA graph", unit="µs", subject="syncbn", values=us, **details)
