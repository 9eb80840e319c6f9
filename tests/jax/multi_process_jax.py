"""One of the two processes of test_multi_process_jax.py: two devices of four, one step of a chain of two layers."""

from __future__ import annotations

import sys

import jax
import numpy as np
from cases import Case
from jax.sharding import Mesh, PartitionSpec

from syncbn.functional import sync_batch_norm

CASE = Case("two processes", (3, 3, 3, 3), (4, 3), mask="one replica")


def step(x, dy, mask, scale, offset):
    """Outputs and all gradients of one device."""

    def f(x, scale, offset):
        y, *moments = sync_batch_norm(x, scale, offset, mask=mask, axis_name="data")
        return y, moments

    y, pull, moments = jax.vjp(f, x, scale, offset, has_aux=True)
    return y, *pull(dy), *moments


def main(port: str, rank: int, path: str) -> None:
    """Writes what this process's two devices saw."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank, initialization_timeout=60)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    each, same = PartitionSpec("data"), PartitionSpec()
    own = slice(2 * rank, 2 * rank + 2)
    given = [
        jax.make_array_from_process_local_data(jax.NamedSharding(mesh, each), np.concatenate(arrays[own]))
        for arrays in (CASE.inputs(4), CASE.cotangents(4), CASE.masks(4))
    ]
    scale, offset = (v[0] for v in CASE.parameters(4))
    program = jax.shard_map(
        step, mesh=mesh, in_specs=(each, each, each, same, same), out_specs=(each, each, same, same, same, same, same)
    )
    names = ("y", "dx", "dscale", "doffset", "mean", "variance", "count")
    out = dict(zip(names, jax.jit(program)(*given, scale, offset), strict=True))
    np.savez(path, **{name: np.concatenate([s.data for s in v.addressable_shards]) if name in ("y", "dx")
                      else np.asarray(v.addressable_shards[0].data) for name, v in out.items()})  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
