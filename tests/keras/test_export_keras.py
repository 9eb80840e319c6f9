"""Keras models out of training: folded, and exported as plain batch norm. Keras's backend is the environment's."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

import syncbn
from syncbn import SyncBatchNormalization

BACKEND = keras.backend.backend()


@pytest.fixture(autouse=True)
def _seed():
    keras.utils.set_random_seed(7)


def data(*shape):
    return np.random.default_rng(0).normal(1, 2, shape).astype("float32")


def norms(model):
    return [layer for layer in model._flatten_layers() if isinstance(layer, layers.BatchNormalization)]


def randomised(model):
    rng = np.random.default_rng(3)
    for layer in norms(model):
        for v in layer.weights:
            v.assign(rng.uniform(0.5, 1.5, v.shape))
    return model


def numpy(y):
    return ops.convert_to_numpy(y)


def close(got, expected, tolerance=1e-5):
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


# ---------------------------------------------------------------------------------------------------------------- fold

BEFORE = {
    "Dense": (lambda: layers.Dense(6), (4,)),
    "Dense, rank 3": (lambda: layers.Dense(6), (5, 4)),
    "Conv1D": (lambda: layers.Conv1D(6, 3, use_bias=False), (9, 4)),
    "Conv2D, groups": (lambda: layers.Conv2D(6, 3, groups=2), (9, 9, 4)),
    "Conv3D": (lambda: layers.Conv3D(6, 2), (3, 3, 3, 4)),
    "Conv1DTranspose": (lambda: layers.Conv1DTranspose(6, 3), (9, 4)),
    "Conv2DTranspose": (lambda: layers.Conv2DTranspose(6, 3, use_bias=False), (5, 5, 4)),
    "DepthwiseConv1D": (lambda: layers.DepthwiseConv1D(3, depth_multiplier=2), (9, 4)),
    "DepthwiseConv2D": (lambda: layers.DepthwiseConv2D(3, use_bias=False), (9, 9, 4)),
    "SeparableConv2D": (lambda: layers.SeparableConv2D(6, 3), (9, 9, 4)),
}


@pytest.mark.parametrize(
    "make_norm",
    [lambda: layers.BatchNormalization(scale=False), lambda: SyncBatchNormalization(activation="relu")],
    ids=["Keras", "ours"],
)
@pytest.mark.parametrize("kind", BEFORE)
def test_fold_computes_the_same(kind, make_norm):
    make, shape = BEFORE[kind]
    model = randomised(keras.Sequential([keras.Input(shape), make(), make_norm()]))
    x, former = data(2, *shape), [numpy(v).copy() for v in model.variables]
    folded = syncbn.fold(model)
    assert not norms(folded)
    close(numpy(folded(x)), numpy(model(x)))
    for a, b in zip(model.variables, former, strict=True):
        np.testing.assert_array_equal(numpy(a), b)


def functional():
    """Some that fold, and each reason not to."""
    inputs = keras.Input((6, 6, 3))
    x = layers.BatchNormalization(name="folds, outside")(layers.Conv2D(3, 1)(inputs))
    inner = keras.Sequential(
        [keras.Input((6, 6, 3)), layers.Conv2D(3, 1), SyncBatchNormalization(name="folds, inside")], name="inner"
    )
    x = inner(x)
    both = layers.Conv2D(3, 1)(x)
    x = layers.add([SyncBatchNormalization(name="used twice")(both), both])
    x = SyncBatchNormalization(name="after an activation")(layers.Conv2D(3, 1, activation="relu")(x))
    shared = layers.Conv2D(3, 1)
    x = layers.BatchNormalization(name="called twice")(shared(shared(x)))
    seen = layers.Conv2D(3, 1)(x)
    y = SyncBatchNormalization(name="before an output")(seen)
    x = SyncBatchNormalization(axis=1, name="other axis")(layers.Conv2D(6, 1)(y))
    x = SyncBatchNormalization(axis=[1, 3], name="several axes")(layers.Conv2D(6, 1)(x))
    return keras.Model(inputs, [x, seen])


def test_fold_leaves_what_others_use():
    model, x = randomised(functional()), data(2, 6, 6, 3)
    folded = syncbn.fold(model)
    left = {layer.name for layer in norms(folded)}
    assert left == {layer.name for layer in norms(model) if not layer.name.startswith("folds")}
    assert "folds, inside" not in left
    for a, b in zip(folded(x), model(x), strict=True):
        close(numpy(a), numpy(b))


def test_fold_keeps_what_a_normalization_layer_learned():
    """It computes with a copy of its weights."""
    seen = layers.Normalization()
    seen.adapt(data(50, 4))
    model = randomised(keras.Sequential([keras.Input((4,)), seen, layers.Dense(4), layers.BatchNormalization()]))
    folded = syncbn.fold(model)
    assert not norms(folded)
    close(numpy(folded(data(3, 4))), numpy(model(data(3, 4))))


@pytest.mark.parametrize("twice", ["the batch norm", "the layer before it"])
def test_fold_leaves_what_a_sequential_has_twice(twice):
    norm, dense = layers.BatchNormalization(), layers.Dense(4)
    parts = [dense, norm, layers.ReLU(), norm] if twice == "the batch norm" else [dense, norm, dense, layers.BatchNormalization()]
    model = randomised(keras.Sequential([keras.Input((4,)), *parts]))
    folded = syncbn.fold(model)
    assert len(set(norms(folded))) == len(set(norms(model)))
    close(numpy(folded(data(3, 4))), numpy(model(data(3, 4))))


@pytest.mark.filterwarnings("ignore:.*does not have a `quantize` method")
@pytest.mark.parametrize("kind", ["LoRA", "int8"])
def test_fold_leaves_layers_with_more_weights(kind):
    model = randomised(keras.Sequential([keras.Input((4,)), layers.Dense(4), layers.BatchNormalization()]))
    if kind == "LoRA":
        model.layers[0].enable_lora(2)
        model.layers[0].lora_kernel_b.assign(data(2, 4))
    else:
        model.quantize("int8")
    folded = syncbn.fold(model)
    assert len(norms(folded)) == 1
    close(numpy(folded(data(3, 4))), numpy(model(data(3, 4))))


def test_fold_keeps_subclasses_and_subclassed_models():
    class Doubled(layers.BatchNormalization):
        def call(self, inputs, training=None, mask=None):
            return 2 * super().call(inputs, training=training, mask=mask)

    model = randomised(keras.Sequential([keras.Input((3,)), layers.Dense(3), Doubled()]))
    folded = syncbn.fold(model)
    assert len(norms(folded)) == 1
    close(numpy(folded(data(2, 3))), numpy(model(data(2, 3))))

    class Model(keras.Model):
        pass

    with pytest.raises(ValueError, match=r"syncbn\.fold takes a Sequential or functional Keras model.*Received: mine, a Model\."):
        syncbn.fold(Model(name="mine"))


def test_fold_leaves_a_sequential_with_a_call_of_its_own():
    class Residual(keras.Sequential):
        def call(self, inputs, training=None, mask=None):
            return inputs + super().call(inputs, training=training)

    inputs = keras.Input((6,))
    residual = Residual([keras.Input((6,)), layers.Dense(6), layers.BatchNormalization()])
    model = randomised(keras.Model(inputs, residual(inputs)))
    x = data(3, 6)
    close(numpy(syncbn.fold(model)(x)), numpy(model(x)))
    with pytest.raises(ValueError, match=r"Received: mine, a Residual\."):
        syncbn.fold(Residual([keras.Input((6,))], name="mine"))


class Shift(layers.Layer):
    """Its config, which Keras makes, leaves out the name."""

    def __init__(self, by=1.0, **rest):
        super().__init__(**rest)
        self.by = by

    def build(self, shape):
        self.shift = self.add_weight(shape=(shape[-1],))

    def call(self, inputs):
        return keras.ops.tanh(inputs + self.shift) * self.by


def test_fold_gives_each_copy_the_weights_of_its_layer():
    second, first = Shift(2.0), Shift(2.0)  # made in another order than they are called
    model = randomised(keras.Sequential([keras.Input((6,)), first, second, layers.Dense(3), layers.BatchNormalization()]))
    x = data(4, 6)
    model(x)
    keras.backend.clear_session()  # new layers are named from the beginning
    folded = syncbn.fold(model)
    assert not norms(folded)
    close(numpy(folded(x)), numpy(model(x)))


def test_fold_copies_functions():
    parts = [layers.Lambda(lambda v: v * 2), layers.Dense(3), layers.BatchNormalization()]
    model = randomised(keras.Sequential([keras.Input((6,)), *parts]))
    x = data(4, 6)
    close(numpy(syncbn.fold(model)(x)), numpy(model(x)))


@pytest.mark.parametrize("kind", [layers.StringLookup, layers.TextVectorization, layers.IntegerLookup])
def test_fold_keeps_a_vocabulary(kind):
    integers = kind is layers.IntegerLookup
    if not integers and keras.backend.backend() != "tensorflow":
        pytest.skip("strings are TensorFlow's alone")
    look_up, words = kind(), [7, 9] if integers else ["a", "b"]
    look_up.adapt(words)
    shape, dtype = ((2,), "int64") if integers else ((2,), "string") if kind is layers.StringLookup else ((1,), "string")
    model = keras.Sequential(
        [keras.Input(shape, dtype=dtype), look_up, layers.Embedding(5, 3), layers.Conv1D(4, 1), syncbn.SyncBatchNormalization()]
    )
    x = keras.ops.convert_to_tensor([words] if shape == (2,) else [["a b"]])
    randomised(model)
    close(numpy(syncbn.fold(model)(x)), numpy(model(x)))


def test_fold_of_a_real_architecture():
    model = randomised(keras.applications.MobileNetV2(weights=None, input_shape=(32, 32, 3), classes=5, alpha=0.35))
    x = data(2, 32, 32, 3)
    expected = numpy(model(x, training=False))
    folded = syncbn.fold(syncbn.convert(model))
    assert len(norms(folded)) < 0.1 * len(norms(model))
    close(numpy(folded(x, training=False)), expected, 1e-4)


# ------------------------------------------------------------------------------------------------------------- export


def small():
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3), batch_size=2),
            layers.Conv2D(4, 3),
            SyncBatchNormalization(activation="relu"),
            layers.Flatten(),
            layers.Dense(5),
            SyncBatchNormalization(scale=False, renorm=True),
        ]
    )
    return randomised(model), data(2, 8, 8, 3)


@pytest.mark.skipif(BACKEND == "torch", reason="Keras exports no SavedModel from torch")
def test_saved_model(tmp_path):
    import tensorflow as tf

    model, x = small()
    model.export(tmp_path / "model", verbose=False)
    loaded = tf.saved_model.load(str(tmp_path / "model"))
    close(loaded.serve(x).numpy(), numpy(model(x)))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TFLite takes models of TensorFlow")
def test_tflite():
    import tensorflow as tf

    model, x = small()
    interpreter = tf.lite.Interpreter(model_content=tf.lite.TFLiteConverter.from_keras_model(model).convert())
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
    interpreter.invoke()
    close(interpreter.get_tensor(interpreter.get_output_details()[0]["index"]), numpy(model(x)))


@pytest.mark.filterwarnings("ignore")
def test_onnx(tmp_path):
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    if BACKEND != "torch":
        pytest.importorskip({"tensorflow": "tf2onnx", "jax": "jax2onnx"}[BACKEND])
    model, x = small()
    model(x)
    model.export(tmp_path / "model.onnx", format="onnx", verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (y,) = session.run(None, {session.get_inputs()[0].name: x})
    close(y, numpy(model(x)))


@pytest.mark.skipif(BACKEND != "jax", reason="jax.export takes functions of JAX")
def test_jax_export():
    import jax

    model, x = small()
    trainable, others = ([v.value for v in vs] for vs in (model.trainable_variables, model.non_trainable_variables))
    forward = jax.jit(lambda x: model.stateless_call(trainable, others, x, training=False)[0])
    exported = jax.export.export(forward)(jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert "all_reduce" not in exported.mlir_module()
    assert "all_gather" not in exported.mlir_module()
    close(numpy(jax.export.deserialize(exported.serialize()).call(x)), numpy(model(x)))
