"""The replicas of a `keras.distribution`: those among which JAX's mesh shards the batch."""

from __future__ import annotations

from typing import Any

import keras

from syncbn.groups import Group, Sharded


def group_of(size: int | None, weight: Any) -> Group:
    """The group of a layer with this `group_size`. Its `weight`, [C], tells whether a mesh axis shards the channels.

    The engine takes axis 0 of the input for the batch where the mesh divides it, and sums over the global array elsewhere.
    """
    found = keras.distribution.distribution()
    if found is None or found.batch_dim_name is None:
        return size
    return Sharded(found.device_mesh.backend_mesh, found.batch_dim_name, _channels(found, weight), size)


def _channels(found: Any, weight: Any) -> str | None:
    layout = found.get_variable_layout(weight)
    if layout is None or len(layout.axes) != 1 or layout.axes[0] == found.batch_dim_name:
        return None
    return layout.axes[0]
