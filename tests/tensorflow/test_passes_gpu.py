"""The passes for GPUs on the CPU: when they are XLA clusters, when plain operators, and what XLA does to a whole step."""

from __future__ import annotations

import importlib

import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from cases import CASES, RAGGED, TOLERANCE, Case
from checks import arguments, close, equals_oracle
from test_engine_tensorflow import step

import syncbn
from syncbn import SyncBatchNormalization
from syncbn.functional import sync_batch_norm
from syncbn.tensorflow import compiled_step, engine, passes_cpu, passes_gpu, replicas


@pytest.fixture
def gpu_passes(monkeypatch):
    """Passes of GPUs, and a record of their clusters that is empty."""
    monkeypatch.setattr(engine, "passes_for", lambda x: passes_gpu)
    monkeypatch.setattr(replicas, "copies_messages", lambda strategy: True)


def compiled_functions(graph):
    """Names of the functions in a graph that XLA must compile, that of the vectors apart: its shapes do not change."""
    functions = graph.as_graph_def().library.function
    return [f.signature.name for f in functions if f.attr["_XlaMustCompile"].b and "moments_of_sums" not in f.signature.name]


def layer_of(channels=3, **arguments):
    layer = SyncBatchNormalization(**arguments)
    layer.build((None, None, channels))
    return layer


CHOSEN = ("ragged", "an empty replica", "masked, two axes apart", "float64, channels first", "float16, channels first, masked")


@pytest.mark.parametrize("compiled", [True, False], ids=["clusters", "plain"])
@pytest.mark.parametrize("case", [c for c in CASES if c.name in CHOSEN], ids=lambda case: case.name)
def test_equals_the_concatenated_batch(world, gpu_passes, monkeypatch, case, compiled):
    monkeypatch.setattr(passes_gpu, "is_compiled", lambda x, axes: compiled)
    args = arguments(case, world.replicas)
    equals_oracle(world.run(step(case), *args, graph=True), case, args)


@pytest.mark.parametrize("masked", [False, True])
def test_every_axis_may_be_a_channel_axis(gpu_passes, masked):
    x = tf.random.normal([4, 3])
    y, mean, variance, count = sync_batch_norm(x, axis=[0, 1], mask=tf.constant(True) if masked else None)
    np.testing.assert_allclose(y, np.zeros([4, 3]), atol=1e-6)
    np.testing.assert_allclose(mean, x, atol=1e-6)
    np.testing.assert_allclose(variance, np.zeros([4, 3]), atol=1e-6)
    assert int(count) == 1


@pytest.mark.parametrize("mask", [None, "rows"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_a_training_step_equals_the_concatenated_batch(world, gpu_passes, mask, activation):
    case = Case("a step", RAGGED, (4, 3), mask=mask, dtype="float64")
    with world.strategy.scope():
        layer = SyncBatchNormalization(momentum=0.6, dtype="float64", activation=activation)
        layer.build((None, *case.rest))
        layer.set_weights([np.random.default_rng(5).uniform(0.5, 2, w.shape) for w in layer.get_weights()])
    gamma, beta, mean, variance = layer.get_weights()

    def replica(x, dy, mask=None):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True, mask=mask)
        return y, tape.gradient(y, [x, layer.gamma.value, layer.beta.value], dy)

    xs, dys, masks = case.inputs(world.replicas), case.cotangents(world.replicas), case.masks(world.replicas)
    got = world.run(replica, xs, dys, masks, graph=True)
    truth = oracle.BatchNorm(xs, masks=masks)
    ys = truth.forward(gamma, beta)
    if activation:
        dys = [dy * (y > 0) for dy, y in zip(dys, ys, strict=True)]
        ys = [np.maximum(y, 0) for y in ys]
    close([y for y, _ in got], ys, case, "output")
    for i, expected in enumerate(truth.backward(dys, gamma)):
        close([g[i] for _, g in got], expected, case, "gradient")
    _, new_mean, new_variance = truth.moving()
    for weight, old, new in ((layer.moving_mean, mean, new_mean), (layer.moving_variance, variance, new_variance)):
        for value in world.strategy.experimental_local_results(weight.value):
            np.testing.assert_allclose(value, oracle.moving_average(old, new, 0.6), atol=1e-12)


IN_PARTS = [
    ((32, 56, 56, 256), (3,), [64, 1568, 256]),
    ((None, 56, 56, 256), (3,), [32, 2, 1568, 256]),
    ((None, 7, 7, 2048), (3,), [32, 1, 49, 2048]),
    ((6, 5, 4, 3), (2, 3), [1, 30, 12]),
    ((0, 4, 4, 8), (3,), [1, 0, 8]),
    # Rows that are not one behind the other, and rows of which too little is known.
    ((8, 32, 5, 5), (1,), [8, 32, 5, 5]),
    ((5, 4, 6), (0,), [5, 4, 6]),
    ((None, 64), (1,), [32, 64]),
    ((4, None, 6, 2), (3,), [4, 32, 6, 2]),
]


@pytest.mark.parametrize("compiled", [True, False], ids=["clusters", "plain"])
@pytest.mark.parametrize(("shape", "axes", "parts"), IN_PARTS, ids=[str(shape) for shape, _, _ in IN_PARTS])
def test_channels_last_are_summed_in_parts(shape, axes, parts, compiled):
    real = [32 if n is None else n for n in shape]
    x = np.random.default_rng(0).normal(3, 2, real).astype("float32")
    found = []

    @tf.function(input_signature=[tf.TensorSpec(shape)], jit_compile=compiled, autograph=False)
    def sums(x):
        layout = passes_gpu.Layout.of(x, axes)
        divided, _, _ = layout._in_parts()
        found[:] = divided
        return layout.sums(x, x * x), [n for n in divided if not isinstance(n, int)]

    got, unknown = sums(x)
    assert [int(unknown[0]) if not isinstance(n, int) else n for n in found] == parts
    others = tuple(i for i in range(len(real)) if i not in axes)
    for value, expected in zip(got, (x, x.astype("float64") ** 2), strict=True):
        np.testing.assert_allclose(value, expected.sum(others, "float64").reshape(-1), rtol=1e-5)


def test_a_number_of_shapes_is_compiled_and_no_more(gpu_passes, monkeypatch):
    monkeypatch.setattr(passes_gpu, "COMPILED_SHAPES", 2)
    layer = layer_of(5)
    for rows, compiled in ((31, True), (32, True), (33, False), (31, True)):
        function = tf.function(lambda x: layer(x, training=True), autograph=False)
        graph = function.get_concrete_function(tf.TensorSpec([rows, 7, 5])).graph
        assert bool(compiled_functions(graph)) == compiled, rows
    other = layer_of(6)
    function = tf.function(lambda x: other(x, training=True), autograph=False)
    assert compiled_functions(function.get_concrete_function(tf.TensorSpec([33, 7, 6])).graph), "counted by number of channels"


@pytest.mark.parametrize(("shape", "compiled"), [((None, 9, 3), True), ((None, None, 3), False), ((4, None, 3), False)])
def test_of_unknown_sizes_only_the_batch_is_compiled(gpu_passes, shape, compiled):
    layer = layer_of()
    step = tf.function(lambda x: layer(x, training=True), input_signature=[tf.TensorSpec(shape)], autograph=False)
    assert bool(compiled_functions(step.get_concrete_function().graph)) == compiled
    for size in (4, 4):
        x = np.random.default_rng(size).normal(3, 2, (size, 9, 3)).astype("float32")
        truth = oracle.BatchNorm([x]).forward(np.ones(3), np.zeros(3))[0]
        np.testing.assert_allclose(step(x), truth, atol=1e-5)


def test_inference_and_exports_have_no_cluster(gpu_passes, tmp_path):
    model = keras.Sequential([keras.Input((4, 3)), SyncBatchNormalization()])
    model.layers[0].set_weights([np.random.default_rng(0).uniform(0.5, 2, 3) for _ in range(4)])
    function = tf.function(lambda x: model(x, training=False), autograph=False)
    assert not compiled_functions(function.get_concrete_function(tf.TensorSpec([None, 4, 3])).graph)
    model.export(tmp_path / "model", verbose=False)
    loaded = tf.saved_model.load(tmp_path / "model")
    assert not compiled_functions(loaded.signatures["serving_default"].graph)
    x = np.random.default_rng(1).normal(1, 2, (5, 4, 3)).astype("float32")
    gamma, beta, mean, variance = model.layers[0].get_weights()
    np.testing.assert_allclose(loaded.serve(x), (x - mean) / np.sqrt(variance + 1e-3) * gamma + beta, atol=1e-5)


def test_the_device_of_the_replica_chooses_the_passes():
    x = tf.zeros([2, 3])
    assert engine.passes_for(x) is passes_cpu
    inside = []
    tf.function(lambda: inside.append(engine.passes_for(x)), jit_compile=True, autograph=False)()
    assert inside == [passes_gpu]
    names = iter(["/job:localhost/device:GPU:1", "/job:localhost/device:CPU:0"])

    class Device:
        device = property(lambda self: next(names))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tf, "constant", lambda value: Device())
        assert engine.passes_for(x) is passes_gpu
        assert engine.passes_for(x) is passes_cpu


def test_a_step_that_xla_compiles_keeps_large_means():
    """At mean/std = 1e4 XLA's form of the fused operators, which the CPU's passes are, loses 1e-4."""
    x = np.random.default_rng(0).normal(1e4, 1, (300, 8)).astype("float32")
    dy = np.random.default_rng(1).normal(size=x.shape).astype("float32")
    layer = SyncBatchNormalization(momentum=0.0)
    layer.build((None, 8))

    @tf.function(jit_compile=True, autograph=False)
    def step(x, dy):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        return y, tape.gradient(y, x, dy)

    y, dx = (np.asarray(v) for v in step(x, dy))
    truth = oracle.BatchNorm([x])
    exact, (exact_dx,) = truth.forward(np.ones(8), np.zeros(8))[0], truth.backward([dy], np.ones(8))[0]
    limit = TOLERANCE["float32", "large mean"]
    assert np.abs(y - exact).max() < limit * np.abs(exact).max()
    assert np.abs(dx - exact_dx).max() < limit * np.abs(exact_dx).max()
    np.testing.assert_allclose(layer.moving_variance, truth.moments[0][2], rtol=1e-5)


# ------------------------------------------------------------------------------------------------- compiled_step


def test_the_example_of_a_compiled_step_trains_as_keras_does():
    example = importlib.import_module("keras_xla")
    one = tf.distribute.get_strategy()
    (compiled, losses), (plain, expected) = (example.train(one, cls) for cls in (example.CompiledModel, keras.Model))
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    for ours, theirs in zip(compiled.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_a_compiled_step_that_applies_gradients_says_what_to_do(world, monkeypatch):
    monkeypatch.setattr(compiled_step, "_check_devices", lambda: None)
    with world.strategy.scope():
        counter = keras.Variable(0, aggregation="only_first_replica", trainable=False)
    with pytest.raises(RuntimeError, match="Return the gradients"):
        world.run(syncbn.compiled_step(lambda: counter.assign_add(1)), graph=True)


def test_a_compiled_step_in_an_eager_loop_compiles_once():
    traces = []

    def step(x):
        traces.append(1)
        return 2 * x

    compiled = syncbn.compiled_step(step)
    for value in (1.0, 2.0, 3.0):
        assert float(compiled(tf.constant(value))) == 2 * value
    assert len(traces) == 1


def test_a_compiled_step_may_branch_on_tensors():
    """As under `tf.function(jit_compile=True)`: AutoGraph converts it."""

    def step(v):
        if tf.reduce_sum(v) > 1:
            v = v / 2
        for _ in tf.range(3):
            v += 1
        return v

    compiled = syncbn.compiled_step(step)
    np.testing.assert_array_equal(compiled(tf.constant([1.0, 2.0])), [3.5, 4.0])
    np.testing.assert_array_equal(tf.function(compiled)(tf.constant([0.0, 0.5])), [3.0, 3.5])


def test_a_compiled_step_takes_no_argument_for_a_collective(world, monkeypatch):
    """TensorFlow would make a number for each at every call, and copy it to the GPU. Traced only: CPUs cannot run it."""
    monkeypatch.setattr(compiled_step, "_check_devices", lambda: None)
    monkeypatch.setattr(type(world.strategy.extended), "_use_merge_call", lambda self: False)

    def step():
        return tf.distribute.get_replica_context().all_reduce("sum", tf.ones(3))

    def arguments(replica):
        run = tf.function(lambda: world.strategy.run(replica), autograph=False)
        return len(run.get_concrete_function().captured_inputs)

    def by_tensorflow():
        return tf.function(step, jit_compile=True, autograph=False)()

    plain = arguments(by_tensorflow)
    assert arguments(syncbn.compiled_step(step)) == plain - world.replicas
    # Only in a compiled step.
    assert arguments(by_tensorflow) == plain


def test_a_compiled_step_on_cpu_replicas_says_what_to_do(world):
    with pytest.raises(RuntimeError, match="Run the step without `compiled_step`"):
        world.run(syncbn.compiled_step(lambda x: 2 * x), [np.ones(2)] * world.replicas)


# ------------------------------------------------------------------------------------------------- errors


def test_a_layer_made_outside_of_the_scope(world):
    layer = layer_of(name="stray")
    xs = Case("outside", RAGGED, (4, 3)).inputs(world.replicas)
    with pytest.raises(RuntimeError, match="the layer 'stray', made outside of it"):
        world.run(lambda x: layer(x, training=True), xs)
    assert all(np.isfinite(y).all() for y in world.run(lambda x: layer(x, training=False), xs)), "inference moves nothing"


@pytest.mark.parametrize("passes", [passes_cpu, passes_gpu], ids=["cpu", "gpu"])
def test_forward_mode_raises_in_training(monkeypatch, passes):
    monkeypatch.setattr(engine, "passes_for", lambda x: passes)
    layer, x = layer_of(), tf.constant(np.random.default_rng(0).normal(size=(5, 4, 3)), tf.float32)
    with tf.autodiff.ForwardAccumulator(x, tf.ones_like(x)) as accumulator:
        with pytest.raises(NotImplementedError, match="Forward-mode derivatives"):
            layer(x, training=True)
        y = layer(x, training=False)
    np.testing.assert_allclose(accumulator.jvp(y), np.full(x.shape, 1 / np.sqrt(1.001)), rtol=1e-5)
