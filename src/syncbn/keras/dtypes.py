"""In which dtype the Keras layer computes."""

from __future__ import annotations

from typing import Any

import keras

from syncbn import validation


def of_inputs(dtype: Any, compute_dtype: str) -> str:
    """The dtype in which inputs are normalised: a float dtype that holds them, no narrower than the layer's compute dtype.

    Integers and bools are read as float32, or as a wider compute dtype, as Keras's layer reads them.
    """
    dtype = keras.backend.standardize_dtype(dtype)
    if keras.backend.is_int_dtype(dtype) or dtype == "bool":
        dtype = "float32"
    validation.check_float_dtype(dtype, keras.backend.is_float_dtype(dtype))
    if dtype == compute_dtype:
        return dtype
    return "float64" if "float64" in (dtype, compute_dtype) else "float32"


def float32_or_wider(dtype: Any) -> str:
    """float64 for float64, else float32."""
    return "float64" if keras.backend.standardize_dtype(dtype) == "float64" else "float32"
