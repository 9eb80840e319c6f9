"""The layers that are measured, one adapter each: how to make it. All are Keras layers that take (x, training=True)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def tensorflow_peers() -> dict[str, Callable[[], Any]]:
    """Ours first, then Keras's synchronised layer, then its unsynchronised one."""
    import keras

    import syncbn

    return {
        "syncbn": syncbn.SyncBatchNormalization,
        "keras synchronized": lambda: keras.layers.BatchNormalization(synchronized=True),
        "keras unsynchronised": keras.layers.BatchNormalization,
    }
