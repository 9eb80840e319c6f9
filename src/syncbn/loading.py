"""`load_weights`: what is no Keras model is told before Keras, and with it a framework, is imported."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from syncbn.validation import FOREIGN_TO_LOADING, foreign_model


def load_weights(model: Any, path: Any) -> Any:
    """Loads weights into a Keras model, from any file of Keras 2 or 3, whichever batch norm classes wrote it and the model has.

    A file's kind is told by its content, whatever its name. How layers are matched depends on it: see the table. Every name and
    shape is checked before any weight is changed. Optimizer states are left out.

    | file | how layers are matched |
    |---|---|
    | HDF5 of Keras 2, weights alone or a whole model | names of layers, else order; names of weights |
    | TensorFlow checkpoint: its prefix, its `.index`, or a folder with a file `checkpoint` | attributes; order of layers |
    | SavedModel, of a subclassed model too | as a checkpoint |
    | `.weights.h5` or `.keras` of Keras 3, or of TensorFlow ≥ 2.12 | classes of layers, and order among the same class |

    Args:
        model: a Keras 3 model that is built.
        path: of the file or folder. Checkpoints and SavedModels are read with TensorFlow.

    Returns:
        the model.

    Raises:
        FileNotFoundError: nothing there.
        TypeError: something that is no Keras 3 layer or model.
        ImportError: a checkpoint or a SavedModel, and TensorFlow is not installed.
        ValueError: a file of another kind, or broken; a model that is not built; weights that do not fit, by name. The model is
            unchanged.

    Source: the formats of TensorFlow 2.2 to 2.15, tf_keras, and Keras 3.

    Example:
        >>> import keras, os, syncbn, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "plain.weights.h5")
        >>> plain = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization()])
        >>> plain.save_weights(path)
        >>> ours = keras.Sequential([keras.Input((3,)), syncbn.SyncBatchNormalization()])
        >>> syncbn.load_weights(ours, path) is ours
        True
    """
    if sys.modules.get("keras") is None:
        raise foreign_model("syncbn.load_weights", "a Keras 3 layer or model", model, FOREIGN_TO_LOADING)
    return importlib.import_module("syncbn.keras.weights").load_weights(model, path)
