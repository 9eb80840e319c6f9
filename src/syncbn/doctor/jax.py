"""JAX: the devices, and a known batch over all of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from syncbn.doctor import Report, version
from syncbn.doctor.batch import EPSILON, errors, known
from syncbn.functional import sync_batch_norm

# On a CPU, so that there is something to exchange.
CPU_DEVICES = 2


def report() -> Report:
    """Synchronises a known batch over the devices of this process, with `jax.shard_map`."""
    jax.config.update("jax_num_cpu_devices", CPU_DEVICES)
    devices = jax.local_devices()
    kinds = sorted({device.device_kind for device in devices})
    made = " made for this check" if devices[0].platform == "cpu" else ""
    lines = [
        ("jax", f"{jax.__version__}, jaxlib {version('jaxlib')}"),
        ("flax", version("flax")),
        ("devices", f"{len(devices)} × {devices[0].platform} ({', '.join(kinds)}){made}"),
        ("processes", str(jax.process_count())),
        ("passes", "XLA's, one program with the model"),
        ("exchange", "one all-gather each way" if len(devices) > 1 else "none: there is one device"),
    ]
    batch = known(len(devices))
    mesh, own = Mesh(np.array(devices), ("replica",)), PartitionSpec("replica")
    ones, zeros = jnp.ones(batch.x.shape[-1]), jnp.zeros(batch.x.shape[-1])

    def replica(x: Any, dy: Any) -> Any:
        def normalized(x: Any) -> Any:
            y, mean, variance, _ = sync_batch_norm(x, ones, zeros, epsilon=EPSILON, axis_name="replica")
            return y, (mean[None], variance[None])

        y, pull, statistics = jax.vjp(normalized, x, has_aux=True)
        return *statistics, y, pull(dy)[0]

    run = jax.jit(jax.shard_map(replica, mesh=mesh, in_specs=(own, own), out_specs=own, check_vma=False))
    flat = [v.reshape(-1, *v.shape[2:]) for v in batch]
    mean, variance, y, dx = map(np.asarray, run(*flat))
    return Report(lines, len(devices), errors(batch, mean, variance, y.reshape(batch.x.shape), dx.reshape(batch.x.shape)))
