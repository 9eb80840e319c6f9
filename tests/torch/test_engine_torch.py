"""The contract of the two verbs, on torch processes."""

from __future__ import annotations

import contextlib

import numpy as np
import oracle
import pytest
import torch
import torch.distributed as dist
from cases import CASES, LARGE_MEAN, RAGGED, Case
from checks import EPSILON, arguments, close, equals_oracle

from syncbn.contract import Moments, Statistics
from syncbn.groups import Activation
from syncbn.torch import cpu, dispatch, engine, groups, peer_memory, reference, transport
from syncbn.torch.arguments import ACTIVATIONS
from syncbn.torch.channel_view import ChannelView

# ------------------------------------------------------------------------------------------------- what a process runs


def tensor(a, dtype=None):
    return None if a is None else torch.tensor(np.asarray(a), dtype=dtype)


def numbers(v):
    """Tensors as numpy arrays."""
    if isinstance(v, torch.Tensor):
        return v.detach().clone().to(torch.float64 if v.is_floating_point() else v.dtype).cpu().numpy()
    return type(v)(map(numbers, v)) if isinstance(v, (list, tuple)) else v


def step(case, group, activation, x, dy, scale, offset, mask, residual=None):
    """Moments, output and gradients of one replica."""
    dtype = getattr(torch, case.dtype)
    x, dy, scale, offset = tensor(x, dtype).requires_grad_(), tensor(dy, dtype), tensor(scale), tensor(offset)
    scale.requires_grad_(), offset.requires_grad_()
    common = {"axes": case.channel_axes(), "mask": tensor(mask), "group": group}
    moments = engine.moments(x, **common)
    residual = tensor(residual, dtype)
    y = engine.normalize(x, moments, scale, offset, epsilon=EPSILON, activation=activation, residual=residual, **common)
    assert y.dtype == dtype
    mean = moments.mean if moments.mean_lo is None else moments.mean.double() + moments.mean_lo.double()
    gradients = torch.autograd.grad(y, [x, scale, offset], dy)
    return {"moments": numbers((moments.count, mean, moments.variance)), "y": numbers(y), "gradients": numbers(gradients)}


def step_by_eager(*arguments):
    """The same by the reference kernels, on whatever device."""
    with pytest.MonkeyPatch.context() as patch:
        for kernels in (cpu, dispatch.cuda_kernels()):
            if kernels is not None:
                patch.setattr(kernels, "serves", lambda x, mask: False)
        return step(*arguments)


def step_without_float64(*arguments):
    """The same in the form for devices without float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "has_float64", lambda device: False)
        # Mailboxes carry float64, and no device that lacks it has them.
        patch.setattr(transport, "mailbox_for", lambda communicator, device, channels: None)
        return step_by_eager(*arguments)


@contextlib.contextmanager
def counting():
    """(dtype, size) of each message that is sent inside, by a backend or by a mailbox, which carries float64."""
    sent, real, exchange = [], dist.all_reduce, peer_memory.Mailbox.exchange

    def exchanged(mailbox, channels, backward):
        sent.append((torch.float64, 2 * channels + (not backward)))
        return exchange(mailbox, channels, backward)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", lambda v, **k: (sent.append((v.dtype, v.numel())), real(v, **k))[1])
        patch.setattr(peer_memory.Mailbox, "exchange", exchanged)
        yield sent


def step_counting(*arguments):
    """All messages that a step sends."""
    with counting() as sent:
        step(*arguments)
    return sent


def statistics_after(case, weight, unbiased, x, scale, offset, mask):
    """(y, mean, variance, batches) after a training step with new statistics that the engine does not assign."""
    channels = case.channels()
    old = Statistics(torch.full((channels,), 3.0), torch.full((channels,), 5.0), weight, unbiased, torch.tensor(3))
    common = {"axes": case.channel_axes(), "epsilon": EPSILON, "mask": tensor(mask)}
    y, new = engine.train_step(tensor(x), tensor(scale), tensor(offset), old, **common)
    assert not new.assigned
    return numbers((y, new.mean, new.variance, new.batches))


def second_order(mask_as, x, dy, scale, offset, mask, direction):
    """d/dx of a gradient penalty."""
    x, dy, scale, offset = tensor(x).requires_grad_(), tensor(dy), tensor(scale).requires_grad_(), tensor(offset)
    common = {"axes": (2,), "mask": tensor(mask)}
    y = engine.normalize(x, engine.moments(x, **common), scale, offset, epsilon=EPSILON, **common)
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    (penalty,) = torch.autograd.grad(dx, x, tensor(direction))
    return numbers(penalty)


def constants(x, dy, scale, offset):
    """In inference: y, gradients, and the messages that went."""
    x, scale, offset = (tensor(v).requires_grad_() for v in (x, scale, offset))
    with counting() as sent:
        mean, variance = torch.arange(3.0, dtype=torch.float64), torch.arange(1.0, 4.0, dtype=torch.float64)
        y = engine.normalize(x, Moments(None, mean, variance), scale, offset, axes=(2,), epsilon=EPSILON)
        return *numbers((y, torch.autograd.grad(y, [x, scale, offset], tensor(dy)))), sent


def moments_of(group, axis, x):
    """(count, mean, variance)."""
    return numbers(engine.moments(tensor(x), axes=(axis,), group=group)[:3])


# ------------------------------------------------------------------------------------------------- the table of cases


def check(world, case, function=step, group=None):
    args = arguments(case, world.replicas)
    got = world.run(function, *args, common=(case, group, None))
    return equals_oracle(got, case, args, group)


@pytest.mark.parametrize("function", [step, step_by_eager])
@pytest.mark.parametrize("case", [*CASES, *LARGE_MEAN], ids=lambda case: case.name)
def test_equals_the_concatenated_batch(torch_world, case, function):
    check(torch_world, case, function)


@pytest.mark.parametrize("case", [*CASES[:8], *CASES[14:16], *LARGE_MEAN[:4]], ids=lambda case: case.name)
def test_without_float64(torch_world, case):
    """The form for devices that lack it, forced."""
    check(torch_world, case, step_without_float64)


class SingleProcess:
    """A world of this process."""

    replicas = 1

    @staticmethod
    def run(function, *per_replica, common=()):
        return [function(*common, *(None if values is None else values[0] for values in per_replica))]


@pytest.mark.parametrize("small", [2**16, 0])
@pytest.mark.parametrize("case", [*CASES, *LARGE_MEAN], ids=lambda case: case.name)
def test_one_process(case, small, monkeypatch):
    """Small inputs and large ones take different passes of the CPU kernels."""
    monkeypatch.setattr(cpu, "SMALL", small)
    check(SingleProcess, case)


def test_torch_before_2_13_takes_no_epsilon_of_0(monkeypatch):
    real = cpu.functional.batch_norm

    def strict(*arguments):
        assert arguments[-1] > 0
        return real(*arguments)

    monkeypatch.setattr(cpu.functional, "batch_norm", strict)
    check(SingleProcess, CASES[0])


@pytest.mark.parametrize("channels_first", [False, True])
def test_a_million_rows_a_channel(torch_world, channels_first):
    rest, axes = ((2, 500_000), (1,)) if channels_first else ((500_000, 2), (-1,))
    case = Case("a million rows", (1, 2, 0, 1), rest, axes, mean=1e4)
    xs = case.inputs(torch_world.replicas)
    got = torch_world.run(moments_of, xs, common=(None, *case.channel_axes()))
    n, mean, variance = oracle.BatchNorm(xs, axes=axes).moments[0]
    assert got[0][0] == n
    assert np.abs(got[0][2] / variance - 1).max() < 1e-5
    assert (np.abs(got[0][1] - mean) / np.sqrt(variance)).max() < 1e-5


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("ragged", "an empty replica", "masked, float64")], ids=lambda c: c.name
)
def test_groups(torch_world, case):
    check(torch_world, case, group=torch_world.replicas // 2)


def test_nan_stays_in_its_group(torch_world):
    xs = Case("nan in a group", RAGGED).inputs(torch_world.replicas)
    xs[0][:] = np.nan
    size = torch_world.replicas // 2
    got = torch_world.run(moments_of, xs, common=(size, 3))
    assert np.isnan(got[0][1]).all()
    np.testing.assert_allclose(got[-1][1], oracle.BatchNorm(xs[size:]).moments[0][1], atol=2e-6)


@pytest.mark.parametrize(("weight", "unbiased"), [(0.3, False), (0.3, True), (None, False)])
def test_a_training_step_by_the_other_verbs(torch_world, weight, unbiased):
    case = Case("a training step", RAGGED, (4, 3), mask="rows", scales_differ=True)
    xs, _, scale, offset, masks = arguments(case, torch_world.replicas)
    got = torch_world.run(statistics_after, xs, scale, offset, masks, common=(case, weight, unbiased))
    truth = oracle.BatchNorm(xs, axes=case.axes, masks=masks, epsilon=EPSILON)
    n, mean, variance = truth.moments[0]
    variance = variance * n / (n - 1) if unbiased else variance
    weight = weight or 1 / 4
    close([y for y, _, _, _ in got], truth.forward(scale, offset), case, "output")
    for _, new_mean, new_variance, batches in got:
        np.testing.assert_allclose(new_mean, 3 * (1 - weight) + mean * weight, rtol=1e-5)
        np.testing.assert_allclose(new_variance, 5 * (1 - weight) + variance * weight, rtol=1e-5)
        assert batches == 4


@pytest.mark.parametrize("function", [step, step_without_float64])
def test_global_count_0(torch_world, function):
    case = Case("nothing", (0, 0, 0, 0), (4, 3))
    for out in torch_world.run(function, *arguments(case, torch_world.replicas), common=(case, None, None)):
        count, mean, variance = out["moments"]
        assert count == 0
        assert np.array_equal(mean, np.zeros(3))
        assert np.array_equal(variance, np.ones(3))
        assert out["y"].shape == (0, 4, 3)
        assert all(np.isfinite(g).all() for g in out["gradients"])


def test_all_masked_normalises_with_0_and_1(torch_world):
    case = Case("all masked", RAGGED, (4, 3), mask="rows")
    xs, dys, scale, offset, masks = arguments(case, torch_world.replicas)
    got = torch_world.run(step, xs, dys, scale, offset, [np.zeros_like(m) for m in masks], common=(case, None, None))
    for x, s, o, out in zip(xs, scale, offset, got, strict=True):
        np.testing.assert_allclose(out["y"], x / np.sqrt(1 + EPSILON) * s + o, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", [step, step_by_eager])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", [*ACTIVATIONS.values(), Activation("leaky_relu", 0.2)], ids=str)
def test_activation_and_residual(torch_world, activation, residual, function):
    case = Case("fused", RAGGED, (4, 5), dtype="float64")
    xs, dys, scale, offset, _ = arguments(case, torch_world.replicas)
    residuals = case.cotangents(torch_world.replicas, "residuals") if residual else None
    got = torch_world.run(function, xs, dys, scale, offset, None, residuals, common=(case, None, activation))
    truth = oracle.BatchNorm(xs, axes=(2,), epsilon=EPSILON)
    before = truth.forward(scale, offset)
    if residual:
        before = [y + r for y, r in zip(before, residuals, strict=True)]
    sigmoid = [1 / (1 + np.exp(-z)) for z in before]
    if activation.name == "silu":
        ys = [z * s for z, s in zip(before, sigmoid, strict=True)]
        slopes = [s * (1 + z * (1 - s)) for z, s in zip(before, sigmoid, strict=True)]
    else:
        slopes = [np.where(z > 0, 1, activation.slope) for z in before]
        ys = [z * s for z, s in zip(before, slopes, strict=True)]
    close([out["y"] for out in got], ys, case, "output")
    for i, expected in enumerate(truth.backward([d * s for d, s in zip(dys, slopes, strict=True)], scale)):
        close([out["gradients"][i] for out in got], expected, case, "gradient")


@pytest.mark.parametrize("mask", [None, "rows"])
def test_second_order(torch_world, mask):
    """d/dx of a gradient penalty, ragged: wrong by half where the moments are constants of the backward pass."""
    case = Case("second order", (2, 1, 3, 0), (3, 2), dtype="float64", mask=mask, scales_differ=True)
    xs, dys, scale, offset, masks = arguments(case, torch_world.replicas)
    directions = case.cotangents(torch_world.replicas, "directions")
    got = torch_world.run(second_order, xs, dys, scale, offset, masks, directions, common=(None,))
    truth = oracle.BatchNorm(xs, axes=(2,), masks=masks, epsilon=EPSILON)
    flat = [oracle.rows(d, (2,)) for d in directions]
    truth_rows = truth.penalty_gradient(dys, scale, [oracle.unrows(f, s, (2,)) for f, s in zip(flat, truth.shapes, strict=True)])
    close(got, truth_rows, case, "second")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("activation", [None, "silu", "leaky_relu"])
def test_gradgradcheck(activation, masked):
    torch.manual_seed(3)
    x, residual = torch.randn(4, 3, 2, dtype=torch.float64), torch.randn(4, 3, 2, dtype=torch.float64)
    scale, offset = torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    mask = torch.rand(4, 1, 2) < 0.7 if masked else None
    chosen = activation and ACTIVATIONS[activation]

    def normalized(x, scale, offset, residual):
        moments = engine.moments(x, mask=mask)
        return engine.normalize(x, moments, scale, offset, epsilon=0.1, mask=mask, activation=chosen, residual=residual)

    inputs = [v.requires_grad_() for v in (x, scale, offset, residual)]
    assert torch.autograd.gradcheck(normalized, inputs)
    assert torch.autograd.gradgradcheck(normalized, inputs)


def test_constants_send_nothing_and_have_the_plain_gradient(torch_world):
    case = Case("constants", RAGGED, (4, 3), dtype="float64")
    xs, dys, scale, offset, _ = arguments(case, torch_world.replicas)
    mean, variance = np.arange(3.0), np.arange(1.0, 4.0)
    results = torch_world.run(constants, xs, dys, scale, offset)
    for x, dy, s, o, (y, (dx, dscale, doffset), sent) in zip(xs, dys, scale, offset, results, strict=True):
        assert sent == []
        x_hat = (x - mean) / np.sqrt(variance + EPSILON)
        np.testing.assert_allclose(y, x_hat * s + o, atol=1e-12)
        np.testing.assert_allclose(dx, dy * s / np.sqrt(variance + EPSILON), atol=1e-12)
        np.testing.assert_allclose(dscale, (dy * x_hat).sum((0, 1)), atol=1e-12)
        np.testing.assert_allclose(doffset, dy.sum((0, 1)), atol=1e-12)


@pytest.mark.parametrize(("group", "sizes"), [(None, [11, 10]), (1, [])])
def test_one_message_each_way(torch_world, group, sizes):
    case = Case("messages", RAGGED, (4, 5))
    got = torch_world.run(step_counting, *arguments(case, torch_world.replicas), common=(case, group, None))
    assert got == [[(torch.float64, size) for size in sizes]] * torch_world.replicas


def test_message_sizes_do_not_depend_on_dtype_or_emptiness(torch_world):
    case = Case("half", (0, 3, 1, 0), (4, 5), dtype="float16")
    got = torch_world.run(step_counting, *arguments(case, torch_world.replicas), common=(case, None, None))
    assert got == [[(torch.float64, 11), (torch.float64, 10)]] * torch_world.replicas


def communicators(group):
    return groups.communicator_of(group).name


def test_groups_are_made_once(torch_world):
    size = torch_world.replicas // 2
    for group in (None, size) if size > 1 else (None,):
        assert torch_world.run(communicators, common=(group,)) == torch_world.run(communicators, common=(group,))


def test_nothing_is_copied_where_there_is_a_view():
    x = torch.randn(2, 3, 4, 5)
    for axes in [(1,), (3,), (2, 3), (1, 2)]:
        view = ChannelView(axes, x.shape)
        assert view.of(x).data_ptr() == x.data_ptr()
        assert torch.equal(view.restore(view.of(x)), x)


@pytest.mark.parametrize("counted", [False, True])
def test_a_biased_moving_variance(counted):
    """Keras's, which neither torch's own operator nor the kernels compute."""
    x, vectors = torch.randn(4, 3, 5), [torch.ones(3), torch.zeros(3)]
    batches = torch.zeros((), dtype=torch.int64) if counted else None
    _, new = engine.train_step(x, *vectors, Statistics(torch.zeros(3), torch.ones(3), 0.1, False, batches), epsilon=EPSILON)
    torch.testing.assert_close(new.variance, 0.9 + 0.1 * x.var((0, 2), unbiased=False))
