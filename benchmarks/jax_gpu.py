"""JAX on GPUs: `python benchmarks/jax_gpu.py [OUT]`: forward + backward of one layer out of 20 in a scan, under `shard_map`.

On several GPUs ours and Flax's are synchronised over all of them, beside Flax's local one; on one nothing is. Shapes are those of
each GPU. Before a case is timed its outputs, gradients and statistics are compared: float32 with Flax's; in bfloat16, where each
of 20 layers rounds, ours and Flax's are both held against Flax's in float32.
"""

from __future__ import annotations

import argparse
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import exp, log
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jax_cpu import AXIS, PEERS, Layer, flax, ours, scan_of
from rows import provenance, quantiles, write

SHAPES = [(32, 112, 112, 64), (32, 56, 56, 256), (32, 28, 28, 512), (32, 14, 14, 1024), (32, 7, 7, 2048)]
SMALL = [(4, 6, 6, 8), (2, 3, 3, 32)]
LAYERS, REPEATS = 20, 5
# A layer's passes over its input at the least: x twice and y once forward; x and dy twice and dx once backward.
FLOOR_PASSES = 8
PEERS_ALONE: dict[str, Layer] = {"syncbn": ours(None), "flax": flax(None)}
# Largest difference from Flax after 20 layers in float32, relative to the largest value; and, in bfloat16, how much farther from
# the truth ours may be than Flax's.
TOLERANCE, FARTHER = 1e-4, 2
COLLECTIVES = re.compile(r" (all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all)(?:-start)?\(")
EACH, SAME = PartitionSpec(AXIS), PartitionSpec()


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

    run = scan_of(in_dtype)

    def local(x: Any, dy: Any, weights: Any, statistics: Any) -> Any:
        y, pull, moved = jax.vjp(lambda x, w: run(x, w, statistics), x, weights, has_aux=True)
        dx, gradients = pull(dy)
        return {"y": y, "dx": dx, **jax.tree.map(lambda v: v[None], {"gradients": gradients, "moved": moved})}

    step = jax.shard_map(local, mesh=mesh, in_specs=(EACH, EACH, SAME, SAME), out_specs=EACH, check_vma=False)
    return jax.jit(step).lower(*given)


def compiled(peers: dict[str, Layer], dtype: str, mesh: Mesh, given: tuple[Any, ...]) -> dict[str, Any]:
    """Each peer's program; compiled side by side, which takes most of the benchmark's time."""
    steps = [lowered(layer, dtype, mesh, given) for layer in peers.values()]
    with ThreadPoolExecutor() as pool:
        return dict(zip(peers, pool.map(lambda step: step.compile(), steps), strict=True))


def differences(got: Any, expected: Any) -> dict[str, float]:
    """The largest difference of each quantity, relative to its largest value."""

    @jax.jit
    def error(a: Any, b: Any) -> Any:
        a, b = a.astype("float32"), b.astype("float32")
        return jnp.abs(a - b).max() / jnp.maximum(jnp.abs(b).max(), jnp.finfo("float32").tiny)

    return {jax.tree_util.keystr(path): float(e) for path, e in jax.tree.leaves_with_path(jax.tree.map(error, got, expected))}


def compare(dtype: str, programs: dict[str, Any], mesh: Mesh, given: tuple[Any, ...]) -> tuple[bool, str]:
    """Whether ours is as right as Flax's that does the same, and by how much both are off. They are the first two programs."""
    (ours, theirs), flaxs = [program(*given) for program in list(programs.values())[:2]], list(programs)[1]
    if dtype == "float32":
        errors = differences(ours, theirs)
        # NaN is no agreement either.
        return all(e <= TOLERANCE for e in errors.values()), f"differs from Flax by {max(errors.values()):.0e}"
    wide = jax.tree.map(lambda v: v.astype("float32") if v.dtype == dtype else v, given)
    truth = compiled({flaxs: (PEERS if mesh.size > 1 else PEERS_ALONE)[flaxs]}, "float32", mesh, wide)[flaxs](*wide)
    of_ours, of_theirs = differences(ours, truth), differences(theirs, truth)
    right = all(e <= max(FARTHER * of_theirs[name], TOLERANCE) for name, e in of_ours.items())
    return right, "off by " + ", ".join(f"{name} {e:.0e} (Flax {of_theirs[name]:.0e})" for name, e in of_ours.items())


def in_turns(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds per layer; peers take turns within each round, in an order that rotates."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for _ in range(rounds):
        for name in order:
            start = time.perf_counter()
            for _ in range(REPEATS):
                jax.block_until_ready(steps[name]())
            seconds[name].append((time.perf_counter() - start) / REPEATS / LAYERS)
        order = order[1:] + order[:1]
    return seconds


def bandwidth(size: int) -> float:
    """Bytes a second of a copy on the device, read and written."""
    x = jnp.zeros(size, "float32")
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


def times(
    rounds: int, devices: int = 1, shapes: list[tuple[int, ...]] = SHAPES, hlo: Path | None = None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of seconds per layer, a case after the other, and the cases that are wrong; `hlo`: where programs of one are kept."""
    mesh, peers = Mesh(np.array(jax.devices()[:devices]), (AXIS,)), PEERS if devices > 1 else PEERS_ALONE
    device, speed, rows = jax.devices()[0].device_kind, bandwidth(2**28 if shapes is SHAPES else 2**20), []
    wrong = []
    for dtype in ("float32", "bfloat16"):
        for shape in shapes:
            case, given = f"{dtype} {'x'.join(map(str, shape))}", arguments(shape, dtype, mesh)
            programs = compiled(peers, dtype, mesh, given)
            if hlo and (dtype, shape) == ("bfloat16", shapes[1]):
                keep(hlo, case, programs)
            right, errors = compare(dtype, programs, mesh, given)
            wrong += [] if right else [case]
            seconds = in_turns({name: partial(program, *given) for name, program in programs.items()}, rounds)
            floor = float(FLOOR_PASSES * np.prod(shape) * jnp.dtype(dtype).itemsize / speed)
            common = {"quantity": "seconds per layer", "dtype": dtype, "shape": shape, "layers": LAYERS, "replicas": devices,
                      "rounds": rounds, "device": device, "bytes per second": speed, "floor": floor}  # fmt: skip
            for name, program in programs.items():
                row = {"peer": name, **common, **quantiles(seconds[name])}
                # The scan's body stands in a program once.
                counted = Counter(COLLECTIVES.findall(program.as_text()))
                rows.append({**row, "floor / median": floor / row["median"], "collectives per layer": counted})
            medians = [f"{row['peer']} {row['median'] * 1e6:.0f} us" for row in rows[-len(programs) :]]
            print(f"{case}: {'' if right else 'WRONG: '}{errors}; {', '.join(medians)}", flush=True)
    return rows, wrong


def keep(folder: Path, case: str, programs: dict[str, Any]) -> None:
    """The optimized programs as text, a file a peer."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, program in programs.items():
        (folder / f"{name} {case}.txt".replace(" ", "-")).write_text(program.as_text())


def table(rows: list[dict[str, Any]]) -> str:
    """µs per layer with the collectives, and ours over each peer and over the floor; then geometric means."""
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    lines = [["", *peers, *[f"ours / {peer}" for peer in peers[1:]], "ours / floor"]]
    ratios: dict[str, list[list[float]]] = {"all": []}
    for i in range(0, len(rows), len(peers)):
        of = rows[i : i + len(peers)]
        against = [of[0]["median"] / other for other in [*[row["median"] for row in of[1:]], of[0]["floor"]]]
        for key in (of[0]["dtype"], "all"):
            ratios.setdefault(key, []).append(against)
        cells = [f"{row['median'] * 1e6:.0f} us, {sum(row['collectives per layer'].values())} coll." for row in of]
        lines.append([f"{of[0]['dtype']} {'x'.join(map(str, of[0]['shape']))}", *cells, *[f"{r:.2f}" for r in against]])
    for key, columns in ratios.items():
        means = [exp(sum(map(log, column)) / len(column)) for column in zip(*columns, strict=True)]
        lines.append([f"geometric mean, {key}", *[""] * len(peers), *[f"{mean:.2f}" for mean in means]])
    return "\n".join("".join(f"{cell:>27}" for cell in line) for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, help="where the rows are copied to, besides benchmarks/results/")
    parser.add_argument("--devices", type=int, default=0, help="how many GPUs; all of them unless given")
    parser.add_argument("--rounds", type=int, default=9, help="rounds per shape; the peers take turns in each")
    parser.add_argument("--hlo", type=Path, help="a folder for the optimized programs of one case, bfloat16 32×56×56×256")
    parser.add_argument("--small", action="store_true", help="small shapes, to try the script on host devices; no rows are kept")
    given = parser.parse_args()
    devices = given.devices or jax.device_count()
    rows, wrong = times(given.rounds, devices, SMALL if given.small else SHAPES, given.hlo)
    print(table(rows))
    if not given.small:
        name, where = "jax-gpu" if devices == 1 else f"jax-gpu-x{devices}", provenance("jax", "flax", "numpy")
        path = write(name, [{"benchmark": name, **row, **where} for row in rows])
        if given.out:
            shutil.copy(path, given.out)
        print(f"{len(rows)} rows in {path}")
    if wrong:
        raise SystemExit(f"Farther from the truth than Flax's: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
