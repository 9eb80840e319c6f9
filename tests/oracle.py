"""What is right: plain batch norm on the concatenated batch in float64, by textbook formulas on numpy arrays.

Shares no line with src/. Gradients are the derivatives written out, not a framework's.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def rows(x: Any, axes: tuple[int, ...]) -> np.ndarray:
    """An array as float64 [values, channels]."""
    x = np.asarray(x, np.float64)
    rest = [i for i in range(x.ndim) if i not in axes]
    channels = int(np.prod([x.shape[i] for i in axes]))
    return x.transpose(*rest, *axes).reshape(-1, channels)


def unrows(r: np.ndarray, shape: tuple[int, ...], axes: tuple[int, ...]) -> np.ndarray:
    """The inverse of `rows`."""
    rest = [i for i in range(len(shape)) if i not in axes]
    order = rest + list(axes)
    return r.reshape([shape[i] for i in order]).transpose(np.argsort(order))


def counted(mask: Any, shape: tuple[int, ...], axes: tuple[int, ...]) -> np.ndarray:
    """Which rows count, bool [values]."""
    if mask is None:
        return np.ones(int(np.prod([n for i, n in enumerate(shape) if i not in axes])), bool)
    mask = np.asarray(mask, bool)
    if mask.ndim < len(shape):
        mask = np.expand_dims(mask, axes)
    full = np.broadcast_to(mask, [1 if i in axes else n for i, n in enumerate(shape)])
    return full.reshape(-1)


class BatchNorm:
    """Batch norm of several replicas' inputs as of one batch.

    xs: one array a replica; masks: one bool array a replica, or None. scale and offset: [C], or one [C] a replica. Replicas
    are cut into consecutive groups of `group_size`, each with moments of its own.
    """

    def __init__(self, xs, *, axes=(-1,), masks=None, epsilon=1e-3, group_size=None):
        self.shapes = [np.shape(x) for x in xs]
        self.axes = tuple(sorted(a % len(self.shapes[0]) for a in axes))
        masks = [None] * len(xs) if masks is None else masks
        self.weights = [counted(m, s, self.axes).astype(np.float64) for m, s in zip(masks, self.shapes, strict=True)]
        self.xs = [np.where((w > 0)[:, None] | np.isfinite(r), r, 0) for w, r in self._each_rows(xs, with_weights=True)]
        self.epsilon, self.size = epsilon, group_size or len(xs)
        self.moments = [self._moments(g) for g in range(len(xs) // self.size)]

    def _each_rows(self, arrays, with_weights=False):
        out = [rows(a, self.axes) for a in arrays]
        return list(zip(self.weights, out, strict=True)) if with_weights else out

    def _group(self, values, group):
        return np.concatenate(values[group * self.size : (group + 1) * self.size])

    def _moments(self, group):
        x, w = self._group(self.xs, group), self._group(self.weights, group)
        kept = x[w > 0]
        if not len(kept):
            return 0, np.zeros(x.shape[1]), np.ones(x.shape[1])
        return len(kept), kept.mean(0), kept.var(0)

    def moving(self):
        """(count, mean, variance) averaged over groups by count."""
        total = sum(n for n, _, _ in self.moments)
        if total == 0:
            return self.moments[0]
        kept = [m for m in self.moments if m[0]]
        return total, sum(n * m for n, m, _ in kept) / total, sum(n * v for n, _, v in kept) / total

    def _each(self, parameter):
        """A parameter as one [C] a replica."""
        parameter = np.asarray(parameter, np.float64)
        return [parameter] * len(self.xs) if parameter.ndim == 1 else list(parameter)

    def forward(self, scale, offset):
        """One output a replica."""
        out = []
        for i, (x, s, o) in enumerate(zip(self.xs, self._each(scale), self._each(offset), strict=True)):
            _, mean, variance = self.moments[i // self.size]
            out.append(unrows((x - mean) / np.sqrt(variance + self.epsilon) * s + o, self.shapes[i], self.axes))
        return out

    def backward(self, dys, scale):
        """(dx, dscale, doffset), one of each a replica: derivatives of Σ dy·y over all replicas."""
        scales, dys = self._each(scale), self._each_rows(dys)
        dxs, dscales, doffsets = [], [], []
        for group, (n, mean, variance) in enumerate(self.moments):
            members = range(group * self.size, (group + 1) * self.size)
            std = np.sqrt(variance + self.epsilon)
            dmean, dvariance = np.zeros_like(mean), np.zeros_like(variance)
            for i in members:  # y = scale·(x − mean)/std + offset, differentiated for mean and variance
                g = dys[i] * scales[i]
                dmean -= (g / std).sum(0)
                dvariance -= (g * (self.xs[i] - mean)).sum(0) / (2 * std**3)
            for i in members:
                direct = dys[i] * scales[i] / std
                through = (dmean + 2 * dvariance * (self.xs[i] - mean)) / max(n, 1)
                dxs.append(unrows(direct + self.weights[i][:, None] * through, self.shapes[i], self.axes))
                dscales.append((dys[i] * (self.xs[i] - mean) / std).sum(0))
                doffsets.append(dys[i].sum(0))
        return dxs, dscales, doffsets

    def penalty_gradient(self, dys, scale, directions, step=1e-5):
        """d/dx of Σ direction·dx, by central differences of `backward` in float64: second order without second formulas."""
        flat, base = [], [np.array(x) for x in self.xs]
        for i, x in enumerate(base):
            grad = np.zeros_like(x)
            for at in np.ndindex(x.shape):
                values = []
                for sign in (1, -1):
                    self.xs = [np.array(b) for b in base]
                    self.xs[i][at] += sign * step
                    self.moments = [self._moments(g) for g in range(len(base) // self.size)]
                    dxs, _, _ = self.backward(dys, scale)
                    values.append(sum(np.sum(d * u) for d, u in zip(dxs, directions, strict=True)))
                grad[at] = (values[0] - values[1]) / (2 * step)
            flat.append(unrows(grad, self.shapes[i], self.axes))
        self.xs = base
        self.moments = [self._moments(g) for g in range(len(base) // self.size)]
        return flat


def moving_average(old, new, momentum):
    """What a moving statistic becomes."""
    return np.asarray(old) * momentum + np.asarray(new) * (1 - momentum)
