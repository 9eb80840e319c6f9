"""The Triton kernels on the CPU, under Triton's interpreter, and compiled for a GPU that need not be there."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import itertools
import math

import numpy as np
import pytest
import torch
from kernel_checks import EPSILON, MATRIX, KernelCase, check, each_way
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton", reason="the kernels are written in Triton")

from syncbn import SyncBatchNorm, maths
from syncbn.contract import Statistics
from syncbn.groups import Activation
from syncbn.torch import dispatch, fused, reference
from syncbn.torch.reference import Normalization
from syncbn.torch.triton import backend, ops, plan, scratch, tiling
from syncbn.torch.triton.device import barrier
from syncbn.torch.triton.plan import Plan, PlanOptions
from syncbn.torch.triton.tiling import ChannelView, SingleLaunchTile, Tile

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


# Many splits, cut tiles, several steps a program, the order of steps: what small inputs would not make.
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


def shared(case, held, splits):
    """Each way in one launch, `splits` programs a block of channels, each with so many tiles in registers."""
    tiles = -(-case.shape[0] * math.prod(case.shape[2:]) // 4)
    each = -(-tiles // splits)
    last = tiles % each or each
    assert each < tiles
    return dict.fromkeys(("forward", "backward"), SingleLaunchTile(4, 2, 1, min(held, last), each))


@pytest.mark.parametrize(("held", "splits"), [(1, 5), (2, 3), (9, 4)])
@pytest.mark.parametrize(
    "case",
    [
        KernelCase((3, 7, 5, 5)),
        KernelCase((3, 7, 5, 5), last=True, dtype="bfloat16"),
        KernelCase((6, 4, 4, 4), mean=1e4),
        KernelCase((5, 3, 3, 3), last=True, mask=True, mean=1e4),
        KernelCase((4, 4, 6), activation="silu", residual=True),
        KernelCase((4, 4, 6), activation="relu", residual=True, mask=True),
    ],
    ids=lambda c: c.name,
)
def test_equals_oracle_where_programs_share_a_block(case, held, splits):
    """The interpreter runs one program after the other. So all but the last give up, and it writes their tiles."""
    check(case, tiles=shared(case, held, splits), way="single launch")


def test_the_same_input_gives_the_same_bits():
    first, second = (check(MATRIX[0], tiles=SMALL) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def plan_of(x, tiles=None, **options):
    """A plan with moving statistics."""
    options = PlanOptions(EPSILON, statistics=torch.float32, **options)
    return Plan(tiling.channel_view(x), x.dtype, x.device, options, tiles)


def moving_statistics(mean, variance, batches, weight):
    return Statistics(mean, variance, weight, True, batches)


def statistics(x, mask=None, update=1):
    x = x.contiguous()
    moving = [torch.full((x.shape[1],), 3.0), torch.full((x.shape[1],), 5.0), torch.zeros(1, dtype=torch.int64)]
    mask_bytes = None if mask is None else mask.to(torch.uint8)
    plan = plan_of(x, masked=mask is not None, update=update)
    stats = ops.measure(plan, x, mask_bytes)
    y = ops.normalize(plan, x, stats, None, None, mask=mask_bytes, statistics=moving_statistics(*moving, 0.5))
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


@pytest.mark.parametrize(("update", "updated"), [(1, True), (2, False)])
def test_statistics_that_are_not_finite(update, updated):
    x = torch.randn(4, 700, 2)
    x[0, 699, 0] = float("inf")
    _, _, (mean, _, batches) = statistics(x, update=update)
    assert batches.item() == updated
    assert (mean[0].item() != 3.0) == updated


def test_a_masked_value_that_is_not_finite_does_not_spread():
    x, mask = torch.randn(3, 2, 4), torch.ones(3, 1, 4, dtype=torch.bool)
    x[1, :, 2], mask[1, :, 2] = float("nan"), False
    _, y, _ = statistics(x, mask)
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("partial_sums", [False, True], ids=["within", "partial sums"])
def test_statistics_have_the_bits_of_the_other_code(partial_sums):
    """An empty or float64 replica updates its statistics by plain operators: they must not part from the others'."""
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.normal(size=(3, 400, 2)), dtype=torch.float32)
    old = torch.tensor(rng.random(400), dtype=torch.float32)
    moving = moving_statistics(old.clone(), old.clone(), torch.zeros(1, dtype=torch.int64), 0.4)
    plan = plan_of(x, update=2, partial_sums=partial_sums, reduced_sums=partial_sums)
    stats = ops.measure(plan, x, None)
    ops.normalize(plan, x, stats, None, None, statistics=moving)
    if partial_sums:
        n, mean, variance = reference.moments_of_sums(stats)
    else:
        mean, variance, n = stats[:400], stats[400:800], stats[800]
    for got, batch in ((moving.mean, mean), (moving.variance, variance * (n / (n - 1)))):
        assert torch.equal(got, maths.moving_average(old.double(), batch, 1 - 0.4).float())


def test_cumulative_average():
    x = torch.randn(8, 3, 2)
    moving = moving_statistics(torch.zeros(3), torch.ones(3), torch.tensor([3]), None)
    plan = plan_of(x, update=1)
    ops.normalize(plan, x, ops.measure(plan, x, None), None, None, statistics=moving)
    np.testing.assert_allclose(moving.mean, x.mean((0, 2)) / 4, rtol=1e-5)
    assert moving.batches.item() == 4


@pytest.mark.parametrize("layout", ["first", "last", "strided"])
@pytest.mark.parametrize(
    ("activation", "residual", "full"),
    [(None, False, False), (None, True, True), ("relu", False, False), ("silu", True, True), ("relu", True, False)],
)
def test_interface_agrees_with_the_reference(layout, activation, residual, full):
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
    message = reference.local_sums(x, mask)
    torch.testing.assert_close(backend.local_sums(x, mask), message, rtol=1e-6, atol=1e-6)
    count, mean, variance = reference.moments_of_sums(message)
    norm = Normalization(mean, variance, draw(3), draw(3), EPSILON, chosen)
    y = reference.normalize(x, norm, r)
    torch.testing.assert_close(backend.normalize(x, norm, r), y, rtol=1e-5, atol=1e-5)
    saved = None if not residual or chosen is None else (r if activation == "silu" else y)
    dz, sums, sent = reference.gradient_sums(dy, x, norm, saved, full)
    got_dz, got_sums, got_sent = backend.gradient_sums(dy, x, norm, saved, full)
    torch.testing.assert_close(got_sums, sums, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got_sent, sent, rtol=1e-5, atol=1e-5)
    if full:
        torch.testing.assert_close(got_dz, dz, rtol=1e-5, atol=1e-5)
    # As of two replicas.
    dx = reference.input_gradient(dz, x, mask, norm, 2 * count, 3 * sent)
    torch.testing.assert_close(backend.input_gradient(got_dz, x, mask, norm, 2 * count, 3 * sent), dx, rtol=1e-5, atol=1e-5)


# One tile that covers all positions.
IN_REGISTERS = dict.fromkeys(("forward", "backward"), SingleLaunchTile(64, 2, 1))
# One tile, several of which some are read twice, and several programs with a barrier.
PARTITIONS = {
    "one tile": IN_REGISTERS,
    "tiles": dict.fromkeys(IN_REGISTERS, SingleLaunchTile(4, 2, 1, 2, 8)),
    "barrier": dict.fromkeys(IN_REGISTERS, SingleLaunchTile(4, 2, 1, 1, 3)),
}


def in_one_launch(x, mask=None, weight=0.5, tiles=IN_REGISTERS):
    """(stats, y, moving statistics) of x, in registers, without scale and offset."""
    moving = [torch.full((x.shape[1],), 3.0), torch.full((x.shape[1],), 5.0), torch.zeros(1, dtype=torch.int64)]
    plan = plan_of(x, tiles, masked=mask is not None, update=1, single_launch=True)
    given = {"mask": None if mask is None else mask.to(torch.uint8), "residual": None}
    y, stats = ops.forward(plan, x, None, None, statistics=moving_statistics(*moving, weight), **given)
    return stats, y, moving


def test_in_registers_a_batch_masked_everywhere_says_nothing():
    stats, y, (mean, variance, batches) = in_one_launch(torch.full((2, 3, 4), 7.0), torch.zeros(2, 1, 4, dtype=torch.bool))
    assert stats.tolist() == [0, 0, 0, 1, 1, 1, 0]
    assert torch.isfinite(y).all()
    assert (mean.tolist(), variance.tolist(), batches.item()) == ([3.0] * 3, [5.0] * 3, 0)


def test_in_registers_a_masked_value_that_is_not_finite_does_not_spread():
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


@pytest.mark.parametrize("where", [float("nan"), float("-inf"), 1.0])
@pytest.mark.parametrize("partition", PARTITIONS)
def test_an_infinite_mean_is_one_only_where_all_else_is_finite(partition, where):
    """One tile gives torch's mean. Several tiles may give NaN where torch has infinity, but never the reverse."""
    x = torch.randn(1, 2, 32)
    x[0, 0, 1], x[0, 0, 9] = float("inf"), where
    stats, y, (mean, _, _) = in_one_launch(x, tiles=PARTITIONS[partition])
    expected = x[0, 0].double().mean()
    assert stats[0].isnan() if expected.isnan() else not stats[0].isfinite()
    assert not mean[0].isfinite()
    assert y[0, 0].isnan().any()
    assert stats[1].isfinite()
    assert y[0, 1].isfinite().all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("partition", PARTITIONS)
def test_values_whose_sum_is_too_large(partition, masked):
    # Many channels, because the outcome depends on the signs of the values.
    x = torch.randn(4, 40, 8) * 1e30 + 3e37
    stats, y, _ = in_one_launch(x, torch.ones(4, 1, 8, dtype=torch.bool) if masked else None, tiles=PARTITIONS[partition])
    np.testing.assert_allclose(stats[:40], x.double().mean((0, 2)), rtol=1e-6)
    assert torch.isfinite(y).all()


def test_steps_visit_every_tile_once():
    for across, length in itertools.product(range(1, 5), range(1, 6)):
        seen = [step % across * length + (length - 1 - step // across) for step in range(across * length)]
        assert sorted(seen) == list(range(across * length))


def test_the_barrier_can_be_used_again():
    """All counters are 0 after each launch, and one program of a block updates the moving statistics."""
    case = KernelCase((3, 7, 5, 5))
    x, dy = (case.tensor(np.random.default_rng(seed)) for seed in (1, 2))
    moving = [torch.zeros(7), torch.ones(7), torch.zeros(1, dtype=torch.int64)]
    layer = plan_of(x, shared(case, 1, 5), update=1, single_launch=True)
    found = []
    for _ in range(3):
        given = {"mask": None, "residual": None, "statistics": moving_statistics(*moving, 0.5)}
        y, stats = ops.forward(layer, x, None, None, **given)
        found.append((y, stats, ops.backward(layer, x, dy, stats, None, None, mask=None, saved=None).dx))
    assert all(torch.equal(a, b) for others in found[1:] for a, b in zip(found[0], others, strict=True))
    assert not any(of_stream.arrivals.any() for of_stream in scratch._streams.values())
    assert moving[2].item() == 3
    torch.testing.assert_close(moving[0], 0.875 * x.mean((0, 2, 3)))


@pytest.mark.parametrize("extra_bytes", [0, 2, 8])
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_single_launches_cover_every_value(way, extra_bytes):
    """The programs of a block cover all its tiles. Their number fits the barrier's bits and the GPU's processors."""
    shapes = [
        (32, 64, 56, 56),
        (8, 1024, 14, 14),
        (8, 64, 112, 112),
        (3, 2048, 9, 31),
        (2, 96, 25, 42),
        (8, 512, 28, 28),
        (7, 24, 40, 40),
    ]
    found = []
    for (n, c, h, w), last, size in itertools.product(shapes, (True, False), (2, 4)):
        view = ChannelView(n * h * w, c, 1) if last else ChannelView(n, c, h * w)
        tile = tiling.single_launch_tile(way, view, size, extra_bytes, MACHINE)
        if tile is not None:
            tiles = -(-n * h * w // tile.block_p)
            programs = -(-tiles // tile.tiles_per_program)
            last_has = tiles - (programs - 1) * tile.tiles_per_program
            assert 1 <= tile.register_tiles <= last_has <= tile.tiles_per_program
            assert programs <= barrier.MAX_PROGRAMS
            assert programs == 1 or programs * -(-c // tile.block_c) <= MACHINE.processors
            found.append(programs)
    assert min(found) == 1
    assert max(found) > 1


@pytest.mark.parametrize("capacity", [1, 5, 30])
def test_the_partition_of_tiles_is_the_best(capacity):
    for tiles, most in itertools.product((1, 2, 31, 49, 98, 392), (1, 4, 31)):
        held, each = tiling.partition_tiles(tiles, most, capacity)
        programs = -(-tiles // each)
        assert programs <= most
        assert held == min(capacity, tiles - (programs - 1) * each)
        # No other number of programs would do better.
        assert all(
            2 * each - held <= 2 * -(-tiles // p) - min(capacity, (tiles - 1) % -(-tiles // p) + 1)
            for p in range(1, min(most, tiles) + 1)
        )


def test_images_that_all_differ_in_size_take_kernels_that_are_compiled_once(monkeypatch):
    monkeypatch.setattr(backend, "_plans", {})
    monkeypatch.setattr(backend, "_sizes", {})
    options = PlanOptions(EPSILON, single_launch=True)
    images = [torch.zeros(1, 64, 5, width).to(memory_format=torch.channels_last) for width in range(2, 2 + backend.MAX_SIZES + 2)]
    singles = [backend.plan_for(x, options).forward is not None for x in images]
    assert singles == [True] * backend.MAX_SIZES + [False] * 2
    assert backend.plan_for(images[0], options).forward is not None
    # A recomputation, which updates no statistics, takes what the first pass took.
    again = options._replace(statistics=torch.float32, update=1)
    assert [backend.plan_for(x, again).forward is not None for x in reversed(images)] == singles[::-1]
    # Planes are compiled for their size anyway.
    assert backend.plan_for(torch.zeros(1, 64, 5, 20), options).forward is not None


def test_an_empty_replica_has_a_program_that_updates_its_statistics():
    for view in (ChannelView(0, 3, 49), ChannelView(0, 3, 1)):
        tile, before = (tiling.tile_for(kernel, view, 4, MACHINE) for kernel in ("normalize", "moments"))
        assert plan.pointwise_programs(view, tile, before) >= 1


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(("kernel", "following"), [("moments", "normalize"), ("sums", "input_gradient")])
def test_programs_of_channels_last_have_equal_parts(kernel, following, itemsize):
    """Then what the next launch reads first is what all of them read last."""
    h200 = tiling.Machine(132, 227 << 10, True)
    for images, channels, side in [
        (32, 64, 112),
        (32, 256, 56),
        (32, 512, 28),
        (32, 1024, 14),
        (8, 64, 112),
        (8, 256, 56),
        (8, 512, 28),
    ]:
        view = ChannelView(images * side * side, channels, 1)
        tile = tiling.tile_for(kernel, view, itemsize, h200)
        assert view.A % (tile.block_p * tile.tiles_per_program) == 0
        assert tiling.order(view, tiling.tile_for(following, view, itemsize, h200), tile)[0] > 1


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_plans_cover_every_value(layout):
    for shape in [(32, 64, 112, 112), (2, 8192, 1, 1), (1, 1, 333, 333), (7, 3, 7, 7), (1, 1, 1, 1), (300, 5, 1, 1)]:
        n, c, h, w = shape
        view = ChannelView(n * h * w, c, 1) if layout == "NHWC" else ChannelView(n, c, h * w)
        for kernel, size in itertools.product(tiling.CHOICES, (2, 4)):
            tile = tiling.tile_for(kernel, view, size, MACHINE)
            steps = -(-view.A * view.B // tile.block_p)
            assert tile.block_p & (tile.block_p - 1) == tile.block_c & (tile.block_c - 1) == 0
            assert tile.tiles_per_program * -(-steps // tile.tiles_per_program) >= steps
            assert tile.tiles_per_program * tile.block_p <= 2 * tiling.MOST_VALUES


# ------------------------------------------------------------------------------------------------- a whole training step


@pytest.fixture
def by_kernels(monkeypatch):
    """Layers take the path of CUDA tensors; what is returned lists the steps that the kernels did."""
    steps, step = [], fused.train_step

    def counted(*arguments):
        steps.append(1)
        return step(*arguments)

    monkeypatch.setattr(dispatch, "fused_kernels", lambda x, mask: backend if backend.serves(x, mask) else None)
    monkeypatch.setattr(fused, "train_step", counted)
    return steps


def whole_step(layer, x, dy):
    """Output and gradients."""
    x = x.detach().requires_grad_()
    y = layer(x)
    return [y, *torch.autograd.grad(y, [x, layer.weight, layer.bias], dy)]


@pytest.mark.parametrize("momentum", [0.1, 0.0, None])
def test_moving_statistics_are_torchs(by_kernels, momentum):
    """1/batches by two launches: within one some programs would read what another has counted."""
    layer, theirs = SyncBatchNorm(3, momentum=momentum), torch.nn.BatchNorm1d(3, momentum=momentum)
    for _ in range(3):
        x = torch.randn(4, 3, 5) * 2 + 1
        layer(x), theirs(x)
    assert len(by_kernels) == 3
    for got, expected in zip(layer.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None], ids=["one launch", "two"])
def test_nothing_depends_on_a_masked_value_that_is_not_finite(by_kernels, monkeypatch, momentum, create_graph):
    """It is read as 0."""
    layer, x, dy = SyncBatchNorm(2, momentum=momentum), torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    mask = torch.tensor([1, 1, 0, 0], dtype=torch.bool).expand(3, 1, 4)
    x[:, :, 3] = float("inf")
    x.requires_grad_()
    (got,) = torch.autograd.grad(layer(x, mask), x, dy, create_graph=create_graph)
    assert by_kernels
    monkeypatch.undo()
    (expected,) = torch.autograd.grad(layer(x, mask=mask), x, dy)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert (got[:, :, 3] == 0).all()


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_recomputation_saves_what_the_first_pass_saved(by_kernels, momentum):
    layer, x = SyncBatchNorm(3, momentum=momentum), torch.randn(4, 3, 5, requires_grad=True)
    dy = torch.randn(4, 3, 5)
    (expected,) = torch.autograd.grad(layer(x), x, dy)
    y = checkpoint(layer, x, use_reentrant=False)
    (got,) = torch.autograd.grad(y, x, dy)
    assert len(by_kernels) == 3
    assert torch.equal(got, expected)
    assert layer.num_batches_tracked.item() == 2


def test_saved_tensors_may_come_back_in_another_layout(by_kernels):
    """As `save_on_cpu(pin_memory=True)` hands them back."""
    x = torch.randn(4, 3, 5, 6).contiguous(memory_format=torch.channels_last)
    dy, layer = torch.randn(4, 3, 5, 6), SyncBatchNorm(3)
    with torch.autograd.graph.saved_tensors_hooks(lambda v: v, lambda v: v.clone(memory_format=torch.contiguous_format)):
        got = whole_step(layer, x, dy)
    x.requires_grad_()
    y = torch.nn.functional.batch_norm(x, None, None, layer.weight, layer.bias, True, 0.0, layer.eps)
    assert by_kernels
    for a, b in zip(got, [y, *torch.autograd.grad(y, [x, layer.weight, layer.bias], dy)], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_statistics_that_are_not_to_be_tracked_stay(by_kernels):
    layer = SyncBatchNorm(3)
    layer.track_running_stats = False
    whole_step(layer, torch.randn(4, 3, 5), torch.randn(4, 3, 5))
    assert by_kernels
    assert layer.num_batches_tracked == 0
    assert (layer.running_mean == 0).all()


def test_vectors_that_the_kernels_cannot_walk_over_go_another_way(by_kernels):
    layer, x = SyncBatchNorm(3), torch.randn(4, 3, 5)
    layer.weight = torch.nn.Parameter(torch.randn(3, 2)[:, 0])
    layer(x)
    layer = SyncBatchNorm(3)
    layer.bias = torch.nn.Parameter(layer.bias.double())
    layer(x)
    assert not by_kernels


def test_a_bias_without_a_weight(by_kernels):
    layer, x, dy = SyncBatchNorm(3, bias=False), torch.randn(4, 3, 5, requires_grad=True), torch.randn(4, 3, 5)
    y = layer(x)
    (dweight,) = torch.autograd.grad(y, layer.weight, dy)
    right = torch.nn.functional.batch_norm(x, None, None, None, None, True, 0.0, layer.eps)
    assert by_kernels
    torch.testing.assert_close(y, right, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dweight, (dy * right).sum((0, 2)), rtol=1e-4, atol=1e-5)


def test_counters_that_were_given_stay_alive(monkeypatch):
    """A captured graph holds their address alone."""
    monkeypatch.setattr(scratch, "_slabs", {})
    monkeypatch.setattr(scratch, "_replaced", [])
    device = torch.device("cpu")
    scratch.scratch_for(device, 0, 1, 1)
    given = scratch.counters(device, scratch.SLAB // 2 + 1).untyped_storage().data_ptr()
    scratch.scratch_for(device, 0, 1, 1)
    assert scratch._slabs[device.index].untyped_storage().data_ptr() != given
    assert [slab.untyped_storage().data_ptr() for slab in scratch._replaced] == [given]


@pytest.mark.parametrize("unbiased", [False, True])
def test_the_kernels_take_only_torchs_moving_variance(unbiased, monkeypatch):
    monkeypatch.setattr(dispatch, "fused_kernels", lambda x, mask: backend)
    statistics = Statistics(torch.zeros(3), torch.ones(3), 0.1, unbiased, torch.zeros((), dtype=torch.int64))
    found = fused.kernels_for(torch.randn(4, 3, 5), None, None, statistics, None, None)
    assert found is (backend if unbiased else None)
