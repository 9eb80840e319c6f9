"""JAX: the devices, and a known batch over all of them."""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from syncbn.doctor import Report, version
from syncbn.doctor.batch import EPSILON, errors, known
from syncbn.functional import sync_batch_norm

# On a CPU, so that there is something to exchange; unless a number was set.
CPU_DEVICES = 2


def report() -> Report:
    """Synchronises a known batch over the devices of this process, with `jax.shard_map`."""
    is_set = (
        "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
        or getattr(jax.config, "jax_num_cpu_devices", -1) > 0
    )
    if not is_set:
        jax.config.update("jax_num_cpu_devices", CPU_DEVICES)
    devices = jax.local_devices()
    on_cpu = devices[0].platform == "cpu"
    made = ", made for this check" if on_cpu and not is_set else ""
    kinds = "CPU" if on_cpu else ", ".join(sorted({device.device_kind for device in devices}))
    lines = [
        ("jax", f"{jax.__version__}, jaxlib {version('jaxlib')}"),
        ("flax", version("flax")),
        ("devices", f"{len(devices)} × {kinds}{made}"),
        ("processes", str(jax.process_count())),
        ("kernels", "XLA's, compiled with the model as one program"),
        ("exchange", "one all-gather forward, one all-reduce backward" if len(devices) > 1 else "none: there is one device"),
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
