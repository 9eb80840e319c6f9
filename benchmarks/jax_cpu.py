"""JAX on host devices: forward + backward of many layers inside one jit, under `jax.shard_map`.

Three programs: 20 layers in a scan, which dispatch cannot drown; 10 layers unrolled with a 1×1 convolution before each, which is
what real models look like; 20 bare layers unrolled.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from baselines import jax_adapters
from jax.sharding import Mesh, PartitionSpec
from timing import case_name, case_option, chosen, in_turns, rounds_option, seconds

SHAPES = [(8, 28, 28, 64), (4, 14, 14, 256), (2, 56, 56, 64), (4, 256)]
DEVICES = 4
AXIS = "data"

# One layer: (x, (scale, bias), (mean, var)) -> (y, (moved mean, moved var)).
Layer = Callable[[Any, tuple[Any, Any], tuple[Any, Any]], tuple[Any, tuple[Any, Any]]]


def options(parser: argparse.ArgumentParser) -> None:
    case_option(parser)
    rounds_option(parser, 9)


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


def with_gradients(run: Callable[..., Any]) -> Callable[..., Any]:
    """(x, dy, weights, statistics) -> a step's y, gradients and statistics. What is per device has a new first axis."""

    def local(x: Any, dy: Any, weights: Any, statistics: Any) -> Any:
        y, pull, moved = jax.vjp(lambda x, w: run(x, w, statistics), x, weights, has_aux=True)
        dx, gradients = pull(dy)
        return {"y": y, "dx": dx, **jax.tree.map(lambda v: v[None], {"gradients": gradients, "moved": moved})}

    return local


def step_of(run: Callable[..., Any], layers: int, shape: tuple[int, ...], mesh: Mesh) -> Callable[[], Any]:
    """A function without arguments that runs one step on all devices, and waits for it."""
    channels, rng = shape[-1], np.random.default_rng(0)
    each, same = PartitionSpec(AXIS), PartitionSpec()
    local = with_gradients(run)
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


def measure(given: argparse.Namespace, record: Callable[..., Any]) -> None:
    # Read when JAX first looks for devices.
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"
    mesh = Mesh(np.array(jax.devices("cpu")[:DEVICES]), (AXIS,))
    record = functools.partial(record, measure="step", unit="s", replicas=DEVICES, versions=("jax", "flax", "numpy"))
    cases = [(program, shape) for program in PROGRAMS for shape in SHAPES]
    for program, shape in chosen(cases, given.cases, name_of):
        layers, build = PROGRAMS[program]
        steps = {name: step_of(build(adapter.make(shape)), layers, shape, mesh) for name, adapter in jax_adapters(AXIS).items()}
        for step in steps.values():
            step()
        details = {"dtype": "float32", "shape": shape, "layers": layers, "rounds": given.rounds}
        for name, taken in in_turns(steps, given.rounds, seconds).items():
            record(case=name_of((program, shape)), subject=name, values=taken, **details)


def name_of(case: tuple[str, tuple[int, ...]]) -> str:
    program, shape = case
    return f"{program}, {case_name(shape)}"
