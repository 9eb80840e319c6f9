"""JAX on several hosts: one mesh over the devices of all processes. Started as examples/two_hosts.md says."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from syncbn.functional import sync_batch_norm


def main(address, processes, number):
    """Normalises a batch that lies on all processes, and prints the mean: it is the same on every process."""
    jax.distributed.initialize(address, num_processes=int(processes), process_id=int(number))
    mesh, own = jax.sharding.Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data")
    # Every process has images of its own.
    mine = np.random.default_rng(int(number)).normal(size=(4 * jax.local_device_count(), 8)).astype("float32")
    x = jax.make_array_from_process_local_data(NamedSharding(mesh, own), mine)

    @jax.jit
    def step(x):
        def replica(x):
            y, mean, _, count = sync_batch_norm(x, jnp.ones(8), jnp.zeros(8), axis_name="data")
            return y, mean, count

        return jax.shard_map(replica, mesh=mesh, in_specs=own, out_specs=(own, PartitionSpec(), PartitionSpec()))(x)

    _, mean, count = step(x)
    print(f"process {number} of {jax.process_count()}, {int(count)} values per channel, mean {np.asarray(mean)[:3]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
