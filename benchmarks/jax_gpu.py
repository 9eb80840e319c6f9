"""JAX on GPUs: forward + backward of one layer out of 20 in a scan, under `shard_map`.

On several GPUs ours and Flax's are synchronised over all of them, beside Flax's local one; on one nothing is. Shapes are those of
each GPU. Before a case is timed its outputs, gradients and statistics are compared: float32 with Flax's; in bfloat16, where each
of 20 layers rounds, ours and Flax's are both held against Flax's in float32.
"""

from __future__ import annotations

import argparse
import functools
import re
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from baselines import jax_adapters
from jax.sharding import Mesh, PartitionSpec
from jax_cpu import AXIS, Layer, scan_of, with_gradients
from rows import quantiles
from timing import case_name, case_option, chosen, in_turns, rounds_option, seconds

SHAPES = [(32, 112, 112, 64), (32, 56, 56, 256), (32, 28, 28, 512), (32, 14, 14, 1024), (32, 7, 7, 2048)]
SMALL = [(4, 6, 6, 8), (2, 3, 3, 32)]
LAYERS, REPEATS = 20, 5
# A layer's passes over its input at the least: x twice and y once forward; x and dy twice and dx once backward.
FLOOR_PASSES = 8
# Largest difference from Flax after 20 layers in float32, relative to the largest value; and, in bfloat16, how much farther from
# the truth ours may be than Flax's.
TOLERANCE, FARTHER = 1e-4, 2
COLLECTIVES = re.compile(r" (all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all)(?:-start)?\(")
EACH, SAME = PartitionSpec(AXIS), PartitionSpec()


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--devices", type=int, default=0, help="how many GPUs; all of them unless given")
    case_option(parser)
    rounds_option(parser, 9)
    parser.add_argument("--hlo", type=Path, help="a folder for the optimized programs of one case, bfloat16 32×56×56×256")
    parser.add_argument("--small", action="store_true", help="small shapes, to try the suite on host devices; no rows are kept")


def arguments(shape: tuple[int, ...], dtype: str, mesh: Mesh) -> tuple[Any, ...]:
    """(x, dy, weights, statistics): random, and other values on each GPU, about a mean that grows from the first to the last."""
    place, keys = {spec: jax.NamedSharding(mesh, spec) for spec in (EACH, SAME)}, jax.random.split(jax.random.key(0), 4)
    whole, vectors = (mesh.size * shape[0], *shape[1:]), (LAYERS, shape[-1])

    @jax.jit
    def make() -> Any:
        ramp = jnp.linspace(0, 1, whole[0]).reshape(-1, 1, 1, 1)
        x, dy = jax.random.normal(keys[0], whole) + ramp, jax.random.normal(keys[1], whole)
        weights = jax.random.uniform(keys[2], vectors, minval=0.5), jax.random.normal(keys[3], vectors), jnp.zeros(LAYERS)
        made = x.astype(dtype), dy.astype(dtype), weights, (jnp.zeros(vectors), jnp.ones(vectors))
        return tuple(
            jax.lax.with_sharding_constraint(v, place[spec]) for v, spec in zip(made, (EACH, EACH, SAME, SAME), strict=True)
        )

    return make()


def lowered(layer: Layer, dtype: str, mesh: Mesh, given: tuple[Any, ...]) -> Any:
    """One step, not yet compiled: y, gradients and moved statistics, of each GPU its own."""

    def in_dtype(x: Any, parameters: Any, statistics: Any) -> Any:
        y, moved = layer(x, parameters, statistics)
        return y.astype(dtype), moved

    local = with_gradients(scan_of(in_dtype))
    step = jax.shard_map(local, mesh=mesh, in_specs=(EACH, EACH, SAME, SAME), out_specs=EACH, check_vma=False)
    return jax.jit(step).lower(*given)


def compiled(layers: dict[str, Layer], dtype: str, mesh: Mesh, given: tuple[Any, ...]) -> dict[str, Any]:
    """Each layer's program; compiled side by side, which takes most of the benchmark's time."""
    steps = [lowered(layer, dtype, mesh, given) for layer in layers.values()]
    with ThreadPoolExecutor() as pool:
        return dict(zip(layers, pool.map(lambda step: step.compile(), steps), strict=True))


def differences(got: Any, expected: Any) -> dict[str, float]:
    """The largest difference of each quantity, relative to its largest value."""

    @jax.jit
    def error(a: Any, b: Any) -> Any:
        a, b = a.astype("float32"), b.astype("float32")
        return jnp.abs(a - b).max() / jnp.maximum(jnp.abs(b).max(), jnp.finfo("float32").tiny)

    return {jax.tree_util.keystr(path): float(e) for path, e in jax.tree.leaves_with_path(jax.tree.map(error, got, expected))}


def layers_of(shape: tuple[int, ...], mesh: Mesh) -> dict[str, Layer]:
    return {name: adapter.make(shape) for name, adapter in jax_adapters(AXIS if mesh.size > 1 else None).items()}


def compare(dtype: str, programs: dict[str, Any], mesh: Mesh, given: tuple[Any, ...]) -> tuple[bool, str]:
    """Whether ours is as right as Flax's that does the same, and by how much both are off. They are the first two programs."""
    (ours, theirs), flaxs = [program(*given) for program in list(programs.values())[:2]], list(programs)[1]
    if dtype == "float32":
        errors = differences(ours, theirs)
        # NaN is no agreement either.
        return all(e <= TOLERANCE for e in errors.values()), f"differs from Flax by {max(errors.values()):.0e}"
    wide = jax.tree.map(lambda v: v.astype("float32") if v.dtype == dtype else v, given)
    truth = compiled({flaxs: layers_of(given[0].shape, mesh)[flaxs]}, "float32", mesh, wide)[flaxs](*wide)
    of_ours, of_theirs = differences(ours, truth), differences(theirs, truth)
    right = all(e <= max(FARTHER * of_theirs[name], TOLERANCE) for name, e in of_ours.items())
    return right, "off by " + ", ".join(f"{name} {e:.0e} (Flax {of_theirs[name]:.0e})" for name, e in of_ours.items())


def bandwidth(size: int) -> float:
    """Bytes a second of a copy on the device, read and written."""
    x = jnp.zeros(size, "float32")
    copy = jax.jit(lambda x: x + 1)
    copy(x).block_until_ready()
    times = []
    for _ in range(9):
        start = time.perf_counter()
        for _ in range(10):
            y = copy(x)
        y.block_until_ready()
        times.append((time.perf_counter() - start) / 10)
    return 2 * x.nbytes / float(np.median(times))


def measure(given: argparse.Namespace, record: Callable[..., Any]) -> str | None:
    """Records seconds per layer, a case after the other; returns which cases are wrong."""
    given.no_rows |= given.small
    devices, shapes = given.devices or jax.device_count(), SMALL if given.small else SHAPES
    mesh, speed = Mesh(np.array(jax.devices()[:devices]), (AXIS,)), bandwidth(2**20 if given.small else 2**28)
    record = functools.partial(
        record, measure="time per layer", unit="s", replicas=devices, device=jax.devices()[0].device_kind,
        versions=("jax", "flax", "numpy"), layers=LAYERS, rounds=given.rounds, **{"bytes per second": speed},
    )  # fmt: skip
    cases, wrong = [(shape, dtype) for dtype in ("float32", "bfloat16") for shape in shapes], []
    for shape, dtype in chosen(cases, given.cases, lambda case: case_name(*case)):
        name, data = case_name(shape, dtype), arguments(shape, dtype, mesh)
        programs = compiled(layers_of(shape, mesh), dtype, mesh, data)
        if given.hlo and (dtype, shape) == ("bfloat16", shapes[1]):
            keep(given.hlo, name, programs)
        right, errors = compare(dtype, programs, mesh, data)
        wrong += [] if right else [name]
        steps = {subject: partial(program, *data) for subject, program in programs.items()}
        floor = float(FLOOR_PASSES * np.prod(shape) * jnp.dtype(dtype).itemsize / speed)
        print(f"{name}: {'' if right else 'WRONG: '}{errors}", flush=True)
        for subject, taken in in_turns(steps, given.rounds, per_layer).items():
            # The scan's body stands in a program once.
            counted = Counter(COLLECTIVES.findall(programs[subject].as_text()))
            values = quantiles(taken)
            details = {"floor": floor, "floor / median": floor / values["median"], "collectives per layer": counted}
            record(case=name, subject=subject, values=values, dtype=dtype, shape=shape, **details)
            print(f"  {subject} {values['median'] * 1e6:.0f} µs, {sum(counted.values())} collectives", flush=True)
    return f"Farther from the truth than Flax's: {', '.join(wrong)}" if wrong else None


def per_layer(step: Callable[[], Any]) -> float:
    """Seconds."""
    return seconds(lambda: jax.block_until_ready(step()), REPEATS) / LAYERS


def keep(folder: Path, case: str, programs: dict[str, Any]) -> None:
    """The optimized programs as text, a file a layer."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, program in programs.items():
        (folder / f"{name} {case}.txt".replace(" ", "-")).write_text(program.as_text())
