"""The algebra on numpy arrays, against definitions in float64."""

from __future__ import annotations

import numpy as np
import pytest

from syncbn import maths

RNG = np.random.default_rng(3)


def parts(xs, dtype):
    """(n, k, s, q) of each replica, the sums about a pivot rounded to the dtype."""
    for x in xs:
        k = x.mean(0).astype(dtype) if len(x) else np.zeros(x.shape[1], dtype)
        rest = (x - k).astype(dtype)
        yield len(x), k, rest.sum(0), (rest * rest).sum(0)


def replicas(dtype, mean):
    return [(mean + i + RNG.normal(size=(n, 4))).astype(dtype) for i, n in enumerate((50, 0, 7, 300))]


@pytest.mark.parametrize(
    ("dtype", "mean", "tolerance"), [("float64", 1.0, 1e-12), ("float64", 1e4, 1e-7), ("float32", 1e4, 1e-5)]
)
def test_moments_of_sums(dtype, mean, tolerance):
    xs = replicas(dtype, mean)
    n, total, squares = 0, 0, 0
    for count, k, s, q in parts(xs, dtype):
        t, u = maths.raw_sums(np.float64(count), *(v.astype("float64") for v in (k, s, q)))
        n, total, squares = n + count, total + t, squares + u
    got_mean, got_variance = maths.moments_of_sums(n, total, squares, maximum=np.maximum)
    full_batch = np.concatenate(xs).astype("float64")
    np.testing.assert_allclose(got_mean, full_batch.mean(0), rtol=1e-9)
    np.testing.assert_allclose(got_variance, full_batch.var(0), rtol=tolerance)


@pytest.mark.parametrize("first_empty", [False, True])
def test_merge_keeps_what_float32_would_round_away(first_empty):
    xs = replicas("float32", 1e4)
    if first_empty:
        xs = [xs[1], xs[0], *xs[2:]]
    rows = list(parts(xs, "float32"))
    n = np.array([[r[0]] for r in rows], "float32")
    k, s, q = (np.stack([r[i] for r in rows]) for i in (1, 2, 3))
    r, m2 = s / np.maximum(n, 1), maths.local_m2(n, s, q, maximum=np.maximum)
    pivot = k[np.argmax(n)]
    total, (hi, lo), variance = maths.merge(n, k, r, m2, pivot, add=lambda v: v.sum(0), maximum=np.maximum, where=np.where)
    full_batch = np.concatenate(xs).astype("float64")
    assert hi.dtype == lo.dtype == variance.dtype == np.float32
    assert total == len(full_batch)
    np.testing.assert_allclose(hi.astype("float64") + lo, full_batch.mean(0), atol=1e-5)
    np.testing.assert_allclose(variance, full_batch.var(0), rtol=1e-5)


def test_nothing_counted_gives_mean_0_and_variance_1():
    zero = np.zeros(3)
    mean, variance = maths.moments_of_sums(0.0, zero, zero, maximum=np.maximum)
    np.testing.assert_array_equal(mean, zero)
    np.testing.assert_array_equal(variance, zero + 1)


def test_two_sum_loses_nothing():
    a, b = np.float32([1e4, 1, -3e5]), np.float32([1e-4, 1e4, 0.3])
    hi, lo = maths.two_sum(a, b)
    np.testing.assert_array_equal(hi.astype("float64") + lo, a.astype("float64") + b)


def test_affine_and_gradient_coefficients():
    x, dy = RNG.normal(size=(9, 4)) + 3, RNG.normal(size=(9, 4))
    scale, offset = RNG.normal(size=4), RNG.normal(size=4)
    mean, rstd = x.mean(0), 1 / np.sqrt(x.var(0) + 0.1)
    hi = mean.astype("float32").astype("float64")
    lo = mean - hi
    x_hat = (x - mean) * rstd
    a, b = maths.affine_coefficients(lo, rstd, scale, offset)
    np.testing.assert_allclose(a * (x - hi) + b, x_hat * scale + offset)
    dscale = maths.scale_gradient(lo, rstd, dy.sum(0), (dy * (x - hi)).sum(0))
    np.testing.assert_allclose(dscale, (dy * x_hat).sum(0))
    sum_g, sum_g_x_hat = (scale * dy).sum(0), (scale * dy * x_hat).sum(0)
    a, b = maths.moment_path_coefficients(9, lo, rstd, sum_g, sum_g_x_hat, maximum=np.maximum)
    expected = maths.moment_path(9, x_hat, rstd, sum_g, sum_g_x_hat, maximum=np.maximum)
    np.testing.assert_allclose(a * (x - hi) + b, expected)
    np.testing.assert_allclose(expected, -rstd / 9 * (sum_g + x_hat * sum_g_x_hat))
