"""What JAX does not publish, or only as an experiment, and the engine needs."""

from __future__ import annotations

import contextlib
from typing import Any

import jax

try:
    # Keeps a call from being inlined: only then does XLA on the CPU compute an array once for several readers. Without it the
    # engine is slower, and right.
    from jax.experimental.xla_metadata import set_xla_metadata
except ImportError:
    set_xla_metadata = None  # type: ignore[assignment]


def varying_axes(v: Any) -> frozenset[str]:
    """The axes along which a typed value differs between replicas. The attribute has had two names."""
    kind = jax.typeof(v)
    with contextlib.suppress(AttributeError):
        return kind.manual_axis_type.varying
    try:
        return kind.vma
    except AttributeError as error:
        raise RuntimeError(
            "syncbn needs the axes along which an array varies: `jax.typeof(x).manual_axis_type` or `.vma`. Received: JAX "
            f"{jax.__version__}, which has neither. Install JAX 0.10, or a later version of syncbn."
        ) from error
