"""JAX on host devices: forward + backward of many layers inside one jit, under `jax.shard_map`.

Three programs: 20 layers in a scan, which dispatch cannot drown; 10 layers unrolled with a 1×1 convolution before each, which is
what real models look like; 20 bare layers unrolled.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import linen
from jax.sharding import Mesh, PartitionSpec
from rows import quantiles

from syncbn.functional import sync_batch_norm

SHAPES = [(8, 28, 28, 64), (4, 14, 14, 256), (2, 56, 56, 64), (4, 256)]
DEVICES = 4
MOMENTUM, EPSILON = 0.9, 1e-5
AXIS = "data"

# One layer: (x, (scale, bias), (mean, var)) -> (y, (moved mean, moved var)).
Layer = Callable[[Any, tuple[Any, Any], tuple[Any, Any]], tuple[Any, tuple[Any, Any]]]


def ours(axis_name: str | None) -> Layer:
    def layer(x: Any, parameters: tuple[Any, Any], statistics: tuple[Any, Any]) -> Any:
        y, mean, var, _ = sync_batch_norm(x, *parameters, epsilon=EPSILON, axis_name=axis_name)
        old_mean, old_var = statistics
        return y, (MOMENTUM * old_mean + (1 - MOMENTUM) * mean, MOMENTUM * old_var + (1 - MOMENTUM) * var)

    return layer


def flax(axis_name: str | None) -> Layer:
    module = linen.BatchNorm(use_running_average=False, momentum=MOMENTUM, epsilon=EPSILON, axis_name=axis_name)

    def layer(x: Any, parameters: tuple[Any, Any], statistics: tuple[Any, Any]) -> Any:
        variables = {"params": dict(zip(("scale", "bias"), parameters, strict=True)),
                     "batch_stats": dict(zip(("mean", "var"), statistics, strict=True))}  # fmt: skip
        y, moved = module.apply(variables, x, mutable=["batch_stats"])
        return y, (moved["batch_stats"]["mean"], moved["batch_stats"]["var"])

    return layer


PEERS: dict[str, Layer] = {
    "syncbn": ours(AXIS),
    "flax axis_name": flax(AXIS),
    "flax unsynchronised": flax(None),
}


def scan_of(layer: Layer) -> Callable[..., Any]:
    """20 layers in a `lax.scan`; kernels are unused."""

    def run(x: Any, weights: Any, statistics: Any) -> Any:
        return jax.lax.scan(lambda x, w: layer(x, w[0][:2], w[1]), x, (weights, statistics))

    return run


def unrolled(layer: Layer, convolutions: bool) -> Callable[..., Any]:
    """Layers one after the other, each with a 1×1 convolution before it or bare."""

    def run(x: Any, weights: Any, statistics: Any) -> Any:
        moved = []
        for i in range(weights[0].shape[0]):
            scale, bias, kernel = (w[i] for w in weights)
            if convolutions:
                x = x @ kernel
            x, new = layer(x, (scale, bias), (statistics[0][i], statistics[1][i]))
            moved.append(new)
        return x, moved

    return run


PROGRAMS: dict[str, tuple[int, Callable[[Layer], Callable[..., Any]]]] = {
    "20 in a scan": (20, scan_of),
    "10 with 1×1 convolutions between": (10, lambda layer: unrolled(layer, True)),
    "20 bare, unrolled": (20, lambda layer: unrolled(layer, False)),
}


def step_of(run: Callable[..., Any], layers: int, shape: tuple[int, ...], mesh: Mesh) -> Callable[[], Any]:
    """A function without arguments that runs one step on all devices: y, all gradients and statistics; waits for them."""
    channels, rng = shape[-1], np.random.default_rng(0)

    def local(x: Any, dy: Any, weights: Any, statistics: Any) -> Any:
        y, pull, moved = jax.vjp(lambda x, w: run(x, w, statistics), x, weights, has_aux=True)
        dx, gradients = pull(dy)
        return y, dx, jax.tree.map(lambda g: g[None], (gradients, moved))

    each, same = PartitionSpec(AXIS), PartitionSpec()
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(each, each, same, same), out_specs=each, check_vma=False)
    kernels = rng.standard_normal((layers, channels, channels), np.float32) / np.sqrt(channels)
    weights = (np.ones((layers, channels), "float32"), np.zeros((layers, channels), "float32"), kernels.astype("float32"))
    statistics = (np.zeros((layers, channels), "float32"), np.ones((layers, channels), "float32"))
    whole = (mesh.size * shape[0], *shape[1:])
    x, dy = (rng.standard_normal(whole, np.float32) for _ in range(2))
    place = jax.NamedSharding(mesh, each), jax.NamedSharding(mesh, same)
    x, dy = (jax.device_put(v, place[0]) for v in (x, dy))
    weights, statistics = (jax.device_put(v, place[1]) for v in (weights, statistics))
    program = jax.jit(mapped).lower(x, dy, weights, statistics).compile()
    return lambda: jax.block_until_ready(program(x, dy, weights, statistics))


def times(rounds: int, programs: list[str]) -> list[dict[str, Any]]:
    """Rows of seconds per step; peers take turns within each round, in an order that rotates."""
    mesh, rows = Mesh(np.array(jax.devices()[:DEVICES]), (AXIS,)), []
    for program in programs:
        layers, build = PROGRAMS[program]
        for shape in SHAPES:
            steps = {name: step_of(build(PEERS[name]), layers, shape, mesh) for name in PEERS}
            for step in steps.values():
                step()
            seconds: dict[str, list[float]] = {name: [] for name in steps}
            order = list(steps)
            for _ in range(rounds):
                for name in order:
                    start = time.perf_counter()
                    steps[name]()
                    seconds[name].append(time.perf_counter() - start)
                order = order[1:] + order[:1]
            common = {"quantity": f"seconds per step, {program}", "dtype": "float32", "shape": shape, "layers": layers,
                      "replicas": DEVICES, "rounds": rounds}  # fmt: skip
            rows += [{"peer": name, **common, **quantiles(seconds[name])} for name in steps]
    return rows
