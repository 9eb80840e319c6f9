"""The contract of the two verbs, on TensorFlow replicas."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import tensorflow as tf
from cases import CASES, LARGE_MEAN, RAGGED, Case
from checks import EPSILON, arguments, close, equals_oracle

from syncbn.groups import Activation
from syncbn.tensorflow import engine, replicas


def step(case, group=None, activation=None):
    """Moments, output and gradients of one replica."""

    def replica(x, dy, scale, offset, mask, residual=None):
        x, dy = tf.cast(x, case.dtype), tf.cast(dy, case.dtype)
        common = {"axes": case.channel_axes(), "mask": mask, "group": group}
        with tf.GradientTape() as tape:
            tape.watch([x, scale, offset])
            moments = engine.moments(x, **common)
            extra = {"activation": activation, "residual": residual}
            y = engine.normalize(x, moments, scale, offset, epsilon=EPSILON, **common, **extra)
        gradients = tape.gradient(y, [x, scale, offset], dy)
        average = () if moments.average is None else moments.average
        return {"moments": moments[:3], "y": y, "gradients": gradients, "average": average}

    return replica


def check(case, world, graph, group=None):
    """One step of every replica against the oracle."""
    args = arguments(case, world.replicas)
    got = world.run(step(case, group), *args, graph=graph)
    return got, equals_oracle(got, case, args, group)


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_concatenated_batch(world, case, graph):
    check(case, world, graph)


@pytest.mark.parametrize("case", LARGE_MEAN, ids=lambda case: case.name)
def test_large_mean(world, case):
    check(case, world, graph=True)


@pytest.mark.parametrize("channels_first", [False, True])
def test_a_million_rows_a_channel(world, channels_first):
    rest, axes = ((2, 500_000), (1,)) if channels_first else ((500_000, 2), (-1,))
    case = Case("a million rows", (1, 2, 0, 1), rest, axes, mean=1e4)
    args = arguments(case, world.replicas)
    got = world.run(lambda x: engine.moments(x, axes=case.channel_axes())[:3], args[0], graph=True)
    n, mean, variance = oracle.BatchNorm(args[0], axes=axes).moments[0]
    assert got[0][0] == n
    assert np.abs(got[0][2] / variance - 1).max() < 1e-5
    assert (np.abs(got[0][1] - mean) / np.sqrt(variance)).max() < 1e-5


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("ragged", "an empty replica", "masked, float64")], ids=lambda c: c.name
)
def test_groups(world, case, graph):
    got, truth = check(case, world, graph, group=world.replicas // 2)
    count, mean, variance = truth.moving()
    for out in got:
        assert out["average"][0] == count
        np.testing.assert_allclose(out["average"][1], mean, atol=2e-6)
        np.testing.assert_allclose(out["average"][2], variance, rtol=1e-5)


def test_nan_stays_in_its_group(world):
    case = Case("nan in a group", RAGGED)
    xs = case.inputs(world.replicas)
    xs[0][:] = np.nan
    size = world.replicas // 2
    got = world.run(lambda x: engine.moments(x, axes=(3,), group=size)[:3], xs)
    truth = oracle.BatchNorm(xs[size:])
    assert np.isnan(got[0][1]).all()
    np.testing.assert_allclose(got[-1][1], truth.moments[0][1], atol=2e-6)


def test_global_count_0(world):
    case = Case("nothing", (0, 0, 0, 0), (4, 3))
    for out in world.run(step(case), *arguments(case, world.replicas), graph=True):
        count, mean, variance = out["moments"]
        assert count == 0
        assert np.array_equal(mean, np.zeros(3))
        assert np.array_equal(variance, np.ones(3))
        assert out["y"].shape == (0, 4, 3)
        assert all(np.isfinite(g).all() for g in out["gradients"])


def test_all_masked_normalises_with_0_and_1(world):
    case = Case("all masked", RAGGED, (4, 3), mask="rows")
    xs, dys, scale, offset, masks = arguments(case, world.replicas)
    got = world.run(step(case), xs, dys, scale, offset, [np.zeros_like(m) for m in masks])
    for x, s, o, out in zip(xs, scale, offset, got, strict=True):
        np.testing.assert_allclose(out["y"], x / np.sqrt(1 + EPSILON) * s + o, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", [Activation("relu"), Activation("silu"), Activation("leaky_relu", 0.2)])
def test_activation_and_residual(world, activation):
    case = Case("fused", RAGGED, (4, 5), dtype="float64")
    xs, dys, scale, offset, _ = arguments(case, world.replicas)
    residuals = case.cotangents(world.replicas, "residuals")
    got = world.run(step(case, activation=activation), xs, dys, scale, offset, None, residuals)
    truth = oracle.BatchNorm(xs, axes=(2,), epsilon=EPSILON)
    before = [y + r for y, r in zip(truth.forward(scale, offset), residuals, strict=True)]
    sigmoid = [1 / (1 + np.exp(-z)) for z in before]
    if activation.name == "silu":
        ys = [z * s for z, s in zip(before, sigmoid, strict=True)]
        slopes = [s * (1 + z * (1 - s)) for z, s in zip(before, sigmoid, strict=True)]
    else:
        slopes = [np.where(z > 0, 1, activation.slope) for z in before]
        ys = [z * s for z, s in zip(before, slopes, strict=True)]
    close([out["y"] for out in got], ys, case, "output")
    dxs, _, _ = truth.backward([d * s for d, s in zip(dys, slopes, strict=True)], scale)
    close([out["gradients"][0] for out in got], dxs, case, "gradient")


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("mask", [None, "rows"])
def test_second_order(world, graph, mask):
    """d/dx of a gradient penalty, ragged: wrong by half where the moments are constants of the backward pass."""
    case = Case("second order", (2, 1, 3, 0), (3, 2), dtype="float64", mask=mask, scales_differ=True)
    xs, dys, scale, offset, masks = arguments(case, world.replicas)
    directions = case.cotangents(world.replicas, "directions")

    def replica(x, dy, scale, offset, mask, direction):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                moments = engine.moments(x, axes=(2,), mask=mask)
                y = engine.normalize(x, moments, scale, offset, axes=(2,), epsilon=EPSILON, mask=mask)
            dx = inner.gradient(y, x, dy)
            penalty = tf.reduce_sum(dx * direction)
        return outer.gradient(penalty, x)

    got = world.run(replica, xs, dys, scale, offset, masks, directions, graph=graph)
    truth = oracle.BatchNorm(xs, axes=(2,), masks=masks, epsilon=EPSILON)
    flat = [oracle.rows(d, (2,)) for d in directions]
    truth_rows = truth.penalty_gradient(dys, scale, [oracle.unrows(f, s, (2,)) for f, s in zip(flat, truth.shapes, strict=True)])
    close(got, truth_rows, case, "second")


def test_constants_send_nothing_and_have_the_plain_gradient(world, monkeypatch):
    case = Case("constants", RAGGED, (4, 3), dtype="float64")
    xs, dys, scale, offset, _ = arguments(case, world.replicas)
    calls = count_messages(monkeypatch)
    mean, variance = np.arange(3.0), np.arange(1.0, 4.0)

    def replica(x, dy, scale, offset):
        with tf.GradientTape() as tape:
            tape.watch([x, scale, offset])
            moments = engine.Moments(None, tf.constant(mean), tf.constant(variance))
            y = engine.normalize(x, moments, scale, offset, axes=(2,), epsilon=EPSILON)
        return y, tape.gradient(y, [x, scale, offset], dy)

    for x, dy, s, o, (y, (dx, dscale, doffset)) in zip(
        xs, dys, scale, offset, world.run(replica, xs, dys, scale, offset), strict=True
    ):
        x_hat = (x - mean) / np.sqrt(variance + EPSILON)
        np.testing.assert_allclose(y, x_hat * s + o, atol=1e-12)
        np.testing.assert_allclose(dx, dy * s / np.sqrt(variance + EPSILON), atol=1e-12)
        np.testing.assert_allclose(dscale, (dy * x_hat).sum((0, 1)), atol=1e-12)
        np.testing.assert_allclose(doffset, dy.sum((0, 1)), atol=1e-12)
    assert calls == []


def count_messages(monkeypatch):
    """Records the shape of every message that a replica sends: all that replicas of one process exchange is a merge call."""
    calls, real = [], tf.distribute.ReplicaContext.merge_call

    def counting(self, merge, args=(), kwargs=None):
        calls.extend(tuple(v.shape) for v in tf.nest.flatten(args))
        return real(self, merge, args, kwargs)

    monkeypatch.setattr(tf.distribute.ReplicaContext, "merge_call", counting)
    return calls


@pytest.mark.parametrize("group", [None, 1])
def test_one_message_each_way(world, monkeypatch, group):
    case = Case("messages", RAGGED, (4, 5))
    calls = count_messages(monkeypatch)
    world.run(step(case, group), *arguments(case, world.replicas))
    rows = () if group is None else (world.replicas,)
    assert sorted(calls) == sorted([(*rows, 11), (*rows, 10)] * world.replicas)


@pytest.mark.parametrize("gathered", [True, False], ids=["gathered", "two sums"])
@pytest.mark.parametrize("group", [None, 2])
@pytest.mark.parametrize("case", [*CASES[:5], *LARGE_MEAN[:2]], ids=lambda case: case.name)
def test_without_float64(world, monkeypatch, case, group, gathered):
    """The form for TPUs, forced on CPU replicas."""
    monkeypatch.setattr(replicas, "has_float64", lambda strategy: False)
    if not gathered:
        monkeypatch.setattr(replicas, "GATHERED_REPLICAS", 0)
    xs, dys, scale, offset, _ = arguments(case, world.replicas)

    def replica(x, dy, scale, offset):
        with tf.GradientTape() as tape:
            tape.watch([x, scale, offset])
            moments = engine.moments(x, axes=case.channel_axes(), group=group)
            y = engine.normalize(x, moments, scale, offset, axes=case.channel_axes(), epsilon=EPSILON, group=group)
        (hi, lo), variance = moments.mean, moments.variance
        assert hi.dtype == lo.dtype == variance.dtype == tf.float32
        mean = tf.cast(hi, tf.float64) + tf.cast(lo, tf.float64)
        return moments.count, mean, variance, y, tape.gradient(y, [x, scale, offset], dy)

    got = world.run(replica, xs, dys, scale, offset, graph=True)
    truth = oracle.BatchNorm(xs, axes=case.axes, epsilon=EPSILON, group_size=group)
    for r, (count, mean, variance, _, _) in enumerate(got):
        n, true_mean, true_variance = truth.moments[r // truth.size]
        assert int(count) == n
        np.testing.assert_allclose(variance, true_variance, rtol=1e-5, atol=1e-7)
        assert (np.abs(mean - true_mean) / np.sqrt(true_variance + EPSILON)).max() < 1e-5
    quantity = ["large mean"] * 2 if case.mean > 1e3 else ["output", "gradient"]
    close([g[3] for g in got], truth.forward(scale, offset), case, quantity[0])
    for i, expected in enumerate(truth.backward(dys, scale)):
        close([g[4][i] for g in got], expected, case, quantity[1])


@pytest.mark.parametrize("kind", ["forward", "backward", "gathered"])
def test_a_message_that_fails_says_what_to_do(world, monkeypatch, kind):
    """In eager code; the type of the error stays."""
    case = Case("fails", RAGGED, (4, 3))
    xs, dys, scale, offset, _ = arguments(case, world.replicas)

    def fails(*arguments, **named):
        raise tf.errors.UnavailableError(None, None, "Connection reset by peer\nmore")

    def replica(x, dy, scale, offset):
        with tf.GradientTape() as tape:
            tape.watch(x)
            moments = engine.moments(x, axes=(2,))
            y = engine.normalize(x, moments, scale, offset, axes=(2,), epsilon=EPSILON)
        if kind == "backward":
            monkeypatch.setattr(tf.distribute.ReplicaContext, "all_reduce", fails)
        return tape.gradient(y, x, dy)

    if kind == "gathered":
        monkeypatch.setattr(replicas, "has_float64", lambda strategy: False)
        monkeypatch.setattr(tf.distribute.ReplicaContext, "all_gather", fails)
    else:
        # GPUs copy their messages to each other, and a copy cannot fail so.
        monkeypatch.setattr(replicas, "copies_messages", lambda strategy: False)
    if kind == "forward":
        monkeypatch.setattr(tf.distribute.ReplicaContext, "all_reduce", fails)
    with pytest.raises(tf.errors.UnavailableError, match=r"All replicas must run the same synchronised layers") as caught:
        world.run(replica, xs, dys, scale, offset)
    said = str(caught.value)
    assert "failed with 'Connection reset by peer'" in said
    assert {"forward": "shape (7,)", "backward": "shape (6,)", "gathered": "shape (1, 10)"}[kind] in said
    assert "training=False" in said
    assert isinstance(caught.value.__cause__, tf.errors.UnavailableError)
