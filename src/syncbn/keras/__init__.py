"""Synchronised batch normalization for Keras 3, on each of its backends."""

from syncbn import _missing

try:
    from syncbn.keras import converted  # noqa: F401  registers the class that files of converted layers name
    from syncbn.keras.layer import SyncBatchNormalization
    from syncbn.keras.legacy import load_legacy
    from syncbn.keras.weights import load_weights
except ImportError as error:
    raise _missing.explained("syncbn.keras", error, "tensorflow") from error

__all__ = ["SyncBatchNormalization", "load_legacy", "load_weights"]
