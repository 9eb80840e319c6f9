"""Searches tiles for the 28 cases on the GPU at hand: `python benchmarks/gpu_tiles.py OUT`. What it finds goes into tiling.py."""

from __future__ import annotations

import json
import multiprocessing
import sys
import time

import torch
from gpu_cases import CASES, graph_time, tensors

from syncbn.torch.triton import ops as fused
from syncbn.torch.triton import plan as plans
from syncbn.torch.triton.launch import power_of_2
from syncbn.torch.triton.tiling import Tile

EPSILON = 1e-5


def share_for(f, T, K, programs_per_processor):
    steps = -(-f.A * f.B // T)
    splits = max(1, min(steps, round(132 * programs_per_processor / -(-f.C // K))))
    return -(-steps // splits)


def reductions(f, itemsize):
    found = []
    J = f.A * f.B
    if f.B == 1:
        vector = 16 // itemsize
        for K, elements, warps, waves, unroll, *stages in [
            (64, 2048, 4, 4, 1),
            (64, 2048, 4, 6, 1),
            (64, 2048, 4, 6, 2),
            (64, 4096, 8, 3, 1),
            (64, 2048, 8, 3, 1),
            (64, 2048, 8, 3, 2),
            (64, 1024, 4, 8, 2),
            (64, 1024, 4, 6, 4),
            (32, 2048, 4, 4, 1),
            (32, 2048, 4, 6, 1),
            (32, 2048, 4, 6, 2),
            (32, 4096, 8, 3, 1),
            (32, 1024, 4, 6, 2),
            (32, 1024, 4, 8, 2),
            (32, 512, 4, 8, 4),
            (32, 2048, 8, 4, 2),
            (16, 2048, 4, 6, 1),
            (16, 1024, 4, 8, 2),
            (16, 2048, 8, 3, 2),
            (16, 2048, 4, 4, 2),
            (64, 4096, 4, 3, 1, 5),
            (64, 2048, 4, 3, 1, 5),
            (64, 4096, 8, 3, 1, 5),
            (32, 2048, 4, 4, 1, 3),
        ]:
            found.append((max(elements // K, 1), min(K, power_of_2(f.C)), warps, waves, unroll, *stages))
        if J <= 8192:
            found += [
                (512, vector, 8, 0, 1),
                (512, vector, 8, 0, 2),
                (1024, vector, 8, 0, 1),
                (1024, vector // 2, 8, 0, 1),
                (256, vector, 4, 0, 2),
            ]
    elif f.B >= 512:
        for T, K, warps, waves, unroll, *stages in [
            (1024, 1, 4, 8, 1),
            (2048, 1, 4, 4, 1),
            (2048, 1, 4, 8, 1),
            (2048, 1, 4, 16, 1),
            (4096, 1, 8, 4, 1),
            (4096, 1, 8, 8, 1),
            (2048, 1, 8, 4, 2),
            (1024, 1, 4, 8, 2),
            (2048, 1, 4, 6, 2),
            (1024, 2, 4, 8, 1),
            (512, 4, 4, 8, 1),
            (512, 4, 4, 6, 2),
            (512, 2, 4, 8, 2),
            (1024, 2, 4, 6, 2),
            (1024, 4, 8, 4, 1),
            (8192, 1, 16, 2, 1),
            (512, 1, 4, 8, 4),
            (512, 1, 2, 16, 2),
            (1024, 1, 4, 12, 2),
            (2048, 1, 4, 4, 1, 4),
            (1024, 1, 4, 8, 1, 3),
        ]:
            found.append((T, K, warps, waves, unroll, *stages))
        if J <= 8192:
            found += [
                (4096, 1, 8, 0, 1),
                (2048, 1, 4, 0, 1),
                (2048, 1, 8, 0, 2),
                (4096, 1, 16, 0, 1),
                (1024, 1, 4, 0, 2),
                (4096, 1, 4, 0, 1),
            ]
    else:
        for T, K, warps, waves, unroll in [
            (256, 8, 4, 8, 1),
            (256, 8, 4, 6, 2),
            (128, 8, 4, 8, 2),
            (128, 8, 4, 12, 1),
            (512, 4, 4, 8, 1),
            (1024, 2, 4, 8, 1),
            (128, 8, 4, 8, 1),
            (64, 16, 4, 8, 1),
            (64, 16, 4, 8, 2),
            (256, 4, 4, 8, 1),
            (256, 4, 4, 8, 2),
            (64, 8, 2, 16, 1),
            (128, 4, 2, 16, 2),
            (64, 8, 2, 12, 2),
            (64, 8, 4, 16, 1),
        ]:
            found.append((T, K, warps, waves, unroll))
        found += [
            (256, 8, 4, 0, 1),
            (256, 8, 8, 0, 1),
            (256, 4, 4, 0, 1),
            (512, 4, 4, 0, 1),
            (512, 2, 4, 0, 1),
            (1024, 2, 4, 0, 1),
            (2048, 1, 4, 0, 1),
            (512, 1, 2, 0, 2),
            (1024, 1, 4, 0, 2),
            (2048, 1, 8, 0, 1),
        ]
    tiles = []
    for T, K, warps, waves, unroll, *stages in found:
        T = min(T, power_of_2(J))
        tiles.append(Tile(T, K, warps, share_for(f, T, K, waves) if waves else -(-J // T), unroll, *stages))
    return list(dict.fromkeys(tiles))


def pointwises(f, itemsize):
    cap = power_of_2(f.C)
    if f.B == 1:
        found = [(4096 // K if K <= 4096 else 1, K, w) for K, w in [(64, 4), (128, 4), (256, 4), (512, 4)]] + [
            (2048 // 128, 128, 4),
            (2048 // 64, 64, 4),
            (8192 // 128, 128, 8),
            (1024 // 64, 64, 4),
            (2048 // 256, 256, 4),
        ]
    elif f.B >= 512:
        found = [(1024, 1, 4), (2048, 1, 4), (4096, 1, 4), (4096, 1, 8), (8192, 1, 8), (512, 4, 4), (1024, 2, 4), (1024, 4, 8)]
    else:
        found = [
            (256, 8, 4),
            (64, 32, 4),
            (128, 16, 4),
            (512, 4, 4),
            (64, 16, 4),
            (1024, 2, 4),
            (256, 4, 4),
            (256, 16, 8),
            (2048, 1, 4),
        ]
    tiles = [
        Tile(min(T, power_of_2(f.A * f.B)), min(K, cap), w, share)
        for T, K, w in found
        for share in ((1, 2) if f.B == 1 and T * K == 4096 else (1,))
    ]
    return list(dict.fromkeys(tiles))


def residents(f):
    """Tiles of one launch each way, 8 to 32 values a thread."""
    T, cap = power_of_2(f.A * f.B), power_of_2(f.C)
    if T > 8192:
        return []
    return [Tile(T, K, w, 1) for K in (1, 2, 4, 8, 16) for w in (1, 2, 4, 8, 16) if cap >= K and 256 * w <= T * K <= 1024 * w]


def make(case, tiles, at_once=False):
    f, device = case.fold(), torch.device("cuda", 0)
    how = {"scale": torch.float32, "moving": torch.float32, "moves": 1, "tiles": tiles, "at_once": at_once}
    return plans.Plan(f, case.torch_dtype(), device, **how)


def candidates(case):
    f = case.fold()
    size = case.torch_dtype().itemsize
    r, p = reductions(f, size), pointwises(f, size)
    return {"moments": r, "sums": r, "normalize": p, "input_gradient": p, "resident": residents(f)}


def settle(knobs: tuple[bool]) -> None:
    (plans.PDL,) = knobs


def warm(job):
    index, tiles, knobs = job
    settle(knobs)
    try:
        make(CASES[index], tiles, "resident" in tiles)
    except Exception as error:  # a tile that does not compile is no candidate
        return repr(error)[:200]


def calls(plan, t):
    def moments():
        return fused.measure(plan, t.x, None)

    stats = moments()
    moving = fused.Moving(t.running_mean, t.running_var, t.tracked, 0.1)

    def normalize():
        return fused.normalize(plan, t.x, stats, t.weight, t.bias, EPSILON, moving=moving)

    def sums():
        return fused.gradient_sums(plan, t.x, t.dy, stats, t.weight, t.bias, EPSILON)

    message = sums()[2]

    def input_gradient():
        return fused.input_gradient(plan, t.x, t.dy, message, stats, t.weight, t.bias, EPSILON)

    return moments, normalize, sums, input_gradient


def one_launch(plan, t):
    """(forward, backward) of a plan that is resident."""
    moving = fused.Moving(t.running_mean, t.running_var, t.tracked, 0.1)
    given = {"keep": None, "slope": 0.0, "lane": None}

    def forward():
        return fused.forward(plan, t.x, t.weight, t.bias, EPSILON, moving=moving, residual=None, **given)

    stats = forward()[1]
    return forward, lambda: fused.backward(plan, t.x, t.dy, stats, t.weight, t.bias, EPSILON, saved=None, dresidual=None, **given)


def check(case, plan, t):
    moments, normalize, sums, input_gradient = calls(plan, t)
    stats, y, (dw, db, _), dx = moments(), normalize(), sums(), input_gradient()
    x = t.x.double().requires_grad_()
    w, b = t.weight.double().requires_grad_(), t.bias.double().requires_grad_()
    right = torch.nn.functional.batch_norm(x, None, None, w, b, True, 0.1, EPSILON)
    right.backward(t.dy.double())
    rel = lambda got, want: ((got.double() - want).abs().max() / want.abs().max()).item()  # noqa: E731
    dims = [0, *range(2, x.dim())]
    C = plan.fold.C
    var = x.detach().var(dims, unbiased=False)
    return {
        "variance": ((stats[C : 2 * C] - var) / var).abs().max().item(),
        "y": rel(y, right.detach()),
        "dx": rel(dx, x.grad),
        "dw": rel(dw, w.grad),
        "db": rel(db, b.grad),
    }


def main(out):
    start = time.time()
    pool = multiprocessing.get_context("spawn").Pool(14)
    plain = (True,)
    jobs = [
        (i, {kind: tile}, plain) for i, case in enumerate(CASES) for kind, tiles in candidates(case).items() for tile in tiles
    ]
    print(len(jobs), "candidates", flush=True)
    failed = [e for e in pool.imap_unordered(warm, jobs, chunksize=8) if e]
    print("compiled in", round(time.time() - start), "s; failed", len(failed), failed[:3], flush=True)
    found = []
    settle(plain)
    for i, case in enumerate(CASES):
        t = tensors(case)
        base = make(case, {})
        best, seen = {}, {}
        for kind, tiles in candidates(case).items():
            times = []
            for tile in tiles:
                try:
                    plan = make(case, {kind: tile}, kind == "resident")
                except Exception:
                    continue
                if kind == "resident":
                    both = one_launch(plan, t)
                    times.append((graph_time(lambda both=both: [f() for f in both], 6, 5), tile))
                    continue
                m, n, s, g = calls(plan, t)
                # After the kernel that comes before it, and that leaves it its input in L2 or not.
                fn = {
                    "moments": lambda: (g(), m()),
                    "sums": lambda: (n(), s()),
                    "normalize": lambda: (m(), n()),
                    "input_gradient": lambda: (s(), g()),
                }[kind]
                times.append((graph_time(fn, 6, 5), tile))
            if not times:
                continue
            times.sort()
            best[kind], seen[kind] = times[0][1], [(round(us, 2), *tile) for us, tile in times]
        found.append(
            {"case": case.name, "best": {k: list(v) for k, v in best.items()}, "seen": seen, "errors": check(case, base, t)}
        )
        print(
            case.name,
            {k: [v[0][0], *best[k]] for k, v in seen.items()},
            {k: f"{v:.0e}" for k, v in found[-1]["errors"].items()},
            flush=True,
        )
        del t
    print("swept at", round(time.time() - start), flush=True)
    knobs = [(True,), (False,)]
    jobs = [
        (i, {k: Tile(*v) for k, v in found[i]["best"].items() if k != "resident"}, kn)
        for i, case in enumerate(CASES)
        for kn in knobs
    ]
    list(pool.imap_unordered(warm, jobs, chunksize=2))
    pool.close()
    for i, case in enumerate(CASES):
        t = tensors(case)
        row = []
        for kn in knobs:
            settle(kn)
            plan = make(case, {k: Tile(*v) for k, v in found[i]["best"].items()})
            all_four = calls(plan, t)
            row.append(graph_time(lambda: [f() for f in all_four], 4, 5))
        found[i]["knobs"] = row
        print(case.name, "floor", round(case.floor(), 1), [round(r, 1) for r in row], flush=True)
        del t
    with open(out, "w") as file:
        json.dump(found, file)
    print("done at", round(time.time() - start))


if __name__ == "__main__":
    main(sys.argv[1])
