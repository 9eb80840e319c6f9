"""The Keras layer on the replicas of a MirroredStrategy."""

from __future__ import annotations

import itertools

import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from cases import RAGGED, Case
from checks import close
from test_engine_tensorflow import count_messages
from versions import needs_remat_scope

from syncbn import SyncBatchNormalization
from syncbn.tensorflow import replicas

RNG = np.random.default_rng(11)
BY_NAME = [
    Case("ragged", RAGGED),
    Case("an empty replica", (3, 0, 2, 1)),
    Case("masked", RAGGED, mask="rows"),
    Case("a fully masked replica", RAGGED, mask="one replica"),
    Case("channels first, masked", RAGGED, (3, 4, 5), (1,), mask="rows"),
    Case("two axes", RAGGED, (3, 4, 5), (1, 3)),
    Case("float64", RAGGED, dtype="float64"),
]


def make(world, case, **arguments):
    """A built layer in the strategy's scope, with other weights than the initial ones."""
    with world.strategy.scope():
        axis = list(case.axes) if len(case.axes) > 1 else case.axes[0]
        layer = SyncBatchNormalization(axis=axis, dtype=case.dtype, **arguments)
        layer.build((None, *case.rest))
        layer.set_weights([np.random.default_rng(5).uniform(0.5, 2, w.shape) for w in layer.get_weights()])
    return layer


def step(layer):
    """One training step of one replica."""

    def replica(x, dy, mask=None):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True, mask=mask)
        return y, tape.gradient(y, [x, layer.gamma.value, layer.beta.value], dy)

    return replica


def statistics(world, layer):
    """The layer's statistics on every replica, after a check that all are equal to the bit."""
    everywhere = {}
    for w in layer.non_trainable_weights:
        values = [np.asarray(v) for v in world.strategy.experimental_local_results(w.value)]
        assert len(values) == world.replicas
        for v in values:
            np.testing.assert_array_equal(v, values[0])
        everywhere[w.name] = values[0]
    return everywhere


@pytest.mark.parametrize("group_size", [None, 1, 2])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("case", BY_NAME, ids=lambda case: case.name)
def test_a_step_equals_the_concatenated_batch(world, case, graph, group_size):
    layer = make(world, case, momentum=0.6, group_size=group_size)
    gamma, beta, mean, variance = (np.ravel(w) for w in layer.get_weights())
    xs, dys, masks = case.inputs(world.replicas), case.cotangents(world.replicas), case.masks(world.replicas)
    got = world.run(step(layer), xs, dys, masks, graph=graph)
    truth = oracle.BatchNorm(xs, axes=case.axes, masks=masks, group_size=group_size)
    close([y for y, _ in got], truth.forward(gamma, beta), case, "output")
    for i, expected in enumerate(truth.backward(dys, gamma)):
        close([g[i].reshape(e.shape) for (_, g), e in zip(got, expected, strict=True)], expected, case, "gradient")
    moved = statistics(world, layer)
    _, new_mean, new_variance = truth.moving()
    np.testing.assert_allclose(np.ravel(moved["moving_mean"]), oracle.moving_average(mean, new_mean, 0.6), atol=2e-6)
    np.testing.assert_allclose(np.ravel(moved["moving_variance"]), oracle.moving_average(variance, new_variance, 0.6), rtol=1e-5)


@pytest.mark.parametrize("group_size", [None, 1])
def test_renorm_by_formula(world, group_size):
    """r and d from the group's own moments; the statistics from the average over groups."""
    case = Case("renorm", RAGGED, (4, 3), dtype="float64")
    clipping = {"rmin": 0.7, "rmax": 1.2, "dmax": 0.4}
    layer = make(world, case, renorm=True, renorm_clipping=clipping, momentum=0.6, renorm_momentum=0.7, group_size=group_size)
    gamma, beta, mean, _, stddev, renorm_mean, renorm_stddev = layer.get_weights()
    xs, dys = case.inputs(world.replicas), case.cotangents(world.replicas)
    got = world.run(step(layer), xs, dys, graph=True)
    truth = oracle.BatchNorm(xs, group_size=group_size)
    scales, offsets = [], []
    for r in range(world.replicas):
        _, m, v = truth.moments[r // truth.size]
        ratio = np.clip(np.sqrt(v + 1e-3) / renorm_stddev, 0.7, 1.2)
        shift = np.clip((m - renorm_mean) / renorm_stddev, -0.4, 0.4)
        scales.append(ratio * gamma)
        offsets.append(shift * gamma + beta)
    close([y for y, _ in got], truth.forward(scales, offsets), case, "output")
    dxs, _, _ = truth.backward(dys, scales)
    close([g[0] for _, g in got], dxs, case, "gradient")
    moved = statistics(world, layer)
    _, m, v = truth.moving()
    s = np.sqrt(v + 1e-3)
    moved_stddev = oracle.moving_average(stddev, s, 0.6)
    expected = {"moving_mean": oracle.moving_average(mean, m, 0.6), "moving_variance": moved_stddev**2 - 1e-3,
                "moving_stddev": moved_stddev, "renorm_mean": oracle.moving_average(renorm_mean, m, 0.7),
                "renorm_stddev": oracle.moving_average(renorm_stddev, s, 0.7)}  # fmt: skip
    for name, value in expected.items():
        np.testing.assert_allclose(moved[name], value, atol=1e-12, err_msg=name)


def test_each_replica_draws_its_own_adjustment(world):
    case = Case("adjustment", RAGGED, (4, 3), dtype="float64")

    def adjustment(shape):
        replica = tf.cast(tf.distribute.get_replica_context().replica_id_in_sync_group, tf.float64)
        return 1 + 0.1 * replica, 0.2 * replica

    layer = make(world, case, adjustment=adjustment)
    gamma, beta, *_ = layer.get_weights()
    xs, dys = case.inputs(world.replicas), case.cotangents(world.replicas)
    got = world.run(step(layer), xs, dys)
    truth = oracle.BatchNorm(xs)
    scales = [(1 + 0.1 * r) * gamma for r in range(world.replicas)]
    close([y for y, _ in got], truth.forward(scales, [0.2 * r * gamma + beta for r in range(world.replicas)]), case, "output")
    close([g[0] for _, g in got], truth.backward(dys, scales)[0], case, "gradient")


@pytest.mark.parametrize("renorm", [False, True])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_an_adjustment_of_each_example_equals_the_concatenated_batch(world, graph, renorm):
    """Plain operators after the normalization; the gradient goes through the global moments."""
    case = Case("adjustment of examples", RAGGED, (4, 3), dtype="float64")
    layer = make(world, case, renorm=renorm, adjustment=lambda shape: (factor(shape), 0.5 * factor(shape)))

    def factor(shape):
        replica = tf.cast(tf.distribute.get_replica_context().replica_id_in_sync_group, tf.float64)
        return tf.reshape(1 + 0.1 * replica + 0.2 * tf.cast(tf.range(shape[0]), tf.float64), [-1, 1, 1])

    held = {w.name: w.numpy() for w in layer.weights}
    gamma, beta = held["gamma"], held["beta"]
    xs, dys = case.inputs(world.replicas), case.cotangents(world.replicas)
    got = world.run(step(layer), xs, dys, graph=graph)
    truth = oracle.BatchNorm(xs)
    _, mean, variance = truth.moments[0]
    std = np.sqrt(variance + 1e-3)
    r, d = (
        (std / held["renorm_stddev"], (mean - held["renorm_mean"]) / held["renorm_stddev"]) if renorm else (0 * std + 1, 0 * std)
    )
    factors = [(1 + 0.1 * i + 0.2 * np.arange(len(x)))[:, None, None] for i, x in enumerate(xs)]
    ys = [(y * f + 0.5 * f) * gamma + beta for y, f in zip(truth.forward(r, d), factors, strict=True)]
    close([y for y, _ in got], ys, case, "output")
    dxs, _, _ = truth.backward([dy * f for dy, f in zip(dys, factors, strict=True)], r * gamma)
    close([g[0] for _, g in got], dxs, case, "gradient")
    dgammas = [((y - beta) / gamma * dy).sum((0, 1)) for y, dy in zip(ys, dys, strict=True)]
    close([g[1] for _, g in got], dgammas, case, "gradient")


@pytest.mark.parametrize("what", ["empty", "masked", "infinite", "nan"])
@pytest.mark.parametrize("renorm", [False, True])
def test_statistics_stay_where_the_batch_says_nothing(world, what, renorm):
    case = Case("nothing", (0, 0, 0, 0) if what == "empty" else RAGGED, (4, 3))
    layer = make(world, case, renorm=renorm)
    before = layer.get_weights()
    xs, masks = case.inputs(world.replicas), None
    if what == "masked":
        masks = [np.zeros(x.shape[:-1], bool) for x in xs]
    if what in ("infinite", "nan"):
        xs[1][0, 0, 0] = np.inf if what == "infinite" else np.nan
    got = world.run(step(layer), xs, case.cotangents(world.replicas), masks, graph=True)
    if what in ("empty", "masked"):
        assert all(np.isfinite(v).all() for y, g in got for v in (y, *g))
    statistics(world, layer)
    for old, new in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_padding_that_is_not_finite_spreads_nowhere(world):
    case = Case("padding", RAGGED, (4, 3), mask="rows", dtype="float64")
    layer = make(world, case, momentum=0.0)
    xs, masks = case.inputs(world.replicas), case.masks(world.replicas)
    for x, mask in zip(xs, masks, strict=True):
        x[~np.broadcast_to(mask, x.shape)] = RNG.choice([np.nan, np.inf, -np.inf])
    got = world.run(step(layer), xs, case.cotangents(world.replicas), masks)
    assert all(np.isfinite(v).all() for y, g in got for v in (y, *g))
    _, mean, variance = oracle.BatchNorm(xs, masks=masks).moments[0]
    np.testing.assert_allclose(statistics(world, layer)["moving_mean"], mean, atol=1e-12)
    np.testing.assert_allclose(statistics(world, layer)["moving_variance"], variance, atol=1e-12)
    for (_, g), x, mask in zip(got, xs, masks, strict=True):
        assert (g[0][~np.broadcast_to(mask, x.shape)] == 0).all()


# ------------------------------------------------------------------------------------------------- messages


def collectives(graph):
    """Names of the all-reduces in a traced graph and its function library."""
    definition = graph.as_graph_def()
    nodes = [*definition.node, *itertools.chain.from_iterable(f.node_def for f in definition.library.function)]
    return [n.name for n in nodes if n.op == "CollectiveReduceV2"]


def traced(world, function, *per_replica):
    """One tf.function of a step on all replicas, traced with these arguments."""
    values = world.strategy.experimental_distribute_values_from_function(
        lambda context: [tf.constant(p[context.replica_id_in_sync_group]) for p in per_replica]
    )
    everywhere = tf.function(lambda v: world.strategy.run(lambda v: function(*v), args=(v,)))
    return everywhere.get_concrete_function(values)


def chain(world, layers):
    """A replica's step through several layers, with all gradients."""

    def replica(x, dy):
        weights = [w.value for layer in layers for w in layer.trainable_weights]
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = x
            for layer in layers:
                y = layer(y, training=True)
        return tape.gradient(y, [x, *weights], dy)

    return replica


@pytest.mark.parametrize("renorm", [False, True])
def test_one_collective_each_way_and_layer(world, monkeypatch, renorm):
    case = Case("counted", RAGGED, (4, 3))
    layers = [make(world, case, renorm=renorm) for _ in range(3)]
    calls = count_messages(monkeypatch)
    function = traced(world, chain(world, layers), case.inputs(world.replicas), case.cotangents(world.replicas))
    assert len(calls) == 2 * 3 * world.replicas
    if not world.copies:
        assert len(collectives(function.graph)) == 2 * 3 * world.replicas


def test_keras_own_needs_five(world):
    case = Case("counted", RAGGED, (4, 3))
    with world.strategy.scope():
        layer = keras.layers.BatchNormalization(synchronized=True)
        layer.build((None, 4, 3))
    function = traced(world, chain(world, [layer]), case.inputs(world.replicas), case.cotangents(world.replicas))
    assert len(collectives(function.graph)) == 5 * world.replicas


def test_inference_and_building_send_nothing(world, monkeypatch):
    calls = count_messages(monkeypatch)
    case = Case("inference", RAGGED, (4, 3))
    layer = make(world, case)
    world.run(lambda x: layer(x, training=False), case.inputs(world.replicas))
    layer.trainable = False
    world.run(lambda x: layer(x, training=True), case.inputs(world.replicas), graph=True)
    assert calls == []


def test_parallel_branches_are_ordered(world):
    """On each replica every collective has the previous one as an ancestor, so that no two replicas can differ in order.

    What replicas copy to each other needs no order.
    """
    case = Case("branches", (2, 2, 2, 2), (4, 3))
    left, right = make(world, case), make(world, case)

    def replica(x, dy):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = left(x, training=True) + right(tf.square(x), training=True)
        return tape.gradient(y, x, dy)

    xs, dys = case.inputs(world.replicas), case.cotangents(world.replicas)
    function = traced(world, replica, xs, dys)
    graph = function.graph
    found = [op for op in graph.get_operations() if op.type == "CollectiveReduceV2"]
    assert len(found) == (0 if world.copies else 4 * world.replicas)
    for device in {op.device for op in found}:
        own = [op for op in found if op.device == device]
        assert len(own) == 4
        above = {op: ancestors(op) for op in own}
        own.sort(key=lambda op: len(above[op] & set(own)))
        assert all(earlier in above[later] for earlier, later in itertools.pairwise(own))
    values = world.strategy.experimental_distribute_values_from_function(
        lambda c: [tf.constant(xs[c.replica_id_in_sync_group]), tf.constant(dys[c.replica_id_in_sync_group])]
    )
    everywhere = tf.function(lambda v: world.strategy.run(replica, args=(v[0], v[1])))
    first = world.results(everywhere(values))
    for _ in range(49):
        last = world.results(everywhere(values))
    np.testing.assert_array_equal(first, last)


def ancestors(op):
    """All operations that run before one."""
    seen, todo = set(), [op]
    while todo:
        current = todo.pop()
        for before in [t.op for t in current.inputs] + list(current.control_inputs):
            if before not in seen:
                seen.add(before)
                todo.append(before)
    return seen


# ------------------------------------------------------------------------------------------------- beside Keras's own


def test_variance_where_keras_own_is_wrong(world):
    """Means of replicas differ: over 1 % off at mean/std = 1e3 there, under 1e-5 at 1e4 here."""
    errors = {}
    for mean in (1e3, 1e4):
        case = Case("large", (300, 100, 200, 50), (3,), mean=mean)
        truth = oracle.BatchNorm(case.inputs(world.replicas)).moments[0][2]
        for name, cls, extra in (
            ("ours", SyncBatchNormalization, {}),
            ("keras", keras.layers.BatchNormalization, {"synchronized": True}),
        ):
            with world.strategy.scope():
                layer = cls(momentum=0.0, **extra)
                layer.build((None, 3))
            world.run(lambda x, layer=layer: layer(x, training=True), case.inputs(world.replicas), graph=True)
            errors[name, mean] = np.abs(np.asarray(layer.moving_variance) / truth - 1).max()
    assert errors["ours", 1e3] < 1e-5
    assert errors["ours", 1e4] < 1e-5
    assert errors["keras", 1e3] > 0.01


@pytest.mark.parametrize("mean", [1.0, 100.0])
def test_errors_are_at_most_twice_those_of_the_plain_layer(world, mean):
    """Of output and gradients in float32, from float64; the plain layer sees the whole batch at once."""
    case = Case("accuracy", (16, 4, 9, 3), (8, 8, 6), mean=mean)
    layer = make(world, case)
    gamma, beta, *_ = layer.get_weights()
    xs, dys = case.inputs(world.replicas), case.cotangents(world.replicas)
    plain = keras.layers.BatchNormalization()
    plain.build((None, *case.rest))
    plain.set_weights(layer.get_weights())
    whole = tf.constant(np.concatenate(xs))
    with tf.GradientTape() as tape:
        tape.watch(whole)
        y = plain(whole, training=True)
    theirs = [y, *tape.gradient(y, [whole, plain.gamma.value, plain.beta.value], tf.constant(np.concatenate(dys)))]
    got = world.run(step(layer), xs, dys, graph=True)
    ours = [
        np.concatenate([y for y, _ in got]),
        np.concatenate([g[0] for _, g in got]),
        sum(g[1] for _, g in got),
        sum(g[2] for _, g in got),
    ]
    truth = oracle.BatchNorm(xs)
    dxs, dgammas, dbetas = truth.backward(dys, gamma)
    exact = [np.concatenate(truth.forward(gamma, beta)), np.concatenate(dxs), sum(dgammas), sum(dbetas)]
    for name, our, their, value in zip(("y", "dx", "dgamma", "dbeta"), ours, theirs, exact, strict=True):
        our_error, their_error = (np.abs(np.asarray(v) - value).max() for v in (our, their))
        # Half a unit in the last place is what rounding the exact value to float32 costs.
        assert our_error <= 2 * their_error + np.spacing(np.float32(np.abs(value).max())) / 2, name


# ------------------------------------------------------------------------------------------------- how people train


def model_of(layer_class, **arguments):
    keras.utils.set_random_seed(3)
    return keras.Sequential([
        keras.Input((6, 6, 1)), keras.layers.Conv2D(4, 3), layer_class(**arguments), keras.layers.ReLU(),
        keras.layers.Flatten(), keras.layers.Dense(3), layer_class(**arguments), keras.layers.Dense(1),
    ])  # fmt: skip


@pytest.mark.parametrize("compiled", [{}, {"jit_compile": False}, {"jit_compile": True}], ids=str)
def test_fit_equals_one_device_with_the_whole_batch(world, compiled):
    x, y = RNG.normal(size=(24, 6, 6, 1)).astype("float32"), RNG.normal(size=(24, 1)).astype("float32")
    with world.strategy.scope():
        many = model_of(SyncBatchNormalization)
        if compiled.get("jit_compile"):
            with pytest.warns(UserWarning, match="doesn't support `jit_compile=True`"):
                many.compile(keras.optimizers.SGD(0.05), "mse", **compiled)
        else:
            many.compile(keras.optimizers.SGD(0.05), "mse", **compiled)
    one = model_of(keras.layers.BatchNormalization)
    one.set_weights(many.get_weights())
    one.compile(keras.optimizers.SGD(0.05), "mse")
    for model in (many, one):
        model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    for layer in (many.layers[1], many.layers[5]):
        statistics(world, layer)
    for got, expected in zip(many.get_weights(), one.get_weights(), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


def test_fit_with_a_last_batch_that_leaves_replicas_empty(world):
    """9 samples in batches of 8: the last batch is one sample on one replica."""
    x, y = RNG.normal(size=(9, 6, 6, 1)).astype("float32"), RNG.normal(size=(9, 1)).astype("float32")
    with world.strategy.scope():
        model = model_of(SyncBatchNormalization, momentum=0.0)
        model.compile(keras.optimizers.SGD(0.0), "mse")
    model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    assert all(np.isfinite(w).all() for w in model.get_weights())
    last = np.asarray(model.layers[0](x[8:]))
    moved = statistics(world, model.layers[1])
    np.testing.assert_allclose(moved["moving_mean"], last.mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(moved["moving_variance"], last.var((0, 1, 2)), rtol=1e-5)


def test_steps_per_execution(world):
    """TensorFlow 2.21 fails with its default cross-device operations for every model."""
    devices = world.strategy.extended.worker_devices
    strategy = tf.distribute.MirroredStrategy(devices, cross_device_ops=tf.distribute.ReductionToOneDevice())
    x, y = RNG.normal(size=(48, 4)).astype("float32"), RNG.normal(size=(48, 1)).astype("float32")
    with strategy.scope():
        keras.utils.set_random_seed(3)
        model = keras.Sequential([keras.Input((4,)), SyncBatchNormalization(momentum=0.0), keras.layers.Dense(1)])
        model.compile("sgd", "mse", steps_per_execution=3)
    model.fit(x, y, batch_size=16, epochs=1, shuffle=False, verbose=0)
    np.testing.assert_allclose(model.layers[0].moving_mean, x[32:].mean(0), atol=1e-6)
    np.testing.assert_allclose(model.layers[0].moving_variance, x[32:].var(0), rtol=1e-5)


def test_gradient_penalty_through_the_layer(world):
    case = Case("penalty", (2, 1, 3, 2), (4,), dtype="float64")
    layer = make(world, case)
    gamma = layer.get_weights()[0]
    xs, dys, directions = (
        case.inputs(world.replicas),
        case.cotangents(world.replicas),
        case.cotangents(world.replicas, "directions"),
    )

    def replica(x, dy, direction):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                y = layer(x, training=True)
            penalty = tf.reduce_sum(inner.gradient(y, x, dy) * direction)
        return outer.gradient(penalty, x)

    got = world.run(replica, xs, dys, directions, graph=True)
    close(got, oracle.BatchNorm(xs).penalty_gradient(dys, gamma, directions), case, "second")


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_recompute_grad(world, graph):
    """Gradients are right and nothing hangs; the moving statistics move twice, as Keras's own do."""
    case = Case("recomputed", RAGGED, (4, 3), dtype="float64")
    layer = make(world, case, momentum=0.5)
    gamma, beta, mean, _ = layer.get_weights()

    def replica(x, dy):
        again = tf.recompute_grad(lambda x: layer(x, training=True))
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = again(x)
        return y, tape.gradient(y, x, dy)

    xs, dys = case.inputs(world.replicas), case.cotangents(world.replicas)
    got = world.run(replica, xs, dys, graph=graph)
    truth = oracle.BatchNorm(xs)
    close([y for y, _ in got], truth.forward(gamma, beta), case, "output")
    close([dx for _, dx in got], truth.backward(dys, gamma)[0], case, "gradient")
    twice = oracle.moving_average(oracle.moving_average(mean, truth.moments[0][1], 0.5), truth.moments[0][1], 0.5)
    np.testing.assert_allclose(statistics(world, layer)["moving_mean"], twice, atol=1e-12)


@needs_remat_scope
def test_remat_scope(world):
    """Eager only: in a tf.function Keras 3.15's scope fails for every layer that is called with a keyword."""
    case = Case("remat", RAGGED, (4, 3), dtype="float64")
    with keras.RematScope("full"):
        layer = make(world, case)
    gamma = layer.get_weights()[0]
    xs, dys = case.inputs(world.replicas), case.cotangents(world.replicas)
    got = world.run(step(layer), xs, dys)
    close([g[0] for _, g in got], oracle.BatchNorm(xs).backward(dys, gamma)[0], case, "gradient")
    statistics(world, layer)


# ------------------------------------------------------------------------------------------------- bad input


def refused_before_any_message(world, monkeypatch, error, text, layer, *arguments):
    calls, before = count_messages(monkeypatch), layer.get_weights()
    with pytest.raises(error) as caught:
        world.run(lambda x, mask=None: layer(x, training=True, mask=mask), *arguments)
    assert text in str(caught.value)
    assert calls == []
    for old, new in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_group_size_that_does_not_divide(world, monkeypatch):
    layer = make(world, Case("groups", RAGGED, (4, 3)), group_size=3)
    text = f"`group_size` must divide the number of replicas that train. Received: group_size=3 for {world.replicas} replicas."
    refused_before_any_message(world, monkeypatch, ValueError, text, layer, Case("groups", RAGGED, (4, 3)).inputs(world.replicas))
    assert np.isfinite(layer(np.ones((2, 4, 3), "float32"))).all(), "inference does not ask"


def test_bad_mask_and_complex_numbers_on_replicas(world, monkeypatch):
    case = Case("bad", RAGGED, (4, 3))
    layer = make(world, case)
    masks = [np.ones((x.shape[0], 5), bool) for x in case.inputs(world.replicas)]
    text = "`mask` must have the input's shape without the channel axes"
    refused_before_any_message(world, monkeypatch, ValueError, text, layer, case.inputs(world.replicas), masks)
    numbers = [x.astype("complex64") for x in case.inputs(world.replicas)]
    refused_before_any_message(world, monkeypatch, TypeError, "The input must be of a float dtype", layer, numbers)


def test_half_weights_beside_float32_ones_warn(world, recwarn):
    with world.strategy.scope():
        SyncBatchNormalization(dtype="mixed_float16").build((None, 3))
        assert not [w for w in recwarn if "packs the gradients" in str(w.message)]
        with pytest.warns(UserWarning, match="Use mixed_float16, or MirroredStrategy"):
            SyncBatchNormalization(dtype="float16").build((None, 3))


def test_cross_replica_training(world):
    layer = make(world, Case("cross", RAGGED, (4, 3)))
    x = np.ones((2, 4, 3), "float32")
    with world.strategy.scope():
        assert np.isfinite(layer(x, training=False)).all()
        with pytest.raises(RuntimeError, match="must train inside a replica"):
            layer(x, training=True)


def test_shapes_are_inferred_in_cross_replica_context(world, monkeypatch):
    """A composite layer that passes training=True is traced by Keras to learn its output's shape."""

    class Block(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.norm = SyncBatchNormalization()

        def call(self, x):
            return self.norm(x, training=True)

    calls = count_messages(monkeypatch)
    with world.strategy.scope():
        inputs = keras.Input((4, 3))
        model = keras.Model(inputs, Block()(inputs))
    assert model.output_shape == (None, 4, 3)
    assert calls == []
    case = Case("composite", RAGGED, (4, 3))
    got = world.run(model, case.inputs(world.replicas))
    truth = oracle.BatchNorm(case.inputs(world.replicas))
    close(got, truth.forward(np.ones(3), np.zeros(3)), case, "output")


def test_parameter_server_strategy(monkeypatch):
    class Strategy(tf.distribute.ParameterServerStrategy):
        def __init__(self):
            pass

    layer = SyncBatchNormalization()
    layer.build((None, 3))
    monkeypatch.setattr(tf.distribute, "get_strategy", Strategy)
    with pytest.raises(RuntimeError, match="Received: ParameterServerStrategy"):
        SyncBatchNormalization()
    with pytest.raises(RuntimeError, match="Received: ParameterServerStrategy"):
        layer(np.ones((2, 3), "float32"), training=True)


def test_compiled_by_xla_only_on_one_replica(world):
    assert SyncBatchNormalization().supports_jit
    assert not make(world, Case("jit", RAGGED, (4, 3))).supports_jit


def test_tpus_take_the_form_without_float64():
    class Strategy(tf.distribute.TPUStrategy):
        def __init__(self):
            pass

    assert not replicas.has_float64(Strategy())
    assert replicas.has_float64(tf.distribute.get_strategy())


def test_an_axis_name_of_jax(world, monkeypatch):
    """Kept; an error where it would be needed, not in inference nor on one replica."""
    layer = make(world, Case("axis", RAGGED, (4, 3)), axis_name="data")
    text = "`axis_name` is for JAX: on TensorFlow replicas are found without it."
    refused_before_any_message(world, monkeypatch, ValueError, text, layer, Case("axis", RAGGED, (4, 3)).inputs(world.replicas))
    assert np.isfinite(layer(np.ones((2, 4, 3), "float32"))).all()
    alone = SyncBatchNormalization.from_config(layer.get_config())
    assert alone.axis_name == "data"
    assert np.isfinite(alone(np.ones((2, 4, 3), "float32"), training=True)).all()
