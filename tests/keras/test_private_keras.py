"""Private names of Keras that the package uses: what this version lacks is named here."""

from __future__ import annotations

import keras
import pytest
from keras import layers
from versions import KERAS, KERAS_HAS_RENORM

import syncbn
from syncbn.keras import _private

NAMES = ["SafeModeScope", "get_keras_mask", "global_state", "in_symbolic_scope", "saving_options", "saving_utils"]


@pytest.mark.parametrize("name", NAMES)
def test_keras_still_has_each_module_and_function(name):
    found = getattr(_private, name)
    assert not isinstance(found, _private.Missing), f"Keras {keras.__version__} has no {name}"


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (_private.global_state, ["get_global_attribute", "set_global_attribute"]),
        (_private.saving_options, ["keras_option_scope"]),
        (_private.saving_utils, ["model_from_config"]),
    ],
    ids=["global_state", "saving_options", "saving_utils"],
)
def test_the_legacy_modules_still_have_each_function(module, names):
    assert [name for name in names if not hasattr(module, name)] == []


def test_keras_still_has_each_attribute_of_a_layer():
    layer = layers.BatchNormalization()
    layer.build((None, 3))
    names = [
        "_tracker",
        "_open_name_scope",
        "_lock_state",
        "_untrack_variable",
        "_flatten_layers",
        *["_remat_mode"] * hasattr(keras, "RematScope"),
        "_reduction_axes",
    ]
    assert [name for name in names if not hasattr(layer, name)] == []
    model = keras.Model(inputs := keras.Input((3,)), layer(inputs))
    assert hasattr(model, "_nodes_by_depth")
    assert hasattr(inputs, "_keras_history")


def test_no_version_lacks_what_it_is_said_to_have():
    assert _private.has_renorm() == KERAS_HAS_RENORM == (KERAS >= (3, 14))


def test_the_wrapper_of_build_still_holds_the_method():
    layer = layers.BatchNormalization()
    _private.change_class(layer, syncbn.SyncBatchNormalization)
    assert type(layer) is syncbn.SyncBatchNormalization


def test_what_vanished_raises_where_it_is_used():
    missing = _private._find("keras.src.backend.common.symbolic_scope", "gone")
    text = rf"needs `keras\.src\.backend\.common\.symbolic_scope\.gone`.*Received: Keras {keras.__version__}, which lacks it\. Install"
    for use in (missing, lambda: missing.load_weights):
        with pytest.raises(RuntimeError, match=text):
            use()
    with pytest.raises(RuntimeError, match=r"needs `keras\.gone\.name`"):
        _private._find("keras.gone", "name")()
    with pytest.raises(RuntimeError, match=r"needs `BatchNormalization\.gone`, which is not public"):
        _private._member(layers.BatchNormalization(), "gone")


def test_without_its_name_the_class_of_functional_models_is_found(monkeypatch):
    expected = _private.functional_class()
    monkeypatch.setattr(_private, "_find", lambda module, name: _private.Missing(name))
    assert _private.functional_class() is expected is type(keras.Model(inputs := keras.Input((3,)), inputs))
