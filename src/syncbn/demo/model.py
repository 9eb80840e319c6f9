"""The network, in Keras, for TensorFlow and JAX. PyTorch's stands in `torch.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

import syncbn
from syncbn.demo import LOCAL, RENORM, SYNCED
from syncbn.demo.data import CLASSES

# Short runs: the default momentum of 0.99 would still remember the initial statistics.
MOMENTUM = 0.9

# On JAX the layer is told which axis the replicas are along.
LAYERS: dict[str, Callable[..., Any]] = {
    LOCAL: lambda: keras.layers.BatchNormalization(momentum=MOMENTUM),
    SYNCED: lambda **along: syncbn.SyncBatchNormalization(momentum=MOMENTUM, **along),
    RENORM: lambda **along: syncbn.SyncBatchNormalization(momentum=MOMENTUM, renorm=True, renorm_momentum=MOMENTUM, **along),
}


def network(norm: Callable[[], Any]) -> keras.Sequential:
    """Two convolutions and a dense layer, each with a batch norm after it; [N, 8, 8, 1] to logits [N, 10]."""
    return keras.Sequential([
        keras.Input((8, 8, 1)),
        keras.layers.Conv2D(16, 3, use_bias=False),
        norm(),
        keras.layers.ReLU(),
        keras.layers.Conv2D(32, 3, use_bias=False),
        norm(),
        keras.layers.ReLU(),
        keras.layers.GlobalAveragePooling2D(),
        keras.layers.Dense(32, use_bias=False),
        norm(),
        keras.layers.ReLU(),
        keras.layers.Dense(CLASSES),
    ])  # fmt: skip
