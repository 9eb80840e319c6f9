"""State that belongs to a thread or to a backward pass: local statistics, and what counts as a recomputation."""

from __future__ import annotations

import contextlib
import threading
import warnings

import numpy as np
import oracle
import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
import torch.nn as nn
from cases import Case
from checks import close
from test_engine_torch import counting, numbers, tensor
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint
from versions import TORCH
from worlds import TorchWorld, free_ports

import syncbn
from syncbn import SyncBatchNorm
from syncbn.torch import groups, reference
from syncbn.torch.local import is_local

# ------------------------------------------------------------------------------------------------- threads


@contextlib.contextmanager
def another_thread_inside():
    """Meanwhile a thread stays in `local_statistics`."""
    entered, leave = threading.Event(), threading.Event()

    def stays():
        with syncbn.local_statistics():
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=stays)
    thread.start()
    assert entered.wait(60)
    try:
        yield
    finally:
        leave.set()
        thread.join()


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("arguments", [{}, {"renorm": True}], ids=str)
def test_another_thread_makes_nobody_local(backend, arguments):
    torch._dynamo.reset()
    layer, x = SyncBatchNorm(3, **arguments), torch.randn(5, 3)
    step = layer if backend is None else torch.compile(layer, fullgraph=True, backend=backend)
    with another_thread_inside():
        step(x)
    torch.testing.assert_close(layer.running_mean, 0.1 * x.mean(0))
    assert layer.num_batches_tracked == 1


def test_a_thread_that_starts_inside_is_not_local():
    found = []
    with syncbn.local_statistics():
        thread = threading.Thread(target=lambda: found.append(is_local()))
        thread.start()
        thread.join()
        assert is_local()
    assert found == [False]


def test_inside_ends_with_the_outermost_block():
    for _ in range(2):
        with contextlib.suppress(ZeroDivisionError), syncbn.local_statistics():
            with syncbn.local_statistics():
                pass
            assert is_local()
            raise ZeroDivisionError
        assert not is_local()


class Deep(Function):
    """A backward pass that starts another one, and so on: past 60, autograd takes a thread of its own, on the CPU too."""

    @staticmethod
    def forward(ctx, x, depth, last):
        ctx.depth, ctx.last = depth, last
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        with torch.enable_grad():
            v = torch.ones(1, requires_grad=True)
            y = Deep.apply(v, ctx.depth - 1, ctx.last) if ctx.depth else ctx.last()
            y.backward(torch.ones_like(y))
        return dy, None, None


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_block_recomputed_in_a_thread_of_autograd(inside, reentrant):
    passes = []

    def block(v):
        passes.append((threading.get_ident(), is_local()))
        return v * v

    def last():
        return checkpoint(block, torch.ones(3, requires_grad=True), use_reentrant=reentrant)

    y = Deep.apply(torch.ones(1, requires_grad=True), 70, last)
    with syncbn.local_statistics() if inside else contextlib.nullcontext():
        y.backward(torch.ones(1))
    threads, local = zip(*passes, strict=True)
    assert len(passes) == 2
    assert threading.get_ident() not in threads
    assert set(local) == {inside}
    # The thread goes back to its pool.
    passes.clear()
    Deep.apply(torch.ones(1, requires_grad=True), 70, last).backward(torch.ones(1))
    assert {local for _, local in passes} == {False}


def beside_a_thread(form, x, dy):
    """A step of every rank, while rank 0 has another thread inside."""
    torch._dynamo.reset()
    layer = SyncBatchNorm(3)
    step = torch.compile(layer, fullgraph=True, backend="aot_eager") if form == "compiled" else layer
    x = tensor(x).requires_grad_()
    with another_thread_inside() if dist.get_rank() == 0 else contextlib.nullcontext():
        y = step(x)
        y.backward(tensor(dy))
    return numbers(y), numbers(x.grad)


@pytest.mark.parametrize("form", ["eager", "compiled"])
def test_ranks_synchronise_beside_a_thread_that_is_local(torch_world, form):
    case = Case("threads", (4, 3, 2, 5), (3,))
    xs, dys = case.inputs(torch_world.replicas), case.cotangents(torch_world.replicas)
    got = torch_world.run(beside_a_thread, xs, dys, common=(form,))
    truth = oracle.BatchNorm(xs, epsilon=1e-5)
    close([y for y, _ in got], truth.forward(np.ones(3), np.zeros(3)), case, "output")
    close([dx for _, dx in got], truth.backward(dys, np.ones(3))[0], case, "gradient")


def local_and_compiled(form, x, dy):
    """Rank 0 alone: output and gradients, compiled and not, of what it runs inside; the backward pass outside."""
    with pytest.MonkeyPatch.context() as patch:
        if form == "without float64":
            patch.setattr(reference, "has_float64", lambda device: False)
        return _local_and_compiled(form, x, dy)


def _local_and_compiled(form, x, dy):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    layer = SyncBatchNorm(3).double()

    def inside(v):
        with syncbn.local_statistics():
            return layer(v)

    compiled = torch.compile(inside if form == "inside the graph" else layer, fullgraph=True, backend=counter)
    together = numbers(compiled(tensor(x)))
    found = []
    if dist.get_rank() == 0:
        before = numbers(layer.running_mean)
        for function in (compiled, layer):
            v = tensor(x).requires_grad_()
            with counting() as sent:
                with syncbn.local_statistics():
                    y = function(v)
                y.backward(tensor(dy))
            found += [(numbers(y), numbers(v.grad), sent)]
        np.testing.assert_array_equal(before, numbers(layer.running_mean))
    return together, found, counter.frame_count


INSIDE = pytest.param("inside the graph", marks=pytest.mark.skipif(
    TORCH < (2, 11), reason="torch 2.6 breaks the graph at context managers that are generators; fullgraph=True allows no break"
))  # fmt: skip


@pytest.mark.parametrize("form", ["around the graph", INSIDE, "without float64"])
def test_local_compiled_in_both_passes(torch_world, form):
    case = Case("compiled locally", (4, 3, 2, 5), (3,), dtype="float64")
    xs, dys = case.inputs(torch_world.replicas), case.cotangents(torch_world.replicas)
    got = torch_world.run(local_and_compiled, xs, dys, common=(form,))
    truth = oracle.BatchNorm(xs[:1] if form == "inside the graph" else xs, epsilon=1e-5)
    close([got[0][0]], truth.forward(np.ones(3), np.zeros(3))[:1], case, "output")
    (y, dx, sent), (right, right_dx, _) = got[0][1]
    assert sent == []
    np.testing.assert_allclose(y, right, atol=1e-12)
    np.testing.assert_allclose(dx, right_dx, atol=1e-12)
    # The compiled code asks as it runs: it is one graph, and a second one with gradients.
    assert got[0][2] == 2


# ------------------------------------------------------------------------------------------------- forward passes in a backward pass


def tensor_hook(linear, run):
    linear.register_forward_hook(lambda module, x, y: y.register_hook(run) and None)


def module_hook(linear, run):
    linear.register_full_backward_hook(lambda module, dx, dy: run(dy[0]))


def accumulate_hook(linear, run):
    linear.weight.register_post_accumulate_grad_hook(lambda p: run(p.grad))


CRITICS = {
    "plain": lambda critic: critic,
    "compiled": lambda critic: torch.compile(critic, fullgraph=True, backend="aot_eager"),
    "checkpointed": lambda critic: lambda g: checkpoint(critic, g, use_reentrant=False),
    "reentrant": lambda critic: lambda g: checkpoint(critic, g.detach().requires_grad_(), use_reentrant=True),
}


@pytest.mark.parametrize("how", CRITICS)
@pytest.mark.parametrize("hook", [tensor_hook, module_hook, accumulate_hook])
def test_a_layer_that_a_hook_calls_moves_once(hook, how):
    torch._dynamo.reset()
    linear, critic, theirs = nn.Linear(4, 4), SyncBatchNorm(4), nn.BatchNorm1d(4)
    called, seen = CRITICS[how](critic), []

    def run(g):
        # Outside of the gradient's own graph, as the next step's would be.
        with torch.enable_grad():
            called(g.detach()).square().mean().backward()
        seen.append(theirs(g.detach()))

    hook(linear, run)
    linear(torch.randn(6, 4, requires_grad=True)).backward(torch.randn(6, 4))
    assert len(seen) == 1
    torch.testing.assert_close(critic.state_dict(), theirs.state_dict())
    assert critic.num_batches_tracked == 1


def test_renorm_in_a_hook():
    linear, critic = nn.Linear(4, 4), SyncBatchNorm(4, renorm=True)
    y = linear(torch.randn(6, 4))
    y.register_hook(lambda g: critic(g))
    y.backward(torch.randn(6, 4))
    assert critic.num_batches_tracked == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_hook_that_a_checkpointed_block_sets(reentrant):
    """The block runs twice, the hook once."""
    layer, critic = SyncBatchNorm(4), SyncBatchNorm(4)

    def block(v):
        y = layer(v)
        if y.requires_grad:
            y.register_hook(lambda g: critic(g))
        return y * 2

    checkpoint(block, torch.randn(6, 4, requires_grad=True), use_reentrant=reentrant).backward(torch.randn(6, 4))
    assert (int(layer.num_batches_tracked), int(critic.num_batches_tracked)) == (1, 1)


class Recomputed(Function):
    """A checkpoint as other libraries write it."""

    @staticmethod
    def forward(ctx, x, block):
        ctx.save_for_backward(x)
        ctx.block = block
        return block(x.detach())

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            v = x.detach().requires_grad_()
            ctx.block(v).backward(dy)
        return v.grad, None


def test_a_function_that_recomputes_moves_once():
    layer = SyncBatchNorm(4)
    Recomputed.apply(torch.randn(6, 4, requires_grad=True), layer).backward(torch.randn(6, 4))
    assert layer.num_batches_tracked == 1


def test_the_error_of_renorm_names_both_causes():
    layer = SyncBatchNorm(4, renorm=True)
    y = Recomputed.apply(torch.randn(6, 4, requires_grad=True), layer)
    with pytest.raises(RuntimeError, match=r"a checkpoint that keeps no record, or .* an autograd function of your own"):
        y.backward(torch.randn(6, 4))


# ------------------------------------------------------------------------------------------------- no process group yet


@pytest.mark.parametrize(("arguments", "ranks", "told"), [
    ({}, "2", 1), ({}, "1", 0), ({}, None, 0), ({"group_size": 1}, "2", 0), ({"group_size": 2}, "2", 1), ({"renorm": True}, "2", 1),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_ranks_that_no_process_group_joins(monkeypatch, arguments, ranks, told, backend):
    torch._dynamo.reset()
    monkeypatch.setattr(groups, "_looked_for_ranks", False)
    if ranks is None:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("WORLD_SIZE", ranks)
    layer = SyncBatchNorm(3, **arguments)
    step = layer if backend is None else torch.compile(layer, fullgraph=True, backend=backend)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(torch.randn(4, 3))
        step(torch.randn(4, 3))
        said = [str(w.message) for w in caught if "process group" in str(w.message)]
    assert len(said) == told
    for text in said:
        assert "Received: a training step of one of 2 ranks (the environment variable WORLD_SIZE) before" in text
        assert "group_size=1" in text


def test_eval_without_a_process_group_warns_of_nothing(monkeypatch):
    monkeypatch.setattr(groups, "_looked_for_ranks", False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SyncBatchNorm(3).eval()(torch.randn(4, 3))
        with syncbn.local_statistics():
            SyncBatchNorm(3)(torch.randn(4, 3))


def compiled_before(port, x):
    """The output of a function that was compiled while there was no process group."""
    torch._dynamo.reset()
    rank, size, backend = dist.get_rank(), dist.get_world_size(), dist.get_backend()
    dist.destroy_process_group()
    step = torch.compile(SyncBatchNorm(3).double(), fullgraph=True, backend="aot_eager")
    alone = numbers(step(tensor(x)))
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    return alone, numbers(step(tensor(x)))


def test_a_function_that_is_older_than_the_process_group():
    case = Case("older", (4, 3), (3,), dtype="float64")
    xs = case.inputs(2)
    with contextlib.closing(TorchWorld(2)) as world:
        got = world.run(compiled_before, xs, common=(free_ports(1)[0],))
    for i, truths in enumerate(([oracle.BatchNorm([x], epsilon=1e-5) for x in xs], [oracle.BatchNorm(xs, epsilon=1e-5)])):
        expected = [y for truth in truths for y in truth.forward(np.ones(3), np.zeros(3))]
        close([g[i] for g in got], expected, case, "output")
