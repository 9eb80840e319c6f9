"""The torch module in what training brings: compilation, activation checkpointing, mixed precision, FSDP2, uneven steps."""

from __future__ import annotations

import functools
import inspect
import itertools

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
import torch.nn as nn
from cases import Case
from test_engine_torch import counting, numbers, tensor
from test_layer_torch_ranks import Branches, drawn_on_the_cpu, equal_everywhere, randomised, state, train
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from versions import TORCH

import syncbn
from syncbn import SyncBatchNorm
from syncbn.functional import sync_batch_norm
from syncbn.torch import compiled

# ------------------------------------------------------------------------------------------------- compiled

SIZES = [(4, 3, 6, 5), (6, 2, 5, 4), (1, 4, 2, 3), (0, 6, 1, 2), (7, 3, 0, 4), (5, 0, 4, 1), (0, 4, 3, 0), (9, 5, 2, 6)]


def compiled_steps(form, rows, *batches):
    """State after training, and how many graphs there are after each step."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model = Branches(count=6 if form == "DDP(compile(model))" else 1)
    graphs = []
    if form == "DDP(compile(model))":
        inner = torch.compile(model, fullgraph=True, backend=counter)
    else:
        model.compile(fullgraph=True, backend=counter)
        inner = model
    wrapped = DistributedDataParallel(inner)

    def seen(x):
        y = wrapped(x)
        graphs.append(counter.frame_count)
        return y

    return {"state": train(model, batches, rows, seen), "graphs": graphs}


@pytest.mark.parametrize("form", ["DDP(compile(model))", "model.compile(), DDP(model)"])
def test_compiled_under_ddp(torch_world, form):
    """Six parallel branches, ranks of different sizes, one of them empty: no break, and few graphs."""
    sizes = SIZES if form == "DDP(compile(model))" else SIZES[:3]
    xs = [Case(f"compiled {i}", s, (5,), dtype="float64").inputs(torch_world.replicas) for i, s in enumerate(sizes)]
    rows = [sum(map(len, x)) for x in xs]
    got = torch_world.run(compiled_steps, *xs, common=(form, rows))
    equal_everywhere([g["state"] for g in got])
    whole = train(Branches(count=6 if len(sizes) == len(SIZES) else 1), [np.concatenate(x) for x in xs], rows)
    for name, value in whole.items():
        np.testing.assert_allclose(got[0]["state"][name], value, rtol=1e-7, atol=1e-9, err_msg=name)
    if len(sizes) == len(SIZES):
        assert got[0]["graphs"] == [1, 2, 3, 4, 4, 4, 4, 4]
        # Once more when the size first changes, once each at sizes 0 and 1.
        assert all(g["graphs"][-1] <= 4 for g in got)


def by_inductor(*batches):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), SyncBatchNorm(4, activation="relu"), nn.Linear(4, 2)).double()
    wrapped = torch.compile(model, fullgraph=True)
    gradients = []
    for x in batches:
        x = tensor(x).requires_grad_()
        y = wrapped(x)
        y.backward(torch.randn(y.shape, dtype=y.dtype))
        gradients.append(numbers(x.grad))
    return gradients, state(model)


def by_eager(*batches):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda model, fullgraph: model)
        return by_inductor(*batches)


def test_compiled_by_inductor(torch_world):
    """The default compiler drops what an empty rank does not need: not our messages."""
    xs = [Case(f"inductor {s}", s, (3,), dtype="float64").inputs(torch_world.replicas) for s in [(4, 0, 3, 2), (4, 0, 3, 2)]]
    for (gradients, after), (expected, after_eager) in zip(
        torch_world.run(by_inductor, *xs), torch_world.run(by_eager, *xs), strict=True
    ):
        for a, b in zip(gradients, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-10)
        for name, value in after_eager.items():
            np.testing.assert_allclose(after[name], value, atol=1e-10, err_msg=name)


def interleaved(backend, order, *batches):
    """Gradients of two models, one of them called twice before any backward pass; between, a local pass and one without gradients."""
    torch._dynamo.reset()
    with drawn_on_the_cpu(0):
        nets = [nn.Sequential(*[m for _ in range(n) for m in (nn.Linear(3, 3), SyncBatchNorm(3))]) for n in (2, 1)]
    nets = [net.double().to(torch.get_default_device()) for net in nets]
    backends = backend if isinstance(backend, tuple) else (backend, backend)
    calls = [net if b is None else torch.compile(net, fullgraph=True, backend=b) for net, b in zip(nets, backends, strict=True)]
    xs = [tensor(x).requires_grad_() for x in batches]
    ys = [calls[i % 2](x) for i, x in enumerate(xs)]
    with torch.no_grad():
        calls[0](xs[0])
    torch.manual_seed(dist.get_rank())
    with syncbn.local_statistics():
        y = calls[0](xs[0])
    y.backward(torch.randn(y.shape, dtype=y.dtype))
    for y in reversed(ys) if order == "last first" else ys:
        y.backward(torch.randn(y.shape, dtype=y.dtype))
    return [numbers(v.grad) for v in (*xs, *nets[0].parameters(), *nets[1].parameters())]


@pytest.mark.parametrize("order", ["first first", "last first"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor", ("aot_eager", "inductor")], ids=str)
def test_compiled_calls_between_a_forward_and_its_backward(torch_world, backend, order):
    """A siamese model, a generator and a discriminator: the order of messages is kept, and nothing takes it for a change."""
    xs = [Case(f"interleaved {i}", (4, 3, 5, 2), (3,), dtype="float64").inputs(torch_world.replicas) for i in range(3)]
    found, right = (torch_world.run(interleaved, *xs, common=(b, order)) for b in (backend, None))
    for got, expected in zip(found, right, strict=True):
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-9)


@pytest.mark.parametrize("arguments", [
    {"activation": "relu"}, {"activation": "silu", "momentum": None}, {"renorm": True, "renorm_clipping": {"rmax": 2.0}},
    {"activation": nn.GELU(), "affine": False}, {"track_running_stats": False},
], ids=str)  # fmt: skip
def test_compiled_equals_eager(arguments):
    torch._dynamo.reset()
    ours, again = (randomised(SyncBatchNorm(5, **arguments)) for _ in range(2))
    function = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        ours.train(training), again.train(training)
        x, r, dy, mask = torch.randn(6, 5, 2), torch.randn(6, 5, 2), torch.randn(6, 5, 2), torch.rand(6, 2) < 0.7
        xs = [x.clone().requires_grad_() for _ in range(2)]
        ys = [f(v, mask, r) for f, v in zip((function, again), xs, strict=True)]
        for y in ys:
            y.backward(dy)
        torch.testing.assert_close(ys[0], ys[1])
        torch.testing.assert_close(xs[0].grad, xs[1].grad)
        torch.testing.assert_close(ours.state_dict(), again.state_dict())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
@pytest.mark.parametrize(("mean", "activation"), [(0, None), (1e4, "relu"), (1e4, None)])
def test_compiled_as_alone_on_a_gpu(monkeypatch, mean, activation, layout):
    """About a value, channels last by torch's own operator: exact at a large mean too, where that is not."""
    monkeypatch.setattr(compiled, "_is_about_a_value", lambda x, mask, group: True)
    torch._dynamo.reset()
    layer, plain = SyncBatchNorm(5, activation=activation), nn.BatchNorm2d(5).double()
    x, dy, r = (torch.randn(6, 5, 4, 3) for _ in range(3))
    x = (x + mean).contiguous(memory_format=layout).requires_grad_()
    wide = x.detach().double().requires_grad_()
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, None, r)
    right = plain(wide) + r
    right = torch.relu(right) if activation else right
    torch.testing.assert_close(y.double(), right, rtol=0, atol=2e-5)
    for a, b in zip(
        torch.autograd.grad(y, [x, *layer.parameters()], dy), torch.autograd.grad(right, [wide, *plain.parameters()], dy.double()),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.running_mean.double(), plain.running_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), plain.running_var, rtol=1e-5, atol=0)


def compiled_locally(x):
    """Compiled code asks whether statistics are local, and is compiled anew when they are."""
    torch._dynamo.reset()
    layer = SyncBatchNorm(3).double()
    function = torch.compile(layer, fullgraph=True, backend="aot_eager")
    together = numbers(function(tensor(x)))
    before = state(layer)
    if dist.get_rank() == 0:
        with syncbn.local_statistics():
            function(tensor(x))
    local = state(layer)
    return together, numbers(function(tensor(x))), before, local


def test_local_statistics_compiled(torch_world):
    xs = Case("compiled locally", (4, 3, 2, 5), (3,), dtype="float64").inputs(torch_world.replicas)
    for first, again, before, local in torch_world.run(compiled_locally, xs):
        np.testing.assert_array_equal(first, again)
        for name, value in before.items():
            np.testing.assert_array_equal(value, local[name])


# ------------------------------------------------------------------------------------------------- checkpointed


class Block(nn.Module):
    """Two layers, the first called twice: shared."""

    def __init__(self, **arguments):
        super().__init__()
        torch.manual_seed(2)
        self.linear, self.norm = nn.Linear(4, 4), SyncBatchNorm(4, **arguments)
        self.other = SyncBatchNorm(4, activation="relu")
        self.double()

    def forward(self, x):
        return self.other(self.norm(self.linear(self.norm(self.linear(x)))))


# What a selective checkpoint keeps: operators that the layers use too.
KEPT = [
    torch.ops.aten.addmm.default,
    torch.ops.aten.cat.default,
    *(getattr(torch.ops.aten, op).Tensor for op in ("add", "mul", "sub")),
]
WAYS = {
    "selective": {"use_reentrant": False, "context_fn": functools.partial(create_selective_checkpoint_contexts, KEPT)},
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
    "early stop off": {"use_reentrant": False, "early_stop": False},
    "recorded": {"use_reentrant": False, "context_fn": syncbn.checkpoint_contexts},
    "recorded, early stop off": {"use_reentrant": False, "context_fn": syncbn.checkpoint_contexts, "early_stop": False},
}


# Older versions of torch switch the early stop by a context manager.
if "early_stop" not in inspect.signature(checkpoint).parameters:
    WAYS = {name: way for name, way in WAYS.items() if way is None or "early_stop" not in way}


def checkpointed(way, shape, x, arguments=None):
    """Gradients, state and messages of a block, checkpointed in some way."""
    block = Block(**(arguments or {}))
    if shape == "compiled":
        torch._dynamo.reset()
        block.compile(fullgraph=True, backend="aot_eager")
    how = WAYS[way] if way else {}
    x = tensor(x).requires_grad_()

    def run(v):
        if not way:
            return block(v)
        if shape == "nested":
            return checkpoint(lambda u: checkpoint(block, u, **how) * 2, v, **how)
        return checkpoint(block, v, **how)

    with counting() as sent:
        y = run(x)
        if shape == "nested" and not way:
            y = y * 2
        if shape == "two forwards":
            y = y + run(x * 2)
        forward = len(sent)
        y.backward(
            torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator("cpu").manual_seed(1), device="cpu").to(y.device)
        )
    return {
        "dx": numbers(x.grad),
        "gradients": [numbers(p.grad) for p in block.parameters()],
        "state": state(block),
        "messages": (forward, len(sent)),
    }


@pytest.mark.parametrize(("shape", "way"), [
    *itertools.product(["one", "nested", "two forwards"], WAYS), ("compiled", "reentrant"), ("compiled", "recorded"),
])  # fmt: skip
def test_checkpointing(torch_world, way, shape):
    xs = Case("checkpoint", (3, 0, 4, 2), (4,), dtype="float64").inputs(torch_world.replicas)
    plain = torch_world.run(checkpointed, xs, common=(None, shape))
    got = torch_world.run(checkpointed, xs, common=(way, shape))
    for p, g in zip(plain, got, strict=True):
        np.testing.assert_allclose(g["dx"], p["dx"], atol=1e-10)
        for a, b in zip(g["gradients"], p["gradients"], strict=True):
            np.testing.assert_allclose(a, b, atol=1e-10)
        for name, value in p["state"].items():
            np.testing.assert_allclose(g["state"][name], value, atol=1e-12, err_msg=name)
        if way.startswith("recorded") and shape != "compiled":
            assert g["messages"] == p["messages"]
        elif shape != "compiled":
            assert g["messages"][1] > p["messages"][1]


def function_in_a_checkpoint(selective, x, dy):
    x = tensor(x).requires_grad_()
    call = lambda v: sync_batch_norm(v * 2)[0]  # noqa: E731
    y = checkpoint(call, x, **WAYS["selective"]) if selective else call(x)
    y.backward(tensor(dy))
    return numbers(x.grad)


def test_the_function_in_a_selective_checkpoint(torch_world):
    """Its message, which the all-reduce changes in place, is what the checkpoint keeps."""
    case = Case("function", (3, 1, 4, 2), (4,), dtype="float64")
    xs, dys = case.inputs(torch_world.replicas), case.cotangents(torch_world.replicas)
    plain, got = (torch_world.run(function_in_a_checkpoint, xs, dys, common=(selective,)) for selective in (False, True))
    for p, g in zip(plain, got, strict=True):
        np.testing.assert_allclose(g, p, atol=1e-10)


@pytest.mark.parametrize("shape", ["one", "nested", "two forwards"])
def test_checkpointed_renorm_needs_its_record(torch_world, shape):
    xs = Case("checkpoint", (3, 0, 4, 2), (4,), dtype="float64").inputs(torch_world.replicas)
    arguments = [{"renorm": True}] * torch_world.replicas
    plain = torch_world.run(checkpointed, xs, arguments, common=(None, shape))
    got = torch_world.run(checkpointed, xs, arguments, common=("recorded", shape))
    for p, g in zip(plain, got, strict=True):
        np.testing.assert_allclose(g["dx"], p["dx"], atol=1e-10)
        for name, value in p["state"].items():
            np.testing.assert_allclose(g["state"][name], value, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("shape", ["one", "compiled"])
@pytest.mark.parametrize("way", ["reentrant", "not reentrant"])
def test_checkpointed_renorm_without_a_record_raises(way, shape):
    with pytest.raises(RuntimeError, match="renorm=True must not be recomputed in the backward pass") as caught:
        checkpointed(way, shape, np.random.default_rng(0).normal(size=(5, 4)), {"renorm": True})
    assert "context_fn=syncbn.checkpoint_contexts" in str(caught.value)


def test_checkpointed_on_one_process_moves_once():
    x = np.random.default_rng(0).normal(size=(5, 4))
    plain = checkpointed(None, "one", x)
    for way in WAYS:
        got = checkpointed(way, "one", x)
        np.testing.assert_allclose(got["dx"], plain["dx"], atol=1e-12)
        for name, value in plain["state"].items():
            np.testing.assert_array_equal(got["state"][name], value, err_msg=name)


# ------------------------------------------------------------------------------------------------- mixed precision


def amp(dtype, x):
    """Autocast and a loss scale that overflows in the second step."""
    torch.manual_seed(0)
    device = torch.get_default_device().type
    model = nn.Sequential(nn.Linear(3, 4), SyncBatchNorm(4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    states = []
    for step in range(3):
        optimizer.zero_grad()
        values = tensor(x)
        if step == 1 and dist.get_rank() == 0:
            values = values * 1e30
        with torch.autocast(device, dtype=getattr(torch, dtype)):
            loss = model(values).float().square().sum()
        scaler.scale(loss).backward()
        for p in model.parameters():
            dist.all_reduce(p.grad)
        scaler.step(optimizer)
        scaler.update()
        states.append(state(model[1]))
    return states, scaler.get_scale()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_amp_with_an_empty_rank_and_a_step_that_overflows(torch_world, dtype):
    xs = Case("amp", (4, 0, 3, 2), (3,)).inputs(torch_world.replicas)
    got = torch_world.run(amp, xs, common=(dtype,))
    for states, _ in got:
        for value in states[2].values():
            assert np.isfinite(value).all()
        if dtype == "float16":
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                np.testing.assert_array_equal(states[0][name], states[1][name])
            assert states[2]["num_batches_tracked"] == 2
    equal_everywhere([{k: v for k, v in s[2].items() if "running" in k} for s, _ in got])


def everybodys(what):
    """What every rank says, in their order."""
    said = [None] * dist.get_world_size()
    dist.all_gather_object(said, what)
    return said


def fsdp(dtype, x):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    with drawn_on_the_cpu(0):
        model = nn.Sequential(nn.Linear(3, 8), SyncBatchNorm(8), nn.ReLU(), nn.Linear(8, 2))
    device = torch.get_default_device()
    model.to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=getattr(torch, dtype), reduce_dtype=torch.float32))
    x = tensor(x)
    hidden = {}
    model[1].register_forward_hook(lambda m, given, y: hidden.update(x=given[0].dtype, weight=m.weight.dtype, y=y.dtype))
    loss = model(x).float().square().mean() if len(x) else model(x).float().sum()
    loss.backward()
    # Not `full_tensor`: of GPU tensors over gloo it ends the process.
    shards = everybodys([numbers(p.grad.to_local()) for p in model.parameters()])
    gradients = [np.concatenate(each) for each in zip(*shards, strict=True)]
    buffers = {k: numbers(v) for k, v in model[1].named_buffers()}
    return {k: str(v) for k, v in hidden.items()}, gradients, buffers, str(model[1].running_mean.dtype)


@pytest.mark.skipif(TORCH < (2, 11), reason="fully_shard of torch 2.6 needs a GPU")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_fsdp2(torch_world, dtype):
    case = Case("fsdp", (4, 0, 3, 2), (3,))
    got = torch_world.run(fsdp, case.inputs(torch_world.replicas), common=(dtype,))
    for dtypes, gradients, _, of_buffer in got:
        assert set(dtypes.values()) == {f"torch.{dtype}"}
        assert of_buffer == "torch.float32"
        assert all(np.isfinite(g).all() for g in gradients)
        assert np.abs(gradients[2]).max() > 0
    equal_everywhere([g[2] for g in got])
    # The statistics are those of the whole batch through the first layer.
    with drawn_on_the_cpu(0):
        hidden = nn.Linear(3, 8)(torch.tensor(np.concatenate(case.inputs(torch_world.replicas))))
    expected = 0.1 * hidden.mean(0).detach().numpy()
    np.testing.assert_allclose(got[0][2]["running_mean"], expected, atol=2e-6 if dtype == "float32" else 3e-3)


# ------------------------------------------------------------------------------------------------- uneven numbers of steps


def joined(steps):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), SyncBatchNorm(4), nn.ReLU(), nn.Linear(4, 2)).double()
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    rng = np.random.default_rng(dist.get_rank())

    def step(x):
        optimizer.zero_grad()
        ((wrapped(x) - 1).abs().sum() / 4).backward()
        optimizer.step()

    def empty():
        return (torch.empty(0, 3, dtype=torch.float64),)

    training = syncbn.EmptySteps(step, empty, torch.get_default_device())
    with Join([training]):
        for _ in range(steps):
            training(torch.tensor(rng.normal(size=(4, 3))))
    return state(model)


def test_join_with_3_and_5_steps(torch_world):
    got = torch_world.run(joined, [3, 5, 4, 5][: torch_world.replicas])
    equal_everywhere(got)
    assert got[0]["1.num_batches_tracked"] == 5
