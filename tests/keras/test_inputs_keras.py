"""What the Keras layer takes and returns, on the backend of the environment: `adjustment`, integers, half precision, epsilon 0."""

from __future__ import annotations

import keras
import numpy as np
import oracle
import pytest
from keras import ops
from versions import needs_keras_renorm

import syncbn
from syncbn import SyncBatchNormalization

BACKEND = keras.backend.backend()
RNG = np.random.default_rng(5)
# JAX has no float64 by default.
WIDE, TOLERANCE = ("float32", 2e-5) if BACKEND == "jax" else ("float64", 1e-6 if BACKEND == "torch" else 1e-11)


def data(*shape, dtype=WIDE):
    return (RNG.normal(size=shape) * 2 + 1).astype(dtype)


def numbers(value):
    return np.array(ops.convert_to_numpy(ops.cast(value, "float32" if BACKEND == "jax" else "float64")))


def step(layer, x, dy, **call):
    """(y, gradients for x and the trainable weights) of a training step; the layer's statistics are updated."""
    dy = dy.astype(x.dtype)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        x = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True, **call)
        gradients = tape.gradient(y, [x, *[w.value for w in layer.trainable_weights]], ops.cast(dy, y.dtype))
    elif BACKEND == "torch":
        import torch

        x = torch.tensor(x, requires_grad=True)
        y = layer(x, training=True, **call)
        gradients = torch.autograd.grad(y, [x, *[w.value for w in layer.trainable_weights]], torch.tensor(dy).to(y.dtype))
    else:
        import jax

        held = [[w.value for w in ws] for ws in (layer.trainable_variables, layer.non_trainable_variables)]
        run = lambda x, trainable: layer.stateless_call(trainable, held[1], x, training=True, **call)  # noqa: E731
        y, back, updated = jax.vjp(run, ops.convert_to_tensor(x), held[0], has_aux=True)
        dx, rest = back(ops.cast(dy, y.dtype))
        gradients = [dx, *rest]
        for w, v in zip(layer.non_trainable_variables, updated, strict=True):
            w.assign(v)
    return numbers(y), [numbers(g) for g in gradients]


def randomised(layer, shape):
    """The layer, built, with other weights than the initial ones."""
    layer.build(shape)
    layer.set_weights([RNG.uniform(0.5, 2, w.shape) for w in layer.get_weights()])
    return layer


# ------------------------------------------------------------------------------------------------- axis


@pytest.mark.parametrize("axis", [[3], [-1], (1,)], ids=str)
def test_a_list_of_one_axis_is_an_axis(axis):
    """TensorFlow 2.2 stores such a list once a layer is built. Keras's own layer takes none."""
    layer = SyncBatchNormalization.from_config({"axis": axis, "momentum": 0.5})
    layer.build((None, 5, 5, 5))
    assert (layer.axis, layer.get_config()["axis"]) == (axis[0], axis[0])
    assert [tuple(w.shape) for w in layer.weights] == [(5,)] * 4
    model = keras.Sequential([keras.Input((5, 5, 5)), SyncBatchNormalization(axis=axis)])
    syncbn.revert(syncbn.convert(model))
    assert type(model.layers[0]) is keras.layers.BatchNormalization
    assert model.layers[0].axis == axis[0]


# ------------------------------------------------------------------------------------------------- adjustment


def expected(layer, x, dy, a, b, axes, mask=None):
    """(y, dx, dgamma, dbeta) in float64, with a and b broadcast to the input."""
    held = {w.name: np.ravel(numbers(w)).astype("float64") for w in layer.weights}
    along = [n if i in axes else 1 for i, n in enumerate(x.shape)]
    masks = None if mask is None else [mask]
    truth = oracle.BatchNorm([x], axes=axes, masks=masks, epsilon=layer.epsilon)
    _, mean, variance = truth.moments[0]
    std = np.sqrt(variance + layer.epsilon)
    r, d = np.ones_like(mean), np.zeros_like(mean)
    if layer.renorm:
        r, d = std / held["renorm_stddev"], (mean - held["renorm_mean"]) / held["renorm_stddev"]
    gamma, beta = held["gamma"], held["beta"]
    inner = truth.forward(r, d)[0]
    y = (inner * a + b) * gamma.reshape(along) + beta.reshape(along)
    dx, _, _ = truth.backward([dy * a], r * gamma)
    rest = tuple(i for i in range(x.ndim) if i not in axes)
    dgamma = (dy * (inner * a + b)).sum(rest).ravel()
    return y, [dx[0], dgamma, dy.sum(rest).ravel()]


SHAPES = {
    "[C]": (1, (3,)), "[C, 1, 1]": (1, (3, 1, 1)), "one per example": (1, (5, 1, 1, 1)), "one per element": (1, (5, 3, 4, 2)),
    "one per position": (1, (4, 1)), "another axis": (1, (2,)), "example and channel": (1, (5, 3, 1, 1)), "scalar": (1, ()),
    "ones": (1, (1, 1, 1)), "channels last": (-1, (5, 1, 1, 2)), "some of two axes": ([1, 3], (3, 1, 1)),
    "two axes": ([1, 3], (3, 1, 2)), "examples, two axes": ([1, 3], (5, 1, 1, 2)),
}  # fmt: skip


@pytest.mark.parametrize("renorm", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_an_adjustment_broadcasts(name, renorm):
    axis, shape = SHAPES[name]
    axes = tuple(a % 4 for a in np.atleast_1d(axis))
    a, b = RNG.uniform(0.5, 1.5, shape).astype(WIDE), RNG.normal(size=shape).astype(WIDE)
    layer = randomised(SyncBatchNormalization(axis, adjustment=lambda _: (a, b), renorm=renorm, dtype=WIDE), (None, 3, 4, 2))
    x, dy = data(5, 3, 4, 2), data(5, 3, 4, 2)
    along = (3, 1, 1) if name == "[C]" else shape
    y, gradients = expected(layer, x, dy, a.reshape(along), b.reshape(along), axes)
    got_y, got_gradients = step(layer, x, dy)
    for got, value in zip((got_y, *got_gradients), (y, *gradients), strict=True):
        np.testing.assert_allclose(got, value.reshape(got.shape), rtol=TOLERANCE, atol=TOLERANCE * 10)


def test_one_of_the_two_is_constant_outside_of_the_channels():
    a, b = np.array([0.9, 1.1], WIDE), data(4, 3, 1)
    layer = randomised(SyncBatchNormalization(adjustment=lambda _: (a, b), dtype=WIDE), (None, 3, 2))
    x, dy = data(4, 3, 2), data(4, 3, 2)
    y, gradients = expected(layer, x, dy, a, b, (2,))
    got_y, got_gradients = step(layer, x, dy)
    for got, value in zip((got_y, *got_gradients), (y, *gradients), strict=True):
        np.testing.assert_allclose(got, value, rtol=TOLERANCE, atol=TOLERANCE * 10)


def test_an_adjustment_of_each_element_with_a_mask():
    a, b, mask = data(4, 3, 2), data(4, 3, 2), RNG.random((4, 3)) < 0.6
    layer = randomised(SyncBatchNormalization(adjustment=lambda _: (a, b), dtype=WIDE), (None, 3, 2))
    x, dy = data(4, 3, 2), data(4, 3, 2)
    y, gradients = expected(layer, x, dy, a, b, (2,), mask)
    got_y, got_gradients = step(layer, x, dy, mask=ops.convert_to_tensor(mask))
    for got, value in zip((got_y, *got_gradients), (y, *gradients), strict=True):
        np.testing.assert_allclose(got, value, rtol=TOLERANCE, atol=TOLERANCE * 10)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_adjustment_comes_before_the_activation_and_is_rounded_once(activation, dtype):
    a, b = data(6, 1, dtype="float32"), data(6, 1, dtype="float32") * 8
    layers = [SyncBatchNormalization(adjustment=lambda _: (a, b), activation=activation, dtype=d) for d in (dtype, WIDE)]
    x = data(6, 3, dtype=dtype)
    y, value = layers[0](x, training=True), numbers(layers[1](x.astype(WIDE), training=True))
    assert keras.backend.standardize_dtype(y.dtype) == dtype
    unit = {"float16": 2.0**-11, "float32": 2.0**-19}[dtype]
    np.testing.assert_allclose(numbers(y), value, rtol=1.01 * unit, atol=2e-5)
    plain = SyncBatchNormalization(adjustment=lambda _: (a, b), dtype=WIDE)(x.astype(WIDE), training=True)
    np.testing.assert_allclose(value, numbers(keras.activations.get(activation)(plain)), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------- dtypes

INTEGERS = ["uint8", "int8", "int32", "int64", "bool"]


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "float16", "float64"])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_are_cast_as_keras_casts_them(dtype, policy):
    if BACKEND == "jax" and policy == "float64":
        pytest.skip("JAX has no float64 by default")
    x = RNG.integers(0, 2 if dtype == "bool" else 100, (8, 4, 3)).astype(dtype)
    outputs = []
    for cls in (SyncBatchNormalization, keras.layers.BatchNormalization):
        layer = cls(dtype=policy, momentum=0.5)
        trained, inferred = layer(x, training=True), layer(x, training=False)
        assert keras.backend.standardize_dtype(trained.dtype) == layer.compute_dtype
        outputs.append([numbers(v) for v in (trained, inferred, layer.moving_mean, layer.moving_variance)])
    # Keras keeps statistics of half precision in it.
    tolerance = {"float32": 1e-5, "float64": 1e-5, "float16": 3e-3, "mixed_bfloat16": 2e-2}[policy]
    for ours, theirs in zip(*outputs, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_integers_that_half_precision_does_not_hold(policy):
    x = RNG.integers(3000, 3100, (64, 3)).astype("int32")
    layer = SyncBatchNormalization(dtype=policy, momentum=0.0)
    layer(x, training=True)
    np.testing.assert_allclose(numbers(layer.moving_mean), x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(numbers(layer.moving_variance), x.var(0), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["uint8", "int32"])
def test_a_converted_model_takes_its_integers(dtype):
    model = keras.Sequential([keras.Input((4, 3), dtype=dtype), keras.layers.BatchNormalization(), keras.layers.Dense(2)])
    x = RNG.integers(0, 100, (8, 4, 3)).astype(dtype)
    before = numbers(model(x, training=False))
    trained = numbers(keras.models.clone_model(model)(x, training=True))
    assert trained.shape == before.shape
    syncbn.convert(model)
    assert isinstance(model.layers[0], SyncBatchNormalization)
    np.testing.assert_allclose(numbers(model(x, training=False)), before, atol=1e-5)
    model.compile("sgd", "mse")
    model.fit(x, data(8, 4, 2, dtype="float32"), batch_size=4, verbose=0)
    np.testing.assert_allclose(numbers(model.layers[0].moving_mean), 0.01 * x.mean((0, 1)) * 1.99, rtol=0.2)


def test_integers_with_a_mask():
    x, mask = RNG.integers(0, 100, (8, 4, 3)).astype("int32"), RNG.random((8, 4)) < 0.5
    layer = SyncBatchNormalization(momentum=0)
    layer(x, training=True, mask=mask)
    np.testing.assert_allclose(numbers(layer.moving_mean), x[mask].mean(0), rtol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_inputs_are_not_rounded_again_where_the_layer_is_wider(dtype, training):
    """With autocast off, inputs come in any dtype."""
    layer = SyncBatchNormalization(autocast=False, activation="silu")
    x = ops.cast(data(64, 3, dtype="float32"), dtype)
    y = layer(x, training=training)
    assert keras.backend.standardize_dtype(y.dtype) == "float32"
    wide = SyncBatchNormalization(activation="silu")(numbers(x).astype("float32"), training=training)
    np.testing.assert_allclose(numbers(y), numbers(wide), atol=1e-6)


# ------------------------------------------------------------------------------------------------- epsilon


@pytest.mark.parametrize("renorm", [False, pytest.param(True, marks=needs_keras_renorm)])
def test_epsilon_0_gives_what_keras_gives(renorm):
    """A constant channel is NaN, on PyTorch x_hat is 0 there; its statistics are right, and other channels are as ever."""
    x = data(16, 3, dtype="float32")
    x[:, 1] = 3.0
    results = []
    for cls in (SyncBatchNormalization, keras.layers.BatchNormalization):
        layer = cls(epsilon=0, momentum=0.5, **{"renorm": True, "renorm_clipping": {}} if renorm else {})
        trained = layer(x, training=True)
        held = [numbers(w) for w in layer.weights]
        for _ in range(3):
            layer(x, training=True)
        results.append([numbers(trained), *held, numbers(layer(x, training=False))])
    constant = results[0][0][:, 1]
    if keras.backend.backend() == "torch":
        # PyTorch's own operator divides nothing by nothing: x_hat is 0, and with renorm d is 3.
        np.testing.assert_array_equal(constant, 3.0 if renorm else 0.0)
        results = [(y[:, [0, 2]], *rest) for y, *rest in results]
    else:
        assert np.isnan(constant).all()
    assert np.isfinite(results[0][0][:, [0, -1]]).all()
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_epsilon_0_of_a_converted_layer_is_saved(tmp_path):
    model = syncbn.convert(keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(epsilon=0)]))
    model.save(tmp_path / "model.keras")
    assert keras.saving.load_model(tmp_path / "model.keras").layers[0].epsilon == 0


@pytest.mark.parametrize("training", [True, False])
def test_a_mask_of_floats_is_refused(training):
    """Keras's own layer weighs with it. Ours counts whole values only."""
    layer = SyncBatchNormalization()
    with pytest.raises(TypeError, match=r"Received: a mask of dtype float32. Give for example mask > 0.5."):
        layer(data(3, 2), training=training, mask=[1.0, 1.0, 0.1])
    layer(data(3, 2), training=training, mask=[1, 0, 2])


# ------------------------------------------------------------------------------------------------- activations, ragged


def test_an_activation_that_is_not_hashable():
    class Scale:
        __hash__ = None

        def __call__(self, v):
            return 2 * v

    x = data(5, 3)
    got, plain = (numbers(SyncBatchNormalization(activation=a)(x, training=True)) for a in (Scale(), None))
    np.testing.assert_allclose(got, 2 * plain, rtol=1e-6)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="ragged tensors are TensorFlow's")
def test_ragged_tensors_are_refused():
    import tensorflow as tf

    x = tf.RaggedTensor.from_row_lengths(data(5, 3), [2, 3])
    with pytest.raises(TypeError, match=r"Received: a RaggedTensor of shape \(2, None, 3\)\."):
        SyncBatchNormalization()(x, training=True)
    y = x.with_flat_values(SyncBatchNormalization()(x.flat_values, training=True))
    assert y.shape == x.shape
