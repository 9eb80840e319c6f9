"""The layers that are measured, one adapter each: how to make it. All are Keras layers that take (x, training=True)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def tensorflow_peers(**arguments: Any) -> dict[str, Callable[[], Any]]:
    """Ours first, then Keras's synchronised layer, then its unsynchronised one, all with these arguments."""
    import keras

    import syncbn

    return {
        "syncbn": lambda: syncbn.SyncBatchNormalization(**arguments),
        "keras synchronized": lambda: keras.layers.BatchNormalization(synchronized=True, **arguments),
        "keras unsynchronised": lambda: keras.layers.BatchNormalization(**arguments),
    }
