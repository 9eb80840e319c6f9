"""The Triton kernels on the CPU, under Triton's interpreter, and compiled for a GPU that need not be there."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import itertools

import numpy as np
import pytest
import torch
from kernel_checks import EPSILON, MATRIX, KernelCase, check, each_way
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton", reason="the kernels are written in Triton")

from syncbn import SyncBatchNorm, maths
from syncbn.policy import Activation
from syncbn.torch import reference as eager
from syncbn.torch.passes import Normalization
from syncbn.torch.triton import backend as cuda
from syncbn.torch.triton import ops as fused
from syncbn.torch.triton import plan as plans
from syncbn.torch.triton import tiling
from syncbn.torch.triton.tiling import Tile

MACHINE = tiling.Machine(132, 227 << 10, True)


@pytest.fixture(autouse=True, scope="module")
def poisoned():
    """Memory that nobody wrote is NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.mark.parametrize(("case", "way"), each_way(MATRIX), ids=lambda v: getattr(v, "name", v))
def test_equals_oracle(case, way):
    check(case, way=way)


# Many splits, cut tiles, several turns a program, the order of turns: what small inputs would not make.
SMALL = {"moments": Tile(4, 2, 1, 3), "sums": Tile(8, 2, 1, 2), "normalize": Tile(4, 4, 1, 2), "input_gradient": Tile(2, 2, 1, 3)}


@pytest.mark.parametrize(
    "case",
    [
        KernelCase((3, 7, 5, 5)),
        KernelCase((3, 7, 5, 5), last=True),
        KernelCase((6, 4, 4, 4), mean=1e4),
        KernelCase((5, 3, 3, 3), last=True, mask=True, mean=1e4),
        KernelCase((4, 4, 6), activation="silu", residual=True),
    ],
    ids=lambda c: c.name,
)
def test_equals_oracle_in_small_tiles(case):
    check(case, tiles=SMALL)


def test_the_same_input_gives_the_same_bits():
    first, second = (check(MATRIX[0], tiles=SMALL) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def statistics(x, mask=None, moves=1):
    x = x.contiguous()
    moving = [torch.full((x.shape[1],), 3.0), torch.full((x.shape[1],), 5.0), torch.zeros(1, dtype=torch.int64)]
    keep = None if mask is None else mask.to(torch.uint8)
    plan = plans.Plan(tiling.fold(x), x.dtype, x.device, masked=mask is not None, moving=torch.float32, moves=moves)
    stats = fused.measure(plan, x, keep)
    y = fused.normalize(plan, x, stats, None, None, EPSILON, keep=keep, moving=fused.Moving(*moving, 0.5))
    return stats, y, moving


def test_an_empty_batch_says_nothing():
    stats, y, (mean, variance, batches) = statistics(torch.empty(0, 3, 4))
    assert stats[:7].tolist() == [0, 0, 0, 1, 1, 1, 0]
    assert y.shape == (0, 3, 4)
    assert (mean.tolist(), variance.tolist(), batches.item()) == ([3.0] * 3, [5.0] * 3, 0)


def test_a_batch_masked_everywhere_says_nothing():
    stats, y, (mean, _, batches) = statistics(torch.full((2, 3, 4), 7.0), torch.zeros(2, 1, 4, dtype=torch.bool))
    assert stats[:7].tolist() == [0, 0, 0, 1, 1, 1, 0]
    assert torch.isfinite(y).all()
    assert (mean.tolist(), batches.item()) == ([3.0] * 3, 0)


@pytest.mark.parametrize(("moves", "moved"), [(1, True), (2, False)])
def test_statistics_that_are_not_finite(moves, moved):
    x = torch.randn(4, 700, 2)
    x[0, 699, 0] = float("inf")
    _, _, (mean, _, batches) = statistics(x, moves=moves)
    assert batches.item() == moved
    assert (mean[0].item() != 3.0) == moved


def test_a_stray_value_under_the_mask_does_not_spread():
    x, mask = torch.randn(3, 2, 4), torch.ones(3, 1, 4, dtype=torch.bool)
    x[1, :, 2], mask[1, :, 2] = float("nan"), False
    _, y, _ = statistics(x, mask)
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("sent", [False, True], ids=["within", "sent"])
def test_statistics_move_to_the_bits_of_the_other_code(sent):
    """An empty or float64 replica moves its statistics by plain operators: they must not part from the others'."""
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.normal(size=(3, 400, 2)), dtype=torch.float32)
    old = torch.tensor(rng.random(400), dtype=torch.float32)
    moving = fused.Moving(old.clone(), old.clone(), torch.zeros(1, dtype=torch.int64), 0.4)
    plan = plans.Plan(tiling.fold(x), x.dtype, x.device, moving=torch.float32, moves=2, sent=sent, raw=sent)
    stats = fused.measure(plan, x, None)
    fused.normalize(plan, x, stats, None, None, EPSILON, moving=moving)
    if sent:
        n, mean, variance = eager.moments_of_sums(stats)
    else:
        mean, variance, n = stats[:400], stats[400:800], stats[800]
    for got, batch in ((moving.mean, mean), (moving.variance, variance * (n / (n - 1)))):
        assert torch.equal(got, maths.moving_average(old.double(), batch, 1 - 0.4).float())


def test_cumulative_average():
    x = torch.randn(8, 3, 2)
    moving = fused.Moving(torch.zeros(3), torch.ones(3), torch.tensor([3]), -1.0)
    plan = plans.Plan(tiling.fold(x), x.dtype, x.device, moving=torch.float32, moves=1)
    fused.normalize(plan, x, fused.measure(plan, x, None), None, None, EPSILON, moving=moving)
    np.testing.assert_allclose(moving.mean, x.mean((0, 2)) / 4, rtol=1e-5)
    assert moving.tracked.item() == 4


@pytest.mark.parametrize("layout", ["first", "last", "strided"])
@pytest.mark.parametrize(
    ("activation", "residual", "whole"),
    [(None, False, False), (None, True, True), ("relu", False, False), ("silu", True, True), ("relu", True, False)],
)
def test_interface_agrees_with_the_reference(layout, activation, residual, whole):
    rng = np.random.default_rng(1)
    draw = lambda *size: torch.tensor(rng.normal(size=size), dtype=torch.float32)  # noqa: E731
    x = draw(4, 3, 5, 6)
    if layout == "last":
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        x = draw(4, 3, 5, 12)[..., ::2]
    mask = torch.tensor(rng.random((4, 1, 5, 1)) < 0.7)
    dy, r = draw(4, 3, 5, 1).expand(4, 3, 5, 6), draw(4, 3, 5, 6) if residual else None
    chosen = activation and Activation(activation, 0.0)
    message = eager.local_sums(x, mask)
    torch.testing.assert_close(cuda.local_sums(x, mask), message, rtol=1e-6, atol=1e-6)
    count, mean, variance = eager.moments_of_sums(message)
    norm = Normalization(mean, variance, draw(3), draw(3), EPSILON, chosen)
    y = eager.normalize(x, norm, r)
    torch.testing.assert_close(cuda.normalize(x, norm, r), y, rtol=1e-5, atol=1e-5)
    kept = None if not residual or chosen is None else (r if activation == "silu" else y)
    dz, sums, sent = eager.gradient_sums(dy, x, norm, kept, whole)
    got_dz, got_sums, got_sent = cuda.gradient_sums(dy, x, norm, kept, whole)
    torch.testing.assert_close(got_sums, sums, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got_sent, sent, rtol=1e-5, atol=1e-5)
    if whole:
        torch.testing.assert_close(got_dz, dz, rtol=1e-5, atol=1e-5)
    # As of two replicas.
    dx = eager.input_gradient(dz, x, mask, norm, 2 * count, 3 * sent)
    torch.testing.assert_close(cuda.input_gradient(got_dz, x, mask, norm, 2 * count, 3 * sent), dx, rtol=1e-5, atol=1e-5)


# As if registers held hardly more than this.
HELD = {"resident": Tile(64, 2, 1, 1)}


def in_one_launch(x, mask=None, weight=0.5):
    """(stats, y, moving statistics) of x, in registers, without scale and offset."""
    moving = [torch.full((x.shape[1],), 3.0), torch.full((x.shape[1],), 5.0), torch.zeros(1, dtype=torch.int64)]
    keep = None if mask is None else mask.to(torch.uint8)
    plan = plans.Plan(
        tiling.fold(x), x.dtype, x.device, masked=mask is not None, moving=torch.float32, moves=1, at_once=True, tiles=HELD
    )
    given = {"keep": keep, "residual": None, "slope": 0.0, "lane": None}
    y, stats = fused.forward(plan, x, None, None, EPSILON, moving=fused.Moving(*moving, weight), **given)
    return stats, y, moving


def test_in_registers_a_batch_masked_everywhere_says_nothing():
    stats, y, (mean, variance, batches) = in_one_launch(torch.full((2, 3, 4), 7.0), torch.zeros(2, 1, 4, dtype=torch.bool))
    assert stats.tolist() == [0, 0, 0, 1, 1, 1, 0]
    assert torch.isfinite(y).all()
    assert (mean.tolist(), variance.tolist(), batches.item()) == ([3.0] * 3, [5.0] * 3, 0)


def test_in_registers_a_stray_value_under_the_mask_does_not_spread():
    x, mask = torch.randn(3, 2, 4), torch.ones(3, 1, 4, dtype=torch.bool)
    x[1, :, 2], mask[1, :, 2] = float("nan"), False
    stats, y, (mean, _, batches) = in_one_launch(x, mask)
    assert torch.isfinite(stats).all()
    assert torch.isfinite(y).all()
    np.testing.assert_allclose(mean, (3 + torch.where(mask, x, 0).sum((0, 2)) / 11) / 2, rtol=1e-5)
    assert batches.item() == 1


def test_in_registers_what_is_not_finite_shows():
    x = torch.randn(4, 3, 2)
    x[0, 1, 0] = float("inf")
    stats, y, (mean, variance, batches) = in_one_launch(x)
    assert stats[:6].isfinite().tolist() == [True, False, True, True, False, True]
    assert y.isfinite().all((0, 2)).tolist() == [True, False, True]
    assert mean.isfinite().tolist() == variance.isfinite().tolist() == [True, False, True]
    assert (stats[1].item(), mean[1].item()) == (float("inf"), float("inf"))
    assert batches.item() == 1


def test_values_whose_sum_is_too_large():
    x = torch.randn(4, 3, 8) * 1e30 + 3e37
    stats, y, _ = in_one_launch(x)
    np.testing.assert_allclose(stats[:3], x.double().mean((0, 2)), rtol=1e-6)
    assert torch.isfinite(y).all()


def test_turns_visit_every_tile_once():
    for across, length in itertools.product(range(1, 5), range(1, 6)):
        seen = [turn % across * length + (length - 1 - turn // across) for turn in range(across * length)]
        assert sorted(seen) == list(range(across * length))


def test_an_empty_replica_has_a_program_that_moves_its_statistics():
    for f in (tiling.Fold(0, 3, 49), tiling.Fold(0, 3, 1)):
        tile, before = (tiling.tile_for(kernel, f, 4, MACHINE) for kernel in ("normalize", "moments"))
        assert plans.pointwise_programs(f, tile, before) >= 1


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_plans_cover_every_value(layout):
    for shape in [(32, 64, 112, 112), (2, 8192, 1, 1), (1, 1, 333, 333), (7, 3, 7, 7), (1, 1, 1, 1), (300, 5, 1, 1)]:
        n, c, h, w = shape
        f = tiling.Fold(n * h * w, c, 1) if layout == "NHWC" else tiling.Fold(n, c, h * w)
        for kernel, size in itertools.product(tiling.CHOICES, (2, 4)):
            tile = tiling.tile_for(kernel, f, size, MACHINE)
            steps = -(-f.A * f.B // tile.T)
            assert tile.T & (tile.T - 1) == tile.K & (tile.K - 1) == 0
            assert tile.share * -(-steps // tile.share) >= steps
            assert tile.share * tile.T <= 2 * tiling.MOST_VALUES


# ------------------------------------------------------------------------------------------------- a layer in whole


def whole_step(layer, x, dy):
    """Output and gradients by the kernels, as on a GPU."""
    x = x.detach().requires_grad_()
    y = layer._in_whole(x, None, None)
    return [y, *torch.autograd.grad(y, [x, layer.weight, layer.bias], dy)]


@pytest.mark.parametrize("momentum", [0.1, 0.0, None])
def test_moving_statistics_are_torchs(momentum):
    """1/batches by two launches: within one some programs would read what another has counted."""
    layer, theirs = SyncBatchNorm(3, momentum=momentum), torch.nn.BatchNorm1d(3, momentum=momentum)
    for _ in range(3):
        x = torch.randn(4, 3, 5) * 2 + 1
        assert layer._in_whole(x, None, None) is not None
        theirs(x)
    for got, expected in zip(layer.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None], ids=["one launch", "two"])
def test_nothing_depends_on_a_stray_value_under_the_mask(momentum, create_graph):
    """It is read as 0."""
    layer, x, dy = SyncBatchNorm(2, momentum=momentum), torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    mask = torch.tensor([1, 1, 0, 0], dtype=torch.bool).expand(3, 1, 4)
    x[:, :, 3] = float("inf")
    x.requires_grad_()
    y = layer._in_whole(x, mask, None)
    (got,) = torch.autograd.grad(y, x, dy, create_graph=create_graph)
    (expected,) = torch.autograd.grad(layer(x, mask=mask), x, dy)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert (got[:, :, 3] == 0).all()


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_recomputation_saves_what_the_first_pass_saved(momentum):
    layer, x = SyncBatchNorm(3, momentum=momentum), torch.randn(4, 3, 5, requires_grad=True)
    dy = torch.randn(4, 3, 5)
    (expected,) = torch.autograd.grad(layer._in_whole(x, None, None), x, dy)
    y = checkpoint(lambda x: layer._in_whole(x, None, None), x, use_reentrant=False)
    (got,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(got, expected)
    assert layer.num_batches_tracked.item() == 2


def test_saved_tensors_may_come_back_in_another_layout():
    """As `save_on_cpu(pin_memory=True)` hands them back."""
    x = torch.randn(4, 3, 5, 6).contiguous(memory_format=torch.channels_last)
    dy, layer = torch.randn(4, 3, 5, 6), SyncBatchNorm(3)
    with torch.autograd.graph.saved_tensors_hooks(lambda v: v, lambda v: v.clone(memory_format=torch.contiguous_format)):
        got = whole_step(layer, x, dy)
    x.requires_grad_()
    y = torch.nn.functional.batch_norm(x, None, None, layer.weight, layer.bias, True, 0.0, layer.eps)
    for a, b in zip(got, [y, *torch.autograd.grad(y, [x, layer.weight, layer.bias], dy)], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_statistics_that_are_not_to_be_tracked_stay():
    layer = SyncBatchNorm(3)
    layer.track_running_stats = False
    whole_step(layer, torch.randn(4, 3, 5), torch.randn(4, 3, 5))
    assert layer.num_batches_tracked == 0
    assert (layer.running_mean == 0).all()


def test_vectors_that_the_kernels_cannot_walk_over_go_another_way():
    layer, x = SyncBatchNorm(3), torch.randn(4, 3, 5)
    layer.weight = torch.nn.Parameter(torch.randn(3, 2)[:, 0])
    assert layer._in_whole(x, None, None) is None
    layer = SyncBatchNorm(3)
    layer.bias = torch.nn.Parameter(layer.bias.double())
    assert layer._in_whole(x, None, None) is None
