"""`sync_batch_norm` on JAX arrays, beside Flax where it is installed."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import Case
from checks import EPSILON, close
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from test_engine_jax import collectives, equal_shards, full_batch, of
from versions import needs_axes_of_pmap
from worlds import JaxWorld

from syncbn.functional import sync_batch_norm
from syncbn.jax import axes as jax_axes

AXIS, EACH, SAME = JaxWorld.axis, PartitionSpec(JaxWorld.axis), PartitionSpec()
HOWS = ["checked", "unchecked", "pmap", "vmap"]


def test_no_channels():
    """Alone, and inside a shard_map, where each device is known to hold all of its values."""
    x = np.zeros((4, 0), "float32")
    assert sync_batch_norm(jnp.asarray(x))[0].shape == (4, 0)
    backward = lambda x, dy: jax.vjp(lambda x: sync_batch_norm(x, axis_name=AXIS)[0], x)[1](dy)[0]  # noqa: E731
    assert [dx.shape for dx in JaxWorld(4).run(backward, [x] * 4, [x] * 4)] == [(4, 0)] * 4


def test_a_cotangent_of_numpy():
    """NumPy would add it up in one float32 sum, off by 1 % here."""
    n, c = 2**20, 8
    x, dy = jnp.asarray(np.random.default_rng(0).normal(size=(n, c)), jnp.float32), np.full((n, c), 0.1, "float32")
    _, vjp = jax.vjp(lambda offset: sync_batch_norm(x, jnp.ones(c), offset)[0], jnp.zeros(c))
    np.testing.assert_allclose(vjp(dy)[0], n * np.float64(dy[0, 0]), rtol=1e-5)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("groups", [None, [[3, 0], [1, 2]], [[1], [0, 2, 3]]], ids=str)
def test_equals_the_concatenated_batch(how, groups):
    case = Case("functional", (3, 1, 5, 2), mask="one replica")
    args = xs, dys, scale, offset, masks = equal_shards(case, 4)

    def replica(x, dy, scale, offset, mask):
        def f(x, scale, offset):
            y, *moments = sync_batch_norm(x, scale, offset, mask=mask[..., 0], axis_name=AXIS, axis_index_groups=groups)
            return y, moments

        y, pull, moments = jax.vjp(f, x, scale, offset, has_aux=True)
        return y, pull(dy), moments

    got = JaxWorld(4, how).run(replica, *args)
    for members in groups or [range(4)]:
        truth = oracle.BatchNorm(of(members, xs), masks=of(members, masks))
        n, mean, variance = truth.moments[0]
        for _, _, (got_mean, got_variance, count) in of(members, got):
            assert count == n
            np.testing.assert_allclose(got_mean, mean, atol=2e-6)
            np.testing.assert_allclose(got_variance, variance, rtol=1e-5)
        close([y for y, _, _ in of(members, got)], truth.forward(of(members, scale), of(members, offset)), case, "output")
        for i, expected in enumerate(truth.backward(of(members, dys), of(members, scale))):
            close([g[i] for _, g, _ in of(members, got)], expected, case, "gradient")


@pytest.mark.parametrize(("axis", "parameters"), [(1, (3,)), ([1, 3], (1, 3, 1, 5)), ((-1,), (5,))], ids=str)
def test_axes(axis, parameters):
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype("float32")
    scale, offset = np.full(parameters, 1.5, "float32"), np.full(parameters, 0.5, "float32")
    y, mean, variance, count = jax.jit(lambda x: sync_batch_norm(x, scale, offset, axis=axis))(x)
    axes = tuple(np.atleast_1d(axis))
    truth = oracle.BatchNorm([x], axes=axes)
    assert mean.shape == variance.shape == parameters
    assert count == truth.moments[0][0]
    np.testing.assert_allclose(y, truth.forward(scale.ravel(), offset.ravel())[0], atol=1e-5)


def test_arguments_have_an_effect_and_moments_no_gradient():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.bfloat16)
    one, zero = jnp.ones(3), jnp.zeros(3)
    y, mean, variance, count = sync_batch_norm(x, one, zero)
    assert y.dtype == jnp.bfloat16
    assert mean.dtype == variance.dtype == jnp.float32
    assert np.issubdtype(count.dtype, np.integer)
    assert not np.array_equal(y, sync_batch_norm(x, one, zero, epsilon=1.0)[0])
    grads = jax.grad(lambda x: jnp.vdot(jnp.arange(3.0), sum(sync_batch_norm(x, one, zero)[1:3])))(x)
    assert not grads.any()


def test_padding_that_is_not_finite_spreads_nowhere():
    x, mask = np.array([[1.0, np.nan], [np.inf, 3.0], [2.0, 5.0]], "float32"), np.array([False, False, True])

    def f(x):
        y, *moments = sync_batch_norm(x, jnp.ones(2), jnp.zeros(2), mask=mask)
        return jnp.vdot(y, jnp.arange(6.0).reshape(3, 2)), (y, moments)

    dx, (y, (mean, variance, count)) = jax.grad(f, has_aux=True)(x)
    assert np.isfinite(y).all()
    assert np.isfinite(dx).all()
    assert dx[0, 1] == dx[1, 0] == 0
    np.testing.assert_array_equal(mean, [2, 5])
    np.testing.assert_array_equal(variance, [0, 0])
    assert count == 1


# ------------------------------------------------------------------------------------------------- beside Flax


def flax_step(masked, fast=True):
    """One training step of Flax's layer on 4 devices, with everything returned."""
    linen = pytest.importorskip("flax.linen")
    layer = linen.BatchNorm(use_running_average=False, axis_name=AXIS, epsilon=EPSILON, momentum=0.0, use_fast_variance=fast)

    def run(x, dy, mask):
        variables = {"params": {"scale": jnp.ones(3), "bias": jnp.zeros(3)},
                     "batch_stats": {"mean": jnp.zeros(3), "var": jnp.ones(3)}}  # fmt: skip

        def f(x, parameters):
            y, updated = layer.apply({**variables, "params": parameters}, x, mask=mask, mutable=["batch_stats"])
            return y, updated["batch_stats"]

        y, pull, updated = jax.vjp(f, x, variables["params"], has_aux=True)
        return y, pull(dy), updated

    specs = {"in_specs": (EACH, EACH, EACH if masked else None), "out_specs": (EACH, (EACH, EACH), SAME)}
    return jax.jit(jax.shard_map(run, mesh=JaxWorld(4).mesh(), check_vma=False, **specs))


def our_moments(x, mask=None):
    def run(x, mask):
        return sync_batch_norm(x, jnp.ones(3), jnp.zeros(3), mask=mask, epsilon=EPSILON, axis_name=AXIS)

    specs = {"in_specs": (EACH, None if mask is None else EACH), "out_specs": (EACH, SAME, SAME, SAME)}
    return jax.jit(jax.shard_map(run, mesh=JaxWorld(4).mesh(), **specs))(x, mask)


def test_masks_where_flax_is_wrong():
    """Flax averages the devices' masked means as if each counted as much."""
    case = Case("flax, masked", mask="rows")
    xs, dys, _, _, masks = equal_shards(case, 4)
    for i, mask in enumerate(masks):
        mask[:] = False
        mask[: (3, 1, 1, 2)[i], : (4, 1, 2, 3)[i]] = True
    _, mean, variance = oracle.BatchNorm(xs, masks=masks).moments[0]
    ours = our_moments(full_batch(xs), full_batch(masks))
    np.testing.assert_allclose(ours[1], mean, atol=2e-6)
    np.testing.assert_allclose(ours[2], variance, rtol=1e-5)
    _, _, flax = flax_step(masked=True)(full_batch(xs), full_batch(dys), full_batch(masks))
    wrong = np.mean([oracle.BatchNorm([x], masks=[m]).moments[0][1] for x, m in zip(xs, masks, strict=True)], 0)
    np.testing.assert_allclose(flax["mean"], wrong, atol=1e-5)
    assert np.abs(wrong - mean).max() > 0.05


def test_one_device_fully_masked_where_flax_is_nan():
    case = Case("flax, one device masked", mask="one replica")
    xs, dys, _, _, masks = equal_shards(case, 4)
    y, *_ = our_moments(full_batch(xs), full_batch(masks))
    truth = oracle.BatchNorm(xs, masks=masks, epsilon=EPSILON)
    close(np.split(np.asarray(y), 4), truth.forward(np.ones(3), np.zeros(3)), case, "output")
    y, _, updated = flax_step(masked=True)(full_batch(xs), full_batch(dys), full_batch(masks))
    assert np.isnan(y).all()
    assert np.isnan(updated["var"]).all()


def test_large_mean_where_flax_is_wrong():
    """mean/std = 1e4, replicas' means a standard deviation apart."""
    case = Case("flax, large mean", (60, 60, 60, 60), (8, 3), mean=1e4)
    xs, dys, *_ = equal_shards(case, 4)
    truth = oracle.BatchNorm(xs, epsilon=EPSILON)
    ours, right = our_moments(full_batch(xs)), truth.moments[0][2]
    assert np.abs(ours[2] / right - 1).max() < 1e-5
    expected = np.concatenate(truth.forward(np.ones(3), np.zeros(3)))
    assert np.abs(ours[0] - expected).max() < 1e-5 * np.abs(expected).max()
    y, _, updated = flax_step(masked=False)(full_batch(xs), full_batch(dys), None)
    assert np.abs(updated["var"] / right - 1).max() > 0.1
    assert np.abs(y - expected).max() > 0.1


def test_flax_makes_as_many_messages():
    case = Case("flax, counted")
    xs, dys, *_ = equal_shards(case, 4)
    found = collectives(flax_step(masked=False).lower(full_batch(xs), full_batch(dys), None).compile())
    assert found == {"all-reduce": 2}


def test_docstring_example():
    import doctest

    import syncbn.functional

    assert doctest.testmod(syncbn.functional).failed == 0


# ------------------------------------------------------------------------------------------------- what may be left out


@pytest.mark.parametrize("left_out", [("scale",), ("offset",), ("scale", "offset")], ids=str)
def test_scale_and_offset_may_be_none(left_out):
    xs = Case("no parameters", (2, 2, 2, 2), (3,)).inputs(4)
    given = {"scale": np.array([1.5, 2, 3], "float32"), "offset": np.array([4, 5, 6], "float32"), **dict.fromkeys(left_out)}

    def replica(x):
        f = jax.vjp(lambda x: sync_batch_norm(x, **given, axis_name=AXIS)[0], x)
        return f[0], f[1](jnp.cos(x))[0]

    got = JaxWorld(4).run(replica, xs)
    truth = oracle.BatchNorm(xs)
    scale, offset = (np.full(3, default) if given[k] is None else given[k] for k, default in (("scale", 1), ("offset", 0)))
    expected = truth.forward(scale, offset), truth.backward([np.cos(x) for x in xs], scale)[0]
    for i, values in enumerate(expected):
        np.testing.assert_allclose([g[i] for g in got], values, atol=1e-5)


def test_a_numpy_array_is_jax_where_something_says_so():
    x = np.random.default_rng(0).normal(size=(6, 3))
    expected = oracle.BatchNorm([x]).forward(np.ones(3), np.zeros(3))[0]
    for arguments in ({"scale": jnp.ones(3)}, {"offset": jnp.zeros(3)}, {"axis_name": ()}):
        y, *_ = sync_batch_norm(x, **arguments)
        assert isinstance(y, jax.Array)
        np.testing.assert_allclose(y, expected, atol=1e-5)
    y = jax.jit(lambda scale: sync_batch_norm(x, scale)[0])(jnp.ones(3))
    np.testing.assert_allclose(y, expected, atol=1e-5)
    with pytest.raises(TypeError, match=r"The input must be of a float dtype. Received: int32"):
        sync_batch_norm(np.ones((4, 3), "int32"), jnp.ones(3))
    with pytest.raises(TypeError, match="must be an array of JAX, TensorFlow or PyTorch"):
        sync_batch_norm(x, np.ones(3, "float32"))


def test_examples_of_rank_1():
    """Each lane of a vmap holds one example, as Equinox's modules do; a mask is a scalar then."""
    rng = np.random.default_rng(0)
    x, dy, mask = rng.normal(size=(6, 3)), rng.normal(size=(6, 3)), np.arange(6) % 3 > 0

    def loss(x, masked):
        norm = jax.vmap(lambda x, mask: sync_batch_norm(x, axis_name="v", mask=mask)[::3], axis_name="v")
        y, count = (
            norm(x, mask) if masked else jax.vmap(lambda x: sync_batch_norm(x, axis=0, axis_name="v")[::3], axis_name="v")(x)
        )
        return jnp.vdot(y, dy), count

    for masked in (False, True):
        dx, count = jax.grad(loss, has_aux=True)(jnp.asarray(x), masked)
        truth = oracle.BatchNorm([x], masks=[mask[:, None]] if masked else None)
        assert (np.asarray(count) == (4 if masked else 6)).all()
        np.testing.assert_allclose(dx, truth.backward([dy], np.ones(3))[0][0], atol=1e-5)
    with pytest.raises(ValueError, match="so rank 2 at least"):
        sync_batch_norm(jnp.ones(3))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gathered", [True, False], ids=["gathered", "two sums"])
def test_the_count_leaves_a_mesh_that_divides_the_channels(monkeypatch, masked, gathered):
    """Its type says that it is the same wherever a channel lies, so out_specs=P() takes it. No message is added."""
    if not gathered:
        monkeypatch.setattr(jax_axes, "GATHERED_REPLICAS", 0)
    x, mask = np.random.default_rng(0).normal(size=(8, 6)).astype("float32"), np.arange(8) % 3 > 0
    mesh, both, channel = (
        Mesh(np.array(jax.devices()).reshape(4, 2), (AXIS, "model")),
        PartitionSpec(AXIS, "model"),
        PartitionSpec("model"),
    )

    def replica(x, mask):
        return sync_batch_norm(x, mask=mask if masked else None, axis_name=AXIS)

    specs = {"in_specs": (both, EACH), "out_specs": (both, channel, channel, SAME)}
    program = jax.jit(jax.shard_map(replica, mesh=mesh, **specs))
    y, mean, _, count = program(x, mask)
    truth = oracle.BatchNorm([x], masks=[mask[:, None]] if masked else None)
    assert count.shape == ()
    assert count == truth.moments[0][0]
    np.testing.assert_allclose(mean, truth.moments[0][1], atol=2e-6)
    np.testing.assert_allclose(y, truth.forward(np.ones(6), np.zeros(6))[0], atol=1e-5)
    assert sum(collectives(program.lower(x, mask).compile()).values()) == (1 if gathered else 2)


# ------------------------------------------------------------------------------------------------- local


@pytest.fixture
def _no_warning_yet(monkeypatch):
    monkeypatch.setattr(jax_axes, "warned_of", set())


LOCAL_STEPS = {
    "checked": lambda f, x: jax.jit(jax.shard_map(f, mesh=JaxWorld(4).mesh(), in_specs=EACH, out_specs=EACH))(x),
    "unchecked": lambda f, x: jax.shard_map(f, mesh=JaxWorld(4).mesh(), in_specs=EACH, out_specs=EACH, check_vma=False)(x),
    "pmap": lambda f, x: jax.pmap(f)(x.reshape(4, 2, 3)).reshape(8, 3),
}


@pytest.mark.usefixtures("_no_warning_yet")
@pytest.mark.parametrize("how", [pytest.param(how, marks=needs_axes_of_pmap) if how == "pmap" else how for how in LOCAL_STEPS])
def test_a_map_that_is_not_named_warns_once(how):
    x = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
    with pytest.warns(UserWarning, match=r"sync_batch_norm trains inside a map over mesh axes, and none is named") as caught:
        y = LOCAL_STEPS[how](lambda x: sync_batch_norm(sync_batch_norm(x)[0])[0], x)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LOCAL_STEPS[how](lambda x: sync_batch_norm(x, epsilon=0.1)[0], x)
    local = [oracle.BatchNorm([part]).forward(np.ones(3), np.zeros(3))[0] for part in np.split(x, 4)]
    np.testing.assert_allclose(
        y, np.concatenate([oracle.BatchNorm([v]).forward(np.ones(3), np.zeros(3))[0] for v in local]), atol=1e-4
    )


@pytest.mark.usefixtures("_no_warning_yet")
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("how", LOCAL_STEPS)
def test_local_on_purpose_does_not_warn(how):
    x = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
    y = LOCAL_STEPS[how](lambda x: sync_batch_norm(x, axis_name=())[0], x)
    np.testing.assert_allclose(
        y, np.concatenate([oracle.BatchNorm([v]).forward(np.ones(3), np.zeros(3))[0] for v in np.split(x, 4)]), atol=1e-5
    )


@pytest.mark.usefixtures("_no_warning_yet")
@pytest.mark.filterwarnings("error")
def test_what_does_not_differ_along_a_map_does_not_warn():
    """vmap's axes, which may map an ensemble; what a mesh holds as copies; a mesh of one device."""
    x = np.random.default_rng(0).normal(size=(8, 4, 3)).astype("float32")
    jax.vmap(lambda x: sync_batch_norm(x)[0], axis_name="v")(jnp.asarray(x))
    jax.shard_map(lambda x: sync_batch_norm(x)[0], mesh=JaxWorld(4).mesh(), in_specs=SAME, out_specs=SAME)(x)
    jax.shard_map(lambda x: sync_batch_norm(x)[0], mesh=JaxWorld(1).mesh(), in_specs=EACH, out_specs=EACH)(x)


# ------------------------------------------------------------------------------------------------- bad input

X, ONES = jnp.ones((4, 3)), jnp.ones(3)


@pytest.mark.parametrize(("error", "text", "arguments"), [
    (TypeError, "`x` must be an array of JAX, TensorFlow or PyTorch. Received: numpy.ndarray.", {"x": np.ones((4, 3)), "scale": None, "offset": None}),
    (TypeError, "The input must be of a float dtype. Received: int32.", {"x": jnp.ones((4, 3), "int32")}),
    (TypeError, "`process_group` is for PyTorch arrays. Received: it with an array of JAX.", {"process_group": 1}),
    (TypeError, "`axis` must be an integer or a list of integers.", {"axis": 1.0}),
    (ValueError, "`axis_index_groups` must come with `axis_name`", {"axis_index_groups": [[0, 1]]}),
    (ValueError, "they number the devices along it. Received: axis_name=()", {"axis_index_groups": [[0, 1]], "axis_name": ()}),
    (ValueError, "`axis_name` must name an axis that is mapped where the layer trains. Received: 'data'", {"axis_name": "data"}),
    (ValueError, "`axis_name` must be None, the name of a mapped axis", {"axis_name": 3}),
    (ValueError, "`axis` must lie in [-2, 2) for an input of rank 2.", {"axis": 2}),
    (ValueError, "`epsilon` must be a finite number, 0 or more", {"epsilon": -1.0}),
    (ValueError, "`mask` must have the input's shape without the channel axes", {"mask": jnp.ones((3, 3), bool)}),
    (ValueError, "`scale` must have one value a channel: shape [3]. Received: shape (4,) for x of shape (4, 3). Reshape it.", {"scale": jnp.ones(4)}),
    (ValueError, "`scale` must have one value a channel: shape [5]. Received: shape (3,) for x of shape (2, 3, 4, 5). Give axis=1 if the channels are there.",
     {"x": jnp.ones((2, 3, 4, 5))}),
    (ValueError, "`offset` must have one value a channel: shape [15] or [1, 3, 5]. Received: shape () for x of", {"offset": 0.0, "axis": [1, 2], "x": jnp.ones((2, 3, 5)), "scale": jnp.ones(15)}),
])  # fmt: skip
def test_bad_input(error, text, arguments):
    with pytest.raises(error) as caught:
        sync_batch_norm(**{"x": X, "scale": ONES, "offset": ONES, **arguments})
    assert text in str(caught.value)


def test_uneven_groups_that_are_no_partition():
    with pytest.raises(ValueError, match="must be a partition of the indices 0 to 3"):
        jax.vmap(lambda x: sync_batch_norm(x, ONES, ONES, axis_name="v", axis_index_groups=[[0, 1], [2]])[0], axis_name="v")(
            jnp.ones((4, 2, 3))
        )


def test_two_axes_are_one_batch():
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype("float32")
    inner = jax.vmap(lambda x: sync_batch_norm(x, jnp.ones(4), jnp.zeros(4), axis_name=("a", "b")), axis_name="b")
    y, _, _, count = jax.vmap(inner, axis_name="a")(x)
    assert (count == 30).all()
    truth = oracle.BatchNorm([x])
    np.testing.assert_allclose(y, truth.forward(np.ones(4), np.zeros(4))[0], atol=1e-5)


WITHIN = {
    "grad": lambda f: f,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "scan": lambda f: lambda x, mask: lax.scan(lambda _, v: (0, f(*v)), 0, (x[None], mask[None]))[1][0],
}


@pytest.mark.parametrize(
    ("within", "masked", "gathered"),
    [("grad", True, True), ("grad", False, False), ("jit", False, True), ("checkpoint", True, False), ("scan", False, True)],
)
@pytest.mark.parametrize("groups", [[[0, 2], [1], [3]], [[0, 1], [2, 3]]], ids=str)
def test_gradients_taken_outside_of_a_vmap_with_groups(monkeypatch, groups, within, masked, gathered):
    """There JAX runs the custom gradient where vmap's axis has no name any more. A second derivative too."""
    if not gathered:
        monkeypatch.setattr(jax_axes, "GATHERED_REPLICAS", 0)
    rng = np.random.default_rng(0)
    x, dy, direction = rng.normal(size=(3, 4, 5, 3))
    mask = rng.random((4, 5)) > (0.3 if masked else -1)
    scale = rng.normal(size=3)

    def norm(x, mask):
        return sync_batch_norm(x, scale, mask=mask if masked else None, axis_name="v", axis_index_groups=groups)[0]

    def gradient(x):
        return jax.grad(lambda x: jnp.vdot(WITHIN[within](jax.vmap(norm, axis_name="v"))(x, mask), dy))(x)

    dx, of_direction = jax.jit(lambda x: (gradient(x), jax.grad(lambda x: jnp.vdot(gradient(x), direction))(x)))(jnp.asarray(x))
    truths = []
    for shift in (0, 1e-4, -1e-4):
        truths.append(np.zeros_like(x))
        for members in groups:
            truth = oracle.BatchNorm(list((x + shift * direction)[members]), masks=list(mask[members][..., None]))
            truths[-1][members] = truth.backward(list(dy[members]), scale)[0]
    np.testing.assert_allclose(dx, truths[0], atol=1e-5)
    # The matrix of second derivatives is symmetric.
    np.testing.assert_allclose(of_direction, (truths[1] - truths[2]) / 2e-4, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("groups", [[[0, 2], [1], [3]], [[0, 1], [2, 3]]], ids=str)
def test_two_vmapped_axes_with_groups(groups):
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, 2, 2, 5, 3))
    inner = jax.vmap(lambda x: sync_batch_norm(x, axis_name=("a", "b"), axis_index_groups=groups)[0], axis_name="b")
    dx = jax.grad(lambda x: jnp.vdot(jax.vmap(inner, axis_name="a")(x), dy))(jnp.asarray(x)).reshape(4, 5, 3)
    for members in groups:
        truth = oracle.BatchNorm(list(x.reshape(4, 5, 3)[members]))
        np.testing.assert_allclose(
            dx[jnp.asarray(members)], truth.backward(list(dy.reshape(4, 5, 3)[members]), np.ones(3))[0], atol=1e-5
        )


def test_a_constant_channel_with_an_epsilon_of_0():
    """NaN, as in Keras's and Flax's layers. The other channels are as ever."""
    x = np.random.default_rng(0).normal(size=(6, 3))
    x[:, 1] = 2.0
    y = sync_batch_norm(jnp.asarray(x), epsilon=0.0)[0]
    assert np.isnan(y[:, 1]).all()
    expected = oracle.BatchNorm([x[:, [0, 2]]], epsilon=0.0).forward(np.ones(2), np.zeros(2))[0]
    np.testing.assert_allclose(y[:, jnp.asarray([0, 2])], expected, atol=1e-5)


def test_a_loss_of_its_own_on_every_replica():
    """Without check_vma the cotangents of all replicas reach dx, as a sum of all their losses."""
    x = np.random.default_rng(0).normal(size=(4, 5, 3)).astype("float32")

    def loss(x):
        y, *_ = sync_batch_norm(x, ONES, ONES, axis_name="v")
        return jnp.sin(y).mean() * (1.0 + lax.axis_index("v"))

    dx = jax.vmap(jax.grad(loss), axis_name="v")(x)
    truth = oracle.BatchNorm(list(x))
    dys = [np.cos(y) * (1.0 + r) / 15 for r, y in enumerate(truth.forward(np.ones(3), np.ones(3)))]
    np.testing.assert_allclose(dx, truth.backward(dys, np.ones(3))[0], atol=1e-6)
