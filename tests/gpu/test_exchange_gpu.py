"""The exchange on one GPU, by virtual replicas."""

import os
import random
import time

import pytest
import torch
from virtual import Replicas, reference, step

from syncbn.torch.triton import ops
from syncbn.torch.triton.device import peer_exchange

ROUNDS = int(os.environ.get("SYNCBN_ROUNDS", "10000"))
SHAPES = {2: (4, 70, 6, 5), 4: (2, 256, 7, 7), 8: (3, 16, 4, 4)}


def inputs(size, shape, ragged, generator):
    batches = [shape[0]] * size
    if ragged:
        batches = [shape[0] + r for r in range(size)]
        batches[1] = 0
    draw = lambda n, r: torch.randn(n, *shape[1:], device="cuda", generator=generator) * (1 + r) + r  # noqa: E731
    return [draw(n, r) for r, n in enumerate(batches)], [
        torch.randn(n, *shape[1:], device="cuda", generator=generator) for n in batches
    ]


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_many_rounds(size, ragged, layout):
    """Fresh data in every round, random delays; every value checked on the GPU, the verdict read at the end."""
    replicas, shape = Replicas(size), SHAPES[size]
    generator = torch.Generator("cuda").manual_seed(size)
    scale, offset = torch.randn(shape[1], device="cuda"), torch.randn(shape[1], device="cuda")
    as_laid = (lambda t: t.contiguous(memory_format=torch.channels_last)) if layout == "last" else (lambda t: t)
    xs, dys = inputs(size, shape, ragged, generator)
    xs, dys = [as_laid(x) for x in xs], [as_laid(d) for d in dys]
    all_plans = [replicas.plan(x, scale=torch.float32) for x in xs]
    bad = torch.zeros((), dtype=torch.int64, device="cuda")
    rng = random.Random(size)
    for turn in range(max(1, ROUNDS // 24)):
        for x, dy in zip(xs, dys, strict=True):
            x.normal_(rng.uniform(-3, 3), rng.uniform(0.5, 3), generator=generator)
            dy.normal_(generator=generator)
        out = [None] * size

        def one(rank):
            if rng.random() < 0.5:
                torch.cuda._sleep(rng.randrange(1, 60_000))
            out[rank] = step(replicas, all_plans[rank], rank, xs[rank], dys[rank], scale, offset)

        replicas.each(one)
        replicas.join()
        for o in out[1:]:
            bad += (o["stats"] != out[0]["stats"]).sum()
        mean, variance, ys, dxs = reference(xs, dys, scale, offset)
        C = shape[1]
        bad += ((out[0]["stats"][:C] - mean).abs() > 1e-6 * (1 + variance.sqrt())).sum()
        bad += ((out[0]["stats"][C : 2 * C] - variance).abs() > 1e-5 * variance).sum()
        for o, y, dx in zip(out, ys, dxs, strict=True):
            bad += ((o["y"] - y).abs() > 1e-4).sum() + ((o["dx"] - dx).abs() > 1e-4).sum() + (~torch.isfinite(o["y"])).sum()
        if turn % 50 == 0:
            torch.cuda.synchronize()
    assert int(bad) == 0
    assert all(int(s) == 0 for s in replicas.statuses)


def test_captured_replicas_follow_their_inputs():
    replicas = Replicas(2)
    xs, dys = inputs(2, (4, 70, 6, 5), True, torch.Generator("cuda").manual_seed(0))
    scale, offset = torch.randn(70, device="cuda"), torch.randn(70, device="cuda")
    all_plans = [replicas.plan(x, scale=torch.float32) for x in xs]
    out = [None, None]

    def one(rank):
        out[rank] = step(replicas, all_plans[rank], rank, xs[rank], dys[rank], scale, offset)

    replicas.each(one)
    replicas.join()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replicas.each(one)
        replicas.join()
    for turn in range(1000):
        for x in xs:
            x.normal_(turn % 5, 1 + turn % 3)
        graph.replay()
        if turn % 100 == 0:
            mean, variance, ys, dxs = reference(xs, dys, scale, offset)
            torch.testing.assert_close(out[0]["stats"][70:140], variance, rtol=1e-5, atol=0)
            assert torch.equal(out[0]["stats"], out[1]["stats"])
            for o, y, dx in zip(out, ys, dxs, strict=True):
                torch.testing.assert_close(o["y"].double(), y, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(o["dx"].double(), dx, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [2, 4])
def test_a_replica_that_never_comes(size):
    replicas = Replicas(size, limit=20_000)
    xs, dys = inputs(size, (4, 70, 6, 5), False, torch.Generator("cuda").manual_seed(0))
    scale = offset = torch.ones(70, device="cuda")
    plan = replicas.plan(xs[0], scale=torch.float32)
    started = time.perf_counter()
    out = {}

    def one(rank):
        if rank != size - 1:
            out[rank] = step(replicas, plan, rank, xs[rank], dys[rank], scale, offset)

    replicas.each(one)
    torch.cuda.synchronize()
    assert time.perf_counter() - started < 20
    for rank, o in out.items():
        assert o["stats"].isnan().all()
        assert o["y"].isnan().all()
        assert o["dx"].isnan().all()
        said = int(replicas.statuses[rank])
        assert (said >> 32, said & 0xFFFFFFFF) == (peer_exchange.ABSENT.value, size - 1)
    # The mailbox is poisoned: it does not wait again.
    started = time.perf_counter()
    replicas.each(one)
    torch.cuda.synchronize()
    assert time.perf_counter() - started < 1
    assert out[0]["y"].isnan().all()


def test_another_call_is_not_taken_for_this_one():
    replicas = Replicas(2, limit=20_000)
    x = torch.randn(4, 70, 6, 5, device="cuda")
    plan = replicas.plan(x)
    stats = [None, None]

    def one(rank):
        stats[rank] = ops.measure(plan, x, None, replicas.exchange(rank, tag=10 + rank))

    replicas.each(one)
    torch.cuda.synchronize()
    for rank in range(2):
        assert stats[rank][: 2 * plan.view.C + 1].isnan().all()
        assert int(replicas.statuses[rank]) >> 32 == peer_exchange.STRANGER.value


def test_two_mailboxes_and_an_unrelated_kernel():
    """Two mailboxes wait at once; a kernel that fills the GPU runs beside them."""
    both = [Replicas(2), Replicas(2)]
    xs, dys = inputs(2, (4, 2048, 6, 5), False, torch.Generator("cuda").manual_seed(0))
    scale, offset = torch.randn(2048, device="cuda"), torch.randn(2048, device="cuda")
    plan = both[0].plan(xs[0], scale=torch.float32)
    other, stream = torch.randn(4096, 4096, device="cuda"), torch.cuda.Stream()
    other @ other
    torch.cuda.synchronize()
    mean, variance, ys, _ = reference(xs, dys, scale, offset)
    out = {}
    for _ in range(200):
        # In phases, so that no launch stands behind one that waits for it, whatever shares a hardware queue
        # (CUDA_DEVICE_MAX_CONNECTIONS=1).
        stats, rest = {}, {}
        for rank in range(2):
            for which, replicas in enumerate(both):
                with torch.cuda.stream(replicas.streams[rank]):
                    stats[which, rank] = ops.measure(plan, xs[rank], None, replicas.exchange(rank, 2))
            with torch.cuda.stream(stream):
                other @ other
        for rank in range(2):
            for which, replicas in enumerate(both):
                with torch.cuda.stream(replicas.streams[rank]):
                    y = ops.normalize(plan, xs[rank], stats[which, rank], scale, offset)
                    sums = ops.gradient_sums(
                        plan, xs[rank], dys[rank], stats[which, rank], scale, offset, exchange=replicas.exchange(rank, 3)
                    )
                    rest[which, rank] = y, sums
            with torch.cuda.stream(stream):
                other @ other
        out = {key: {"stats": stats[key], "y": rest[key][0]} for key in stats}
    torch.cuda.synchronize()
    for (_, rank), o in out.items():
        torch.testing.assert_close(o["stats"][2048:4096], variance, rtol=1e-5, atol=0)
        torch.testing.assert_close(o["y"].double(), ys[rank], rtol=1e-4, atol=1e-4)


def test_the_exchange_of_values_that_other_code_found():
    replicas, C = Replicas(4), 300
    xs, dys = inputs(4, (4, C, 6), True, torch.Generator("cuda").manual_seed(0))
    mean, variance, _, _ = reference(xs, dys, torch.ones(C, device="cuda"), torch.zeros(C, device="cuda"))
    values = []
    for x in xs:
        n = torch.tensor([float(x.shape[0] * 6)], device="cuda", dtype=torch.float64)
        m = x.double().mean((0, 2)) if len(x) else torch.zeros(C, device="cuda", dtype=torch.float64)
        v = x.double().var((0, 2), unbiased=False) if len(x) else torch.ones(C, device="cuda", dtype=torch.float64)
        values.append(torch.cat([m, v, n]))
    sums = [torch.full((2 * C,), float(r), dtype=torch.float64, device="cuda") for r in range(4)]
    ops.exchange_values("moments", values[0].clone(), replicas.exchange(0)._replace(limit=1), 4)
    ops.exchange_values("sums", sums[0].clone(), replicas.exchange(0)._replace(limit=1), 4)
    replicas.reset()

    def one(rank):
        values[rank] = ops.exchange_values("moments", values[rank], replicas.exchange(rank), 4)
        sums[rank] = ops.exchange_values("sums", sums[rank], replicas.exchange(rank), 4)

    replicas.each(one)
    torch.cuda.synchronize()
    for v, s in zip(values, sums, strict=True):
        torch.testing.assert_close(v[:C], mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(v[C : 2 * C], variance, rtol=1e-10, atol=1e-10)
        assert (s == 6).all()
