"""The Keras layer on Keras's JAX backend: mapped by shard_map, pmap and vmap, sharded by a distribution, and on one replica."""

from __future__ import annotations

import contextlib
import warnings

import jax
import jax.numpy as jnp
import keras
import numpy as np
import oracle
import pytest
from cases import Case
from checks import close
from jax import export, lax
from jax.sharding import PartitionSpec
from test_engine_jax import collectives, equal_shards, full_batch
from versions import needs_keras_renorm
from worlds import JaxWorld

from syncbn import SyncBatchNormalization
from syncbn.jax import axes as jax_axes
from syncbn.keras import _private

AXIS, ONE_EACH, SAME = JaxWorld.axis, PartitionSpec(JaxWorld.axis), PartitionSpec()
RNG = np.random.default_rng(11)
RAGGED = (3, 1, 5, 2)
BY_NAME = [
    Case("equal"),
    Case("masked", RAGGED, mask="rows"),
    Case("a fully masked replica", RAGGED, mask="one replica"),
    Case("channels first, masked", RAGGED, (3, 4, 5), (1,), mask="rows"),
    Case("two axes", (2, 2, 2, 2), (3, 4, 5), (1, 3)),
]


@pytest.fixture(autouse=True)
def _no_distribution_stays():
    yield
    keras.distribution.set_distribution(None)


def make(case, **arguments):
    """A built layer with other weights than the initial ones."""
    axis = list(case.axes) if len(case.axes) > 1 else case.axes[0]
    layer = SyncBatchNormalization(axis=axis, **arguments)
    layer.build((None, *case.rest))
    layer.set_weights([np.random.default_rng(5).uniform(0.5, 2, w.shape).astype("float32") for w in layer.get_weights()])
    return layer


def step(layer):
    """One training step: output, (dx, gradients of gamma and beta), statistics; a pure function."""

    def run(trainable, statistics, x, dy, mask=None):
        def f(x, trainable):
            y, updated = layer.stateless_call(trainable, statistics, x, training=True, mask=mask)
            return y, updated

        y, pull, updated = jax.vjp(f, x, trainable, has_aux=True)
        return y, pull(dy), updated

    return run


def values(variables):
    return [jnp.asarray(v.value) for v in variables]


def state(layer):
    return values(layer.trainable_variables), values(layer.non_trainable_variables)


def is_a_step(case, layer_state, got, args, size=None, momentum=0.6, totals=True):
    """Output, gradients and updated statistics of all replicas against the oracle."""
    xs, dys, _, _, masks = args
    y, (dx, (dgamma, dbeta)), (mean, variance) = got
    (gamma, beta), (old_mean, old_variance) = ([np.ravel(np.asarray(w)) for w in part] for part in layer_state)
    replicas = len(xs)
    truth = oracle.BatchNorm(xs, axes=case.axes, masks=masks, group_size=size)
    close(np.split(np.asarray(y), replicas), truth.forward(gamma, beta), case, "output")
    dxs, dgammas, dbetas = truth.backward(dys, gamma)
    close(np.split(np.asarray(dx), replicas), dxs, case, "gradient")
    for g, expected in ((dgamma, dgammas), (dbeta, dbetas)):
        g = np.asarray(g)
        close([g.ravel()] if totals else list(g.reshape(replicas, -1)), [sum(expected)] if totals else expected, case, "gradient")
    _, new_mean, new_variance = truth.moving()
    np.testing.assert_allclose(np.ravel(mean), oracle.moving_average(old_mean, new_mean, momentum), atol=2e-6)
    np.testing.assert_allclose(np.ravel(variance), oracle.moving_average(old_variance, new_variance, momentum), rtol=1e-5)


# ------------------------------------------------------------------------------------------------- mapped


def mapped(layer, how, replicas, with_mask):
    """The step of all replicas; with check_vma the statistics leave replicated, elsewhere as every replica's own."""
    run = step(layer)
    mesh = JaxWorld(replicas).mesh()
    arrays = (ONE_EACH,) * (3 if with_mask else 2)
    if how == "checked":
        out = ONE_EACH, (ONE_EACH, SAME), SAME
        return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(SAME, SAME, *arrays), out_specs=out))

    def summed(*arguments):
        y, (dx, parameters), updated = run(*arguments)
        return y, (dx, lax.psum(parameters, AXIS)), updated

    if how == "unchecked":
        out = ONE_EACH, (ONE_EACH, SAME), SAME
        return jax.jit(jax.shard_map(summed, mesh=mesh, in_specs=(SAME, SAME, *arrays), out_specs=out, check_vma=False))
    axes = (None, None, *[0] * len(arrays))
    one = (
        jax.pmap(summed, axis_name=AXIS, in_axes=axes, devices=jax.devices()[:replicas])
        if how == "pmap"
        else jax.jit(jax.vmap(summed, axis_name=AXIS, in_axes=axes))
    )

    def call(trainable, statistics, *arrays):
        y, (dx, parameters), updated = one(trainable, statistics, *(np.stack(np.split(a, replicas)) for a in arrays))
        for v in updated:
            assert all(np.array_equal(v[0], v[r]) for r in range(replicas)), "statistics differ between replicas"
        first = jax.tree.map(lambda v: v[0], (parameters, updated))
        return np.concatenate(y), (np.concatenate(dx), first[0]), first[1]

    return call


@pytest.mark.parametrize("how", ["checked", "unchecked", "pmap", "vmap"])
@pytest.mark.parametrize(("case", "size"), [*((c, None) for c in BY_NAME), (BY_NAME[2], 2)], ids=str)
def test_a_mapped_step_equals_the_whole_batch(case, size, how):
    layer = make(case, momentum=0.6, axis_name=AXIS, group_size=size)
    args = equal_shards(case, 4)
    arrays = [full_batch(a) for a in (args[0], args[1], args[4]) if a is not None]
    got = mapped(layer, how, 4, args[4] is not None)(*state(layer), *arrays)
    is_a_step(case, state(layer), got, args, size)


@pytest.mark.parametrize("size", [None, 2])
def test_renorm_by_formula(size):
    """r and d from the group's own moments; the statistics from the average over groups."""
    case = Case("renorm", (3, 3, 3, 3), (4, 3))
    clipping = {"rmin": 0.7, "rmax": 1.2, "dmax": 0.4}
    layer = make(case, renorm=True, renorm_clipping=clipping, momentum=0.6, renorm_momentum=0.7, group_size=size, axis_name=AXIS)
    gamma, beta, mean, _, stddev, renorm_mean, renorm_stddev = layer.get_weights()
    xs, dys, *_ = equal_shards(case, 4)
    y, (dx, _), updated = mapped(layer, "checked", 4, False)(*state(layer), full_batch(xs), full_batch(dys))
    scales, offsets, truth = renormalised(xs, size, gamma, beta, renorm_mean, renorm_stddev)
    close(np.split(np.asarray(y), 4), truth.forward(scales, offsets), case, "output")
    close(np.split(np.asarray(dx), 4), truth.backward(dys, scales)[0], case, "gradient")
    _, m, v = truth.moving()
    s = np.sqrt(v + 1e-3)
    moved_stddev = oracle.moving_average(stddev, s, 0.6)
    expected = [oracle.moving_average(mean, m, 0.6), moved_stddev**2 - 1e-3, moved_stddev,
                oracle.moving_average(renorm_mean, m, 0.7), oracle.moving_average(renorm_stddev, s, 0.7)]  # fmt: skip
    for got, value in zip(updated, expected, strict=True):
        np.testing.assert_allclose(got, value, atol=1e-5)


def renormalised(xs, size, gamma, beta, renorm_mean, renorm_stddev):
    truth, scales, offsets = oracle.BatchNorm(xs, group_size=size), [], []
    for r in range(len(xs)):
        _, m, v = truth.moments[r // truth.size]
        scales.append(np.clip(np.sqrt(v + 1e-3) / renorm_stddev, 0.7, 1.2) * gamma)
        offsets.append(np.clip((m - renorm_mean) / renorm_stddev, -0.4, 0.4) * gamma + beta)
    return scales, offsets, truth


def test_each_replica_draws_its_own_adjustment():
    case = Case("adjustment", (3, 3, 3, 3), (4, 3))

    def adjustment(shape):
        assert shape == (3, 4, 3)
        replica = lax.axis_index(AXIS).astype("float32")
        return 1 + 0.1 * replica, 0.2 * replica

    layer = make(case, adjustment=adjustment, axis_name=AXIS)
    gamma, beta, *_ = layer.get_weights()
    xs, dys, *_ = equal_shards(case, 4)
    y, (dx, (dgamma, _)), _ = mapped(layer, "checked", 4, False)(*state(layer), full_batch(xs), full_batch(dys))
    truth, scales = oracle.BatchNorm(xs), [(1 + 0.1 * r) * gamma for r in range(4)]
    close(np.split(np.asarray(y), 4), truth.forward(scales, [0.2 * r * gamma + beta for r in range(4)]), case, "output")
    dxs, dscales, doffsets = truth.backward(dys, scales)
    close(np.split(np.asarray(dx), 4), dxs, case, "gradient")
    total = sum((1 + 0.1 * r) * s + 0.2 * r * o for r, (s, o) in enumerate(zip(dscales, doffsets, strict=True)))
    close([np.asarray(dgamma)], [total], case, "gradient")


@pytest.mark.parametrize("what", ["masked", "infinite", "nan"])
@pytest.mark.parametrize("renorm", [False, True])
def test_statistics_stay_where_the_batch_says_nothing(what, renorm):
    case = Case("nothing", (3, 3, 3, 3), (4, 3), mask="rows" if what == "masked" else None)
    layer = make(case, renorm=renorm, axis_name=AXIS)
    xs, dys, _, _, masks = equal_shards(case, 4)
    if what == "masked":
        arrays = full_batch(xs), full_batch(dys), np.zeros_like(full_batch(masks))
    else:
        xs[1][0, 0, 0] = np.inf if what == "infinite" else np.nan
        arrays = full_batch(xs), full_batch(dys)
    y, gradients, updated = mapped(layer, "checked", 4, what == "masked")(*state(layer), *arrays)
    if what == "masked":
        assert all(np.isfinite(v).all() for v in jax.tree.leaves((y, gradients)))
    for old, new in zip(layer.non_trainable_variables, updated, strict=True):
        np.testing.assert_array_equal(old.value, new)


def test_vmap_over_an_ensemble_in_training_and_inference():
    case = Case("ensemble", (3, 3, 3, 3), (4, 3))
    layer = make(case)
    xs = np.stack(case.inputs(3))
    stacked = jax.tree.map(lambda v: jnp.stack([v, 2 * v, 3 * v]), state(layer))
    run = jax.vmap(lambda t, n, x: layer.stateless_call(t, n, x, training=True))
    y, _ = run(*stacked, xs)
    for i, x in enumerate(xs):
        gamma, beta = ((i + 1) * np.asarray(v.value) for v in layer.trainable_variables)
        close([np.asarray(y[i])], oracle.BatchNorm([x]).forward(gamma, beta), case, "output")
    y, _ = jax.vmap(lambda t, n, x: layer.stateless_call(t, n, x, training=False))(*stacked, xs)
    (gamma, beta), (mean, variance) = (np.asarray(jax.tree.map(lambda v: v[2], part)) for part in stacked)
    np.testing.assert_allclose(y[2], (xs[2] - mean) / np.sqrt(variance + 1e-3) * gamma + beta, atol=1e-5)


# ------------------------------------------------------------------------------------------------- checkpoint


@pytest.mark.parametrize(("policy", "gathers"), [
    (None, 2), (jax.checkpoint_policies.save_only_these_names("syncbn_moments"), 1),
], ids=["all recomputed", "moments saved"])  # fmt: skip
def test_checkpoint(policy, gathers):
    """State is explicit, so nothing is updated twice. With the moments saved nothing is sent twice."""
    case = Case("checkpoint", (3, 3, 3, 3), (4, 3))
    layer = make(case, momentum=0.6, axis_name=AXIS)
    args = equal_shards(case, 4)

    def run(trainable, statistics, x, dy):
        def f(x, trainable):
            # What comes before and after makes recomputation recompute the layer.
            y, updated = layer.stateless_call(trainable, statistics, jnp.sinh(jnp.arcsinh(x)), training=True)
            return jnp.sinh(jnp.arcsinh(y)), updated

        y, pull, updated = jax.vjp(jax.checkpoint(f, policy=policy), x, trainable, has_aux=True)
        return y, pull(dy), updated

    specs = {"in_specs": (SAME, SAME, ONE_EACH, ONE_EACH), "out_specs": (ONE_EACH, (ONE_EACH, SAME), SAME)}
    program = jax.jit(jax.shard_map(run, mesh=JaxWorld(4).mesh(), **specs))
    given = (*state(layer), full_batch(args[0]), full_batch(args[1]))
    got = program(*given)
    loose = Case("checkpoint", (3, 3, 3, 3), (4, 3), dtype="float32")
    is_a_step(loose, state(layer), got, args)
    text = program.lower(*given).as_text()
    assert text.count("stablehlo.all_gather") == gathers


# ------------------------------------------------------------------------------------------------- sharded


@contextlib.contextmanager
def distributed(kind, devices=4, **layouts):
    """A DataParallel, or a ModelParallel whose mesh has a batch axis and one of size 2 for the channels."""
    names = [f"cpu:{d.id}" for d in jax.devices()[:devices]]
    if kind == "data":
        made = keras.distribution.DataParallel(devices=names)
    else:
        mesh = keras.distribution.DeviceMesh((devices // 2, 2), ["batch", "model"], names)
        layout = keras.distribution.LayoutMap(mesh)
        for path, axes in layouts.items():
            layout[f".*{path}"] = axes
        made = keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch")
    keras.distribution.set_distribution(made)
    try:
        yield _private.backend_mesh(made.device_mesh)
    finally:
        keras.distribution.set_distribution(None)


CHANNELS = dict.fromkeys(("gamma", "beta", "moving_mean", "moving_variance"), ("model",))


@pytest.mark.parametrize(("case", "size"), [*((c, None) for c in BY_NAME), (BY_NAME[0], 2), (BY_NAME[2], 2)], ids=str)
@pytest.mark.parametrize("jitted", [True, False])
def test_a_step_under_data_parallel(case, size, jitted):
    with distributed("data"):
        layer = make(case, momentum=0.6, group_size=size)
        args = equal_shards(case, 4)
        mask = full_batch(args[4])
        run = jax.jit(step(layer)) if jitted else step(layer)
        before = state(layer)
        got = run(*before, full_batch(args[0]), full_batch(args[1]), mask)
        is_a_step(case, before, got, args, size)


@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("case", [Case("even", rest=(4, 6)), Case("masked, even", RAGGED, (6, 4), (1,), mask="rows")], ids=str)
@pytest.mark.parametrize("layouts", [{}, CHANNELS], ids=["replicated", "channels sharded"])
def test_a_step_under_model_parallel(case, layouts, size):
    with distributed("model", 8, **layouts):
        layer = make(case, momentum=0.6, group_size=size)
        args = equal_shards(case, 4)
        before = state(layer)
        got = jax.jit(step(layer))(*before, full_batch(args[0]), full_batch(args[1]), full_batch(args[4]))
        is_a_step(case, before, got, args, size)


@pytest.mark.parametrize("kind", ["data", "channels sharded"])
@pytest.mark.parametrize("leading", [6, 1])
def test_axis_0_that_the_mesh_does_not_divide(leading, kind):
    """A time-major tensor, or prototypes: the batch may lie on another axis, or there is none. The statistics are global."""
    case = Case("time first", (leading,), (8, 6), mask="rows")
    args = equal_shards(case, 1)
    with distributed(*(("data",) if kind == "data" else ("model", 8)), **(CHANNELS if kind != "data" else {})) as mesh:
        layer = make(case, momentum=0.6)
        batch = PartitionSpec(None, mesh.axis_names[0])
        arrays = [jax.device_put(a[0], jax.NamedSharding(mesh, batch)) for a in (args[0], args[1], args[4])]
        before = state(layer)
        got = jax.jit(step(layer))(*before, *arrays)
        is_a_step(case, before, got, args)
        arrays[0] = arrays[0].at[0, 0, 0].set(np.inf)
        _, _, updated = jax.jit(step(layer))(*before, *arrays[:2])
        np.testing.assert_array_equal(updated[0], before[1][0])


def test_a_layout_that_is_known_tells_where_the_batch_is():
    """Outside of jit an array's layout is known. Here the mesh divides axis 1, so axis 0 is not taken apart, nor made groups of."""
    x = np.random.default_rng(0).normal(size=(4, 8, 3)).astype("float32")
    with distributed("data") as mesh:
        time_first = jax.device_put(x, jax.NamedSharding(mesh, PartitionSpec(None, mesh.axis_names)))
        y = make(Case("time first", rest=(8, 3)))(time_first, training=True)
        assert y.sharding.is_equivalent_to(time_first.sharding, 3)
        with pytest.raises(ValueError, match="divides axis 0 of the input, which must be the batch"):
            make(Case("time first", rest=(8, 3)), group_size=2)(time_first, training=True)
        batch_first = jax.device_put(x, jax.NamedSharding(mesh, PartitionSpec(mesh.axis_names)))
        layer = make(Case("batch first", rest=(8, 3)), group_size=2)
        y = layer(batch_first, training=True)
    gamma, beta, *_ = layer.get_weights()
    truth = oracle.BatchNorm(list(x[:, None]), group_size=2)
    np.testing.assert_allclose(y, np.concatenate(truth.forward(gamma, beta)), atol=1e-5)


def test_renorm_in_groups_under_data_parallel():
    case = Case("renorm", (3, 3, 3, 3), (4, 3))
    with distributed("data"):
        clipping = {"rmin": 0.7, "rmax": 1.2, "dmax": 0.4}
        layer = make(case, renorm=True, renorm_clipping=clipping, group_size=2)
        gamma, beta, _, _, _, renorm_mean, renorm_stddev = layer.get_weights()
        xs, dys, *_ = equal_shards(case, 4)
        y, (dx, (dgamma, dbeta)), _ = jax.jit(step(layer))(*state(layer), full_batch(xs), full_batch(dys))
    scales, offsets, truth = renormalised(xs, 2, gamma, beta, renorm_mean, renorm_stddev)
    close(np.split(np.asarray(y), 4), truth.forward(scales, offsets), case, "output")
    dxs, dscales, doffsets = truth.backward(dys, scales)
    close(np.split(np.asarray(dx), 4), dxs, case, "gradient")
    # y = scale·x_hat + offset with scale = r·gamma and offset = d·gamma + beta.
    total = sum((s * ds + (o - beta) * do) / gamma for s, o, ds, do in zip(scales, offsets, dscales, doffsets, strict=True))
    close([np.asarray(dgamma), np.asarray(dbeta)], [total, sum(doffsets)], case, "gradient")


def chained(layers):
    """A step through several layers: output, all gradients, all statistics."""

    def run(states, x, dy):
        def f(x, trainables):
            updated = []
            for layer, trainable, (_, statistics) in zip(layers, trainables, states, strict=True):
                x, new = layer.stateless_call(trainable, statistics, x, training=True)
                updated.append(new)
            return x, updated

        y, pull, updated = jax.vjp(f, x, [t for t, _ in states], has_aux=True)
        return y, pull(dy), updated

    return run


@pytest.mark.parametrize(("kind", "layouts", "size"), [
    ("data", {}, None), ("data", {}, 2), ("model", {}, None), ("model", CHANNELS, None),
], ids=["data", "data, groups", "model", "model, channels sharded"])  # fmt: skip
def test_one_collective_each_way_and_layer_when_sharded(kind, layouts, size):
    case = Case("counted", rest=(4, 6))
    with distributed(kind, 4 if kind == "data" else 8, **layouts) as mesh:
        layers = [make(case, group_size=size) for _ in range(3)]
        batch, channels = mesh.axis_names[0], "model" if layouts else None
        arrays = jax.NamedSharding(mesh, PartitionSpec(batch, None, channels))
        x, dy = (jax.device_put(full_batch(a), arrays) for a in equal_shards(case, 4)[:2])
        states = [state(layer) for layer in layers]
        placed = jax.tree.map(lambda v: v.sharding, states)
        out = arrays, (arrays, [t for t, _ in placed]), [n for _, n in placed]
        run = jax.jit(chained(layers), out_shardings=out).lower(states, x, dy).compile()
    found = collectives(run)
    assert sum(found.values()) == 2 * 3, found


def test_keras_own_under_data_parallel_sends_more():
    case = Case("counted", rest=(4, 6))
    with distributed("data") as mesh:
        layers = [keras.layers.BatchNormalization() for _ in range(3)]
        for layer in layers:
            layer.build((None, 4, 6))
        arrays = jax.NamedSharding(mesh, PartitionSpec(mesh.axis_names[0]))
        x, dy = (jax.device_put(full_batch(a), arrays) for a in equal_shards(case, 4)[:2])
        run = jax.jit(chained(layers)).lower([state(layer) for layer in layers], x, dy).compile()
    assert sum(collectives(run).values()) > 2 * 3


def test_inference_and_building_send_nothing():
    case = Case("inference", rest=(4, 6))
    with distributed("data") as mesh:
        layer = make(case)
        x = jax.device_put(full_batch(case.inputs(4)), jax.NamedSharding(mesh, PartitionSpec(mesh.axis_names[0])))
        run = jax.jit(lambda s, x: layer.stateless_call(*s, x, training=False)[0])
        assert collectives(run.lower(state(layer), x).compile()) == {}
        layer.trainable = False
        frozen = jax.jit(lambda s, x: layer.stateless_call(*s, x, training=True)[0])
        assert collectives(frozen.lower(state(layer), x).compile()) == {}
        run = jax.jit(lambda s, x: layer.stateless_call(*s, x, training=True)[0])
        layer.trainable = True
        assert sum(collectives(run.lower(state(layer), x).compile()).values()) == 1


def test_axis_0_takes_plain_global_operations():
    x, dy = RNG.normal(size=(8, 6)).astype("float32"), RNG.normal(size=(8, 6)).astype("float32")
    with distributed("data"):
        layer = SyncBatchNormalization(axis=0)
        layer.build((8, 6))
        y, (dx, _), _ = jax.jit(step(layer))(*state(layer), x, dy)
        grouped = SyncBatchNormalization(axis=0, group_size=2)
        grouped.build((8, 6))
        with pytest.raises(ValueError, match="`group_size` must come with a way to tell the replicas"):
            jax.jit(step(grouped))(*state(grouped), x, dy)
    truth = oracle.BatchNorm([x], axes=(0,))
    np.testing.assert_allclose(y, truth.forward(np.ones(8), np.zeros(8))[0], atol=1e-5)
    np.testing.assert_allclose(dx, truth.backward([dy], np.ones(8))[0][0], atol=1e-5)


def test_global_arrays_in_jit_without_a_distribution():
    """Global statistics by XLA's partitioner."""
    case = Case("global")
    layer, args = make(case, momentum=0.6), equal_shards(case, 4)
    arrays = [jax.device_put(full_batch(a), jax.NamedSharding(JaxWorld(4).mesh(), ONE_EACH)) for a in args[:2]]
    is_a_step(case, state(layer), jax.jit(step(layer))(*state(layer), *arrays), args)


def test_local_inside_a_map_that_the_layer_is_not_told_of():
    case = Case("local")
    layer, (xs, dys, *_) = make(case), equal_shards(case, 4)
    gamma, beta, *_ = layer.get_weights()
    out = ONE_EACH, (ONE_EACH, ONE_EACH), ONE_EACH
    specs = {"in_specs": (SAME, SAME, ONE_EACH, ONE_EACH), "out_specs": out, "check_vma": False}
    y, _, _ = jax.shard_map(step(layer), mesh=JaxWorld(4).mesh(), **specs)(*state(layer), full_batch(xs), full_batch(dys))
    close(np.split(np.asarray(y), 4), [oracle.BatchNorm([x]).forward(gamma, beta)[0] for x in xs], case, "output")


def test_mapped_form_inside_a_map_over_the_distributions_own_axis():
    case = Case("manual")
    with distributed("data") as mesh:
        layer, args = make(case, momentum=0.6), equal_shards(case, 4)
        each = PartitionSpec(mesh.axis_names[0])
        specs = {"in_specs": (SAME, SAME, each, each), "out_specs": (each, (each, SAME), SAME)}
        got = jax.jit(jax.shard_map(step(layer), mesh=mesh, **specs))(*state(layer), full_batch(args[0]), full_batch(args[1]))
        is_a_step(case, state(layer), got, args)


def test_axis_name_wins_over_a_distribution():
    case = Case("wins")
    with distributed("data"):
        layer = make(case, momentum=0.6, axis_name="lane")
        args = equal_shards(case, 4)
        y, _ = jax.vmap(lambda x: layer.stateless_call(*state(layer), x, training=True), axis_name="lane")(np.stack(args[0]))
    gamma, beta, *_ = layer.get_weights()
    close(list(np.asarray(y)), oracle.BatchNorm(args[0]).forward(gamma, beta), case, "output")


# ------------------------------------------------------------------------------------------------- how people train


def model_of(layer_class, **arguments):
    keras.utils.set_random_seed(3)
    return keras.Sequential([
        keras.Input((6, 6, 1)), keras.layers.Conv2D(4, 3), layer_class(**arguments), keras.layers.ReLU(),
        keras.layers.Flatten(), keras.layers.Dense(3), layer_class(**arguments), keras.layers.Dense(1),
    ])  # fmt: skip


IMAGES, TARGETS = RNG.normal(size=(32, 6, 6, 1)).astype("float32"), RNG.normal(size=(32, 1)).astype("float32")


def fitted(layer_class, **compiled):
    model = model_of(layer_class)
    model.compile(keras.optimizers.SGD(0.05), "mse", **compiled)
    model.fit(IMAGES, TARGETS, batch_size=16, epochs=2, shuffle=False, verbose=0)
    return model


@pytest.mark.parametrize(
    ("devices", "compiled"),
    [(4, {}), (8, {}), (4, {"jit_compile": False}), (4, {"run_eagerly": True}), (4, {"steps_per_execution": 2})],
    ids=str,
)
def test_fit_equals_one_device_with_the_whole_batch(devices, compiled):
    expected = fitted(keras.layers.BatchNormalization).get_weights()
    with distributed("data", devices):
        model = fitted(SyncBatchNormalization, **compiled)
        for got, value in zip(model.get_weights(), expected, strict=True):
            np.testing.assert_allclose(got, value, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(model.predict(IMAGES, verbose=0), model(IMAGES), atol=1e-5)


def test_fit_under_model_parallel():
    expected = fitted(keras.layers.BatchNormalization).get_weights()
    with distributed("model", 8, **{"dense/kernel": (None, None)}):
        for got, value in zip(fitted(SyncBatchNormalization).get_weights(), expected, strict=True):
            np.testing.assert_allclose(got, value, rtol=1e-3, atol=1e-4)


def test_fit_with_whole_batches_masked():
    """A batch of padding updates nothing. The statistics of the other batches are those of what counts."""
    tokens = RNG.integers(1, 9, (32, 4))
    tokens[8:16] = 0
    tokens[16:, 2:] = 0
    with distributed("data"):
        model = keras.Sequential([
            keras.layers.Embedding(9, 3, mask_zero=True), SyncBatchNormalization(momentum=0.5), keras.layers.Dense(1),
        ])  # fmt: skip
        model.compile(keras.optimizers.SGD(0.0), "mse")
        model.fit(tokens, np.zeros((32, 4, 1), "float32"), batch_size=8, shuffle=False, verbose=0)
        table = np.asarray(model.layers[0].embeddings)
        mean = np.zeros(3)
        for batch in (tokens[:8], tokens[16:24], tokens[24:]):
            mean = oracle.moving_average(mean, table[batch[batch > 0]].mean(0), 0.5)
        np.testing.assert_allclose(model.layers[1].moving_mean, mean, atol=1e-6)


def test_no_recompilation_and_donation():
    """State placed with its sharding first, and given away: one program for all steps, and the buffers are reused."""
    case = Case("donated")
    layer, (xs, dys, *_) = make(case, axis_name=AXIS), equal_shards(case, 4)
    mesh, traced = JaxWorld(4).mesh(), []

    def run(trainable, statistics, x, dy):
        traced.append(1)
        _, (_, gradients), updated = step(layer)(trainable, statistics, x, dy)
        return [w - 0.1 * g for w, g in zip(trainable, gradients, strict=True)], updated

    specs = {"in_specs": (SAME, SAME, ONE_EACH, ONE_EACH), "out_specs": (SAME, SAME)}
    program = jax.jit(jax.shard_map(run, mesh=mesh, **specs), donate_argnums=(0, 1))
    current = jax.device_put(jax.tree.map(jnp.copy, state(layer)), jax.NamedSharding(mesh, SAME))
    first, arrays = current, [jax.device_put(full_batch(a), jax.NamedSharding(mesh, ONE_EACH)) for a in (xs, dys)]
    for _ in range(3):
        current = program(*current, *arrays)
    assert len(traced) == 1
    assert program._cache_size() == 1
    assert all(v.is_deleted() for v in jax.tree.leaves(first))
    assert all(np.isfinite(v).all() for v in jax.tree.leaves(current))


def test_export_of_an_inference_function():
    pytest.importorskip("flatbuffers")
    layer = make(Case("exported", rest=(4, 3)), axis_name=AXIS)
    x = RNG.normal(size=(2, 4, 3)).astype("float32")
    exported = export.export(jax.jit(lambda x: layer.stateless_call(*state(layer), x, training=False)[0]))(x)
    again = export.deserialize(exported.serialize())
    np.testing.assert_allclose(again.call(x), layer(x), atol=1e-6)


def test_forward_mode_in_training_and_inference():
    layer = make(Case("forward", rest=(4, 3)))
    x = RNG.normal(size=(2, 4, 3)).astype("float32")
    with pytest.raises(TypeError, match=r"forward-mode|jvp"):
        jax.jvp(lambda x: layer.stateless_call(*state(layer), x, training=True)[0], (x,), (x,))
    _, dy = jax.jvp(lambda x: layer.stateless_call(*state(layer), x, training=False)[0], (x,), (x,))
    gamma, _, _, variance = layer.get_weights()
    np.testing.assert_allclose(dy, x * gamma / np.sqrt(variance + 1e-3), rtol=1e-5)


# ------------------------------------------------------------------------------------------------- one replica


@pytest.mark.parametrize("arguments", [
    {}, {"center": False}, {"scale": False}, {"axis": 1}, {"dtype": "float16"}, {"dtype": "mixed_bfloat16"},
    pytest.param({"renorm": True, "renorm_clipping": {"rmax": 1.1, "dmax": 0.2}}, marks=needs_keras_renorm),
], ids=str)  # fmt: skip
def test_one_replica_equals_keras(arguments):
    ours, theirs = SyncBatchNormalization(**arguments), keras.layers.BatchNormalization(**arguments)
    for layer in (ours, theirs):
        layer.build((None, 4, 3))
    ours.set_weights([RNG.uniform(0.5, 2, w.shape).astype("float32") for w in ours.get_weights()])
    theirs.set_weights(ours.get_weights())
    x, dy = (RNG.normal(size=(6, 4, 3)).astype("float32") for _ in range(2))
    tolerance = {"float16": 4e-3, "mixed_bfloat16": 3e-2}.get(arguments.get("dtype"), 2e-5)
    dy = jnp.asarray(dy, ours.compute_dtype)
    for got, expected in zip(
        *(jax.tree.leaves(jax.jit(step(layer))(*state(layer), x, dy)) for layer in (ours, theirs)), strict=True
    ):
        got, expected = (np.asarray(v, "float32") for v in (got, expected))
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())
    assert ours(x).dtype == theirs(x).dtype


def test_keras_own_refuses_to_synchronise_here():
    with pytest.raises(ValueError):
        keras.layers.BatchNormalization(synchronized=True)


def test_config_keeps_axis_name():
    for name, stored in (("data", "data"), (("data", "model"), ("data", "model")), (["data"], ("data",)), ((), ())):
        layer = SyncBatchNormalization(axis_name=name)
        assert layer.axis_name == stored
        assert SyncBatchNormalization.from_config(layer.get_config()).axis_name == stored
    assert isinstance(SyncBatchNormalization(axis_name=("a", "b")).get_config()["axis_name"], list)


def test_a_file_of_a_mapped_layer_runs_anywhere(tmp_path):
    model = keras.Sequential([keras.Input((4, 3)), SyncBatchNormalization(axis_name=AXIS, group_size=2)])
    model.save(tmp_path / "model.keras")
    x = RNG.normal(size=(2, 4, 3)).astype("float32")
    np.testing.assert_array_equal(keras.saving.load_model(tmp_path / "model.keras")(x), model(x))


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", ["", 3, ("a", 3), ("a", "a"), ("",)], ids=str)
def test_bad_axis_names(name):
    with pytest.raises(ValueError, match="`axis_name` must be None, the name of a mapped axis"):
        SyncBatchNormalization(axis_name=name)


def test_a_layer_in_a_map_that_it_does_not_name_warns_with_its_name(monkeypatch):
    monkeypatch.setattr(jax_axes, "warned_of", set())
    case = Case("local", (3, 3, 3, 3), (4, 3))
    layer, named, on_purpose = make(case, name="mine"), make(case, axis_name=AXIS), make(case, axis_name=())
    arrays = [full_batch(a) for a in equal_shards(case, 4)[:2]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for quiet in (named, on_purpose):
            mapped(quiet, "unchecked", 4, False)(*state(quiet), *arrays)
        layer(arrays[0], training=True)
    with pytest.warns(UserWarning, match=rf"^mine trains inside a map .* where the mapped axes are \['{AXIS}'\]"):
        mapped(layer, "unchecked", 4, False)(*state(layer), *arrays)


def test_a_map_that_a_distribution_does_not_know_warns(monkeypatch):
    monkeypatch.setattr(jax_axes, "warned_of", set())
    case = Case("local", (3, 3, 3, 3), (4, 3))
    with distributed("data"):
        layer = make(case)
        with pytest.warns(UserWarning, match="trains inside a map over mesh axes"):
            mapped(layer, "unchecked", 4, False)(*state(layer), *(full_batch(a) for a in equal_shards(case, 4)[:2]))


def test_groups_of_a_layer_that_is_local_on_purpose():
    layer = SyncBatchNormalization(axis_name=(), group_size=2)
    assert np.isfinite(layer(np.ones((4, 3), "float32"))).all()
    with pytest.raises(ValueError, match=r"`group_size` must not come with axis_name=\(\)"):
        layer(np.ones((4, 3), "float32"), training=True)


def test_an_axis_that_is_not_bound_where_the_layer_trains():
    x = np.ones((4, 3), "float32")
    layer = SyncBatchNormalization(axis_name="data")
    assert np.isfinite(layer(x)).all()
    with pytest.raises(
        ValueError, match=r"`axis_name` must name an axis that is mapped where the layer trains. Received: 'data'"
    ):
        layer(x, training=True)

    class Block(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.norm = layer

        def call(self, x):
            return self.norm(x, training=True)

    inputs = keras.Input((3,))
    assert keras.Model(inputs, Block()(inputs)).output_shape == (None, 3)


def test_group_size_that_does_not_divide_the_devices():
    with distributed("data"):
        layer = make(Case("groups", rest=(4, 3)), group_size=3)
        with pytest.raises(
            ValueError, match=r"`group_size` must divide the number of replicas that train. Received: group_size=3"
        ):
            layer(np.ones((8, 4, 3), "float32"), training=True)
        assert np.isfinite(layer(np.ones((8, 4, 3), "float32"))).all()


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("leading", [6, 1])
def test_groups_of_a_batch_that_the_mesh_does_not_divide(leading, size):
    x = np.ones((leading, 4, 3), "float32")
    with distributed("data"):
        layer = make(Case("indivisible", rest=(4, 3)), group_size=size)
        with pytest.raises(ValueError, match=rf"divides axis 0 of the input.* group_size={size} .* shape \({leading}, 4, 3\)"):
            layer(x, training=True)
        all_of_them = make(Case("indivisible", rest=(4, 3)), group_size=4)
        assert np.isfinite(all_of_them(x, training=True)).all()
