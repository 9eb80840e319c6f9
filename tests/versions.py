"""What older versions of Keras lack: tests that need it are skipped there."""

from __future__ import annotations

import inspect

import keras
import pytest

VERSION = tuple(map(int, keras.__version__.split(".")[:2]))
KERAS_HAS_RENORM = "renorm" in inspect.signature(keras.layers.BatchNormalization.__init__).parameters
KERAS_RENORM = "Keras has no renorm before 3.14"
needs_keras_renorm = pytest.mark.skipif(not KERAS_HAS_RENORM, reason=KERAS_RENORM)
needs_remat_scope = pytest.mark.skipif(not hasattr(keras, "RematScope"), reason="Keras has no RematScope before 3.9")
reads_files_of_keras_3_15 = pytest.mark.skipif(
    VERSION < (3, 14), reason="older versions do not know what Keras 3.15 writes of initializers"
)
