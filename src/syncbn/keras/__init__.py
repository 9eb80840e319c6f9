"""Synchronised batch normalization for Keras 3, on each of its backends."""

from syncbn.keras.layer import SyncBatchNormalization
from syncbn.keras.legacy import load_legacy
from syncbn.keras.weights import load_weights

__all__ = ["SyncBatchNormalization", "load_legacy", "load_weights"]
