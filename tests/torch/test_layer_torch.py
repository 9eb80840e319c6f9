"""The torch module on one process: as torch's own, renorm and mask by formula, dtypes, layouts, bad input."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import operator
import os
import pickle
import subprocess
import sys

import numpy as np
import oracle
import pytest
import torch
import torch.nn as nn
from test_engine_torch import numbers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import syncbn
from syncbn import SyncBatchNorm
from syncbn.functional import sync_batch_norm
from syncbn.torch import engine
from syncbn.torch.arguments import ACTIVATIONS as NAMED

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ROUNDING = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 2e-6, torch.float64: 1e-12}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(7)


def data(*shape, dtype=torch.float32):
    return (torch.randn(shape, dtype=torch.float64) * 2 + 1).to(dtype)


def randomised(layer):
    """The layer with other parameters and statistics than the initial ones."""
    with torch.no_grad():
        for v in [*layer.parameters(), *layer.buffers()]:
            if v.is_floating_point():
                v.copy_(torch.rand(v.shape) + 0.5)
    return layer


def step(layer, x, dy, of=None, **arguments):
    """Output, gradients for x and the parameters, and all buffers after one step. of: the module, if `layer` is a call of it."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x, **arguments)
    y.backward(dy)
    module = of or layer
    gradients = [p.grad for p in module.parameters()]
    return [y.detach(), x.grad, *gradients, *(b.clone() for b in module.buffers())]


def assert_close(got, expected, rounding=2e-6):
    for g, e in zip(got, expected, strict=True):
        assert g.shape == e.shape
        size = e.abs().max() if e.numel() else 1
        torch.testing.assert_close(g.double(), e.double(), rtol=rounding, atol=float(size) * rounding)


# ------------------------------------------------------------------------------------------------- as torch's own


def test_constructor_is_torchs_own():
    """In its order; 2.11 lacks `bias`."""
    ours, theirs = (list(inspect.signature(c.__init__).parameters.values())[1:] for c in (SyncBatchNorm, nn.SyncBatchNorm))
    expected = [(p.name, p.default, p.kind) for p in theirs]
    if torch.__version__ >= "2.13":
        assert [(p.name, p.default, p.kind) for p in ours][: len(theirs)] == expected
    own = {"renorm": False, "renorm_clipping": None, "renorm_momentum": 0.01, "activation": None, "group_size": None}
    assert {p.name: p.default for p in ours[9:]} == own
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[8:])


ARGUMENTS = [
    {}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"momentum": 0.0}, {"eps": 0.5, "momentum": 0.3},
    {"dtype": torch.float64}, {"bias": False}
]  # fmt: skip
SHAPES = [(6, 3), (5, 3, 4), (4, 3, 5, 2), (2, 3, 4, 2, 3)]


def theirs_for(arguments, rank):
    arguments = dict(arguments)
    bias = arguments.pop("bias", True)
    layer = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[rank](3, **arguments)
    if not bias:
        layer.bias = None
    return layer


@pytest.mark.parametrize("path", ["torch's own operator", "ours"])
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_process_equals_torch(arguments, shape, path, monkeypatch):
    if path == "ours":
        monkeypatch.setattr(engine, "can_use_native", lambda *arguments: False)
    ours, theirs = SyncBatchNorm(3, **arguments), theirs_for(arguments, len(shape))
    randomised(ours)
    theirs.load_state_dict(ours.state_dict())
    dtype = arguments.get("dtype", torch.float32)
    rounding = 1e-10 if dtype == torch.float64 else 1e-5
    for _ in range(3):
        x, dy = data(*shape, dtype=dtype), data(*shape, dtype=dtype)
        assert_close(step(ours, x, dy), step(theirs, x, dy), rounding)
    ours.eval(), theirs.eval()
    assert_close(step(ours, x, dy), step(theirs, x, dy), rounding)


@pytest.mark.skipif("SYNCBN_TEST_DEVICE" in os.environ, reason="the kernels for CUDA leave nothing to torch's operator")
def test_takes_torchs_own_operator_where_it_can(monkeypatch):
    seen = []
    real = torch.batch_norm
    monkeypatch.setattr(torch, "batch_norm", lambda *a: (seen.append(a[5]), real(*a))[1])
    SyncBatchNorm(3)(data(4, 3))
    assert seen == [True]
    SyncBatchNorm(3)(data(0, 3))
    assert seen == [True]


@pytest.mark.parametrize("activation", [nn.GELU, lambda: nn.PReLU(3)], ids=["GELU", "PReLU"])
def test_a_module_as_activation(activation):
    own = activation()
    layer, theirs = SyncBatchNorm(3, activation=own), nn.Sequential(nn.BatchNorm1d(3), copy.deepcopy(own))
    x, dy = data(5, 3, 4), data(5, 3, 4)
    assert layer.activation is own
    assert_close(step(layer, x, dy), step(theirs, x, dy), 1e-5)
    assert_close(step(layer.eval(), x, dy), step(theirs.eval(), x, dy), 1e-5)
    with pytest.raises(ValueError, match="activation="):
        syncbn.revert(nn.Sequential(layer))
    assert SyncBatchNorm(3).activation is None
    assert syncbn.convert(nn.BatchNorm1d(3)).activation is None


def test_the_activation_can_be_changed():
    """From any kind to any other, with nothing left of what was before."""
    own, layer, x = nn.GELU(), SyncBatchNorm(3, activation="relu").eval(), data(5, 3)
    for activation, function in (
        (own, own),
        (None, lambda z: z),
        ("silu", nn.SiLU()),
        (own, own),
        (torch.tanh, torch.tanh),
        ("relu", nn.ReLU()),
    ):
        layer.activation = activation
        assert layer.activation is activation
        assert list(layer.children()) == ([own] if activation is own else [])
        torch.testing.assert_close(layer(x), function(SyncBatchNorm(3).eval()(x)))
    with pytest.raises(ValueError, match="activation='tanh'"):
        layer.activation = "tanh"
    assert layer.activation == "relu"


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_batches_that_nobody_counts(momentum, activation):
    """As torch's layers without a counter: with a momentum the statistics move, without one they stay."""
    ours, theirs = SyncBatchNorm(3, momentum=momentum, activation=activation), nn.BatchNorm1d(3, momentum=momentum)
    ours.num_batches_tracked = theirs.num_batches_tracked = None
    x = data(5, 3)
    ours(x), theirs(x)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_a_pass_over_fake_tensors_leaves_nothing_behind():
    layer, x = SyncBatchNorm(5, activation="relu"), data(4, 5)
    expected = copy.deepcopy(layer)(x)
    for _ in range(2):
        with FakeTensorMode():
            SyncBatchNorm(5, activation="relu")(torch.randn(4, 5)).backward(torch.randn(4, 5))
        assert torch.equal(copy.deepcopy(layer)(x), expected)


@pytest.mark.parametrize("renorm", [False, True])
def test_compiled_in_float64(renorm):
    """Renorm's r and d are those of before the statistics moved, in the backward pass too."""
    layer = randomised(SyncBatchNorm(3, renorm=renorm, dtype=torch.float64, activation="relu"))
    x, dy = data(6, 3, 4, dtype=torch.float64), data(6, 3, 4, dtype=torch.float64)
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    for residual in (None, "itself"):
        both = []
        for net in (layer, compiled):
            v = x.clone().requires_grad_()
            y = net(v, residual=None if residual is None else v)
            both.append([y.detach(), *torch.autograd.grad(y, [v, *net.parameters()], dy)])
        assert_close(*both, 1e-10)


def test_a_shallow_copy_meets_the_same_replicas():
    layer = SyncBatchNorm(3)
    layer.process_group = "a group"
    assert copy.copy(layer).process_group == "a group"


def test_state_dict_is_torchs_own():
    ours, theirs = SyncBatchNorm(3), nn.SyncBatchNorm(3)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours._version == theirs._version
    theirs.load_state_dict(randomised(ours).state_dict())
    ours.load_state_dict(nn.BatchNorm2d(3).state_dict())
    renorm = SyncBatchNorm(3, renorm=True)
    own = ["moving_stddev", "renorm_mean", "renorm_stddev"]
    assert list(renorm.state_dict()) == [*theirs.state_dict(), *own]
    fresh = SyncBatchNorm(3, renorm=True)
    fresh.load_state_dict(randomised(renorm).state_dict())
    for a, b in zip(fresh.state_dict().values(), renorm.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    # A file from before num_batches_tracked.
    old = {k: v for k, v in theirs.state_dict().items() if k != "num_batches_tracked"}
    ours.load_state_dict(old)
    assert ours.num_batches_tracked == 0


def test_is_a_batch_norm_but_not_the_one_that_ddp_refuses():
    layer = SyncBatchNorm(3)
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
    assert not isinstance(layer, nn.SyncBatchNorm)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(copier):
    layer = randomised(SyncBatchNorm(3, renorm=True, activation="relu", group_size=2, momentum=None))
    again = copier(layer)
    assert repr(again) == repr(layer)
    x = data(4, 3)
    assert torch.equal(layer.eval()(x), again.eval()(x))
    assert again.running_mean is not layer.running_mean


def test_repr():
    with_bias = [{"bias": False}] if "bias" in inspect.signature(nn.SyncBatchNorm).parameters else []
    for arguments in ({}, {"affine": False}, *with_bias, {"momentum": None, "track_running_stats": False}):
        assert repr(SyncBatchNorm(3, **arguments)) == repr(nn.SyncBatchNorm(3, **arguments))
    assert repr(SyncBatchNorm(3, renorm=True, activation="silu", group_size=2)).endswith(
        "track_running_stats=True, renorm=True, activation='silu', group_size=2)"
    )


def test_initial_statistics_of_renorm_and_reset():
    layer = SyncBatchNorm(3, eps=0.25, renorm=True)
    for _ in range(2):
        assert torch.equal(layer.moving_stddev, torch.full((3,), 1.25**0.5))
        assert torch.equal(layer.renorm_stddev, torch.full((3,), 1.25**0.5))
        assert torch.equal(layer.renorm_mean, torch.zeros(3))
        layer(data(4, 3))
        layer.reset_parameters()
    assert layer.num_batches_tracked == 0


def test_a_swapped_class_works():
    layer = nn.BatchNorm2d(3)
    layer.__class__ = SyncBatchNorm
    assert layer(data(2, 3, 4, 4)).isfinite().all()
    assert "renorm" not in repr(layer)


def test_meta_and_other_dtypes_at_construction():
    assert SyncBatchNorm(3, device="meta", renorm=True).moving_stddev.is_meta
    assert SyncBatchNorm(3, dtype=torch.bfloat16).weight.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------- semantics by formula


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize(
    "clipping",
    [
        None,
        {"rmin": 0.7, "rmax": 1.2, "dmax": 0.4},
        {"rmax": torch.tensor(1.1, dtype=torch.float64), "rmin": 0.8},
        {"dmax": lambda: 0.2},
    ],
    ids=["none", "numbers", "a tensor", "a callable"],
)
def test_renorm_by_formula(clipping, momentum):
    eps, weight = 1e-3, 1.0 if momentum is None else momentum
    layer = SyncBatchNorm(3, eps, momentum, renorm=True, renorm_clipping=clipping, renorm_momentum=0.4, dtype=torch.float64)
    randomised(layer)
    before = {k: numbers(v) for k, v in layer.state_dict().items()}
    x, dy = data(5, 3, 4, dtype=torch.float64), data(5, 3, 4, dtype=torch.float64)
    y, dx, dweight, dbias, *_ = numbers(step(layer, x, dy))
    truth = oracle.BatchNorm([numbers(x)], axes=(1,), epsilon=eps)
    _, mean, variance = truth.moments[0]
    stddev = np.sqrt(variance + eps)
    r, d = stddev / before["renorm_stddev"], (mean - before["renorm_mean"]) / before["renorm_stddev"]
    bounds = {k: float(v() if callable(v) else v) for k, v in (clipping or {}).items()}
    r = np.clip(r, bounds.get("rmin"), bounds.get("rmax")) if {"rmin", "rmax"} & set(bounds) else r
    d = np.clip(d, -bounds["dmax"], bounds["dmax"]) if "dmax" in bounds else d
    scale, offset = r * before["weight"], d * before["weight"] + before["bias"]
    np.testing.assert_allclose(y, truth.forward(scale, offset)[0], atol=1e-12)
    (true_dx,), (dscale,), (doffset,) = truth.backward([numbers(dy)], scale)
    np.testing.assert_allclose(dx, true_dx, atol=1e-12)
    np.testing.assert_allclose(dweight, dscale * r + doffset * d, atol=1e-12)
    np.testing.assert_allclose(dbias, doffset, atol=1e-12)

    def moved(name, new, w):
        return before[name] * (1 - w) + new * w

    moving_stddev = moved("moving_stddev", stddev, weight)
    expected = {"running_mean": moved("running_mean", mean, weight), "moving_stddev": moving_stddev,
                "running_var": moving_stddev**2 - eps, "renorm_mean": moved("renorm_mean", mean, 0.4),
                "renorm_stddev": moved("renorm_stddev", stddev, 0.4)}  # fmt: skip
    for name, value in expected.items():
        np.testing.assert_allclose(numbers(layer.state_dict()[name]), value, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("kind", ["rows", "broadcast"])
@pytest.mark.parametrize("with_ones", [False, True])
def test_mask(kind, with_ones):
    layer = randomised(SyncBatchNorm(3, momentum=1.0))
    mask = torch.rand(4, 1, *((5, 2) if kind == "rows" else (1, 1))) < 0.6
    x, dy = data(4, 3, 5, 2), data(4, 3, 5, 2)
    x[~mask.expand_as(x)] = float("nan")
    weight, bias = numbers([layer.weight, layer.bias])
    y, dx, dweight, dbias, mean, variance, counter = numbers(step(layer, x, dy, mask=mask if with_ones else mask.squeeze(1)))
    truth = oracle.BatchNorm([numbers(x)], axes=(1,), masks=[numbers(mask)], epsilon=1e-5)
    n, true_mean, true_variance = truth.moments[0]
    np.testing.assert_allclose(mean, true_mean, atol=1e-5)
    np.testing.assert_allclose(variance, true_variance * n / (n - 1), rtol=1e-5)
    np.testing.assert_allclose(y, truth.forward(weight, bias)[0], atol=1e-5)
    expected = truth.backward([numbers(dy)], weight)
    inside = numbers(mask.expand_as(x))
    np.testing.assert_allclose(dx[inside], expected[0][0][inside], atol=1e-5)
    assert (dx[~inside] == 0).all()
    np.testing.assert_allclose(dweight, expected[1][0], rtol=1e-4)
    np.testing.assert_allclose(dbias, expected[2][0], rtol=1e-4)
    assert counter == 1


@pytest.mark.parametrize("renorm", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("what", ["empty", "masked"])
def test_nothing_moves_where_there_is_nothing(what, momentum, renorm):
    layer = randomised(SyncBatchNorm(3, momentum=momentum, renorm=renorm))
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    x = data(0 if what == "empty" else 2, 3, 4).requires_grad_()
    y = layer(x, mask=torch.zeros(len(x), 4, dtype=torch.bool) if what == "masked" else None)
    assert y.shape == x.shape
    y.backward(data(*x.shape))
    assert all(p.grad.isfinite().all() for p in (x, layer.weight, layer.bias))
    for name, old in before.items():
        assert torch.equal(old, layer.state_dict()[name]), name


def test_an_integer_mask_counts_what_is_not_0():
    layer, again = (SyncBatchNorm(3) for _ in range(2))
    x, mask = data(4, 3, 5), torch.randint(0, 3, (4, 5))
    torch.testing.assert_close(layer(x, mask=mask), again(x, mask=mask != 0))
    torch.testing.assert_close(layer.running_mean, again.running_mean)


# ------------------------------------------------------------------------------------------------- axes of length 1

# The input's shape, its order in memory from the outermost axis, the stride of its axes of length 1, and the gradient's order.
OF_LENGTH_1 = [
    ((1, 3, 7, 6), (0, 2, 3, 1), 3, (0, 1, 2, 3)),  # an image [H, W, C] as a batch of one
    ((3, 5, 4, 1), (0, 2, 3, 1), 1, (0, 1, 2, 3)),  # [N, T, C] as [N, C, T, 1]
    ((3, 5, 4, 1), (0, 1, 2, 3), 1, (0, 2, 3, 1)),
    ((3, 5, 1, 4), (0, 2, 3, 1), 100, (0, 1, 2, 3)),
    ((2, 5, 4, 1, 1), (0, 2, 3, 4, 1), 1, (0, 2, 3, 4, 1)),
    ((1, 5, 2, 1, 3), (0, 2, 3, 4, 1), 1, (0, 1, 2, 3, 4)),
    ((3, 1, 2, 5), (0, 2, 3, 1), 7, (1, 0, 3, 2)),
]


def laid_out(shape, order, stride):
    """Random values that lie in memory in this order of axes; axes of length 1 have this stride."""
    x = torch.randn([shape[i] for i in order]).permute([order.index(i) for i in range(len(order))])
    return x.as_strided(shape, [stride if n == 1 else s for n, s in zip(shape, x.stride(), strict=True)])


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("how", ["plain", "mask", "residual"])
@pytest.mark.parametrize("layout", OF_LENGTH_1, ids=str)
def test_the_stride_of_an_axis_of_length_1_may_be_any_number(layout, how, training):
    """Torch's own layer takes a wrong gradient there, on the CPU."""
    shape, order, stride, order_of_dy = layout
    x, dy = laid_out(shape, order, stride), laid_out(shape, order_of_dy, stride)
    layer = randomised(SyncBatchNorm(shape[1])).train(training)
    weight, mean, variance = (numbers(v.double()) for v in (layer.weight, layer.running_mean, layer.running_var))
    mask = torch.rand(shape[0], 1, *shape[2:]) > 0.3 if how == "mask" else None
    given = {"mask": {"mask": mask}, "residual": {"residual": laid_out(shape, order_of_dy, stride)}}.get(how, {})
    _, dx, dweight, dbias, *_ = step(layer, x, dy, **given)
    truth = oracle.BatchNorm([numbers(x)], axes=(1,), masks=None if mask is None else [numbers(mask)], epsilon=1e-5)
    if training:
        expected = [v[0] for v in truth.backward([numbers(dy)], weight)]
    else:
        others = tuple(i for i in range(len(shape)) if i != 1)
        mean, rstd, weight = (v.reshape(-1, *[1] * (len(shape) - 2)) for v in (mean, (variance + 1e-5) ** -0.5, weight))
        g = numbers(dy.double())
        expected = [g * weight * rstd, (g * (numbers(x) - mean) * rstd).sum(others), g.sum(others)]
    assert_close([v.cpu() for v in (dx, dweight, dbias)], [torch.as_tensor(v, device="cpu") for v in expected], 1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_an_output_with_an_axis_of_length_1_is_no_view(training):
    """Programs change it in place, also of a frozen part."""
    x, w = data(1, 3, 4, 4).requires_grad_(), torch.ones(3, 1, 1, requires_grad=True)
    layer = SyncBatchNorm(3).train(training)
    with torch.no_grad():
        frozen = layer(x)
    frozen.mul_(w).backward(torch.randn_like(frozen))
    layer(x).detach_()
    y = layer(x)
    y.relu_().backward(torch.randn_like(y))
    assert x.grad.abs().max() > 0


@pytest.mark.skipif("SYNCBN_TEST_DEVICE" in os.environ, reason="the kernels for CUDA are what a trace of a training step shows")
def test_a_trace_at_batch_1_takes_other_batches():
    layer, x = randomised(SyncBatchNorm(3)).eval(), data(5, 3, 4, 4)
    traced = make_fx(layer)(x[:1])
    torch.testing.assert_close(traced(x), layer(x))


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_second_derivatives_with_an_axis_of_length_1(training):
    """By torch's checks, which also pass no gradient at all."""
    layer = SyncBatchNorm(2, momentum=0.0, dtype=torch.float64).train(training)
    x = laid_out((1, 2, 3, 2), (0, 2, 3, 1), 5).double().requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradgradcheck(layer, (x,))


# ------------------------------------------------------------------------------------------------- an epsilon of 0


def by_the_operator(layer, x, dy):
    """As `step`, by torch's operator: the function around it refuses to train with an epsilon of 0."""
    # On the CPU, because torch returns NaN on CUDA.
    layer, device = layer.cpu(), x.device
    x, dy = x.cpu().clone().requires_grad_(), dy.cpu()
    statistics = layer.running_mean, layer.running_var.clone()
    y = torch.batch_norm(x, layer.weight, layer.bias, *statistics, True, layer.momentum, 0.0, False)
    y.backward(dy)
    layer.running_var.copy_(statistics[1])
    layer.num_batches_tracked.add_(1)
    found = [y.detach(), x.grad, *(p.grad for p in layer.parameters()), *(b.clone() for b in layer.buffers())]
    layer.to(device)
    return [v.to(device) for v in found]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.5, 0.1])
@pytest.mark.parametrize("shape", [(6, 3), (8, 3, 4), (2, 3, 200, 200)], ids=str)
def test_a_constant_channel_with_epsilon_0_equals_torch(shape, value, dtype):
    """x_hat and dx are 0 there. Of a value that torch cannot add up exactly it makes noise, so that it is given another."""
    ours, theirs = randomised(SyncBatchNorm(3, eps=0, dtype=dtype)), theirs_for({"eps": 0, "dtype": dtype}, len(shape))
    theirs.load_state_dict(ours.state_dict())
    x, dy = data(*shape, dtype=dtype), data(*shape, dtype=dtype)
    x[:, 0] = value
    got = step(ours, x, dy)
    x[:, 0] = 0.5
    expected = by_the_operator(theirs, x, dy)
    expected[4][0] += 0.1 * (value - 0.5)
    assert_close(got, expected, 1e-5 if dtype == torch.float32 else 1e-10)
    assert got[1][:, 0].abs().max() < 1e-12
    # By the operator too: torch 2.11's function refuses an epsilon of 0 in inference as well.
    state = [v.cpu() for v in (ours.weight, ours.bias, ours.running_mean, ours.running_var)]
    inferred = torch.batch_norm(x.cpu(), *state, False, 0.0, 0.0, False)
    torch.testing.assert_close(ours.eval()(x), inferred.to(x.device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_constants_with_epsilon_0(dtype):
    """Of some of them rounding makes a variance that is not 0: without a bound dx would be 1e8 and more."""
    layer = SyncBatchNorm(500, eps=0, activation="relu", dtype=dtype)
    x = (torch.rand(500, dtype=torch.float64) * 1000).to(dtype).expand(7, 500)
    y, dx, *rest = step(layer, x, data(7, 500, dtype=dtype))
    assert y.abs().max() < 1e-6
    assert dx.abs().max() < 1e-12
    assert all(v.isfinite().all() for v in rest)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_derivatives_of_a_constant_channel_with_epsilon_0(activation):
    layer = SyncBatchNorm(2, eps=0, activation=activation, dtype=torch.float64)
    x, dy = data(5, 2, dtype=torch.float64), data(5, 2, dtype=torch.float64)
    x[:, 0] = 0.1
    x.requires_grad_()
    (once,) = torch.autograd.grad(layer(x), x, dy)
    (again,) = torch.autograd.grad(layer(x), x, dy, create_graph=True)
    torch.testing.assert_close(again, once, rtol=1e-9, atol=1e-12)
    (second,) = torch.autograd.grad(again, x, dy)
    assert second.isfinite().all()
    assert once[:, 0].abs().max() < 1e-12


def test_a_constant_channel_with_epsilon_0_and_renorm():
    """x_hat is 0, and y = d·weight + bias, with d = (mean − renorm_mean) / renorm_stddev."""
    layer = randomised(SyncBatchNorm(3, eps=0, renorm=True, dtype=torch.float64))
    mean, stddev, weight, bias = (v[0].item() for v in (layer.renorm_mean, layer.renorm_stddev, layer.weight, layer.bias))
    before = {name: v.clone() for name, v in layer.named_buffers()}
    x, dy = data(6, 3, 4, dtype=torch.float64), data(6, 3, 4, dtype=torch.float64)
    x[:, 0] = 0.1
    y, dx, *rest = step(layer, x, dy)
    torch.testing.assert_close(y[:, 0], torch.full_like(y[:, 0], (0.1 - mean) / stddev * weight + bias))
    assert dx[:, 0].abs().max() < 1e-12
    assert all(v.isfinite().all() for v in (y, dx, *rest))
    torch.testing.assert_close(layer.renorm_stddev[0], before["renorm_stddev"][0] * 0.99, atol=1e-9, rtol=0)


@pytest.mark.skipif("SYNCBN_TEST_DEVICE" in os.environ, reason="a compiler's cold start, once")
def test_a_constant_channel_with_epsilon_0_when_compiled():
    layer, eager = (SyncBatchNorm(3, eps=0) for _ in range(2))
    x, dy = data(6, 3), data(6, 3)
    x[:, 0] = 0.1
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    compiled.parameters, compiled.buffers = layer.parameters, layer.buffers
    assert_close(step(compiled, x, dy), step(eager, x, dy), 1e-5)


ACTIVATIONS = {"relu": torch.relu, "silu": nn.functional.silu, "leaky_relu": nn.functional.leaky_relu}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", [*ACTIVATIONS, "callable", None])
def test_activation_and_residual_equal_the_plain_composition(name, residual, training):
    activation = nn.functional.gelu if name == "callable" else name
    ours, plain = randomised(SyncBatchNorm(3, activation=activation)), nn.BatchNorm2d(3)
    plain.load_state_dict(ours.state_dict())
    ours.train(training), plain.train(training)
    x, dy, r = data(4, 3, 5, 2), data(4, 3, 5, 2), data(4, 3, 5, 2)
    rs = [r.clone().requires_grad_() for _ in range(2)]
    function = ACTIVATIONS.get(name, activation or (lambda z: z))
    got = step(ours, x, dy, residual=rs[0] if residual else None)
    with_plain = plain.forward
    plain.forward = lambda x: function(with_plain(x) + rs[1]) if residual else function(with_plain(x))
    assert_close(got, step(plain, x, dy), 1e-5)
    if residual:
        assert_close([rs[0].grad], [rs[1].grad], 1e-5)


@pytest.mark.parametrize(("activation", "residual", "kept"), [
    (None, False, 0), ("relu", False, 0), ("silu", False, 0), (None, True, 0), ("relu", True, 1), ("leaky_relu", True, 1), ("silu", True, 1),
])  # fmt: skip
def test_memory_kept_for_backward(activation, residual, kept, monkeypatch):
    """x and O(channels); with a residual and an activation, one tensor more."""
    monkeypatch.setattr(engine, "can_use_native", lambda *arguments: False)
    x = data(8, 3, 16, 16).requires_grad_()
    r = data(8, 3, 16, 16).requires_grad_() if residual else None
    sizes = {}

    def pack(v):
        sizes[v.data_ptr()] = v.numel()
        return v

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
        SyncBatchNorm(3, activation=activation)(x, residual=r)
    assert sizes.pop(x.data_ptr()) == x.numel()
    assert sorted(n for n in sizes.values() if n > 3 * 3) == [x.numel()] * kept


# ------------------------------------------------------------------------------------------------- dtypes and layouts


@pytest.mark.parametrize(
    ("x", "parameters", "buffers"), list(itertools.product(DTYPES, DTYPES, DTYPES)), ids=lambda d: str(d)[6:]
)
def test_every_combination_of_dtypes(x, parameters, buffers):
    layer = randomised(SyncBatchNorm(3))
    layer.weight.data, layer.bias.data = layer.weight.data.to(parameters), layer.bias.data.to(parameters)
    layer.running_mean, layer.running_var = layer.running_mean.to(buffers), layer.running_var.to(buffers)
    plain = nn.BatchNorm1d(3, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    values, dy = data(6, 3, 4, dtype=x), data(6, 3, 4, dtype=x)
    limit = max(ROUNDING[d] for d in (x, parameters, buffers)) * 4
    for training in (True, False):
        layer.train(training), plain.train(training)
        layer.zero_grad(), plain.zero_grad()
        got = step(layer, values, dy)
        assert [g.dtype for g in got] == [x, x, parameters, parameters, buffers, buffers, torch.int64]
        assert_close(got, step(plain, values.double(), dy.double()), limit)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_counts_above_what_half_precision_holds(dtype):
    layer = SyncBatchNorm(2, momentum=1.0).to(dtype)
    x = data(70_001, 2, dtype=dtype)
    layer(x)
    variance = x.double().var(0)
    torch.testing.assert_close(layer.running_var.double(), variance, rtol=ROUNDING[dtype], atol=0)


LAYOUTS = {"contiguous": torch.contiguous_format, "last": torch.channels_last}


@pytest.mark.parametrize("three", [False, True])
@pytest.mark.parametrize(("of_x", "of_dy"), list(itertools.product(LAYOUTS, LAYOUTS)))
@pytest.mark.parametrize("arguments", [{}, {"activation": "silu"}, {"renorm": True}], ids=str)
def test_memory_formats(of_x, of_dy, three, arguments):
    formats = {**LAYOUTS, "last": torch.channels_last_3d} if three else LAYOUTS
    shape = (4, 3, 5, 2, 6) if three else (4, 3, 5, 6)
    x, dy = data(*shape), data(*shape)
    ours = [randomised(SyncBatchNorm(3, **arguments)) for _ in range(2)]
    ours[1].load_state_dict(ours[0].state_dict())
    plain = step(ours[0], x, dy)
    x = x.to(memory_format=formats[of_x])
    got = step(ours[1], x, dy.to(memory_format=formats[of_dy]))
    assert_close(got, plain, 1e-5)
    assert got[0].is_contiguous(memory_format=formats[of_x])
    assert got[1].is_contiguous(memory_format=formats[of_x])


@pytest.mark.parametrize("arguments", [{}, {"activation": "relu"}], ids=str)
def test_strides_that_fit_no_format(arguments):
    layer, again = (SyncBatchNorm(3, **arguments) for _ in range(2))
    x, dy = data(4, 5, 6, 3).permute(0, 3, 2, 1)[:, :, ::2], data(5, 4, 3, 3).permute(1, 2, 3, 0)
    got = step(layer, x, dy)
    assert_close(got, step(again, x.contiguous(), dy.contiguous()), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    model = nn.Sequential(nn.Linear(4, 3), SyncBatchNorm(3), nn.Linear(3, 2))
    model[1].activation = "silu"
    x = data(8, 4)
    with torch.autocast(x.device.type, dtype=dtype):
        hidden = model[0](x)
        y = model[1](hidden)
        assert y.dtype == dtype
        model(x).float().square().mean().backward()
    assert model[1].running_mean.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().max() > 0 for p in model.parameters() if p is not model[0].bias)


def test_large_mean_where_more_than_one_would_meet(monkeypatch):
    monkeypatch.setattr(engine, "can_use_native", lambda *arguments: False)
    x = 1e4 + torch.randn(4000, 3)
    layer = SyncBatchNorm(3, momentum=1.0)
    y = layer(x)
    truth = oracle.BatchNorm([numbers(x)], epsilon=1e-5)
    np.testing.assert_allclose(numbers(y), truth.forward(np.ones(3), np.zeros(3))[0], atol=1e-5)
    np.testing.assert_allclose(numbers(layer.running_var), truth.moments[0][2] * 4000 / 3999, rtol=1e-5)


@pytest.mark.parametrize("op", ["addmm.default", "mul.Tensor", "add.Tensor", "clone.default"])
@pytest.mark.parametrize("arguments", [{}, {"activation": "silu"}, {"momentum": None}], ids=str)
def test_selective_checkpoints(arguments, op):
    """Whatever operator such a checkpoint keeps: gradients and statistics as without it."""
    model = nn.Sequential(nn.Linear(4, 8), randomised(SyncBatchNorm(8, **arguments)), nn.Linear(8, 4))
    plain, x, dy = copy.deepcopy(model), data(6, 4), data(6, 4)
    kept = [operator.attrgetter(op)(torch.ops.aten)]
    contexts = functools.partial(create_selective_checkpoint_contexts, kept)
    got = step(lambda v: checkpoint(model, v, use_reentrant=False, context_fn=contexts), x, dy, of=model)
    assert_close(got, step(plain, x, dy))


@pytest.mark.parametrize("tracing_mode", ["real", "fake"])
def test_large_inputs_are_traced(tracing_mode):
    """Above 65,536 elements the CPU's passes read a value, which a trace does not have."""
    given = data(40_000, 3), torch.rand(3), torch.rand(3)
    graph = make_fx(lambda *given: sync_batch_norm(*given)[0], tracing_mode=tracing_mode)(*given)
    torch.testing.assert_close(graph(*given), sync_batch_norm(*given)[0])
    with FakeTensorMode():
        assert SyncBatchNorm(3, activation="relu")(torch.randn(40_000, 3)).shape == (40_000, 3)


# ------------------------------------------------------------------------------------------------- second order


@pytest.mark.parametrize("arguments", [{}, {"activation": "silu"}, {"affine": False}, {"renorm": True}], ids=str)
def test_gradgradcheck(arguments, monkeypatch):
    monkeypatch.setattr(engine, "can_use_native", lambda *arguments: False)
    layer = SyncBatchNorm(2, dtype=torch.float64, eps=0.1, renorm_clipping={"rmax": 1.0, "rmin": 1.0, "dmax": 0.0}, **arguments)
    assert torch.autograd.gradgradcheck(layer, [data(4, 2, 2, dtype=torch.float64).requires_grad_()])


@pytest.mark.parametrize("activation", [None, "silu", "relu"])
def test_batched_gradients(activation):
    """All rows of a Jacobian in one backward pass."""
    layer, x, mask = randomised(SyncBatchNorm(2, activation=activation)), data(5, 2), data(5) > -1
    calls = [lambda v: layer(v, mask), lambda v: layer(v, residual=v.square())]
    for call in calls:
        rows, each = (torch.autograd.functional.jacobian(call, x, vectorize=v) for v in (True, False))
        torch.testing.assert_close(rows, each)


@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_derivatives_of_inputs_that_share_a_history(activation):
    """The residual is what x is made of, and the bias what the weight is made of."""
    layer = SyncBatchNorm(2, dtype=torch.float64, eps=0.1, activation=activation)
    h, dy = data(4, 2, 3, dtype=torch.float64).requires_grad_(), data(4, 2, 3, dtype=torch.float64)

    def block(h):
        return layer(torch.sin(h), residual=h)

    (plain,) = torch.autograd.grad(block(h), h, dy)
    (again,) = torch.autograd.grad(block(h), h, dy, create_graph=True)
    torch.testing.assert_close(again, plain, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradgradcheck(block, [h])


# ------------------------------------------------------------------------------------------------- eval


def test_eval_exports_traces_and_maps():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), randomised(SyncBatchNorm(4, activation="relu")), nn.Flatten()).eval()
    x = data(5, 3, 6, 6)
    expected = model(x)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), expected)
    # Torch's own operator takes another way from 65,536 samples on, on a GPU.
    batch = torch.export.Dim("batch", min=2, max=1024)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(exported.module()(x[:3]), expected[:3])
    torch.testing.assert_close(torch.vmap(model)(x[:, None]).squeeze(1), expected)
    jacobian = torch.func.jacrev(lambda v: model(v[None])[0])(x[0])
    (row,) = torch.autograd.grad(model(x.requires_grad_())[0, 7], x)
    torch.testing.assert_close(jacobian[7], row[0])


def test_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), randomised(SyncBatchNorm(4, renorm=True, activation="silu"))).eval()
    x = data(5, 3, 6, 6)
    file = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), str(file), dynamo=True, verbose=False, dynamic_shapes=({0: torch.export.Dim("batch")},))
    session = onnxruntime.InferenceSession(str(file))
    (got,) = session.run(None, {session.get_inputs()[0].name: x[:3].cpu().numpy()})
    np.testing.assert_allclose(got, numbers(model(x)[:3]), atol=1e-5)


# ------------------------------------------------------------------------------------------------- every argument


EFFECTS = {
    "eps": 0.5, "momentum": 0.5, "affine": False, "track_running_stats": False, "dtype": torch.float64, "bias": False,
    "renorm": True, "renorm_clipping": {"rmax": 0.5}, "renorm_momentum": 0.5, "activation": "relu",
}  # fmt: skip


def two_steps(arguments, x, dy):
    """Every number of two training steps with SGD between them, and of eval after."""
    torch.manual_seed(1)
    layer = SyncBatchNorm(3, **arguments)
    if layer.bias is not None:
        nn.init.ones_(layer.bias)
    optimizer, seen = torch.optim.SGD([*layer.parameters(), nn.Parameter(torch.zeros(1))], 0.1), []
    for _ in range(2):
        seen += step(layer, x, dy)
        optimizer.step()
    return [*seen, layer.eval()(x)]


@pytest.mark.parametrize("name", EFFECTS)
def test_no_argument_without_an_effect(name):
    x, dy = data(6, 3, 3), data(6, 3, 3)
    base = {"renorm": name.startswith("renorm_")}
    plain, changed = two_steps(base, x, dy), two_steps({**base, name: EFFECTS[name]}, x, dy)
    assert len(plain) != len(changed) or any(not torch.equal(a.double(), b.double()) for a, b in zip(plain, changed, strict=True))


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(("arguments", "text"), [
    ({"group_size": 0}, "`group_size` must be None or a positive integer, a number of replicas. Received: group_size=0."),
    ({"group_size": 2, "process_group": object()}, "Only one of `process_group` and `group_size` may be given"),
    ({"activation": nn.ReLU}, "`activation` must be an instance of a module, not its class. Received: activation=ReLU. Give ReLU()."),
    ({"activation": "tanh"}, "`activation` must be None, a callable or one of ['leaky_relu', 'relu', 'silu']. Received: activation='tanh'."),
    ({"renorm": True, "track_running_stats": False}, "renorm=True corrects towards the moving statistics, so they must be kept."),
    ({"renorm_clipping": {"max": 1}}, "`renorm_clipping` must be a dict with the keys"),
    ({"renorm_clipping": {"rmax": [1.0, 2.0]}}, "Each bound of `renorm_clipping` must be a number, a scalar tensor or variable"),
    ({"momentum": 1.5}, "`momentum` must lie in [0, 1]: it is the weight of the new value. Received: momentum=1.5."),
    ({"momentum": -0.1}, "`momentum` must lie in [0, 1]: it is the weight of the new value. Received: momentum=-0.1."),
    ({"eps": -1e-5}, "`eps` must be a finite number, 0 or more: it is added to the variance. Received: eps=-1e-05."),
    ({"eps": float("inf")}, "`eps` must be a finite number, 0 or more: it is added to the variance. Received: eps=inf."),
    ({"renorm_momentum": 2}, "`renorm_momentum` must lie in [0, 1]: it is the weight of the new value. Received: renorm_momentum=2."),
], ids=lambda v: v if isinstance(v, str) else None)  # fmt: skip
def test_bad_arguments(arguments, text):
    with pytest.raises(ValueError) as caught:
        SyncBatchNorm(3, **arguments)
    assert text in str(caught.value)


MASK = "`mask` must have the input's shape without the channel axes, or with 1 there, and each other axis full or 1."


@pytest.mark.parametrize(("shape", "arguments", "error", "text"), [
    ((3,), {}, ValueError, "expected at least 2D input (got 1D input)"),
    ((4, 0, 2), {}, ValueError, "SyncBatchNorm number of input channels should be non-zero"),
    ((4, 5), {}, ValueError, "The input must have the layer's number of channels on dim 1. Received: shape (4, 5) for num_features=3."),
    ((2, 4, 3), {}, ValueError, "for num_features=3. The channels come second: move them there, for example with x.movedim(-1, 1)."),
    ((2, 5, 5, 3), {}, ValueError, "for num_features=3. The channels come second"),
    ((2, 5, 3, 5), {}, ValueError, "for num_features=3. Make a layer with num_features=5."),
    ((4, 3, 5), {"mask": torch.ones(4, 5)}, TypeError, "`mask` must be of dtype bool, or of integers: True, or not 0, marks what counts. Received: a mask of dtype torch.float32."),
    ((4, 3, 5), {"mask": torch.ones(4, 5, dtype=torch.float16)}, TypeError, "`mask` must be of dtype bool, or of integers"),
    ((4, 3, 5), {"mask": torch.ones(4, 3, dtype=torch.bool)}, ValueError, MASK),
    ((4, 3, 5), {"mask": torch.ones(4, 3, 5, dtype=torch.bool)}, ValueError, MASK),
    ((4, 3, 5), {"mask": torch.ones(4, dtype=torch.bool)}, ValueError, MASK),
    ((4, 3, 5), {"residual": torch.ones(4, 3, 1)}, ValueError, "`residual` must have the input's shape. Received: residual of shape (4, 3, 1)"),
    ((1, 3), {}, ValueError, "Expected more than 1 value per channel when training, got input size [1, 3]"),
], ids=str)  # fmt: skip
def test_bad_calls(shape, arguments, error, text):
    layer = SyncBatchNorm(3)
    with pytest.raises(error) as caught:
        layer(data(*shape), **arguments)
    assert text in str(caught.value)
    assert layer.num_batches_tracked == 0


def test_torchs_own_says_the_same():
    for shape in ((3,), (4, 0, 2)):
        said = []
        for layer in (SyncBatchNorm(3), nn.SyncBatchNorm(3)):
            with pytest.raises(ValueError) as caught:
                layer.eval()(data(*shape))
            said.append(str(caught.value))
        assert said[0] == said[1]


def test_integer_input():
    with pytest.raises(TypeError, match=r"The input must be of a float dtype\. Received: torch\.int64"):
        SyncBatchNorm(3)(torch.ones(4, 3, dtype=torch.int64))


def test_the_environment_turns_the_handshake_on():
    code = "from syncbn.torch import desync; print(desync.enabled())"
    for value, said in (("1", "True"), ("0", "False")):
        environment = {**os.environ, "SYNCBN_DEBUG": value, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
        assert done.stdout.strip() == said, done.stderr


def test_group_size_has_no_effect_alone():
    assert SyncBatchNorm(3, group_size=8)(data(4, 3)).isfinite().all()


def test_docstring_examples():
    import doctest
    import importlib

    for name in ("torch.module", "torch.local", "torch.desync"):
        # What they print names no device.
        with torch.device("cpu"):
            found = doctest.testmod(importlib.import_module(f"syncbn.{name}"))
        assert found.failed == 0
        assert found.attempted > 1
    assert NAMED["leaky_relu"].slope == 0.01
    assert {"SyncBatchNorm", "local_statistics", "checkpoint_contexts", "debug", "EmptySteps"} <= set(syncbn.__all__)


def test_imported_in_inference_mode():
    """What the first import makes is no inference tensor: compiled training goes on from it."""
    code = (
        "import torch\n"
        "with torch.inference_mode():\n"
        "    from syncbn.torch.module import SyncBatchNorm\n"
        "    SyncBatchNorm(3).eval()(torch.randn(4, 3))\n"
        "layer, x = SyncBatchNorm(3), torch.randn(4, 3, requires_grad=True)\n"
        "y = torch.compile(layer, backend='aot_eager')(x)\n"
        "torch.autograd.grad(y, x, torch.randn_like(y))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
