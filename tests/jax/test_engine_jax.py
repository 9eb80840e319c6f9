"""The contract of the two verbs, on the replicas of a JAX program: devices of the host, or lanes of a vmap."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import CASES, LARGE_MEAN, RAGGED, Case
from checks import EPSILON, arguments, close, equals_oracle
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from versions import needs_members_on_a_mesh
from worlds import JaxWorld, padded

from syncbn.groups import LOCAL, Activation, Axes
from syncbn.jax import axes as jax_axes
from syncbn.jax import engine

X64 = jax.config.jax_enable_x64
HOWS = ["checked", "unchecked", "pmap", "vmap"]
AXIS = JaxWorld.axis


def runnable(cases):
    """float64 exists in processes with x64 only."""
    return [c for c in cases if X64 or c.dtype != "float64"]


def named(*names):
    return runnable([c for c in [*CASES, *LARGE_MEAN] if c.name in names])


@pytest.fixture(scope="session")
def replicas(request):
    return request.config.getoption("--replicas")


def equal_shards(case, replicas):
    """The case's arguments with equal batches: where they were ragged, padded with what must not count, and masked."""
    xs, dys, scale, offset, masks = arguments(case, replicas)
    size = max(max(map(len, xs)), 1)
    if any(len(x) < size for x in xs):
        if masks is None:
            masks = [np.ones([1 if a in case.channel_axes() else n for a, n in enumerate(x.shape)], bool) for x in xs]
        masks = padded(masks, size, False)
    # Not far from what counts: the largest value of all is what errors are measured by.
    return padded(xs, size, case.mean + 3), padded(dys, size, 1), scale, offset, masks


def step(case, groups=None, activation=None, names=(AXIS,)):
    """Moments, output and gradients of one replica."""
    common = {"axes": case.channel_axes(), "group": Axes(names, groups)}

    def replica(x, dy, scale, offset, mask, residual=None):
        x, dy = x.astype(case.dtype), dy.astype(case.dtype)

        def normalized(x, scale, offset):
            moments = engine.moments(x, mask=mask, **common)
            extra = {"mask": mask, "activation": activation, "residual": residual}
            return engine.normalize(x, moments, scale, offset, epsilon=EPSILON, **common, **extra), moments

        y, pull, moments = jax.vjp(normalized, x, scale, offset, has_aux=True)
        return {"moments": (moments.count, moments.mean, moments.variance), "y": y, "gradients": pull(dy),
                "average": moments.average or ()}  # fmt: skip

    return replica


def joined(got):
    """The mean's two parts as one, in float64."""
    for out in got:
        count, (hi, lo), variance = out["moments"]
        assert np.issubdtype(count.dtype, np.integer)
        assert hi.dtype == lo.dtype == variance.dtype
        out["moments"] = count, hi.astype("float64") + lo, variance.astype("float64")
    return got


def check(case, replicas, how, group=None):
    """One step of every replica against the oracle."""
    args = equal_shards(case, replicas)
    got = joined(JaxWorld(replicas, how).run(step(case, group), *args))
    return got, equals_oracle(got, case, args, group)


@pytest.mark.parametrize("how", HOWS[:2])
@pytest.mark.parametrize("case", runnable([*CASES, *LARGE_MEAN]), ids=lambda case: case.name)
def test_equals_the_concatenated_batch(replicas, case, how):
    check(case, replicas, how)


@pytest.mark.parametrize("how", HOWS[2:])
@pytest.mark.parametrize(
    "case", named("equal", "an empty replica", "two axes apart", "scales differ", "masked, float64", "bfloat16", "large mean"),
    ids=lambda case: case.name,
)  # fmt: skip
def test_equals_the_concatenated_batch_mapped_otherwise(replicas, case, how):
    check(case, replicas, how)


def test_a_million_rows_a_channel():
    case = Case("a million rows", (1, 1, 1, 1), (1_000_000, 2), mean=1e4)
    xs = case.inputs(2)
    got = JaxWorld(2).run(lambda x: engine.moments(x, axes=(2,), group=Axes((AXIS,)))[:3], xs)
    n, mean, variance = oracle.BatchNorm(xs, axes=(2,)).moments[0]
    count, (hi, lo), got_variance = got[0]
    assert count == n
    assert np.abs(got_variance / variance - 1).max() < 1e-5
    assert (np.abs(hi.astype("float64") + lo - mean) / np.sqrt(variance)).max() < 1e-5


def test_a_batch_whose_beginning_lies_apart():
    """The pivot is the mean of the first sixteenth: as far from the mean of all as it can be, nearly four standard deviations."""
    xs = Case("beginning apart", (64, 64, 64, 64), (8, 3), mean=1e4).inputs(2)
    for x in xs:
        x[:4] += 100
    got = JaxWorld(2).run(lambda x: engine.moments(x, axes=(2,), group=Axes((AXIS,)))[:3], xs)
    _, mean, variance = oracle.BatchNorm(xs, axes=(2,)).moments[0]
    _, (hi, lo), got_variance = got[0]
    assert np.abs(got_variance / variance - 1).max() < 1e-5
    assert (np.abs(hi.astype("float64") + lo - mean) / np.sqrt(variance)).max() < 2e-6


def test_a_value_that_is_all_that_a_replica_has():
    """It lies as far from the rest as a value can; means are not subtracted about it."""
    xs = Case("a value apart", (16_384,) * 4, (3,), mean=1e4).inputs(4)
    xs[3][:] = 1e4 + np.sqrt(3 * 16_384)
    masks = [np.ones((len(x), 1), bool) for x in xs]
    masks[3][1:] = False
    got = JaxWorld(4).run(lambda x, mask: engine.moments(x, axes=(1,), mask=mask, group=Axes((AXIS,)))[:3], xs, masks)
    _, mean, variance = oracle.BatchNorm(xs, axes=(1,), masks=masks).moments[0]
    _, (hi, lo), got_variance = got[0]
    assert np.abs(got_variance / variance - 1).max() < 2e-6
    assert (np.abs(hi.astype("float64") + lo - mean) / np.sqrt(variance)).max() < 2e-6


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_global_arrays_are_summed_where_they_are(kind):
    """XLA's partitioner adds up each device's part of a batch, and copies none of it."""
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(getattr(jax.sharding.AxisType, kind),))
    case = Case("global", (64,) * 4, (3,))
    (x,), (scale, offset) = case.inputs(1), case.parameters(1)
    x = jax.device_put(x, jax.sharding.NamedSharding(mesh, PartitionSpec("batch")))

    @jax.jit
    def normalized(x):
        moments = engine.moments(x, axes=(1,))
        return engine.normalize(x, moments, scale[0], offset[0], axes=(1,), epsilon=EPSILON)

    text = normalized.lower(x).compile().as_text()
    assert "all-reduce" in text
    assert not any(name in text for name in ("collective-permute", "all-to-all", "all-gather"))
    truth = oracle.BatchNorm([np.asarray(x)], axes=(1,), epsilon=EPSILON)
    close([np.asarray(normalized(x))], truth.forward(scale, offset), case, "output")


GROUPED = named("equal", "an empty replica", "masked, float64", "large mean")


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("case", GROUPED, ids=lambda case: case.name)
def test_groups(replicas, case, how):
    got, truth = check(case, replicas, how, group=replicas // 2)
    averages_are(got, truth.moving())


def averages_are(got, expected):
    count, mean, variance = expected
    for out in got:
        assert out["average"][0] == count
        np.testing.assert_allclose(out["average"][1], mean, rtol=1e-6, atol=2e-6)
        np.testing.assert_allclose(out["average"][2], variance, rtol=1e-5)
        assert all(np.array_equal(a, b) for a, b in zip(out["average"], got[0]["average"], strict=True))


def of(members, values):
    return None if values is None else [values[i] for i in members]


@pytest.mark.parametrize("gathered", [True, False], ids=["gathered", "two sums"])
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("case", named("equal", "an empty replica", "large mean"), ids=lambda case: case.name)
def test_uneven_groups(monkeypatch, case, how, gathered):
    if not gathered:
        monkeypatch.setattr(jax_axes, "GATHERED_REPLICAS", 0)
    table = ((2,), (3, 0, 1))
    args = equal_shards(case, 4)
    got = joined(JaxWorld(4, how).run(step(case, table), *args))
    truths = []
    for members in table:
        mine = tuple(of(members, values) for values in args)
        truths.append(equals_oracle(of(members, got), case, mine))
    nonempty = [t.moments[0] for t in truths if t.moments[0][0]]
    total = sum(n for n, _, _ in nonempty)
    averages_are(got, (total, *(sum(m[0] * m[i] for m in nonempty) / total for i in (1, 2))))


@pytest.mark.parametrize("groups", [None, 32, 64])
@pytest.mark.parametrize("case", named("masked", "large mean"), ids=lambda case: case.name)
def test_above_64_replicas_two_sums(case, groups):
    check(case, 128, "vmap", groups)


@pytest.mark.parametrize("how", HOWS[:2])
@pytest.mark.parametrize("case", named("ragged", "an empty replica", "scales differ", "large mean, rank 2"), ids=lambda c: c.name)
def test_two_sums_on_devices(monkeypatch, replicas, case, how):
    monkeypatch.setattr(jax_axes, "GATHERED_REPLICAS", 0)
    check(case, replicas, how)


@pytest.mark.parametrize("how", HOWS)
def test_nan_stays_in_its_group(replicas, how):
    case = Case("nan in a group")
    xs, size = case.inputs(replicas), replicas // 2
    xs[0][:] = np.nan
    got = JaxWorld(replicas, how).run(lambda x: engine.moments(x, axes=(3,), group=Axes((AXIS,), size))[:3], xs)
    assert np.isnan(got[0][2]).all()
    np.testing.assert_allclose(sum(got[-1][1]), oracle.BatchNorm(xs[size:]).moments[0][1], atol=2e-6)


@pytest.mark.parametrize("how", HOWS)
def test_global_count_0(replicas, how):
    case = Case("nothing", (0, 0, 0, 0), (4, 3))
    args = equal_shards(case, replicas)
    for out, x, scale, offset in zip(JaxWorld(replicas, how).run(step(case), *args), args[0], *args[2:4], strict=True):
        count, (hi, lo), variance = out["moments"]
        assert count == 0
        assert np.array_equal(hi + lo, np.zeros(3))
        assert np.array_equal(variance, np.ones(3))
        np.testing.assert_allclose(out["y"], x / np.sqrt(1 + EPSILON) * scale + offset, rtol=1e-5, atol=1e-5)
        assert all(np.isfinite(g).all() for g in out["gradients"])


@pytest.mark.parametrize("activation", [Activation("relu"), Activation("silu"), Activation("leaky_relu", 0.2)])
def test_activation_and_residual(replicas, activation):
    case = Case("fused", (3, 3, 3, 3), (4, 5))
    xs, dys, scale, offset, _ = arguments(case, replicas)
    residuals = case.cotangents(replicas, "residuals")
    got = JaxWorld(replicas).run(step(case, activation=activation), xs, dys, scale, offset, None, residuals)
    truth = oracle.BatchNorm(xs, axes=(2,), epsilon=EPSILON)
    before = [y + r for y, r in zip(truth.forward(scale, offset), residuals, strict=True)]
    sigmoid = [1 / (1 + np.exp(-z)) for z in before]
    if activation.name == "silu":
        ys = [z * s for z, s in zip(before, sigmoid, strict=True)]
        slopes = [s * (1 + z * (1 - s)) for z, s in zip(before, sigmoid, strict=True)]
    else:
        slopes = [np.where(z > 0, 1, activation.slope) for z in before]
        ys = [z * s for z, s in zip(before, slopes, strict=True)]
    close([out["y"] for out in got], ys, case, "output")
    dxs, _, _ = truth.backward([d * s for d, s in zip(dys, slopes, strict=True)], scale)
    close([out["gradients"][0] for out in got], dxs, case, "gradient")


# ------------------------------------------------------------------------------------------------- types and messages


def full_batch(arrays):
    return None if arrays is None else np.concatenate(arrays)


def collectives(compiled):
    """How often each collective stands in a compiled program."""
    text = compiled.as_text()
    kinds = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
    return {kind: n for kind in kinds if (n := text.count(f" {kind}(") + text.count(f" {kind}-start("))}


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("scale_varies", [False, True])
def test_replicated_parameters_have_total_gradients(groups, scale_varies):
    """With check_vma=True the gradient of a replicated parameter is invariant: the total, from the one message."""
    case = Case("typed", RAGGED, mask="rows", scales_differ=scale_varies)
    xs, dys, scale, offset, masks = equal_shards(case, 4)
    group = Axes((AXIS,), groups)
    mesh, sharded, same = JaxWorld(4).mesh(), PartitionSpec(AXIS), PartitionSpec()

    def replica(x, dy, scale, offset, mask):
        def f(x, scale, offset):
            moments = engine.moments(x, axes=(3,), mask=mask, group=group)
            return engine.normalize(x, moments, scale[0], offset, axes=(3,), epsilon=EPSILON, mask=mask, group=group)

        y, pull = jax.vjp(f, x, scale, offset)
        return y, *pull(dy)

    of_scale = sharded if scale_varies else same
    given = (full_batch(xs), full_batch(dys), np.stack(scale)[: 4 if scale_varies else 1], offset[0], full_batch(masks))
    program = jax.jit(
        jax.shard_map(
            replica, mesh=mesh, in_specs=(sharded, sharded, of_scale, same, sharded), out_specs=(sharded, sharded, of_scale, same)
        )
    )
    y, dx, dscale, doffset = program(*given)
    truth = oracle.BatchNorm(xs, axes=(3,), masks=masks, epsilon=EPSILON, group_size=groups)
    offsets = [offset[0]] * 4
    close(np.split(np.asarray(y), 4), truth.forward(scale, offsets), case, "output")
    dxs, dscales, doffsets = truth.backward(dys, scale)
    close(np.split(np.asarray(dx), 4), dxs, case, "gradient")
    close(list(np.asarray(dscale)), dscales if scale_varies else [sum(dscales)], case, "gradient")
    close([np.asarray(doffset)], [sum(doffsets)], case, "gradient")
    assert sum(collectives(program.lower(*given).compile()).values()) == 2


@pytest.mark.parametrize("names", [(AXIS,), ("model",), ("model", AXIS)], ids=str)
def test_a_mesh_of_two_axes(names):
    """x is cut along both axes. Replicas along `names` exchange statistics. The gradient of scale is the total in any case."""
    case = Case("two mesh axes", mask="rows")
    xs, dys, scale, offset, masks = equal_shards(case, 8)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("model", AXIS))
    both, same = PartitionSpec(("model", AXIS)), PartitionSpec()
    group = Axes(names)

    def replica(x, dy, scale, offset, mask):
        def f(x, scale, offset):
            moments = engine.moments(x, axes=(3,), mask=mask, group=group)
            return engine.normalize(x, moments, scale, offset, axes=(3,), epsilon=EPSILON, mask=mask, group=group)

        y, pull = jax.vjp(f, x, scale, offset)
        return y, *pull(dy)

    program = jax.shard_map(replica, mesh=mesh, in_specs=(both, both, same, same, both), out_specs=(both, both, same, same))
    y, dx, dscale, doffset = jax.jit(program)(full_batch(xs), full_batch(dys), scale[0], offset[0], full_batch(masks))
    order = {(AXIS,): range(8), ("model",): [0, 4, 1, 5, 2, 6, 3, 7], ("model", AXIS): range(8)}[names]
    size = {(AXIS,): 4, ("model",): 2, ("model", AXIS): 8}[names]
    truth = oracle.BatchNorm(of(order, xs), axes=(3,), masks=of(order, masks), epsilon=EPSILON, group_size=size)
    close(of(order, np.split(np.asarray(y), 8)), truth.forward(scale[0], offset[0]), case, "output")
    dxs, dscales, doffsets = truth.backward(of(order, dys), scale[0])
    close(of(order, np.split(np.asarray(dx), 8)), dxs, case, "gradient")
    close([np.asarray(dscale), np.asarray(doffset)], [sum(dscales), sum(doffsets)], case, "gradient")


@pytest.mark.parametrize("how", HOWS[:3])
@pytest.mark.parametrize("groups", [None, 2])
def test_one_collective_each_way_and_layer(how, groups):
    """Three chained layers, with everything returned."""
    case = Case("counted")
    xs, dys, scale, offset, _ = arguments(case, 4)
    group = Axes((AXIS,), groups)

    def replica(x, dy, scales, offsets):
        def f(x, scales, offsets):
            averages = []
            for scale, offset in zip(scales, offsets, strict=True):
                moments = engine.moments(x, axes=(3,), group=group)
                x = engine.normalize(x, moments, scale, offset, axes=(3,), epsilon=EPSILON, group=group)
                averages.append(moments.average or (moments.count, moments.mean, moments.variance))
            return x, averages

        y, pull, averages = jax.vjp(f, x, scales, offsets, has_aux=True)
        return y, pull(dy), averages

    given = np.stack(xs), np.stack(dys), [np.stack(scale)] * 3, [np.stack(offset)] * 3
    assert sum(collectives(JaxWorld(4, how).mapped(replica).lower(*given).compile()).values()) == 6


def test_a_message_does_not_grow_with_the_replicas_beyond_64():
    case = Case("message", (2, 2, 2, 2), (5,))
    args = [v and np.stack(v) for v in arguments(case, 128)]
    text = str(jax.make_jaxpr(jax.vmap(step(case), axis_name=AXIS, in_axes=(0, 0, 0, 0, None)))(*args))
    assert "all_gather" not in text


@pytest.mark.parametrize("how", ["unchecked", "pmap", "vmap", "local"])
def test_one_replica_sends_nothing(how):
    case = Case("one replica")
    args = equal_shards(case, 1)
    if how == "local":
        given = [None if v is None else v[0] for v in args]
        program = jax.jit(step(case, names=()))
    else:
        given = [None if v is None else np.stack(v) for v in args]
        program = JaxWorld(1, how).mapped(step(case))
    assert collectives(program.lower(*given).compile()) == {}


def test_constants_send_nothing_and_have_the_plain_gradient(replicas):
    case = Case("constants", (3, 3, 3, 3), (4, 3))
    xs, dys, scale, offset, _ = arguments(case, replicas)
    mean, variance = np.arange(3.0, dtype="float32"), np.arange(1.0, 4.0, dtype="float32")

    def replica(x, dy, scale, offset):
        def f(x, scale, offset):
            moments = engine.Moments(None, jnp.asarray(mean), jnp.asarray(variance))
            return engine.normalize(x, moments, scale, offset, axes=(2,), epsilon=EPSILON, group=Axes((AXIS,)))

        y, pull = jax.vjp(f, x, scale, offset)
        return y, *pull(dy)

    world = JaxWorld(replicas)
    for r, got in enumerate(world.run(replica, xs, dys, scale, offset)):
        x_hat = (xs[r] - mean) / np.sqrt(variance + EPSILON)
        expected = (x_hat * scale[r] + offset[r], dys[r] * scale[r] / np.sqrt(variance + EPSILON),
                    (dys[r] * x_hat).sum((0, 1)), dys[r].sum((0, 1)))  # fmt: skip
        for g, e in zip(got, expected, strict=True):
            np.testing.assert_allclose(g, e, rtol=1e-5, atol=1e-5)
    program = world.mapped(replica).lower(*map(np.stack, (xs, dys, scale, offset)))
    assert collectives(program.compile()) == {}


# ------------------------------------------------------------------------------------------------- transformations


def penalty(x, dy, scale, offset, mask, direction, group):
    """The gradient for x of Σ direction·dx, and the same by forward over reverse."""

    def dx_of(x):
        def f(x):
            moments = engine.moments(x, axes=(2,), mask=mask, group=group)
            return engine.normalize(x, moments, scale, offset, axes=(2,), epsilon=EPSILON, mask=mask, group=group)

        _, pull = jax.vjp(f, x)
        return pull(dy)[0]

    _, pull = jax.vjp(dx_of, x)
    return pull(direction)[0], jax.jvp(dx_of, (x,), (direction,))[1]


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("mask", [None, "rows"])
def test_second_order(how, mask, groups):
    """d/dx of a gradient penalty: wrong by half where the moments are constants of the backward pass. dx is symmetric in the
    direction (it is a gradient), so jvp of the gradient gives the same."""
    dtype = "float64" if X64 else "float32"
    case = Case("second order", (2, 2, 2, 2), (3, 2), dtype=dtype, mask=mask, scales_differ=True)
    xs, dys, scale, offset, masks = arguments(case, 4)
    directions = case.cotangents(4, "directions")
    group = Axes((AXIS,), groups)
    got = JaxWorld(4, how).run(lambda *a: penalty(*a, group), xs, dys, scale, offset, masks, directions)
    expected = oracle.BatchNorm(xs, axes=(2,), masks=masks, epsilon=EPSILON, group_size=groups).penalty_gradient(
        dys, scale, directions
    )
    if X64:
        close([g[0] for g in got], expected, case, "second")
        close([g[1] for g in got], expected, case, "second")
    else:
        size = max(np.abs(e).max() for e in expected)
        for g, e in zip(got, expected, strict=True):
            assert max(np.abs(v - e).max() for v in g) < 1e-5 * size


@pytest.mark.skipif(not X64, reason="the comparison is of float64 arithmetic")
def test_second_order_equals_plain_formulas_differentiated_by_jax():
    """Within 1e-10: the full Hessian of a small model, in one shard_map and out of it, against textbook operators."""
    rng = np.random.default_rng(0)
    x, w, scale, offset = rng.normal(size=(8, 3)), rng.normal(size=(3, 2)), rng.normal(size=2), rng.normal(size=2)

    def textbook(z):
        mean, variance = z.mean(0), z.var(0)
        return (z - mean) / jnp.sqrt(variance + EPSILON) * scale + offset

    def ours(z, group=LOCAL):
        moments = engine.moments(z, axes=(1,), group=group)
        return engine.normalize(z, moments, scale, offset, axes=(1,), epsilon=EPSILON, group=group)

    def loss(norm, x, w):
        return jnp.sin(norm(jnp.tanh(x @ w)) ** 2).sum()

    def mapped(x, w):
        def shard(x, w):
            return lax.psum(loss(lambda z: ours(z, Axes((AXIS,))), x, w), AXIS)

        specs = (PartitionSpec(AXIS), PartitionSpec())
        return jax.shard_map(shard, mesh=JaxWorld(4).mesh(), in_specs=specs, out_specs=PartitionSpec())(x, w)

    expected = jax.hessian(lambda w: loss(textbook, x, w))(w)
    np.testing.assert_allclose(jax.hessian(lambda w: loss(ours, x, w))(w), expected, atol=1e-10)
    np.testing.assert_allclose(jax.jit(jax.hessian(lambda w: mapped(x, w)))(w), expected, atol=1e-10)
    v = jnp.asarray(rng.normal(size=w.shape))
    hvp = jax.jit(lambda w: jax.jvp(jax.grad(lambda w: mapped(x, w)), (w,), (v,))[1])(w)
    np.testing.assert_allclose(hvp, np.einsum("abcd,cd->ab", expected, v), atol=1e-10)
    third = jax.grad(lambda w: jnp.vdot(jax.hessian(lambda w: loss(ours, x, w))(w), np.cos(expected)))(w)
    plain = jax.grad(lambda w: jnp.vdot(jax.hessian(lambda w: loss(textbook, x, w))(w), np.cos(expected)))(w)
    np.testing.assert_allclose(third, plain, rtol=1e-10, atol=1e-9)


def test_forward_mode_is_refused_in_training_and_works_in_inference():
    x, ones = np.random.default_rng(1).normal(size=(4, 3)).astype("float32"), np.ones(3, "float32")

    def train(x):
        return engine.normalize(x, engine.moments(x, axes=(1,)), ones, ones, axes=(1,), epsilon=EPSILON)

    with pytest.raises(TypeError, match=r"forward-mode|jvp"):
        jax.jvp(train, (x,), (x,))
    constants = engine.Moments(None, jnp.zeros(3), jnp.ones(3))
    _, dy = jax.jvp(lambda x: engine.normalize(x, constants, ones, ones, axes=(1,), epsilon=EPSILON), (x,), (x,))
    np.testing.assert_allclose(dy, x / np.sqrt(1 + EPSILON), rtol=1e-6)


@pytest.mark.parametrize("how", HOWS[:2])
def test_an_ensemble_under_vmap(how):
    """Three members at once on every replica."""
    case = Case("ensemble", (2, 2, 2, 2), (4, 3))
    members = [arguments(Case(f"member {i}", (2, 2, 2, 2), (4, 3)), 4) for i in range(3)]
    stacked = [[np.stack([m[k][r] for m in members]) for r in range(4)] for k in range(4)]
    got = JaxWorld(4, how).run(lambda *a: jax.vmap(lambda *a: step(case)(*a, None))(*a), *stacked)
    for i, (xs, dys, scale, offset, _) in enumerate(members):
        truth = oracle.BatchNorm(xs, axes=(2,), epsilon=EPSILON)
        close([g["y"][i] for g in got], truth.forward(scale, offset), case, "output")
        close([g["gradients"][0][i] for g in got], truth.backward(dys, scale)[0], case, "gradient")


@needs_members_on_a_mesh
def test_members_that_lie_along_a_mesh_axis():
    """vmap with a spmd_axis_name maps the members along an axis of the mesh that the shard_map has not seen."""
    case, members = Case("members on a mesh", (2, 2, 2, 2), (4, 3)), 2
    given = [arguments(Case(f"member {i}", (2, 2, 2, 2), (4, 3)), 4) for i in range(members)]
    mesh, along, same = Mesh(np.array(jax.devices()).reshape(4, 2), (AXIS, "member")), PartitionSpec(AXIS), PartitionSpec()

    def step_of(x, dy, scale, offset):
        def f(x, scale, offset):
            moments = engine.moments(x, axes=(2,), group=Axes((AXIS,)))
            return engine.normalize(x, moments, scale, offset, axes=(2,), epsilon=EPSILON, group=Axes((AXIS,)))

        y, pull = jax.vjp(f, x, scale, offset)
        return y, *pull(dy)

    specs = {"in_specs": (along, along, same, same), "out_specs": (along, along, same, same)}
    program = jax.jit(jax.vmap(jax.shard_map(step_of, mesh=mesh, **specs), spmd_axis_name="member"))
    got = program(*(np.stack([full_batch(m[k]) if k < 2 else m[k][0] for m in given]) for k in range(4)))
    for y, dx, dscale, doffset, (xs, dys, scale, offset, _) in zip(*map(np.asarray, got), given, strict=True):
        truth = oracle.BatchNorm(xs, axes=(2,), epsilon=EPSILON)
        close(np.split(y, 4), truth.forward(scale[0], offset[0]), case, "output")
        dxs, dscales, doffsets = truth.backward(dys, scale[0])
        close(np.split(dx, 4), dxs, case, "gradient")
        close([dscale, doffset], [sum(dscales), sum(doffsets)], case, "gradient")


def test_programs_for_other_platforms_have_their_form():
    """Lowered on this machine for GPUs and TPUs: the call that is not inlined is for CPUs alone, and no branch chooses."""

    def f(x):
        moments = engine.moments(x, axes=(1,))
        return engine.normalize(x, moments, jnp.ones(3), jnp.zeros(3), axes=(1,), epsilon=EPSILON)

    traced = jax.jit(f).trace(jax.ShapeDtypeStruct((8, 3), "float32"))
    assert "cond" not in str(traced.jaxpr)
    for platform in ("cpu", "cuda", "tpu"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("inlineable" in text) == (platform == "cpu")
        assert "stablehlo.optimization_barrier" in text


# ------------------------------------------------------------------------------------------------- bad input


def refused(error, text, group, run=lambda f, x: f(x)):
    with pytest.raises(error) as caught:
        run(lambda x: engine.moments(x, axes=(1,), group=group).variance, np.ones((8, 3), "float32"))
    assert text in str(caught.value)


def on_mesh(f, x):
    return jax.shard_map(f, mesh=JaxWorld(4).mesh(), in_specs=PartitionSpec(AXIS), out_specs=PartitionSpec())(x)


def test_axes_that_are_not_bound():
    text = "`axis_name` must name an axis that is mapped where the layer trains. Received: 'batch', where the mapped axes of a mesh are"
    refused(ValueError, f"{text} [].", Axes(("batch",)))
    refused(ValueError, f"{text} ['{AXIS}'].", Axes((AXIS, "batch")), on_mesh)


def test_mesh_axes_beside_a_vmap_axis():
    def run(f, x):
        return on_mesh(lambda x: jax.vmap(f, axis_name="other")(x[None]), x)

    refused(ValueError, "`axis_name` must name axes of a mesh, or axes of vmap, not both", Axes((AXIS, "other")), run)


@pytest.mark.parametrize("groups", [((0, 1), (2,)), ((0, 1), (1, 2, 3)), ((0, 1, 2, 3), ()), ((0, 1, 2, 4),)], ids=str)
def test_groups_that_are_no_partition(groups):
    text = "`axis_index_groups` must be a partition of the indices 0 to 3"
    refused(ValueError, text, Axes((AXIS,), groups), on_mesh)


def test_group_size_that_does_not_divide():
    refused(ValueError, "`group_size` must divide the number of replicas that train. Received: group_size=3 for 4 replicas.",
            Axes((AXIS,), 3), on_mesh)  # fmt: skip


def test_group_size_without_a_way_to_tell_the_replicas():
    text = "`group_size` must come with a way to tell the replicas that train"
    refused(ValueError, text, 2, lambda f, x: jax.jit(f)(x))
    refused(ValueError, text, 2, on_mesh)
    # One device is one replica, whose saved model may have been trained on more.
    engine.moments(np.ones((8, 3), "float32"), axes=(1,), group=2)
