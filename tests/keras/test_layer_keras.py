"""The Keras layer on one replica: equal to Keras's own, every argument with an effect, saved and loaded, bad input refused."""

from __future__ import annotations

import inspect

import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from versions import KERAS_HAS_RENORM, KERAS_RENORM, needs_keras_renorm, needs_remat_scope

import syncbn
from syncbn import SyncBatchNormalization

RNG = np.random.default_rng(7)


def data(*shape, dtype="float32"):
    return (RNG.normal(size=shape) * 2 + 1).astype(dtype)


def step(layer, x, dy, mask=None):
    """Output, gradients for x and the trainable weights, and all weights after one step."""
    x = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=True, mask=None if mask is None else tf.constant(mask))
    gradients = tape.gradient(y, [x, *[w.value for w in layer.trainable_weights]], tf.cast(dy, y.dtype))
    return [np.asarray(v, "float64") for v in [y, *gradients, *layer.get_weights()]]


def randomised(layer, shape):
    """The layer with other weights than the initial ones."""
    layer.build(shape)
    layer.set_weights([RNG.uniform(0.5, 2, w.shape) for w in layer.get_weights()])
    return layer


# ------------------------------------------------------------------------------------------------- as Keras's own


def test_constructor_is_tensorflow_2_2s():
    parameters = list(inspect.signature(SyncBatchNormalization.__init__).parameters.values())[1:]
    assert [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == [
        ("axis", -1), ("momentum", 0.99), ("epsilon", 0.001), ("center", True), ("scale", True),
        ("beta_initializer", "zeros"), ("gamma_initializer", "ones"), ("moving_mean_initializer", "zeros"),
        ("moving_variance_initializer", "ones"), ("beta_regularizer", None), ("gamma_regularizer", None),
        ("beta_constraint", None), ("gamma_constraint", None), ("renorm", False), ("renorm_clipping", None),
        ("renorm_momentum", 0.99), ("trainable", True), ("adjustment", None), ("name", None),
    ]  # fmt: skip
    assert [(p.name, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY] == [
        ("group_size", None),
        ("axis_name", None),
        ("activation", None),
    ]


CLIPPING = {"rmin": 0.8, "rmax": 1.1, "dmax": 0.2}


@pytest.mark.parametrize("arguments", [
    {}, {"center": False}, {"scale": False}, {"center": False, "scale": False}, {"epsilon": 0.1, "momentum": 0.3},
    {"axis": 1}, {"axis": -2}, {"renorm": True}, {"renorm": True, "renorm_clipping": CLIPPING, "renorm_momentum": 0.5},
    {"renorm": True, "scale": False}, {"dtype": "float64"}, {"dtype": "float16"}, {"dtype": "mixed_bfloat16"},
    {"dtype": "float64", "renorm": True},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("shape", [(6, 5, 4, 3), (7, 3), (5, 4, 3)], ids=str)
def test_one_replica_equals_keras(arguments, shape):
    if "renorm" in arguments and not KERAS_HAS_RENORM:
        pytest.skip(KERAS_RENORM)
    if arguments.get("axis") == -2 and len(shape) == 2:
        shape = (*shape, 2)
    ours = randomised(SyncBatchNormalization(**arguments), shape)
    theirs = keras.layers.BatchNormalization(**arguments)
    theirs.build(shape)
    theirs.set_weights(ours.get_weights())
    assert [w.name for w in ours.weights] == [w.name for w in theirs.weights]
    x, dy = data(*shape), data(*shape)
    half = {"float16": 2e-3, "mixed_bfloat16": 2e-2}.get(arguments.get("dtype"), 0)
    tolerance = {"float64": 1e-10}.get(arguments.get("dtype"), 2e-5)
    for got, expected in zip(step(ours, x, dy), step(theirs, x, dy), strict=True):
        np.testing.assert_allclose(got, expected, rtol=tolerance + half, atol=(tolerance + half) * np.abs(expected).max())
    inference = ours(x), theirs(x)
    assert inference[0].dtype == inference[1].dtype
    np.testing.assert_allclose(
        *(np.asarray(tf.cast(y, "float64")) for y in inference), rtol=tolerance + half, atol=tolerance + half
    )


def test_masked_equals_keras():
    ours, theirs = SyncBatchNormalization(), keras.layers.BatchNormalization()
    x, dy, mask = data(6, 5, 3), data(6, 5, 3), RNG.random((6, 5)) < 0.6
    for got, expected in zip(step(ours, x, dy, mask), step(theirs, x, dy, mask), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_weights_of_a_half_precision_layer_are_float32():
    layer = SyncBatchNormalization(renorm=True, dtype="float16")
    layer.build((None, 3))
    assert [w.dtype for w in layer.weights] == ["float32"] * 7
    assert layer(data(4, 3)).dtype == "float16"


def test_weight_order():
    layer = SyncBatchNormalization(renorm=True)
    layer.build((None, 3))
    names = ["gamma", "beta", "moving_mean", "moving_variance", "moving_stddev", "renorm_mean", "renorm_stddev"]
    assert [w.path.split("/")[-1] for w in [*layer.trainable_weights, *layer.non_trainable_weights]] == names


def test_is_a_batch_normalization_and_freezes_like_one():
    layer = SyncBatchNormalization()
    assert isinstance(layer, keras.layers.BatchNormalization)
    x = data(4, 3)
    layer(x, training=True)
    layer.trainable = False
    before = layer.get_weights()
    np.testing.assert_array_equal(layer(x, training=True), layer(x, training=False))
    np.testing.assert_array_equal(before, layer.get_weights())


def test_the_example_of_tensorflow_2_2(capsys):
    model = keras.Sequential([keras.layers.Dense(16), SyncBatchNormalization()])
    model.compile("sgd", "mse")
    model.fit(data(12, 4), data(12, 16), batch_size=5, epochs=2, verbose=0)
    assert np.abs(model.layers[1].moving_mean).max() > 0


def test_input_shape_keyword_builds():
    with pytest.warns(UserWarning, match="input_shape"):
        model = keras.Sequential([SyncBatchNormalization(input_shape=(4, 3))])
    assert model.built


@pytest.mark.parametrize("jit_compile", [True, False])
def test_fit_compiled(jit_compile):
    model = keras.Sequential([keras.layers.Dense(4), SyncBatchNormalization(renorm=True), keras.layers.Dense(1)])
    model.compile("sgd", "mse", jit_compile=jit_compile)
    assert np.isfinite(model.fit(data(12, 4), data(12, 1), batch_size=5, epochs=2, verbose=0).history["loss"]).all()


# ------------------------------------------------------------------------------------------------- semantics by formula


def test_renorm_by_formula():
    """r, d, their clipping, and all five statistics, written out in float64."""
    epsilon, momentum, renorm_momentum = 0.01, 0.6, 0.7
    layer = SyncBatchNormalization(epsilon=epsilon, momentum=momentum, renorm=True, renorm_momentum=renorm_momentum,
                                   renorm_clipping=CLIPPING, dtype="float64")  # fmt: skip
    randomised(layer, (None, 3))
    gamma, beta, moving_mean, _, moving_stddev, renorm_mean, renorm_stddev = layer.get_weights()
    x = data(9, 3, dtype="float64")
    y = layer(x, training=True)
    mean, stddev = x.mean(0), np.sqrt(x.var(0) + epsilon)
    r = np.clip(stddev / renorm_stddev, 0.8, 1.1)
    d = np.clip((mean - renorm_mean) / renorm_stddev, -0.2, 0.2)
    np.testing.assert_allclose(y, ((x - mean) / stddev * r + d) * gamma + beta, atol=1e-12)
    stddev_moved = oracle.moving_average(moving_stddev, stddev, momentum)
    expected = [oracle.moving_average(moving_mean, mean, momentum), np.maximum(stddev_moved**2 - epsilon, 0), stddev_moved,
                oracle.moving_average(renorm_mean, mean, renorm_momentum),
                oracle.moving_average(renorm_stddev, stddev, renorm_momentum)]  # fmt: skip
    np.testing.assert_allclose(layer.get_weights()[2:], expected, atol=1e-12)


def test_renorm_stddev_has_a_floor():
    layer = SyncBatchNormalization(renorm=True, epsilon=0.04, dtype="float64")
    layer.build((None, 1))
    layer.renorm_stddev.assign([0.0])
    x = np.array([[1.0], [3.0]])
    y = layer(x, training=True)
    stddev = np.sqrt(1 + 0.04)
    np.testing.assert_allclose(y, ((x - 2) / stddev * stddev + 2) / 0.2, atol=1e-12)


@pytest.mark.parametrize("kind", [float, np.float32, tf.constant, tf.Variable, keras.Variable, lambda value: lambda: value],
                         ids=["float", "numpy", "tensor", "tf.Variable", "keras.Variable", "callable"])  # fmt: skip
def test_clipping_takes_numbers_tensors_and_schedules(kind):
    bound = kind(0.25)
    layer = SyncBatchNormalization(renorm=True, renorm_clipping={"rmax": bound, "dmax": bound})
    layer(data(8, 3), training=True)
    assert len(layer.weights) == 7
    x = data(8, 3)
    layer.renorm_mean.assign(x.mean(0))
    expected = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-3) * 0.25
    np.testing.assert_allclose(layer(x, training=True), expected, atol=1e-5)


def test_a_clipping_schedule_is_followed_inside_one_graph():
    rmax = tf.Variable(0.5)
    layer = SyncBatchNormalization(renorm=True, renorm_clipping={"rmax": lambda: rmax * 1.0, "dmax": 0})
    x = data(8, 3)
    layer(x, training=True)
    function = tf.function(lambda x: layer(x, training=True))
    x_hat = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-3)
    np.testing.assert_allclose(function(x), x_hat * 0.5, atol=1e-5)
    rmax.assign(0.25)
    np.testing.assert_allclose(function(x), x_hat * 0.25, atol=1e-5)


@pytest.mark.parametrize("form", ["scalar", "vector", "full"])
@pytest.mark.parametrize("renorm", [False, True])
def test_adjustment_by_formula(form, renorm):
    a, b = np.array([0.9, 1.1, 1.3]), np.array([0.1, -0.2, 0.3])
    if form == "scalar":
        a, b = np.float64(0.9), np.float64(0.1)
    seen = []

    def adjustment(shape):
        seen.append(shape)
        return (a.reshape(1, 3, 1), b.reshape(1, 3, 1)) if form == "full" else (a, b)

    layer = randomised(SyncBatchNormalization(axis=1, adjustment=adjustment, renorm=renorm, dtype="float64"), (None, 3, 4))
    weights = dict(zip([w.name for w in layer.weights], layer.get_weights(), strict=True))
    x = data(5, 3, 4, dtype="float64")
    y = np.asarray(layer(x, training=True)).swapaxes(1, 2)
    mean, stddev = x.mean((0, 2)), np.sqrt(x.var((0, 2)) + 1e-3)
    x_hat = (x.swapaxes(1, 2) - mean) / stddev
    if renorm:
        x_hat = x_hat * stddev / weights["renorm_stddev"] + (mean - weights["renorm_mean"]) / weights["renorm_stddev"]
    np.testing.assert_allclose(y, (x_hat * a + b) * weights["gamma"] + weights["beta"], atol=1e-12)
    assert seen == [(5, 3, 4)]
    layer(x, training=False)
    assert len(seen) == 1, "adjustment is for training only"


def test_adjustment_in_a_graph_sees_tensors_where_sizes_are_unknown():
    seen = []

    def adjustment(shape):
        seen.append(shape)
        return keras.random.uniform((shape[-1],), 0.9, 1.1), 0.0

    layer = SyncBatchNormalization(adjustment=adjustment)
    function = tf.function(lambda x: layer(x, training=True), input_signature=[tf.TensorSpec([None, 3])])
    function(data(4, 3))
    assert seen[0][0].shape == ()
    assert seen[0][1] == 3


def adjusted_in_a_graph(adjustment, rows):
    """y of a graph that knows the channels alone, with batches of so many rows."""
    layer = SyncBatchNormalization(adjustment=adjustment)
    function = tf.function(lambda x: layer(x, training=True), input_signature=[tf.TensorSpec([None, None, 3])])
    return function(data(rows, 2, 3))


def test_an_adjustment_of_unknown_size_broadcasts_in_a_graph():
    y = adjusted_in_a_graph(lambda shape: (tf.zeros([shape[0], 1, 1]), tf.ones([shape[1], 1])), 5)
    np.testing.assert_allclose(y, np.ones((5, 2, 3)))
    y = adjusted_in_a_graph(lambda shape: (tf.zeros([shape[2] + 0 * shape[0]]), 1.0), 5)
    np.testing.assert_allclose(y, np.ones((5, 2, 3)))


def test_an_adjustment_does_not_broadcast_the_input():
    with pytest.raises(tf.errors.InvalidArgumentError):
        adjusted_in_a_graph(lambda shape: (tf.zeros([shape[0] + 4, 1, 1]), 1.0), 1)


@pytest.mark.parametrize("spec", [tf.TensorSpec([None, None]), tf.TensorSpec(None)], ids=["channels", "rank"])
@pytest.mark.parametrize("training", [False, True])
def test_channels_that_a_graph_does_not_know(spec, training):
    layer = randomised(SyncBatchNormalization(renorm=True), (None, 3))
    function = tf.function(lambda x: layer(x, training=training), input_signature=[spec])
    x, before = data(6, 3), layer.get_weights()
    y = function(x)
    layer.set_weights(before)
    np.testing.assert_allclose(y, layer(x, training=training), atol=1e-6)
    with pytest.raises(tf.errors.InvalidArgumentError, match="is not compatible with expected shape"):
        function(data(6, 4))


def test_a_built_layer_in_a_model_of_unknown_channels():
    layer = randomised(SyncBatchNormalization(), (None, 3))
    inputs = keras.Input((None,))
    model = keras.Model(inputs, layer(inputs))
    x = data(6, 3)
    np.testing.assert_allclose(model(x), layer(x), atol=1e-6)


@pytest.mark.parametrize("name", ["relu", "silu", "leaky_relu", "tanh", None])
def test_activation(name):
    x = data(6, 4, 3)
    plain, active = SyncBatchNormalization(), SyncBatchNormalization(activation=name)
    np.testing.assert_allclose(active(x, training=True), keras.activations.get(name)(plain(x, training=True)), atol=1e-6)
    np.testing.assert_allclose(active(x), keras.activations.get(name)(plain(x)), atol=1e-6)


@pytest.mark.parametrize(("axis", "shape", "parameters"), [
    ([1, 3], (4, 2, 3, 5), (1, 2, 1, 5)), ([-1, 1], (4, 2, 3, 5), (1, 2, 1, 5)), ([2], (4, 2, 3), (3,)), ((-2,), (4, 2, 3), (2,)), (2, (4, 2, 3), (3,)),
    (np.int64(1), (4, 2, 3), (2,)), (0, (4, 6), (4,)), ((0, 1), (4, 2, 6), (4, 2, 1)),
])  # fmt: skip
def test_axis_forms(axis, shape, parameters):
    layer = SyncBatchNormalization(axis=axis, dtype="float64")
    x, dy = data(*shape, dtype="float64"), data(*shape, dtype="float64")
    axes = tuple(np.atleast_1d(axis))
    y, dx, dgamma, dbeta, *_ = step(layer, x, dy)
    assert layer.gamma.shape == parameters
    truth = oracle.BatchNorm([x], axes=axes)
    channels = int(np.prod(parameters))
    np.testing.assert_allclose(y, truth.forward(np.ones(channels), np.zeros(channels))[0], atol=1e-12)
    for got, expected in zip((dx, dgamma, dbeta), truth.backward([dy], np.ones(channels)), strict=True):
        np.testing.assert_allclose(got, expected[0].reshape(got.shape), atol=1e-12)


@pytest.mark.parametrize("axis", [1, -1, [1, 3]], ids=str)
@pytest.mark.parametrize("with_ones", [False, True])
def test_mask_forms(axis, with_ones):
    """The input's rank, or without the channel axes; an axis of it full or 1; padding that is not finite spreads nowhere."""
    shape, axes = (4, 3, 5, 3), tuple(a % 4 for a in np.atleast_1d(axis))
    layer = SyncBatchNormalization(axis=axis, momentum=0)
    full = [1 if a in axes else n for a, n in enumerate(shape)]
    full[2] = 1 if 2 not in axes else full[2]
    mask = RNG.random(full) < 0.5
    x = data(*shape)
    x[~np.broadcast_to(mask, shape)] = np.nan
    y, dx, *_ = step(layer, x, data(*shape), mask if with_ones else mask.squeeze(axes))
    truth = oracle.BatchNorm([x], axes=axes, masks=[mask])
    np.testing.assert_allclose(np.ravel(layer.moving_mean), truth.moments[0][1], atol=1e-5)
    np.testing.assert_allclose(np.ravel(layer.moving_variance), truth.moments[0][2], rtol=1e-5)
    assert np.isfinite(y).all()
    assert (dx[~np.broadcast_to(mask, shape)] == 0).all()


def test_keras_masks_reach_the_layer():
    model = keras.Sequential([keras.layers.Embedding(9, 3, mask_zero=True), SyncBatchNormalization(momentum=0)])
    tokens = np.array([[1, 2, 0], [3, 0, 0]])
    model(tokens, training=True)
    unmasked = np.asarray(model.layers[0](tokens))[tokens > 0]
    np.testing.assert_allclose(model.layers[1].moving_mean, unmasked.mean(0), atol=1e-6)


@pytest.mark.parametrize("steps", [5, 3], ids=["5 steps", "as many steps as channels"])
def test_a_propagated_mask_that_covers_channels(steps):
    """Keras's masks have the first axes of the input. Inference does not need them; in training all channels have one count."""
    masking = keras.Input((steps, 3)), keras.layers.Masking()
    x, plain = data(4, steps, 3), keras.Sequential([*masking, keras.layers.BatchNormalization(axis=1)])
    x[0, 1:] = 0
    expected = plain.predict(x, verbose=0)
    layer = SyncBatchNormalization(axis=1)
    model = keras.Sequential([*masking, layer])
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, atol=1e-6)
    with pytest.raises(ValueError, match="A mask that Keras propagates must not cover a channel axis"):
        model(x, training=True)
    y = layer(masking[1](x), training=True, mask=np.ones((4, 1, 3), bool))
    assert np.isfinite(y).all()


def test_a_propagated_mask_of_fewer_axes():
    """It leaves out the trailing axes, which no mask then covers."""
    tokens, layer = np.array([[1, 2, 0], [3, 0, 0]]), SyncBatchNormalization(momentum=0)
    embedded = keras.layers.Embedding(9, 4, mask_zero=True)(tokens)
    wide = keras.ops.reshape(embedded, (2, 3, 2, 2))
    wide._keras_mask = embedded._keras_mask
    layer(wide, training=True)
    np.testing.assert_allclose(layer.moving_mean, np.asarray(wide)[tokens > 0].mean((0, 1)), atol=1e-6)


def test_masked_everywhere_moves_nothing():
    layer = randomised(SyncBatchNormalization(renorm=True), (None, 4, 3))
    before = layer.get_weights()
    assert np.isfinite(layer(data(2, 4, 3), training=True, mask=np.zeros((2, 4), bool))).all()
    assert np.isfinite(layer(data(0, 4, 3), training=True)).all()
    for old, new in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_large_mean_where_keras_is_wrong():
    x = (1e4 + RNG.normal(size=(4000, 3))).astype("float32")
    layer = SyncBatchNormalization(momentum=0)
    y = layer(x, training=True)
    truth = oracle.BatchNorm([x])
    np.testing.assert_allclose(layer.moving_variance, truth.moments[0][2], rtol=1e-5)
    np.testing.assert_allclose(y, truth.forward(np.ones(3), np.zeros(3))[0], atol=1e-5)


def test_one_replica_keeps_the_frameworks_nan():
    ours, theirs = SyncBatchNormalization(), keras.layers.BatchNormalization()
    x = data(4, 3)
    x[0, 0] = np.inf
    ours(x, training=True), theirs(x, training=True)
    assert np.isnan(ours.moving_variance[0]) == np.isnan(theirs.moving_variance[0]) == True  # noqa: E712
    np.testing.assert_allclose(ours.moving_mean[1:], theirs.moving_mean[1:], atol=1e-6)


def test_autocast_off_takes_any_float():
    layer = SyncBatchNormalization(autocast=False)
    for dtype in ("float16", "float32", "float64"):
        y = layer(data(8, 3, dtype=dtype), training=True)
        assert y.dtype == "float32"
        np.testing.assert_allclose(np.mean(y, 0), 0, atol=2e-3)


# ------------------------------------------------------------------------------------------------- every argument


ARGUMENTS = {
    "axis": 1, "momentum": 0.5, "epsilon": 0.5, "center": False, "scale": False, "beta_initializer": "ones",
    "gamma_initializer": "zeros", "moving_mean_initializer": "ones", "moving_variance_initializer": "zeros",
    "beta_regularizer": "l2", "gamma_regularizer": "l2", "beta_constraint": "unit_norm", "gamma_constraint": "unit_norm",
    "renorm": True, "renorm_clipping": {"rmax": 0.5}, "renorm_momentum": 0.5, "trainable": False,
    "adjustment": lambda shape: (2.0, 1.0), "activation": "relu", "name": "other", "dtype": "float64",
}  # fmt: skip


def two_steps(arguments, x, dy):
    """Every number of two training steps with SGD between them, and of inference after."""
    layer = SyncBatchNormalization(**arguments)
    seen, optimizer = [], keras.optimizers.SGD(0.1)
    for _ in range(2):
        values = step(layer, x, dy)
        seen += values
        gradients = values[2 : 2 + len(layer.trainable_weights)]
        if gradients:
            optimizer.apply(
                [tf.cast(g, w.dtype) for g, w in zip(gradients, layer.trainable_weights, strict=True)], layer.trainable_weights
            )
    return [*seen, *(np.asarray(v, "float64") for v in (layer(x), sum(layer.losses, 0.0)))], layer.name


@pytest.mark.parametrize("name", ARGUMENTS)
def test_no_argument_without_an_effect(name):
    x, dy = data(4, 3, 3), data(4, 3, 3)
    base = {"beta_initializer": "ones", "renorm": name.startswith("renorm_"), "name": "it"}
    if name == "beta_initializer":
        base[name] = "zeros"
    (plain, plain_name), (changed, changed_name) = two_steps(base, x, dy), two_steps({**base, name: ARGUMENTS[name]}, x, dy)
    numbers = len(plain) != len(changed) or any(not np.array_equal(a, b) for a, b in zip(plain, changed, strict=True))
    assert (changed_name != plain_name) if name == "name" else numbers


# ------------------------------------------------------------------------------------------------- saved and loaded


@keras.saving.register_keras_serializable(package="test")
def a_schedule():
    return 1.5


@keras.saving.register_keras_serializable(package="test")
def an_adjustment(shape):
    return 1.1, 0.1


FULL = {
    "axis": [1, 3], "momentum": 0.8, "epsilon": 0.01, "center": True, "scale": True, "beta_initializer": "ones",
    "gamma_regularizer": keras.regularizers.L2(0.1), "beta_constraint": "max_norm", "renorm": True,
    "renorm_clipping": {"rmin": None, "rmax": a_schedule, "dmax": np.float32(2.0)}, "renorm_momentum": 0.7,
    "adjustment": an_adjustment, "group_size": 2, "activation": "relu", "name": "it", "dtype": "float64",
}  # fmt: skip


def test_config_round_trip():
    layer = SyncBatchNormalization(**FULL)
    config = layer.get_config()
    assert "synchronized" not in config
    again = SyncBatchNormalization.from_config(config)
    assert again.get_config() == config
    assert again.axis == (1, 3)
    assert again.adjustment is an_adjustment
    assert again.renorm_clipping == {"rmin": None, "rmax": a_schedule, "dmax": 2.0}
    assert again.group_size == 2
    assert again.activation is keras.activations.relu


@needs_keras_renorm
@pytest.mark.parametrize("synchronized", [False, True])
def test_reads_the_config_of_keras_own(synchronized):
    theirs = keras.layers.BatchNormalization(momentum=0.5, renorm=True, renorm_clipping={"rmax": 2.0}, synchronized=synchronized)
    ours = SyncBatchNormalization.from_config(theirs.get_config())
    assert (ours.momentum, ours.renorm, ours.renorm_clipping) == (0.5, True, {"rmax": 2.0})


@pytest.mark.parametrize("arguments", [{}, FULL], ids=["defaults", "everything"])
def test_files(tmp_path, arguments):
    model = keras.Sequential([keras.Input((2, 3, 5)), SyncBatchNormalization(**arguments)])
    model(data(4, 2, 3, 5), training=True)
    x = data(4, 2, 3, 5)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.layers[0]) is SyncBatchNormalization
    np.testing.assert_array_equal(model(x), loaded(x))
    model.save_weights(tmp_path / "it.weights.h5")
    fresh = keras.models.clone_model(model)
    fresh.load_weights(tmp_path / "it.weights.h5")
    np.testing.assert_array_equal(model(x), fresh(x))
    model.export(tmp_path / "exported", verbose=False)
    exported = tf.saved_model.load(tmp_path / "exported")
    x = tf.constant(x, model.inputs[0].dtype)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = exported.serve(x)
    np.testing.assert_allclose(model(x), y, rtol=1e-6, atol=1e-6)
    assert np.isfinite(tape.gradient(y, x, tf.random.normal(y.shape, dtype=y.dtype))).all()


def test_a_loaded_model_runs_where_its_group_size_does_not_fit():
    layer = SyncBatchNormalization(group_size=8)
    assert np.isfinite(layer(data(4, 3), training=True)).all()


# ------------------------------------------------------------------------------------------------- bad input


BAD_ARGUMENTS = [
    ({"axis": 1.0}, TypeError, "`axis` must be an integer or a list of integers. Received: axis=1.0."),
    ({"axis": True}, TypeError, "`axis` must be an integer or a list of integers. Received: axis=True."),
    ({"axis": "2"}, TypeError, "`axis` must be an integer or a list of integers. Received: axis='2'."),
    ({"axis": [1, 2.0]}, TypeError, "`axis` must be an integer or a list of integers. Received: axis=[1, 2.0]."),
    ({"axis": []}, ValueError, "`axis` must name at least one axis. Received: axis=[]."),
    ({"momentum": 1.5}, ValueError, "`momentum` must lie in [0, 1]: it is the weight of the old value. Received: momentum=1.5."),
    ({"momentum": None}, ValueError, "`momentum` must lie in [0, 1]"),
    ({"renorm_momentum": -0.1}, ValueError, "`renorm_momentum` must lie in [0, 1]"),
    ({"epsilon": -1e-3}, ValueError, "`epsilon` must be a finite number, 0 or more"),
    ({"epsilon": float("nan")}, ValueError, "`epsilon` must be a finite number, 0 or more"),
    ({"renorm": True, "renorm_clipping": {"max": 1}}, ValueError, "`renorm_clipping` must be a dict with the keys"),
    ({"renorm": True, "renorm_clipping": {"rmin": 2, "rmax": 1}}, ValueError, "must have rmin <= rmax. Received: rmin=2, rmax=1."),
    ({"renorm": True, "renorm_clipping": {"dmax": -1}}, ValueError, "must have dmax >= 0: d is clipped to [-dmax, dmax]"),
    ({"renorm_clipping": {"rmax": "a"}}, ValueError, "Each bound of `renorm_clipping` must be a number, a scalar tensor or variable"),
    ({"adjustment": 3}, TypeError, "`adjustment` must be a callable that takes the input's shape. Received: adjustment=3."),
    ({"group_size": 0}, ValueError, "`group_size` must be None or a positive integer"),
    ({"group_size": 2.0}, ValueError, "`group_size` must be None or a positive integer"),
    ({"fused": True}, ValueError, "`fused` is not applicable to SyncBatchNormalization"),
    ({"virtual_batch_size": 8}, ValueError, "`virtual_batch_size` is not applicable to SyncBatchNormalization"),
    ({"synchronized": False}, ValueError, "SyncBatchNormalization always synchronises. Received: synchronized=False."),
    ({"momentun": 0.9}, ValueError, "Received: ['momentun']. Drop or rename them."),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "text"), BAD_ARGUMENTS, ids=lambda v: str(v)[:40])
def test_bad_arguments(arguments, error, text):
    with pytest.raises(error) as caught:
        SyncBatchNormalization(**arguments)
    assert text in str(caught.value)


@pytest.mark.parametrize(("axis", "shape", "text"), [
    (2, (4, 3), "`axis` must lie in [-2, 2) for an input of rank 2. Received: axis=2, input shape (4, 3)."),
    (-3, (4, 3), "`axis` must lie in [-2, 2)"),
    ([1, -1], (4, 3), "`axis` must not name an axis twice. Received: axis=(1, -1) for an input of rank 2."),
    (-1, (4, None), "The number of channels must be known when the layer is built. Received: input shape (4, None)"),
    (-1, (4,), "The input must have a batch axis and a channel axis, so rank 2 at least. Received: shape (4,)."),
])  # fmt: skip
def test_bad_builds(axis, shape, text):
    for call in (lambda layer: layer.build(shape), lambda layer: layer.compute_output_shape(shape)):
        with pytest.raises(ValueError) as caught:
            call(SyncBatchNormalization(axis=axis))
        assert text in str(caught.value)


def refused(error, text, call, layer):
    """The call raises this text and does not change the weights."""
    before = layer.get_weights()
    with pytest.raises(error) as caught:
        call()
    assert text in str(caught.value)
    for old, new in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("shape", [(4, 5, 7), (4, 3), (2, 4, 5, 3)], ids=str)
def test_another_input_than_it_was_built_for(shape):
    layer = SyncBatchNormalization()
    layer.build((None, 5, 3))
    text = "The input must have the rank and the number of channels that the layer was built for. Received: shape"
    refused(ValueError, text, lambda: layer(data(*shape), training=True), layer)


@pytest.mark.parametrize("shape", [(4, 6), (4,), (4, 5, 3), (4, 5, 1, 1), (3, 5), (4, 2)], ids=str)
def test_masks_that_do_not_broadcast(shape):
    layer = SyncBatchNormalization()
    layer.build((None, 5, 3))
    text = "`mask` must have the input's shape without the channel axes, or with 1 there, and each other axis full or 1."
    refused(ValueError, text, lambda: layer(data(4, 5, 3), training=True, mask=np.ones(shape, bool)), layer)


def test_symbolic_training():
    layer = SyncBatchNormalization()
    layer.build((None, 3))
    function = tf.function(lambda x, training: layer(x, training=training))
    text = "`training` must be known when the layer is called: True, False or None."
    refused(TypeError, text, lambda: function(data(4, 3), tf.constant(True)), layer)


def test_complex_inputs():
    layer = SyncBatchNormalization()
    layer.build((None, 3))
    text = "The input must be of a float dtype. Received: complex64."
    refused(TypeError, text, lambda: layer(np.ones((4, 3), "complex64"), training=True), layer)


@pytest.mark.parametrize("shape", [(2,), (5,), (4, 1), (3, 3), (5, 1, 3), (1, 1, 3, 1), (1, 4, 5, 3)], ids=str)
def test_adjustments_that_do_not_fit(shape):
    layer = SyncBatchNormalization(adjustment=lambda _: (np.ones(shape, "float32"), 0.0))
    layer.build((None, 5, 3))
    text = "`adjustment` must return (scale, bias), each of a shape that broadcasts to the input's, or one value per channel. Received:"
    refused(ValueError, text, lambda: layer(data(4, 5, 3), training=True), layer)


@pytest.mark.parametrize("arguments", [{"adjustment": lambda shape: (1, 0)}, {"renorm": True, "renorm_clipping": {"rmax": lambda: 1}}],
                         ids=["adjustment", "renorm_clipping"])  # fmt: skip
def test_unregistered_callables_are_not_dropped_from_a_file(arguments):
    layer = SyncBatchNormalization(**arguments)
    with pytest.raises(ValueError, match="can only be saved or cloned where it is registered with Keras"):
        layer.get_config()
    with pytest.raises(ValueError, match="can only be saved or cloned where it is registered with Keras"):
        keras.models.clone_model(keras.Sequential([keras.Input((3,)), layer]))


@keras.saving.register_keras_serializable("tests")
class NeverMadeAgain:
    def __call__(self, shape):
        return 1.0, 0.0

    def get_config(self):
        return {}


def test_an_object_that_keras_cannot_make_again_is_not_saved():
    with pytest.raises(ValueError, match="whose class has no `from_config`"):
        SyncBatchNormalization(adjustment=NeverMadeAgain()).get_config()


def test_a_variable_as_the_input():
    x, dy, found = tf.Variable(data(4, 3)), data(4, 3), []
    for layer in (SyncBatchNormalization(), keras.layers.BatchNormalization()):
        with tf.GradientTape() as tape:
            y = layer(x, training=True)
        found.append(tape.gradient(y, x, dy))
    np.testing.assert_allclose(*found, atol=1e-5)


@needs_remat_scope
def test_renorm_in_a_remat_scope():
    with keras.RematScope("full"):
        layer = SyncBatchNormalization(renorm=True)
    layer.build((None, 3))
    refused(
        RuntimeError, "renorm=True must not be recomputed in the backward pass", lambda: layer(data(4, 3), training=True), layer
    )


def test_parameter_server_strategy():
    class Fake(tf.distribute.ParameterServerStrategy):
        def __init__(self):
            pass

    from syncbn.tensorflow import replicas

    with pytest.raises(RuntimeError, match="Received: ParameterServerStrategy"):
        replicas.refuse_parameter_server(Fake())


def test_other_keras_backends_are_named(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "openvino")
    with pytest.raises(NotImplementedError, match="Received: 'openvino'"):
        SyncBatchNormalization()


def test_docstring_example():
    import doctest

    assert doctest.testmod(__import__("syncbn.keras.layer", fromlist=["_"])).failed == 0
    assert syncbn.__version__
