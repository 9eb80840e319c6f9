"""The torch module on the ranks of a process group: a step, DDP, sub-groups, what must not move, local statistics, dead ranks."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime
import io
import os
import pickle
import signal
import time
import weakref

import numpy as np
import oracle
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from cases import RAGGED, Case
from checks import close
from test_engine_torch import counting, numbers, tensor
from torch.nn.parallel import DistributedDataParallel
from worlds import TorchWorld, free_ports

import syncbn
from syncbn import SyncBatchNorm
from syncbn.torch.failures import sends
from syncbn.torch.groups import communicator_of

DOUBLE = {"dtype": torch.float64}
ON_GPUS = os.environ.get("SYNCBN_TEST_DEVICE") == "cuda"
BY_NAME = [
    Case("ragged", RAGGED, (3, 4, 5), (1,)),
    Case("an empty replica", (3, 0, 2, 1), (3, 4), (1,)),
    Case("rank 2", (4, 1, 0, 7), (6,), (1,)),
    Case("masked", RAGGED, (3, 4, 5), (1,), mask="rows"),
    Case("a fully masked replica", RAGGED, (3, 4, 5), (1,), mask="one replica"),
    Case("float64", RAGGED, (3, 4), (1,), dtype="float64"),
    Case("float16", (3, 0, 2, 1), (3, 4, 5), (1,), dtype="float16"),
]


def randomised(layer, seed=5):
    """The layer with other parameters and statistics than the initial ones, the same on every rank."""
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad():
        for v in [*layer.parameters(), *layer.buffers()]:
            if v.is_floating_point():
                v.copy_(torch.rand(v.shape, generator=generator, device="cpu") + 0.5)
    return layer


@contextlib.contextmanager
def drawn_on_the_cpu(seed):
    """Weights that are made inside are the same on every device, and those of the process that compares; move them after."""
    torch.manual_seed(seed)
    with torch.device("cpu"):
        yield


def state(layer):
    return {k: numbers(v) for k, v in layer.state_dict().items()}


def equal_everywhere(states):
    for other in states[1:]:
        for name, value in states[0].items():
            np.testing.assert_array_equal(value, other[name], err_msg=name)


# ------------------------------------------------------------------------------------------------- a step


def step(case, arguments, pairs, x, dy, mask):
    """One training step of one rank; `pairs` makes process groups of two ranks by hand."""
    if pairs:
        groups = [dist.new_group([i, i + 1]) for i in range(0, dist.get_world_size(), 2)]
        arguments = {**arguments, "process_group": groups[dist.get_rank() // 2]}
    layer = randomised(SyncBatchNorm(case.channels(), **arguments))
    x = tensor(x, getattr(torch, case.dtype)).requires_grad_()
    before = state(layer)
    y = layer(x, mask=tensor(mask))
    y.backward(tensor(dy, x.dtype))
    return {
        "y": numbers(y),
        "gradients": [numbers(v.grad) for v in (x, layer.weight, layer.bias)],
        "before": before,
        "after": state(layer),
    }


@pytest.mark.parametrize("groups", [None, 1, 2, "pairs"], ids=str)
@pytest.mark.parametrize("case", BY_NAME, ids=lambda case: case.name)
def test_a_step_equals_the_concatenated_batch(torch_world, case, groups):
    if groups == 1 and case.name == "rank 2":
        # In a group of one a single value a channel is an error, as in torch's layer.
        case = dataclasses.replace(case, batches=(4, 2, 0, 7))
    size = 2 if groups == "pairs" else groups
    arguments = {"momentum": 0.4, "eps": 1e-3, "group_size": None if groups == "pairs" else groups}
    if case.dtype == "float64":
        arguments["dtype"] = torch.float64
    xs, dys, masks = case.inputs(torch_world.replicas), case.cotangents(torch_world.replicas), case.masks(torch_world.replicas)
    got = torch_world.run(step, xs, dys, masks, common=(case, arguments, groups == "pairs"))
    truth = oracle.BatchNorm(xs, axes=case.axes, masks=masks, group_size=size)
    before = got[0]["before"]
    close([g["y"] for g in got], truth.forward(before["weight"], before["bias"]), case, "output")
    for i, expected in enumerate(truth.backward(dys, before["weight"])):
        close([g["gradients"][i] for g in got], expected, case, "gradient")
    for r, g in enumerate(got):
        n, mean, variance = truth.moments[r // truth.size]
        counts = n > 0
        expected = oracle.moving_average(before["running_mean"], mean, 0.6) if counts else before["running_mean"]
        np.testing.assert_allclose(g["after"]["running_mean"], expected, atol=2e-6)
        unbiased = variance * n / max(n - 1, 1)
        expected = oracle.moving_average(before["running_var"], unbiased, 0.6) if counts else before["running_var"]
        np.testing.assert_allclose(g["after"]["running_var"], expected, rtol=1e-5)
        assert g["after"]["num_batches_tracked"] == counts
        first = got[r - r % truth.size]["after"]
        for name, value in first.items():
            np.testing.assert_array_equal(g["after"][name], value, err_msg=name)


def several_steps(arguments, *xs):
    layer = randomised(SyncBatchNorm(3, **arguments, **DOUBLE))
    for x in xs:
        y = layer(tensor(x))
    return {"y": numbers(y), **state(layer)}


@pytest.mark.parametrize("arguments", [
    {"renorm": True, "renorm_clipping": {"rmax": 1.3, "dmax": 0.5}}, {"renorm": True, "momentum": None}, {"momentum": None}, {"activation": "silu"},
], ids=str)  # fmt: skip
def test_several_steps_equal_one_process(torch_world, arguments):
    """Renorm, cumulative averages: the same numbers as one process with the whole batch."""
    cases = [
        Case(f"step {i}", batches, (3, 4), (1,), "float64") for i, batches in enumerate([RAGGED, (0, 2, 1, 4), (1, 1, 0, 0)])
    ]
    xs = [case.inputs(torch_world.replicas) for case in cases]
    got = torch_world.run(several_steps, *xs, common=(arguments,))
    whole = several_steps(arguments, *(np.concatenate(x) for x in xs))
    np.testing.assert_allclose(np.concatenate([g.pop("y") for g in got]), whole.pop("y"), atol=1e-10)
    equal_everywhere(got)
    for name, value in whole.items():
        np.testing.assert_allclose(got[0][name], value, rtol=1e-9, err_msg=name)


def one_value_per_channel(x):
    layer = randomised(SyncBatchNorm(4))
    y = layer(tensor(x))
    return numbers(y), numbers(layer.bias), bool(layer.running_var.isfinite().all())


def test_one_sample_in_all_gives_the_offset(torch_world):
    for y, bias, finite in torch_world.run(one_value_per_channel, Case("one", (0, 1, 0, 0), (4,)).inputs(torch_world.replicas)):
        np.testing.assert_allclose(y, np.broadcast_to(bias, y.shape), atol=1e-6)
        assert finite


def nothing_moves(arguments, what, x):
    layer = randomised(SyncBatchNorm(3, **arguments))
    before = state(layer)
    x = tensor(x).requires_grad_()
    if what in ("infinite", "nan") and dist.get_rank() == 1:
        x.data[0, 0, 0] = float("inf" if what == "infinite" else "nan")
    y = layer(x, mask=torch.zeros(len(x), 4, dtype=torch.bool) if what == "masked" else None)
    y.backward(torch.ones_like(y))
    return before, state(layer)


@pytest.mark.parametrize("what", ["empty", "masked", "infinite", "nan"])
@pytest.mark.parametrize("arguments", [{}, {"renorm": True}, {"momentum": None}], ids=str)
def test_statistics_stay_where_the_batch_says_nothing(torch_world, what, arguments):
    case = Case("nothing", (0, 0, 0, 0) if what == "empty" else (2, 3, 1, 2), (3, 4), (1,))
    for before, after in torch_world.run(nothing_moves, case.inputs(torch_world.replicas), common=(arguments, what)):
        for name, value in before.items():
            np.testing.assert_array_equal(value, after[name], err_msg=name)


def empty_without_history(x):
    """The empty rank's input comes from nowhere; all others' from a layer before."""
    torch.manual_seed(0)
    before, layer = nn.Linear(3, 4), SyncBatchNorm(4)
    hidden = before(tensor(x)) if len(x) else torch.empty(0, 4)
    y = layer(hidden)
    y.backward(torch.ones_like(y) * torch.arange(len(y))[:, None])
    return numbers([layer.weight.grad, layer.bias.grad]), state(layer)


def test_an_empty_input_without_a_history(torch_world):
    got = torch_world.run(empty_without_history, Case("history", (3, 0, 2, 0), (3,)).inputs(torch_world.replicas))
    for gradients, _ in got[1:2]:
        for gradient in gradients:
            np.testing.assert_array_equal(gradient, np.zeros(4))
    equal_everywhere([s for _, s in got])


# ------------------------------------------------------------------------------------------------- under DDP


class Branches(nn.Module):
    """Parallel branches; and one that rank 0 alone uses, where asked for."""

    def __init__(self, lonely=False, count=6):
        super().__init__()
        with drawn_on_the_cpu(3):
            self.branches = nn.ModuleList(
                [nn.Sequential(nn.Linear(5, 4), SyncBatchNorm(4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(count)]
            )
            self.lonely = nn.Linear(5, 2) if lonely else None
            self.last = nn.Sequential(nn.Linear(2, 3), SyncBatchNorm(3), nn.Linear(3, 1))
        self.to(torch.get_default_device(), torch.float64)

    def forward(self, x):
        hidden = sum(branch(x) for branch in self.branches)
        if self.lonely is not None and (dist.get_rank() == 0 if dist.is_initialized() else False):
            hidden = hidden + self.lonely(x)
        return self.last(hidden)


def train(model, batches, rows, wrapped=None):
    """Steps of SGD on a sum of squares over the whole batch, as DDP's mean of gradients has it."""
    wrapped = wrapped or model
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    world = dist.get_world_size() if dist.is_initialized() else 1
    for x, n in zip(batches, rows, strict=True):
        optimizer.zero_grad()
        loss = (wrapped(tensor(x)) - tensor(x)[:, :1]).square().sum() * (world / n)
        loss.backward()
        optimizer.step()
    return state(model)


def ddp(lonely, rows, *batches):
    model = Branches(lonely)
    wrapped = DistributedDataParallel(model, find_unused_parameters=lonely, bucket_cap_mb=1e-6)
    return train(model, batches, rows, wrapped)


@pytest.mark.parametrize("lonely", [False, True])
def test_ddp(torch_world, lonely):
    """Smallest buckets, so that DDP's messages go while ours do; with a branch that one rank alone uses."""
    sizes = [(5, 3, 4, 2), (2, 6, 3, 4), (4, 0, 1, 3)]
    xs = [Case(f"ddp {i}", s, (5,), dtype="float64").inputs(torch_world.replicas) for i, s in enumerate(sizes)]
    rows = [sum(map(len, x)) for x in xs]
    got = torch_world.run(ddp, *xs, common=(lonely, rows))
    equal_everywhere(got)
    if not lonely:
        whole = train(Branches(), [np.concatenate(x) for x in xs], rows)
        for name, value in whole.items():
            np.testing.assert_allclose(got[0][name], value, rtol=1e-7, atol=1e-9, err_msg=name)


def penalty(x):
    """The weights' gradients of a gradient penalty, reduced over ranks."""
    model = Branches()
    x = tensor(x).requires_grad_()
    (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    dx.square().sum().backward()
    gradients = [p.grad for p in model.parameters()]
    if dist.is_initialized():
        for g in gradients:
            dist.all_reduce(g)
    return numbers(gradients), numbers(x.grad)


def test_gradient_penalty_equals_one_process(torch_world):
    xs = Case("penalty", (3, 2, 4, 0), (5,), dtype="float64").inputs(torch_world.replicas)
    got = torch_world.run(penalty, xs)
    gradients, dx = penalty(np.concatenate(xs))
    np.testing.assert_allclose(np.concatenate([g[1] for g in got]), dx, rtol=1e-6, atol=1e-8)
    for other, _ in got:
        for a, b in zip(other, gradients, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)


def batched(x):
    x = tensor(x).requires_grad_()
    y = SyncBatchNorm(4).double().to(x.device)(x)
    with pytest.raises(RuntimeError, match=r"takes one gradient at a time\. Received: a batch of them"):
        torch.autograd.grad(y, x, y.new_ones(2, *y.shape), is_grads_batched=True)


def test_batched_gradients_say_what_to_do(torch_world):
    torch_world.run(batched, Case("batched", (3, 2, 4, 5), (4,), dtype="float64").inputs(torch_world.replicas))


# ------------------------------------------------------------------------------------------------- what must not communicate


def silent(x):
    """Rank 0 alone: eval with and without running statistics, and local statistics."""
    said, x = {}, tensor(x).requires_grad_()
    if dist.get_rank() == 0:
        with counting() as sent:
            for arguments in ({}, {"track_running_stats": False}, {"renorm": True}):
                layer = SyncBatchNorm(3, **arguments).eval()
                layer(x).backward(torch.randn(x.shape))
            layer = randomised(SyncBatchNorm(3, renorm=True))
            before = state(layer)
            with syncbn.local_statistics():
                y = layer(x)
            y.backward(torch.randn(x.shape))
            said = {"sent": sent, "before": before, "after": state(layer)}
    return {**said, "together": numbers(SyncBatchNorm(3)(x.detach()))}


def test_eval_and_local_statistics_send_nothing(torch_world):
    case = Case("silent", (4, 3, 2, 5), (3,))
    xs = case.inputs(torch_world.replicas)
    got = torch_world.run(silent, xs)
    assert got[0]["sent"] == []
    for name, value in got[0]["before"].items():
        np.testing.assert_array_equal(value, got[0]["after"][name], err_msg=name)
    truth = oracle.BatchNorm(xs, epsilon=1e-5)
    close([g["together"] for g in got], truth.forward(np.ones(3), np.zeros(3)), case, "output")


def local_step(x, dy):
    """Forward inside, backward outside, on all ranks at once: each for itself."""
    layer = SyncBatchNorm(3)
    x = tensor(x).requires_grad_()
    with counting() as sent:
        with syncbn.local_statistics():
            # With a residual: torch's own operator, which is local in any case, does not serve.
            y = layer(x, residual=torch.zeros_like(x))
        y.backward(tensor(dy))
    return numbers(y), numbers(x.grad), sent


def test_local_statistics_are_local_in_both_passes(torch_world):
    case = Case("local", (4, 3, 2, 5), (3,))
    xs, dys = case.inputs(torch_world.replicas), case.cotangents(torch_world.replicas)
    got = torch_world.run(local_step, xs, dys)
    for x, dy, (y, dx, sent) in zip(xs, dys, got, strict=True):
        truth = oracle.BatchNorm([x], epsilon=1e-5)
        close([y], truth.forward(np.ones(3), np.zeros(3)), case, "output")
        # Two values a channel leave little of a gradient but rounding.
        np.testing.assert_allclose(dx, truth.backward([dy], np.ones(3))[0][0], atol=1e-4)
        assert sent == []


# ------------------------------------------------------------------------------------------------- groups


def copies(_):
    mine = dist.new_group(list(range(dist.get_world_size())))
    layer = SyncBatchNorm(3, process_group=mine)
    assert copy.deepcopy(layer).process_group is mine
    assert copy.deepcopy(nn.Sequential(layer))[0].process_group is mine
    assert pickle.loads(pickle.dumps(layer)).process_group is None
    torch.save(layer, io.BytesIO())
    with counting() as sent:
        layer(torch.randn(4, 3))
    return sent


def test_process_group_is_shared_by_copies_and_left_out_of_files(torch_world):
    assert torch_world.run(copies, [0] * torch_world.replicas) == [[(torch.float64, 7)]] * torch_world.replicas


def refusals(_):
    said = []
    others = dist.new_group([0])
    for arguments in ({"group_size": 3}, *([{"process_group": others}] if dist.get_rank() else [])):
        with pytest.raises(ValueError) as caught:
            SyncBatchNorm(3, **arguments)(torch.randn(4, 3))
        said.append(str(caught.value))
    return said


def test_groups_that_do_not_fit(torch_world):
    for rank, said in enumerate(torch_world.run(refusals, [0] * torch_world.replicas)):
        assert f"Received: group_size=3 for {torch_world.replicas} replicas." in said[0]
        if rank:
            assert "`process_group` must be a torch.distributed process group that this rank is in. Received:" in said[1]


# ------------------------------------------------------------------------------------------------- ranks that go another way


def impatient():
    """A group whose ranks wait for each other no longer than 3 seconds."""
    return dist.new_group(list(range(dist.get_world_size())), timeout=datetime.timedelta(seconds=3))


def another_way(kind, x):
    torch.manual_seed(0)
    group = impatient() if kind == "impatient" else None
    if kind in ("unnamed", "wrapped"):
        group = dist.new_group(list(range(dist.get_world_size())))
    if kind == "impatient" and dist.get_rank() == 1:
        return "absent"
    model = nn.Sequential(
        nn.Linear(3, 4), SyncBatchNorm(4, process_group=group), nn.Linear(4, 4), SyncBatchNorm(4, process_group=group)
    )
    syncbn.debug(model if group is None else None)
    try:
        y = nn.Sequential(model)(tensor(x)) if kind == "wrapped" and dist.get_rank() == 1 else model(tensor(x))
        y.backward(torch.randn_like(y))
        if dist.get_rank() == 1 and kind in ("skips", "unnamed"):
            model[1].eval()
        if dist.get_rank() == 1 and kind == "dtype":
            model.double(), (x := x.astype("float64"))
        y = model(tensor(x))
        if dist.get_rank() == 1 and kind == "forward again":
            model(tensor(x))
        y.backward(torch.randn_like(y), create_graph=dist.get_rank() == 1 and kind == "create_graph")
    except RuntimeError as error:
        return str(error)
    finally:
        syncbn.debug(enabled=False)
    return "no error"


@pytest.mark.parametrize(("kind", "own", "others"), [
    ("skips", "rank 1: forward of 3 (message", "rank 0: forward of 1 (message"),
    ("create_graph", "rank 1: backward, to be differentiated of 3 (message", "rank 0: backward of 3 (message"),
    ("forward again", "rank 1: forward of 1 (message", "rank 0: backward of 3 (message"),
    ("unnamed", "rank 1: backward of 3 (message 6, 4 channels)", "rank 0: forward of 3 (message 6, 4 channels)"),
])  # fmt: skip
def test_a_rank_that_takes_another_path_is_named(torch_world, kind, own, others):
    for said in torch_world.run(another_way, Case("way", (2, 3, 2, 1), (3,)).inputs(torch_world.replicas), common=(kind,)):
        assert own in said
        assert others in said


@pytest.mark.parametrize("kind", ["dtype", "wrapped"])
def test_ranks_may_differ_in_dtype_and_in_names_that_debug_found(torch_world, kind):
    got = torch_world.run(another_way, Case("way", (2, 3, 2, 1), (3,)).inputs(torch_world.replicas), common=(kind,))
    assert got == ["no error"] * torch_world.replicas


def trains(steps, seconds):
    """Steps of training, until something happens; says how long the last one waited and what was raised."""
    torch.manual_seed(dist.get_rank())
    model = nn.Sequential(nn.Linear(3, 4), SyncBatchNorm(4, process_group=impatient()))
    for _ in range(steps):
        start = time.monotonic()
        try:
            model(torch.randn(4, 3)).backward(torch.randn(4, 4))
        except RuntimeError as error:
            return time.monotonic() - start, str(error)
        time.sleep(seconds)
    return 0.0, "no error"


def alone_and_again(port):
    """A layer that is older than its process group: alone it sends nothing, then it finds the new group. Whether that one is gone:
    kept, its threads would abort the process at its end."""
    rank, size, backend = dist.get_rank(), dist.get_world_size(), dist.get_backend()
    layer = SyncBatchNorm(3)
    x = torch.randn(4, 3)
    with counting() as sent:
        # As numbers, so that the device has done with the group before it goes.
        y = layer(x.requires_grad_())
        numbers(y)
        # Torch's own defaults may hold the group of all.
        ours = [weakref.ref(group) for group in dist.distributed_c10d._world.pg_map if group is not dist.group.WORLD]
        if rank == 0:
            # A message that this rank alone has counted, as where one failed.
            sends("forward", None, 3, communicator_of(None).name)
        dist.destroy_process_group()
        gone = [group() is None for group in ours]
        layer(x)
        address, timeout = f"tcp://127.0.0.1:{port}", datetime.timedelta(seconds=20)
        dist.init_process_group(backend, init_method=address, rank=rank, world_size=size, timeout=timeout)
        # The ranks compare their messages' numbers.
        syncbn.debug()
        numbers(layer(x))
        syncbn.debug(enabled=False)
    try:
        # In the group of all it would be a sum over other replicas.
        torch.autograd.grad(y, x, torch.randn(4, 3))
        late = "nothing"
    except RuntimeError as error:
        late = str(error)
    return sent, gone, "must live until its backward pass" in late


@pytest.fixture
def three_ranks():
    """A world of their own: they do not come out of these tests as they went in."""
    world = TorchWorld(3)
    with contextlib.closing(world):
        yield world


def test_groups_that_go_and_come_and_a_rank_that_is_absent(three_ranks):
    """Absent in the debug mode: named."""
    assert three_ranks.run(alone_and_again, common=(free_ports(1)[0],)) == [([(torch.float64, 7)] * 2, [True], True)] * 3
    got = three_ranks.run(another_way, [np.ones((2, 3), "float32")] * 3, common=("impatient",))
    for said in (got[0], got[2]):
        assert "nothing from ranks [1] within 3 s, while this one came to the forward of 1 (message 1, 4 channels)" in said


@pytest.mark.skipif(ON_GPUS, reason="NCCL ends the process, not the call: tests/gpu/dead_peers.py says how ranks end on GPUs")
def test_ranks_that_are_stopped_or_killed(three_ranks):
    """Stopped: the others raise at the group's timeout. Killed: who talked to it raises at once, who waits for that one with it."""
    # What comes first, imports for one, takes longer than a step.
    assert three_ranks.run(trains, common=(2, 0.01)) == [(0.0, "no error")] * 3
    for sent, soonest in ((signal.SIGSTOP, (2, 10)), (signal.SIGKILL, (0, 2.5))):
        for rank in range(3):
            three_ranks.send(rank, trains, 1000, 0.01)
        time.sleep(2)
        os.kill(three_ranks.workers[1].pid, sent)
        waited = []
        for rank in (0, 2):
            ok, (seconds, said) = three_ranks.receive(rank)
            assert ok
            assert "no error" not in said
            waited.append(seconds)
        assert soonest[0] < min(waited) < soonest[1]
        assert max(waited) < 10
        if sent == signal.SIGSTOP:
            os.kill(three_ranks.workers[1].pid, signal.SIGCONT)
            assert three_ranks.receive(1)[0]
