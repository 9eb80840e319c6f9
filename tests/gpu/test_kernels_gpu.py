"""The Triton kernels and the module on a GPU."""

import copy

import pytest
import torch
from kernel_checks import MATRIX, KernelCase, check, each_way

import syncbn
from syncbn.torch.triton import ops, tiling
from syncbn.torch.triton import plan as plans
from syncbn.torch.triton.plan import Plan, PlanOptions

LARGE = [
    KernelCase((8, 64, 56, 56)),
    KernelCase((8, 64, 56, 56), last=True),
    KernelCase((8, 64, 56, 56), dtype="bfloat16", last=True),
    KernelCase((8, 256, 14, 14), dtype="bfloat16"),
    KernelCase((8, 512, 7, 7), dtype="float16"),
    KernelCase((1, 1, 333, 333)),
    KernelCase((2, 3, 333, 333), last=True),
    KernelCase((64, 8192)),
    KernelCase((5, 8192, 2), mean=1e4),
    KernelCase((2000, 7), mask=True, mean=1e4),
    KernelCase((8, 64, 31, 29), mask=True, last=True, mean=1e4),
    KernelCase((8, 64, 31, 29), activation="silu", residual=True, mask=True),
    KernelCase((8, 64, 28, 28), dtype="bfloat16", activation="relu", residual=True, last=True),
    KernelCase((4, 64, 32, 32), dtype="bfloat16", last=True),
    KernelCase((4, 64, 32, 32), last=True, activation="silu", residual=True, mask=True, mean=1e4),
    KernelCase((32, 40, 14, 14), activation="relu", residual=True),
    KernelCase((8, 200, 7, 7), dtype="bfloat16", last=True, activation="leaky_relu"),
    KernelCase((300, 37), mean=1e4),
    KernelCase((8, 100, 31, 29), mask=True, last=True, mean=1e4),
    KernelCase((3, 2048, 12, 12), last=True, dtype="bfloat16", activation="silu"),
]


@pytest.mark.parametrize(("case", "way"), each_way([*MATRIX, *LARGE]), ids=lambda v: getattr(v, "name", v))
def test_equals_oracle(case, way):
    first = check(case, "cuda", way=way)
    second = check(case, "cuda", way=way)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "bits differ between runs"


SHARED = [
    KernelCase((8, 64, 56, 56), last=True),
    KernelCase((8, 256, 28, 28), dtype="bfloat16", last=True),
    KernelCase((8, 256, 28, 28), dtype="float16", last=True, activation="relu", residual=True),
    KernelCase((2, 96, 25, 42), last=True, mean=1e4),
    KernelCase((8, 100, 31, 29), mask=True, last=True, mean=1e4),
    KernelCase((8, 64, 96, 96), dtype="bfloat16", activation="silu", residual=True),
    KernelCase((8, 64, 56, 56), mask=True, activation="leaky_relu"),
]


@pytest.mark.parametrize("case", SHARED, ids=lambda case: case.name)
def test_programs_that_give_up_change_nothing(case, monkeypatch):
    """The result has the same bits however many programs give up at the barrier."""
    found = [check(case, "cuda", way="single launch")]
    for max_polls in (0, 1, 3):
        monkeypatch.setattr(plans, "MAX_POLLS", max_polls)
        found += [check(case, "cuda", way="single launch") for _ in range(3)]
    assert all(torch.equal(a, b) for others in found[1:] for a, b in zip(found[0], others, strict=True))


def test_the_barrier_on_a_gpu_that_other_kernels_fill():
    """Steps on several streams at once, beside products of matrices that fill the GPU."""
    x, dy = (torch.randn(8, 256, 28, 28, device="cuda").to(memory_format=torch.channels_last) for _ in range(2))
    scale, offset = torch.randn(256, device="cuda"), torch.randn(256, device="cuda")
    options = PlanOptions(1e-5, scale=torch.float32, single_launch=True)
    plan = Plan(tiling.channel_view(x), x.dtype, x.device, options)
    assert plan.forward is not None
    assert plan.backward is not None

    def step():
        y, stats = ops.forward(plan, x, scale, offset, mask=None, residual=None, statistics=None)
        return y, stats, ops.backward(plan, x, dy, stats, scale, offset, mask=None, saved=None).dx

    expected, a = step(), torch.randn(4096, 4096, device="cuda")
    streams = [torch.cuda.Stream(priority=priority) for priority in (0, -1, 0, -1)]
    for round_ in range(50):
        found = []
        for i, stream in enumerate(streams):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                if (round_ + i) % 3 == 0:
                    a @ a
                found += [step() for _ in range(3)]
        torch.cuda.synchronize()
        assert all(torch.equal(e, f) for tensors in found for e, f in zip(expected, tensors, strict=True)), round_


def test_the_barrier_in_a_graph():
    x, dy = (torch.randn(8, 64, 56, 56, device="cuda").to(memory_format=torch.channels_last) for _ in range(2))
    layer = syncbn.SyncBatchNorm(64).cuda()

    def step():
        inputs = x.detach().requires_grad_()
        y = layer(inputs)
        return [y, *torch.autograd.grad(y, [inputs, *layer.parameters()], dy)]

    # On another stream than the default one, which a capture must not depend on.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        eager = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(200):
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(eager, captured, strict=True))
    assert layer.num_batches_tracked == 201


def test_more_than_2_to_the_31_elements():
    x = torch.randn(1, 2, 33_000, 33_000, device="cuda", dtype=torch.bfloat16)
    plan = Plan(tiling.channel_view(x), x.dtype, x.device, PlanOptions(1e-5))
    stats = ops.measure(plan, x, None)
    y = ops.normalize(plan, x, stats, None, None)
    for c in range(2):
        assert abs(stats[c].item()) < 1e-3
        assert abs(stats[2 + c].item() - 1) < 1e-3
        assert torch.equal(
            y[0, c, -1, -1], ((x[0, c, -1, -1].float() - stats[c].float()) / (stats[2 + c].float() + 1e-5).sqrt()).bfloat16()
        )
    assert abs(y[0, 1].float().mean().item()) < 1e-3


def pair(C=32, dtype=torch.float32, **how):
    ours, theirs = syncbn.SyncBatchNorm(C, **how).cuda(), torch.nn.BatchNorm2d(C, **how).cuda()
    if how.get("affine", True):
        with torch.no_grad():
            ours.weight.copy_(torch.randn(C))
            ours.bias.copy_(torch.randn(C))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("how", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
def test_module_is_batch_norm_on_one_replica(how, layout):
    ours, theirs = pair(**how)
    for _ in range(3):
        x = torch.randn(4, 32, 9, 9, device="cuda").contiguous(memory_format=layout).requires_grad_()
        x2 = x.detach().clone().requires_grad_()
        dy = torch.randn_like(x)
        y, y2 = ours(x), theirs(x2)
        y.backward(dy)
        y2.backward(dy)
        torch.testing.assert_close(y, y2, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(x.grad, x2.grad, rtol=1e-4, atol=1e-5)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_module_under_autocast_and_strided_gradients():
    ours, theirs = pair()
    conv = torch.nn.Conv2d(3, 32, 3).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        a, b = ours(conv(torch.ones(2, 3, 8, 8, device="cuda"))), theirs(conv(torch.ones(2, 3, 8, 8, device="cuda")))
    assert a.dtype == torch.bfloat16
    torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    x = torch.randn(2, 32, 6, 6, device="cuda", requires_grad=True)
    (ours(x) * torch.randn(2, 32, 1, 1, device="cuda")).mean().backward()
    x2 = torch.randn(2, 32, 6, 12, device="cuda")[..., ::2].requires_grad_()
    ours(x2).backward(torch.randn(2, 32, 1, 1, device="cuda").expand(2, 32, 6, 6))
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(x2.grad).all()


def test_second_order_through_the_reference():
    ours, _ = pair(4)
    x = torch.randn(3, 4, 2, 2, device="cuda", requires_grad=True)
    (dx,) = torch.autograd.grad(ours(x), x, torch.randn(3, 4, 2, 2, device="cuda"), create_graph=True)
    dx.square().mean().backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad.abs().max() > 0


def test_module_in_a_graph_follows_its_input():
    ours, _ = pair()
    x = torch.randn(4, 32, 9, 9, device="cuda", requires_grad=True)
    dy = torch.randn_like(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ours(x).backward(dy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    x.grad = None
    with torch.cuda.graph(graph):
        y = ours(x)
        y.backward(dy)
    before = int(ours.num_batches_tracked)
    for turn in range(1000):
        with torch.no_grad():
            x.normal_(turn % 7, 1 + turn % 3)
        graph.replay()
        if turn % 100 == 0:
            want = torch.nn.functional.batch_norm(
                x.double(), None, None, ours.weight.double(), ours.bias.double(), True, 0.0, ours.eps
            )
            torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-4)
    assert int(ours.num_batches_tracked) == before + 1000


@pytest.mark.parametrize(("activation", "residual"), [("relu", True), ("silu", True), ("leaky_relu", False)])
def test_module_fused(activation, residual):
    layer = syncbn.SyncBatchNorm(16, activation=activation).cuda()
    x, r = (torch.randn(3, 16, 8, 8, device="cuda", requires_grad=True) for _ in range(2))
    dy = torch.randn_like(x)
    y = layer(x, residual=r if residual else None)
    got = torch.autograd.grad(y, [x, r] if residual else [x], dy)
    X, R = x.detach().double().requires_grad_(), r.detach().double().requires_grad_()
    z = torch.nn.functional.batch_norm(X, None, None, None, None, True, 0.0, layer.eps) + (R if residual else 0)
    want = {
        "relu": torch.relu,
        "silu": torch.nn.functional.silu,
        "leaky_relu": lambda z: torch.nn.functional.leaky_relu(z, 0.01),
    }[activation](z)
    torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-5)
    for a, b in zip(got, torch.autograd.grad(want, [X, R] if residual else [X], dy.double()), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
@pytest.mark.parametrize(("activation", "residual", "masked"), [
    (None, False, False), ("relu", True, False), ("silu", True, False), ("leaky_relu", False, True),
])  # fmt: skip
def test_compiled_module(dtype, layout, activation, residual, masked):
    torch._dynamo.reset()
    layer = syncbn.SyncBatchNorm(32, activation=activation).cuda()
    with torch.no_grad():
        layer.weight.normal_(), layer.bias.normal_()
    again = copy.deepcopy(layer)
    draw = lambda: torch.randn(4, 32, 9, 9, device="cuda").to(dtype).contiguous(memory_format=layout)  # noqa: E731
    x, r, dy = draw() + 3, draw(), draw()
    mask = torch.rand(4, 9, 9, device="cuda") < 0.7 if masked else None
    found = []
    for function in (layer, torch.compile(again, fullgraph=True)):
        inputs = [v.detach().clone().requires_grad_() for v in ([x, r] if residual else [x])]
        parameters = [(layer if function is layer else again).weight, (layer if function is layer else again).bias]
        y = function(inputs[0], mask, *inputs[1:])
        found.append((y, *torch.autograd.grad(y, [*inputs, *parameters], dy)))
    for a, b in zip(*found, strict=True):
        # In bfloat16 the two round in other places, and a parameter's gradient is a sum of many.
        assert a.dtype == b.dtype
        assert (a - b).abs().max() <= (3e-2 if dtype == torch.bfloat16 else 1e-4) * b.abs().max()
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=1e-4, atol=1e-5)
