"""What older versions of the frameworks lack: tests that need it are skipped there."""

from __future__ import annotations

import importlib.metadata
import re

import pytest


def version(package):
    """(major, minor), or (0, 0) where it is not installed."""
    try:
        return tuple(map(int, re.findall(r"\d+", importlib.metadata.version(package))[:2]))
    except importlib.metadata.PackageNotFoundError:
        return 0, 0


KERAS, TORCH, JAX = version("keras"), version("torch"), version("jax")
KERAS_HAS_RENORM = KERAS >= (3, 14)
KERAS_RENORM = "Keras has no renorm before 3.14"
needs_keras_renorm = pytest.mark.skipif(not KERAS_HAS_RENORM, reason=KERAS_RENORM)
needs_remat_scope = pytest.mark.skipif(KERAS < (3, 9), reason="Keras has no RematScope before 3.9")
reads_files_of_keras_3_15 = pytest.mark.skipif(
    KERAS < (3, 14), reason="older versions do not know what 3.15 writes of initializers"
)
# `x * 2` fails there too.
needs_members_on_a_mesh = pytest.mark.skipif(
    JAX < (0, 10), reason="a typed shard_map under vmap with a spmd_axis_name fails in JAX itself before 0.10"
)
needs_axes_of_pmap = pytest.mark.skipif(JAX < (0, 8), reason="the axes of pmap are not seen before JAX 0.8")
