"""What JAX does not publish, or only as an experiment, and the engine needs."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import jax
from jax import lax

try:
    # Keeps a call from being inlined: only then does XLA on the CPU compute an array once for several readers. Without it the
    # engine is slower, and right.
    from jax.experimental.xla_metadata import set_xla_metadata
except ImportError:
    set_xla_metadata = None  # type: ignore[assignment]


def gather_invariant(v: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """[replicas, …] along typed axes, typed as the same on all replicas. Before JAX 0.10 no public function does that."""
    if "to" in inspect.signature(lax.all_gather).parameters:
        return lax.all_gather(v, names, to="invarying")
    try:
        from jax._src.lax.parallel import all_gather_invariant
    except ImportError as error:
        raise RuntimeError(
            'syncbn needs a gather whose result is typed as invariant: jax.lax.all_gather(…, to="invarying"), or JAX\'s own '
            f"`all_gather_invariant`. Received: JAX {jax.__version__}, which has neither. Install JAX 0.10, or use "
            "shard_map(…, check_vma=False)."
        ) from error
    return all_gather_invariant(v, names)


def to_varying(v: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """v, typed as varying along these axes, along which it was the same on all replicas."""
    if hasattr(lax, "pcast"):
        return lax.pcast(v, names, to="varying")
    former: Any = lax  # before JAX 0.8
    return former.pvary(v, names)


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
