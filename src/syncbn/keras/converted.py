"""The class of a converted layer: ours, under the name of the class that was there.

Keras makes the keys of a file from the names of classes. With the former name a converted model reads and writes the files of
the model that it was, and a model whose class builds plain batch norms reads those of the converted one.
"""

from __future__ import annotations

from typing import Any

import keras

from syncbn.keras.layer import SyncBatchNormalization

PLAIN = keras.layers.BatchNormalization.__name__
# What a plain layer's constructor does not take, with the value at which a configuration leaves it out. Keras takes renorm from
# 3.14 on, with these defaults.
RENORM_DEFAULTS = {"renorm": False, "renorm_momentum": 0.99, "renorm_clipping": None}
OURS_ALONE = {"adjustment": None, "group_size": None, "axis_name": None, "activation": "linear", **RENORM_DEFAULTS}
_CLASSES: dict[str, type[SyncBatchNormalization]] = {}


class Converted(SyncBatchNormalization):
    """What the classes of converted layers share: configurations that a plain layer can read too."""

    def get_config(self) -> dict[str, Any]:
        """As our layer's; without what has no effect, and with the name of a class that is not Keras's own."""
        config = super().get_config()
        config = {key: v for key, v in config.items() if key not in OURS_ALONE or v != OURS_ALONE[key]}
        return config if type(self).__name__ == PLAIN else {**config, "former": type(self).__name__}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SyncBatchNormalization:
        """The layer, under the same name as before."""
        name = str(config.get("former"))
        named = class_named(name if "former" in config and name.isidentifier() else PLAIN)
        if cls is not named:
            return named.from_config(config)
        return super().from_config({key: v for key, v in config.items() if key != "former"})

    def load_own_variables(self, store: Any) -> None:
        """As every layer; says what reads a file in which this layer has another key."""
        if self.weights and not len(store.keys()):
            raise ValueError(
                "Keras looks for a layer under the name of its class, and its number among layers of that class. Received: "
                f"a file without one for the converted layer {self.name}. Load it with syncbn.load_weights(model, path), "
                "which takes any batch norm for another."
            )
        super().load_own_variables(store)


def class_named(name: str) -> type[SyncBatchNormalization]:
    """The class of converted layers whose class had this name."""
    if name not in _CLASSES:
        # Without syncbn Keras looks for a class where its configuration says: there it finds its own.
        module = keras.layers.BatchNormalization.__module__ if name == PLAIN else __name__
        made = type(
            name,
            (Converted,),
            {"__module__": module, "__qualname__": SyncBatchNormalization.__name__, "__doc__": SyncBatchNormalization.__doc__},
        )
        # One name for all: a configuration says which of them is meant.
        _CLASSES[name] = keras.saving.register_keras_serializable("syncbn", "Converted")(made)
    return _CLASSES[name]


def is_exactly_ours(layer: Any) -> bool:
    """Whether a layer is ours, converted or not, and of no subclass that somebody wrote."""
    return type(layer) in (SyncBatchNormalization, *_CLASSES.values())


# Registered as soon as syncbn.keras is imported: a file may come before any conversion.
class_named(PLAIN)
