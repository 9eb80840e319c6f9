"""TensorFlow's layer on GPUs: large inputs, the same bits twice, loss scaling, steps that XLA compiles."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.skipif(
    os.environ.get("SYNCBN_TEST_DEVICE") != "gpu", reason="make gpu-tensorflow: a process for TensorFlow"
)

REPLICAS = """
import os, sys
import numpy as np, tensorflow as tf, keras, syncbn
for gpu in tf.config.list_physical_devices("GPU"):
    tf.config.experimental.set_memory_growth(gpu, True)
count = len(tf.config.list_physical_devices("GPU"))
strategy = tf.distribute.MirroredStrategy([f"/gpu:{i}" for i in range(count)])
"""


def run(code: str, **environment: str) -> str:
    """What a process prints; TensorFlow takes a GPU, and its switches, once for a process."""
    program = REPLICAS + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=400, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("shape", [(32, 112, 112, 64), (2, 200, 336, 256), (1 << 17, 16), (1 << 13, 16, 16, 1025)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_sizes_that_cudnn_refuses(shape, training):
    """The last has 2³¹ elements and more, in bfloat16."""
    out = run(f"""
    shape, training = {shape}, {training}
    dtype = "bfloat16" if np.prod(shape) > 2**30 else "float32"
    layer = syncbn.SyncBatchNormalization(dtype="mixed_bfloat16" if dtype == "bfloat16" else "float32", momentum=0.0)
    layer.build((None, *shape[1:]))
    row = tf.random.stateless_normal((shape[0], *[1] * (len(shape) - 2), shape[-1]), (0, 1), 3.0, 2.0)
    x = tf.broadcast_to(tf.cast(row, dtype), shape)
    step = tf.function(lambda x: layer(x, training=training), autograph=False)
    y = step(x)
    truth = row.numpy().astype(float).reshape(-1, shape[-1]) if dtype == "float32" else tf.cast(tf.cast(row, dtype), tf.float64).numpy().reshape(-1, shape[-1])
    mean, variance = (truth.mean(0), truth.var(0)) if training else (0.0, 1.0)
    for i in (0, shape[0] // 2, shape[0] - 1):
        got = tf.cast(y[(i, *[-1] * (len(shape) - 2))], tf.float64).numpy()
        expected = (truth[i] - mean) / np.sqrt(variance + 1e-3)
        assert np.abs(got - expected).max() < (2e-2 if dtype == "bfloat16" else 1e-5), np.abs(got - expected).max()
    if training:
        assert np.abs(np.asarray(layer.moving_variance) / variance - 1).max() < 1e-5
    print("right")
    """)
    assert "right" in out


def test_four_million_rows_a_channel():
    out = run("""
    x = tf.random.stateless_normal((4_000_000, 4), (0, 1)) + 1e4
    layer = syncbn.SyncBatchNormalization(momentum=0.0)
    layer.build((None, 4))
    layer(x, training=True)
    wide = x.numpy().astype(float)
    print(np.abs(np.asarray(layer.moving_variance) / wide.var(0) - 1).max())
    """)
    assert float(out.split()[-1]) < 1e-5


def test_the_same_bits_twice():
    code = """
    tf.config.experimental.enable_op_determinism()
    keras.utils.set_random_seed(1)
    with strategy.scope():
        model = keras.Sequential([keras.Input((16, 16, 3)), keras.layers.Conv2D(8, 3), syncbn.SyncBatchNormalization(), keras.layers.Flatten(), keras.layers.Dense(1)])
        model.compile("sgd", "mse", jit_compile=False)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(96, 16, 16, 3)).astype("float32"), rng.normal(size=(96, 1)).astype("float32")
    model.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0)
    import hashlib
    print(hashlib.sha256(b"".join(w.tobytes() for w in model.get_weights())).hexdigest())
    """
    assert run(code).split()[-1] == run(code).split()[-1]


def test_loss_scaling_in_float16():
    out = run("""
    keras.mixed_precision.set_dtype_policy("mixed_float16")
    keras.utils.set_random_seed(1)
    with strategy.scope():
        model = keras.Sequential([keras.Input((16, 16, 3)), keras.layers.Conv2D(8, 3), syncbn.SyncBatchNormalization(), keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(1)])
        model.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)), "mse", jit_compile=False)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 16, 16, 3)).astype("float32")
    history = model.fit(x, 1 + x.mean((1, 2, 3)), batch_size=16, epochs=4, verbose=0).history["loss"]
    weights = model.get_weights()
    assert all(np.isfinite(w).all() for w in weights)
    print(history[-1] < history[0])
    """)
    assert out.split()[-1] == "True"


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled_step"])
def test_replicas_train_as_one_device_does(compiled):
    """`fit` with a partial last batch; with and without a step that XLA compiles on each replica."""
    out = run(f"""
    tf.config.experimental.enable_tensor_float_32_execution(False)
    sys.path.insert(0, "examples")
    import keras_xla as example
    many, losses = example.train(strategy, example.CompiledModel if {compiled} else keras.Model)
    one, expected = example.train(tf.distribute.OneDeviceStrategy("/gpu:0"), keras.Model)
    print(max(np.abs(a - b).max() for a, b in zip(many.get_weights(), one.get_weights())), max(np.abs(np.divide(losses, expected) - 1)))
    """)
    weights, losses = map(float, out.split()[-2:])
    assert weights < 5e-4
    assert losses < 1e-2


def test_a_model_on_the_cpu_of_a_gpu_machine_takes_the_cpus_passes():
    out = run("""
    from syncbn.tensorflow import engine
    with tf.device("/cpu:0"):
        layer = syncbn.SyncBatchNormalization()
        layer.build((None, 3))
        seen = [tf.function(lambda: (engine.passes_for(tf.zeros(1)).__name__, tf.constant(1))[1])(), engine.passes_for(tf.zeros(1)).__name__]
        y = layer(np.random.default_rng(0).normal(size=(70000, 3)).astype("float32"), training=True)
        print(seen[1], y.device)
    print(engine.passes_for(tf.zeros(1)).__name__)
    """)
    first, second = out.strip().splitlines()[-2:]
    assert "passes_cpu" in first
    assert "CPU" in first
    assert "passes_gpu" in second
