"""JAX on one GPU: forward + backward of one layer out of 20 in a scan, without synchronising; the memory's speed beside it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax_cpu import flax, ours, scan_of
from rows import quantiles

SHAPES = [(32, 112, 112, 64), (32, 56, 56, 256), (32, 28, 28, 512), (32, 14, 14, 1024), (32, 7, 7, 2048)]
LAYERS, REPEATS = 20, 5
# A layer's passes over its input at the least: x twice and y once forward; x and dy twice and dx once backward.
FLOOR_PASSES = 8
PEERS = {"syncbn": ours(None), "flax": flax(None)}


def step_of(layer: Any, shape: tuple[int, ...], dtype: str) -> tuple[Callable[[], Any], Any]:
    """A function that runs one step and waits for it, and its compiled program."""
    channels = shape[-1]
    x, dy = (jax.random.normal(jax.random.key(i), shape, dtype) for i in range(2))
    weights = jnp.ones((LAYERS, channels)), jnp.zeros((LAYERS, channels)), jnp.zeros(LAYERS)
    statistics = jnp.zeros((LAYERS, channels)), jnp.ones((LAYERS, channels))
    run = scan_of(lambda x, p, s: _in(dtype, layer, x, p, s))

    def local(x: Any, dy: Any, weights: Any, statistics: Any) -> Any:
        _, pull, moved = jax.vjp(lambda x, w: run(x, w, statistics), x, weights, has_aux=True)
        return pull(dy), moved

    program = jax.jit(local).lower(x, dy, weights, statistics).compile()
    return lambda: jax.block_until_ready(program(x, dy, weights, statistics)), program


def _in(dtype: str, layer: Any, x: Any, parameters: Any, statistics: Any) -> Any:
    y, moved = layer(x, parameters, statistics)
    return y.astype(dtype), moved


def bandwidth() -> float:
    """Bytes a second of a copy on the device, read and written."""
    x = jnp.zeros(2**28, "float32")
    copy = jax.jit(lambda x: x + 1)
    copy(x).block_until_ready()
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        for _ in range(10):
            y = copy(x)
        y.block_until_ready()
        seconds.append((time.perf_counter() - start) / 10)
    return 2 * x.nbytes / float(np.median(seconds))


def times(rounds: int) -> list[dict[str, Any]]:
    """Rows of seconds per layer, with the share of the memory floor; peers take turns within each round."""
    device, speed, rows = jax.devices()[0], bandwidth(), []
    for dtype in ("bfloat16", "float32"):
        for shape in SHAPES:
            made = {name: step_of(layer, shape, dtype) for name, layer in PEERS.items()}
            seconds: dict[str, list[float]] = {name: [] for name in made}
            for step, _ in made.values():
                step()
            order = list(made)
            for _ in range(rounds):
                for name in order:
                    start = time.perf_counter()
                    for _ in range(REPEATS):
                        made[name][0]()
                    seconds[name].append((time.perf_counter() - start) / REPEATS / LAYERS)
                order = order[1:] + order[:1]
            floor = FLOOR_PASSES * np.prod(shape) * jnp.dtype(dtype).itemsize / speed
            for name in made:
                row = quantiles(seconds[name])
                rows.append({
                    "peer": name, "quantity": "seconds per layer", "dtype": dtype, "shape": shape, "layers": LAYERS,
                    "replicas": 1, "rounds": rounds, "device": device.device_kind, "bytes per second": speed,
                    "floor": float(floor), "floor / median": float(floor) / row["median"], **row,
                })  # fmt: skip
                print(
                    f"{dtype} {shape} {name}: {row['median'] * 1e6:.0f} us, {floor / row['median']:.0%} of the floor", flush=True
                )
    return rows
