"""`convert` and `revert` for Keras: what stays, real architectures, what is refused. Keras's backend is the environment's."""

from __future__ import annotations

import functools
import time
import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops
from versions import KERAS_HAS_RENORM, needs_keras_renorm

import syncbn
from syncbn import SyncBatchNormalization
from syncbn.keras import _private

BACKEND = keras.backend.backend()
CLIPPING = {"rmin": 0.5, "rmax": 2.0, "dmax": 1.0}
# Of Keras's own layer, which has no renorm before 3.14.
RENORM = {"renorm": True, "renorm_clipping": CLIPPING, "renorm_momentum": 0.7} if KERAS_HAS_RENORM else {}


@pytest.fixture(autouse=True)
def _seed():
    keras.utils.set_random_seed(7)


def data(*shape, seed=0):
    return np.random.default_rng(seed).normal(1, 2, shape).astype("float32")


def norms(model):
    return [layer for layer in model._flatten_layers() if isinstance(layer, layers.BatchNormalization)]


def randomised(model):
    """Statistics and parameters that are not the initial ones."""
    rng = np.random.default_rng(3)
    for layer in norms(model):
        for v in layer.weights:
            v.assign(rng.uniform(0.5, 1.5, v.shape))
    return model


def values(model):
    return [np.array(ops.convert_to_numpy(v)) for v in model.variables]


def outputs(model, x):
    """Training and inference; the moving statistics are put back."""
    before = values(model)
    trained = ops.convert_to_numpy(model(x, training=True))
    updated = values(model)
    for v, old in zip(model.variables, before, strict=True):
        v.assign(old)
    return [trained, ops.convert_to_numpy(model(x, training=False)), *updated]


def same(a, b):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


def near(a, b, tolerance=2e-5):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * max(1e-3, float(np.abs(y).max(initial=0))))


# ---------------------------------------------------------------------------------------------- real architectures

APPLICATIONS = {
    "ResNet50": keras.applications.ResNet50,
    "MobileNetV2": functools.partial(keras.applications.MobileNetV2, alpha=0.35),
    "EfficientNetB0": keras.applications.EfficientNetB0,
    "DenseNet121": keras.applications.DenseNet121,
}


@pytest.mark.parametrize("name", APPLICATIONS)
def test_round_trip_is_bit_identical(name):
    """Weights and outputs, in training and in inference, and the same function after conversion. Dropout is seeded by the layer."""
    model = randomised(APPLICATIONS[name](weights=None, input_shape=(32, 32, 3), classes=10))
    for layer in model._flatten_layers():
        if isinstance(layer, layers.Dropout):
            layer.rate = 0.0
    x = data(2, 32, 32, 3)
    former, state = list(model.variables), values(model)
    kinds = [type(layer) for layer in model._flatten_layers()]
    attributes = [set(vars(layer)) for layer in model._flatten_layers()]
    expected = outputs(model, x)
    count = len(norms(model))
    assert count > 40
    assert syncbn.convert(model) is model
    assert sum(isinstance(layer, SyncBatchNormalization) for layer in model._flatten_layers()) == count
    assert all(a is b for a, b in zip(model.variables, former, strict=True))
    # In training only the first layers: 50 layers on, two samples a channel make noise of the last bit.
    _, inferred, *updated = outputs(model, x)
    near([inferred], [expected[1]], 2e-4)
    first = [i for i, v in enumerate(model.variables) if "moving" in v.name][:4]
    near([updated[i] for i in first], [expected[2 + i] for i in first], 1e-4)
    assert syncbn.revert(model) is model
    assert [type(layer) for layer in model._flatten_layers()] == kinds
    assert [set(vars(layer)) for layer in model._flatten_layers()] == attributes
    same(values(model), state)
    same(outputs(model, x), expected)


# ------------------------------------------------------------------------------------------------- kinds of models


class Subclassed(keras.Model):
    """Layers as attributes, in a list, in a layer of layers, in a wrapper, and shared."""

    def __init__(self):
        super().__init__()
        self.first = layers.BatchNormalization()
        self.rest = [layers.BatchNormalization(momentum=0.5), layers.Dense(4)]
        self.block = keras.Sequential([layers.Dense(3), layers.BatchNormalization(axis=1)])
        self.each = layers.TimeDistributed(layers.BatchNormalization())
        self.again = self.first

    def call(self, x, training=None):
        x = self.again(self.first(x, training=training), training=training)
        for layer in self.rest:
            x = layer(x)
        x = self.block(x, training=training)
        return self.each(x[:, None], training=training)[:, 0]


def functional():
    inputs = keras.Input((3,))
    shared = layers.BatchNormalization(name="shared")
    inner = keras.Sequential([layers.Dense(3), layers.BatchNormalization()], name="inner")
    x = shared(inner(shared(inputs)))
    return keras.Model(inputs, [layers.BatchNormalization(**RENORM)(x)][0])


MODELS = {
    "Sequential": lambda: keras.Sequential([keras.Input((3,)), layers.Dense(4), layers.BatchNormalization(trainable=False)]),
    "Sequential, deferred": lambda: keras.Sequential([layers.Dense(4), layers.BatchNormalization(center=False, **RENORM)]),
    "functional": functional,
    "subclassed": Subclassed,
}


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_of_model(kind, built):
    model, twin, x = MODELS[kind](), MODELS[kind](), data(4, 3)
    twin(x)
    if built:
        model(x)
    names = [layer.name for layer in norms(model)]
    objects = [id(layer) for layer in norms(model)]
    syncbn.convert(model)
    model(x)
    randomised(twin)
    model.set_weights(twin.get_weights())
    assert all(isinstance(layer, SyncBatchNormalization) for layer in norms(model))
    assert [layer.name for layer in norms(model)] == names
    assert [id(layer) for layer in norms(model)] == objects
    near(outputs(model, x), outputs(twin, x))
    syncbn.revert(model)
    assert [type(layer) for layer in norms(model)] == [layers.BatchNormalization] * len(names)
    same(outputs(model, x), outputs(twin, x))
    for layer, other in zip(norms(model), norms(twin), strict=True):
        mine, theirs = layer.get_config(), other.get_config()
        assert {**mine, "name": 0} == {**theirs, "name": 0}
        assert layer.input_spec.axes == other.input_spec.axes
        assert set(vars(layer)) == set(vars(other))


def test_attributes_hold():
    layer = layers.BatchNormalization(momentum=0.3, epsilon=0.5, name="bn", beta_regularizer="l2", dtype="float16")
    layer(data(4, 3).astype("float16"))
    layer.trainable = False
    former, regularizer = layer.weights, layer.beta_regularizer
    syncbn.convert(layer)
    assert (layer.momentum, layer.epsilon, layer.name, layer.trainable) == (0.3, 0.5, "bn", False)
    assert all(a is b for a, b in zip(layer.weights, former, strict=True))
    assert layer.beta_regularizer is regularizer
    assert ops.convert_to_numpy(layer(data(4, 3).astype("float16"))).dtype == np.float16
    layer.momentum = 0.4
    syncbn.revert(layer)
    assert layer.momentum == 0.4


@pytest.mark.skipif(BACKEND != "tensorflow", reason="Keras takes synchronized=True only on TensorFlow")
def test_synchronized_comes_back():
    layer = syncbn.revert(syncbn.convert(layers.BatchNormalization(synchronized=True)))
    assert layer.synchronized
    assert layer.get_config()["synchronized"]


def test_compiled_model_trains_on_with_its_optimizer():
    def train(exchange):
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((3,)), layers.Dense(4), layers.BatchNormalization(), layers.Dense(1)])
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse", jit_compile=False)
        x, y = data(16, 3), data(16, 1, seed=1)
        calls = []
        for verb in (None, syncbn.convert, syncbn.revert):
            if verb and exchange:
                verb(model)
                if verb is syncbn.convert:
                    layer = norms(model)[0]
                    engine, layer._engine = layer._engine, Counting(layer._engine, calls)
            model.fit(x, y, batch_size=8, epochs=1, shuffle=False, verbose=0)
            if verb is syncbn.convert and exchange:
                layer._engine = engine
        assert not exchange or calls, "fit went on with the function that it had traced before"
        return [*values(model), *[np.array(ops.convert_to_numpy(v)) for v in model.optimizer.variables]]

    near(train(True), train(False), 1e-4)


class Counting:
    """An engine that notes that it was asked."""

    def __init__(self, engine, calls):
        self.engine, self.calls = engine, calls

    def __getattr__(self, name):
        self.calls.append(name)
        return getattr(self.engine, name)


def test_saves_and_loads_as_ours(tmp_path):
    model, x = functional(), data(4, 3)
    syncbn.convert(randomised(model))
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert all(isinstance(layer, SyncBatchNormalization) for layer in norms(again))
    same([ops.convert_to_numpy(again(x))], [ops.convert_to_numpy(model(x))])
    # No conversion made these layers: they become Keras's.
    syncbn.revert(again)
    assert all(type(layer) is layers.BatchNormalization for layer in norms(again))
    near(outputs(again, x), outputs(syncbn.revert(model), x))
    again.save(tmp_path / "again.keras")
    assert keras.models.load_model(tmp_path / "again.keras").get_config() == again.get_config()


# ------------------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize("built", [True, False])
def test_renorm_starts_from_the_models_own_statistics(built):
    layer, x = layers.BatchNormalization(epsilon=0.5), data(4, 3)
    if built:
        layer(x)
        randomised(layer)
    count = len(layer.weights)
    syncbn.convert(layer, renorm=True)
    if not built:
        layer(x)
    assert [w.path.rsplit("/", 1)[-1] for w in layer.weights][-3:] == ["moving_stddev", "renorm_mean", "renorm_stddev"]
    assert len({w.path.rpartition("/")[0] for w in layer.weights}) == 1
    mean, variance, gamma, beta = (
        ops.convert_to_numpy(v) for v in (layer.moving_mean, layer.moving_variance, layer.gamma, layer.beta)
    )
    # A layer that was never built starts as any other does, without epsilon.
    stddev = np.sqrt(variance + (0.5 if built else 0))
    near([ops.convert_to_numpy(v) for v in (layer.moving_stddev, layer.renorm_stddev)], [stddev] * 2, 1e-6)
    same([ops.convert_to_numpy(layer.renorm_mean)], [mean])
    near([ops.convert_to_numpy(layer(x, training=True))], [(x - mean) / stddev * gamma + beta], 1e-4)
    syncbn.revert(layer)
    assert not getattr(layer, "renorm", False)
    assert len(layer.weights) == (count or 4)
    assert not hasattr(layer, "moving_stddev")
    layer(x, training=True)


# What Keras's layer has since version 3.14.
WITH_RENORM = ("renorm", "renorm_clipping", "renorm_momentum", "moving_stddev", "renorm_mean", "renorm_stddev")


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("renorm", [True, False])
def test_a_layer_of_a_keras_without_renorm(built, renorm):
    """The attribute is absent before the conversion, and afterwards."""
    layer, x = layers.BatchNormalization(), data(4, 3)
    if built:
        layer(x)
    for name in WITH_RENORM:
        vars(layer).pop(name, None)
    syncbn.convert(layer, renorm=renorm)
    layer(x, training=True)
    assert (layer.renorm, layer.renorm_clipping, layer.renorm_momentum, len(layer.weights)) == (
        renorm,
        None,
        0.99,
        7 if renorm else 4,
    )
    syncbn.revert(layer)
    assert not [name for name in WITH_RENORM if name in vars(layer)]
    assert len(layer.weights) == 4


def test_what_a_keras_without_renorm_cannot_do_is_named(monkeypatch):
    layer = SyncBatchNormalization(renorm=True, name="bn")
    monkeypatch.setattr(_private, "has_renorm", lambda: False)
    with pytest.raises(
        ValueError, match=r"Received: bn \(renorm=True, which Keras 3\.\S+ does not know: Keras 3\.14 and later do\)\."
    ):
        syncbn.revert(layer)


def test_group_size_is_given_to_ours_too():
    model = MODELS["Sequential"]()
    syncbn.convert(model, group_size=2)
    syncbn.convert(model)
    assert norms(model)[0].group_size == 2
    syncbn.convert(model, group_size=1)
    assert norms(model)[0].group_size == 1
    with pytest.raises(ValueError, match="`group_size` must be None or a positive integer"):
        syncbn.convert(model, group_size=-1)
    with pytest.raises(ValueError, match=r"`process_group` is for torch modules\. Received: process_group=3 with a Keras model"):
        syncbn.convert(model, process_group=3)


def test_filter_takes_path_and_layer():
    model = functional()
    seen = []
    syncbn.convert(model, filter=lambda path, layer: seen.append((path, layer)) or path == "shared")
    assert [layer for _, layer in seen] == norms(model)
    assert [path for path, _ in seen].count("shared") == 1
    assert [isinstance(layer, SyncBatchNormalization) for layer in norms(model) if layer.name == "shared"] == [True]
    assert sum(isinstance(layer, SyncBatchNormalization) for layer in norms(model)) == 1


# ---------------------------------------------------------------------------------------------- unknown, bad input


class OnlyInit(layers.BatchNormalization):
    """Overrides nothing but its constructor."""

    def __init__(self, **kwargs):
        super().__init__(momentum=0.5, **kwargs)


class Doubled(layers.BatchNormalization):
    def call(self, inputs, training=None, mask=None):
        return 2 * super().call(inputs, training=training, mask=mask)


def with_own_call():
    layer = layers.BatchNormalization(name="own")
    layer.call = lambda inputs, training=None, mask=None: inputs
    return layer


UNKNOWN = {
    "subclass": (lambda: Doubled(name="doubled"), r"doubled \(a test_convert_keras\.Doubled, which overrides call\)"),
    "own call": (with_own_call, r"own \(a keras\..*\.BatchNormalization with a `call` of its own\)"),
}


def test_subclass_that_overrides_only_init():
    layer, x = OnlyInit(), data(4, 3)
    layer(x)
    syncbn.convert(layer)
    assert isinstance(layer, SyncBatchNormalization)
    layer(x, training=True)
    near([ops.convert_to_numpy(layer.moving_mean)], [x.mean(0) / 2], 1e-5)
    assert type(syncbn.revert(layer)) is OnlyInit


@pytest.mark.parametrize("kind", UNKNOWN)
def test_unknown_ones_are_named_and_left(kind):
    make, message = UNKNOWN[kind]
    model = keras.Sequential([make(), layers.BatchNormalization()])
    kinds = [type(layer) for layer in norms(model)]
    with pytest.raises(ValueError, match=message):
        syncbn.convert(model)
    assert [type(layer) for layer in norms(model)] == kinds
    with pytest.warns(UserWarning, match=message):
        syncbn.convert(model, on_unknown="warn")
    assert sorted(isinstance(layer, SyncBatchNormalization) for layer in norms(model)) == [False, True]
    syncbn.revert(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        syncbn.convert(model, on_unknown="skip")
    assert sorted(isinstance(layer, SyncBatchNormalization) for layer in norms(model)) == [False, True]


@pytest.mark.parametrize(
    "wrong",
    [{"momentum": 1.5}, {"momentum": -0.1}, {"epsilon": -1e-3}, pytest.param({"renorm_momentum": 2.0}, marks=needs_keras_renorm)],
    ids=str,
)
def test_numbers_that_the_constructor_refuses_are_refused(wrong):
    """Before anything is changed: such a model would be saved, and could not be loaded."""
    model = keras.Sequential([layers.BatchNormalization(), layers.BatchNormalization(**wrong, name="wrong")])
    (name,) = wrong
    with pytest.raises(ValueError, match=f"The layer 'wrong' cannot be converted, and no layer was: `{name}` must") as caught:
        syncbn.convert(model)
    with pytest.raises(ValueError) as constructed:
        SyncBatchNormalization(**wrong)
    assert str(caught.value).endswith(str(constructed.value))
    assert {type(layer) for layer in norms(model)} == {layers.BatchNormalization}


BEYOND = {
    "axis": (lambda: SyncBatchNormalization(axis=[1, 2], name="bn"), r"bn \(axis=\[1, 2\]\)"),
    "adjustment": (lambda: SyncBatchNormalization(adjustment=lambda shape: (1, 0), name="bn"), r"bn \(adjustment\)"),
    "activation": (lambda: SyncBatchNormalization(activation="relu", name="bn"), r"bn \(activation='relu'\)"),
    "clipping": (lambda: SyncBatchNormalization(renorm=True, renorm_clipping={"rmax": lambda: 2.0}, name="bn"),
                 "bn .renorm_clipping that" if KERAS_HAS_RENORM else "bn .renorm=True, which Keras"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BEYOND)
def test_what_keras_cannot_do_is_named(kind):
    make, message = BEYOND[kind]
    converted = syncbn.convert(layers.BatchNormalization())
    model = keras.Sequential([converted, make()])
    with pytest.raises(
        ValueError, match=rf"Only what keras\.layers\.BatchNormalization can do can be reverted\. Received: {message}"
    ):
        syncbn.revert(model)
    assert isinstance(converted, SyncBatchNormalization)


def test_nothing_to_do_is_a_warning():
    model = keras.Sequential([layers.Dense(3)])
    with pytest.warns(UserWarning, match="syncbn.convert expects a model that holds batch norms"):
        assert syncbn.convert(model) is model
    with pytest.warns(UserWarning, match="syncbn.revert expects a model that holds synchronised batch norms"):
        syncbn.revert(model)


def test_a_wrapper_of_another_kind_is_said():
    layer = layers.BatchNormalization(name="bn")
    layer.build = lambda shape: None
    with pytest.raises(RuntimeError, match="changes its class only where Keras wraps its `build`"):
        syncbn.convert(layer)


def test_resnet50_in_50_ms():
    model = keras.applications.ResNet50(weights=None, input_shape=(32, 32, 3), classes=2)
    syncbn.revert(syncbn.convert(model))
    start = time.perf_counter()
    syncbn.convert(model)
    assert time.perf_counter() - start < 0.05


def test_a_model_with_renorm_from_now_on_trains():
    model = keras.Sequential([layers.Input((3,)), layers.BatchNormalization()])
    model.compile("sgd", "mse")
    syncbn.convert(model, renorm=True)
    x = data(8, 3)
    assert np.isfinite(model.fit(x, x, verbose=0).history["loss"]).all()
    assert ops.any(norms(model)[0].renorm_mean != 0)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="only TensorFlow's variables have a copy for each replica")
def test_replicas_agree_after_conversion(world):
    """Unsynchronised layers left each replica its own statistics."""
    with world.strategy.scope():
        model = keras.Sequential([layers.Input((3,)), layers.BatchNormalization()])
    copies = norms(model)[0].moving_mean.value.values
    assert len(copies) == world.replicas
    for i, copy in enumerate(copies):
        copy.assign(np.full(3, i, "float32"))
    syncbn.convert(model, renorm=True)
    (ours,) = norms(model)
    mean = np.full(3, (world.replicas - 1) / 2)
    for statistic in (ours.moving_mean, ours.renorm_mean):
        assert len(statistic.value.values) == world.replicas
        for copy in statistic.value.values:
            np.testing.assert_array_equal(copy, mean)
