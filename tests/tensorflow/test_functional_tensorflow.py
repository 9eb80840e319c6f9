"""`sync_batch_norm` on TensorFlow's replicas."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import tensorflow as tf
from cases import RAGGED, Case
from checks import arguments, close

from syncbn.functional import sync_batch_norm


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_equals_the_concatenated_batch(world, graph):
    case = Case("functional", RAGGED, (3, 4, 5), (1, 3), mask="rows")
    xs, dys, scale, offset, masks = arguments(case, world.replicas)

    def replica(x, dy, scale, offset, mask):
        with tf.GradientTape() as tape:
            tape.watch([x, scale, offset])
            y, mean, variance, count = sync_batch_norm(x, scale, offset, axis=[1, 3], mask=mask[:, 0, :, 0])
        return {"y": y, "gradients": tape.gradient(y, [x, scale, offset], dy), "moments": (count, mean, variance)}

    got = world.run(replica, xs, dys, scale, offset, masks, graph=graph)
    truth = oracle.BatchNorm(xs, axes=case.axes, masks=masks)
    n, mean, variance = truth.moments[0]
    for out in got:
        count, got_mean, got_variance = out["moments"]
        assert count == n
        assert got_mean.shape == (1, 3, 1, 5)
        np.testing.assert_allclose(got_mean.ravel(), mean, atol=2e-6)
        np.testing.assert_allclose(got_variance.ravel(), variance, rtol=1e-5)
    close([out["y"] for out in got], truth.forward(scale, offset), case, "output")
    for i, expected in enumerate(truth.backward(dys, scale)):
        close([out["gradients"][i] for out in got], expected, case, "gradient")


def test_variables_have_gradients():
    x, dy = np.random.default_rng(0).normal(size=(2, 5, 3)).astype("float32")
    found = []
    for v in (tf.constant(x), tf.Variable(x)):
        with tf.GradientTape() as tape:
            tape.watch(v)
            y = sync_batch_norm(v, tf.ones(3), tf.zeros(3))[0]
        found.append(tape.gradient(y, v, dy))
    np.testing.assert_array_equal(*found)


def test_scale_and_offset_may_be_none():
    x = np.random.default_rng(0).normal(size=(6, 4, 3)).astype("float32")
    y, mean, *_ = sync_batch_norm(tf.constant(x))
    np.testing.assert_allclose(y, oracle.BatchNorm([x]).forward(np.ones(3), np.zeros(3))[0], atol=1e-5)
    assert mean.shape == (3,)


@pytest.mark.parametrize(("name", "owner"), [("axis_name", "JAX"), ("axis_index_groups", "JAX"), ("process_group", "PyTorch")])
def test_keywords_of_other_frameworks(name, owner):
    with pytest.raises(TypeError, match=f"`{name}` is for {owner} arrays. Received: it with an array of TensorFlow"):
        sync_batch_norm(tf.ones([4, 3]), tf.ones(3), tf.zeros(3), **{name: "it"})


def test_bad_scale():
    with pytest.raises(ValueError, match=r"`scale` must have one value a channel: shape \[3\]\. Received: shape \(4,\) for x of"):
        sync_batch_norm(tf.ones([4, 3]), tf.ones(4), tf.zeros(3))


@pytest.mark.parametrize("batch", [200, None], ids=["known", "unknown"])
def test_a_constant_gradient_over_many_rows(batch):
    """As an average over all pixels has it. One float32 sum of 400,000 equal values is off by 1e-3."""
    n, pixels, c = 200, 2048, 4
    x = tf.random.stateless_normal([n, pixels, c], (0, 1))

    def gradients(x):
        offset = tf.zeros(c)
        with tf.GradientTape() as tape:
            tape.watch([x, offset])
            y = sync_batch_norm(x, tf.ones(c), offset)[0]
        return tape.gradient(y, [x, offset], tf.fill(tf.shape(x), 1 / (n * pixels)))

    dx, doffset = tf.function(gradients, input_signature=[tf.TensorSpec([batch, pixels, c])])(x)
    np.testing.assert_allclose(doffset, np.ones(c), rtol=2e-5)
    assert np.abs(dx).max() * n * pixels < 1e-4
