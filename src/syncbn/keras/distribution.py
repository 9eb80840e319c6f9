"""The replicas of a `keras.distribution`: those among which JAX's mesh shards the batch."""

from __future__ import annotations

from typing import Any

import keras

from syncbn.groups import Group, Sharded
from syncbn.keras import _private


def group_of(size: int | None, weight: Any) -> Group:
    """The group of a layer with this `group_size`. Its `weight`, [C], tells whether a mesh axis shards the channels.

    The engine takes axis 0 of the input for the batch where the mesh divides it, and sums over the global array elsewhere.
    """
    found = keras.distribution.distribution()
    if found is None or found.batch_dim_name is None:
        return size
    return Sharded(_private.backend_mesh(found.device_mesh), found.batch_dim_name, _channels(found, weight), size)


def _channels(found: Any, weight: Any) -> str | None:
    layout = found.get_variable_layout(weight)
    # Some versions of Keras, 3.10 among them, hand out JAX's own sharding of a variable that exists.
    axes: Any = () if layout is None else layout.axes if hasattr(layout, "axes") else layout.spec
    return None if len(axes) != 1 or axes[0] == found.batch_dim_name else axes[0]
