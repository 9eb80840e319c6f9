"""What XLA has to be told: which array to compute once, and which value to round."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

try:
    from jax.experimental.xla_metadata import set_xla_metadata
except ImportError:  # an older or newer JAX: the plain barrier is right too, only slower
    set_xla_metadata = None  # type: ignore[assignment]


def materialised(v: jax.Array) -> jax.Array:
    """v, computed once and kept, however many passes read it.

    XLA duplicates cheap operators into each of their readers. A batch norm reads its input in three passes, so in a chain of
    them each pass would compute all layers before it again (2.7 times Flax's time at 20 layers; with this 0.95). On the CPU
    XLA drops barriers before it fuses, but fuses nothing into a call that it may not inline.
    """
    if set_xla_metadata is None:
        return lax.optimization_barrier(v)
    return lax.platform_dependent(v, cpu=_behind_a_call, default=lax.optimization_barrier)


@jax.jit
def _kept(v: jax.Array) -> jax.Array:
    return lax.optimization_barrier(v)


def _behind_a_call(v: jax.Array) -> Any:
    with set_xla_metadata(inlineable="false"):
        return _kept(v)


def summed(*sums: jax.Array) -> Any:
    """Sums over what is made of the same arrays, kept apart from what reads them.

    XLA on GPUs else puts one of them into its reader, where a single thread adds all that a channel has, and the others into
    a pass of their own. On the CPU the barrier is gone before XLA fuses.
    """
    return lax.optimization_barrier(sums)


def rounded(v: jax.Array) -> jax.Array:
    """v, for a subtraction that needs the rounded value: compilers make x − total·(1/n) one operation that rounds once."""
    return jnp.maximum(v, jnp.finfo(v.dtype).min)
