"""The algebra of synchronised batch normalization: operators only, for any framework's arrays.

What operators cannot say (`maximum`, `where`, a sum over replicas) comes in as an argument. The names are those of
docs/maths.md: n a count, k a pivot near the mean, s = Σ(x − k), q = Σ(x − k)², m2 = Σ(x − mean)², rstd =
1/√(variance + ε), x_hat = (x − mean)·rstd. A mean may be a pair (hi, lo) whose sum it is: a mean rounded to float32 costs
5e-4 and more of the variance at mean/std = 1e4.
"""


def raw_sums(n, k, s, q):
    """(Σx, Σx²) from sums about a pivot. In float64: in float32 this is the formula that cancels."""
    return n * k + s, q + k * (2 * s + n * k)


def moments_of_sums(n, total, squares, *, maximum):
    """(mean, variance) from a count and float64 Σx, Σx²; (0, 1) where the count is 0."""
    at_least_one = maximum(n, 1)
    mean = total / at_least_one
    return mean, variance_or_one(n, squares / at_least_one - mean * mean, maximum=maximum)


def local_m2(n, s, q, *, maximum):
    """Σ(x − mean)² from sums about a pivot."""
    return maximum(q - s * s / maximum(n, 1), 0)


def variance_or_one(n, variance, *, maximum):
    """A variance that rounding cannot make negative, and 1 where nothing was counted."""
    return maximum(variance, maximum(1 - n, 0))


def merge(n, k, r, m2, pivot, *, add, maximum, where):
    """Chan's formula for many replicas at once: (n, (hi, lo), variance) without float64.

    Replica i holds n[i] values of mean k[i] + r[i]. Means are subtracted part by part, about the `pivot` of a replica that is
    not empty, so that nothing of r is lost; `add` sums over the replicas in their order.
    """
    shift = where(n > 0, (k - pivot) + r, 0.0)
    total = add(n)
    lo = add(n * shift) / maximum(total, 1)
    variance = add(where(n > 0, m2, 0.0) + n * (shift - lo) * (shift - lo)) / maximum(total, 1)
    return total, two_sum(pivot, lo), variance_or_one(total, variance, maximum=maximum)


def two_sum(a, b):
    """(hi, lo) with hi = a + b rounded and lo what rounding lost (Knuth)."""
    hi = a + b
    b_part = hi - a
    return hi, (a - (hi - b_part)) + (b - b_part)


def affine_coefficients(lo, rstd, scale, offset):
    """(a, b) such that scale·x_hat + offset = a·(x − hi) + b."""
    a = scale * rstd
    return a, offset - lo * a


def scale_gradient(lo, rstd, sum_dy, sum_dy_x):
    """Σdy·x_hat, where sum_dy_x = Σdy·(x − hi)."""
    return rstd * (sum_dy_x - lo * sum_dy)


def moment_path_coefficients(n, lo, rstd, sum_g, sum_g_x_hat, *, maximum):
    """(a, b) such that a·(x − hi) + b is the part of dx that goes through the moments.

    With g = scale·dy, summed over all replicas, that part is −rstd·(Σg + x_hat·Σg·x_hat)/n.
    """
    at_least_one = maximum(n, 1)
    a = -rstd * rstd * sum_g_x_hat / at_least_one
    return a, -rstd * sum_g / at_least_one - lo * a


def moment_path(n, x_hat, rstd, sum_g, sum_g_x_hat, *, maximum):
    """The same part of dx from x_hat itself: the form that is differentiated again."""
    return -rstd * (sum_g + x_hat * sum_g_x_hat) / maximum(n, 1)


def moving_average(old, new, momentum):
    """old·momentum + new·(1 − momentum)."""
    return old * momentum + new * (1 - momentum)


def renorm_correction(mean, stddev, renorm_mean, renorm_stddev, floor, clipping, *, as_array, maximum, minimum):
    """r and d of batch renormalization: r in [rmin, rmax], d in [−dmax, dmax].

    floor: √ε, which keeps a young renorm_stddev from 0.
    clipping: a dict of bounds by name, or None. A bound is None, a value that `as_array` takes, or a function that returns one.
    """
    denominator = maximum(renorm_stddev, as_array(floor))
    r, d = stddev / denominator, (mean - renorm_mean) / denominator
    given = {key: v() if callable(v) else v for key, v in (clipping or {}).items()}
    bounds = {key: as_array(v) for key, v in given.items() if v is not None}
    if "rmin" in bounds:
        r = maximum(r, bounds["rmin"])
    if "rmax" in bounds:
        r = minimum(r, bounds["rmax"])
    if "dmax" in bounds:
        d = maximum(minimum(d, bounds["dmax"]), -bounds["dmax"])
    return r, d


def variance_of_stddev(stddev, epsilon, *, maximum):
    """The variance that a moving √(variance + ε) stands for."""
    return maximum(stddev * stddev - epsilon, 0)
