"""The errors of `load_weights` and `load_legacy`: rule, what was received, mend."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def not_a_model(verb: str, model: Any) -> TypeError:
    """Neither torch's nor Keras's."""
    cls = type(model)
    return TypeError(
        f"{verb} takes a torch.nn.Module or a Keras 3 layer or model. Received: {cls.__module__}.{cls.__qualname__}. For Flax, "
        "Equinox and Haiku call syncbn.functional.sync_batch_norm in the layer; for tf_keras save the model and give the file to "
        "syncbn.load_legacy."
    )


def not_weights(path: Any, received: str) -> ValueError:
    """A file that is no `.weights.h5`."""
    return ValueError(
        "syncbn.load_weights reads `.weights.h5` files, as model.save_weights of Keras 3 (or of tf_keras ≥ 2.12) writes them. "
        f"Received: {path}, {received}. A whole model loads with keras.models.load_model or syncbn.load_legacy, an old `.h5` of "
        "weights alone with model.load_weights."
    )


def not_built(name: str) -> ValueError:
    """A model without weights yet."""
    return ValueError(
        f"A model must be built before weights are loaded into it. Received: {name}, which is not. Call it on some data, or give "
        "it an Input."
    )


def weights_do_not_fit(path: Any, missing: Iterable[str], unused: Iterable[str], other: Iterable[str]) -> ValueError:
    """What is on one side alone, or of another shape."""
    parts = [
        f"{what}: {', '.join(names)}"
        for what, names in (
            ("in the model, not in the file", list(missing)),
            ("in the file, not in the model", list(unused)),
            ("of other shapes", list(other)),
        )
        if names
    ]
    return ValueError(
        f"The file must hold the weights of this model. Received: {path}, where these do not fit: {'; '.join(parts)}. Build the "
        "model that wrote the file, with the same layers and the same `renorm`. No weight was changed."
    )


LEGACY = (
    "syncbn.load_legacy reads whole models that Keras 2 wrote as `.h5` or as a SavedModel, of the Sequential or functional kind."
)


def not_legacy(path: Any, received: str, mend: str) -> ValueError:
    """A file of another kind."""
    return ValueError(f"{LEGACY} Received: {path}, {received}. {mend}")


KERAS_2_MENDS = {
    "keras": "A file of Keras 3 loads with keras.models.load_model; one of tf_keras must be written again, by tf_keras, as `.h5`",
    "subclassed": "For inference alone use keras.layers.TFSMLayer(path); to train, build the model in code and give it the "
    "weights of a `.h5` file by model.load_weights",
    "no config": "For inference alone use keras.layers.TFSMLayer(path); to train, write the model again, by the version that "
    "made it, as `.h5`",
    "weights": "Build the model in code and call model.load_weights, or syncbn.load_weights for a `.weights.h5`",
    "other": "Give the path of such a file",
}


def several_axes(name: str, axis: Sequence[int]) -> ValueError:
    """What Keras 3's own layer cannot."""
    return ValueError(
        f"keras.layers.BatchNormalization of Keras 3 takes one axis. Received: the layer {name!r} with axis={list(axis)}. Load "
        "with convert=True, which makes every batch norm ours."
    )


def variables_do_not_fit(path: Any, names: Iterable[str]) -> ValueError:
    """A SavedModel whose variables are not those of its configuration."""
    return ValueError(
        f"A SavedModel must hold a value for each variable that its configuration makes. Received: {path}, where these have "
        f"none, or one of another shape: {', '.join(names)}. Write the model again, by tf_keras, as `.h5`."
    )
