"""Private and experimental names of JAX that the engine uses: what this version lacks is named here."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from syncbn.jax import _private, xla


def test_jax_still_keeps_calls_from_being_inlined():
    assert _private.set_xla_metadata is not None, f"JAX {jax.__version__} has no jax.experimental.xla_metadata.set_xla_metadata"


def test_without_it_arrays_are_the_same(monkeypatch):
    monkeypatch.setattr(_private, "set_xla_metadata", None)
    x = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
    np.testing.assert_array_equal(jax.jit(xla.materialised)(x), x)


def test_jax_still_says_along_which_axes_an_array_varies():
    seen = []

    def f(x):
        seen.append((_private.varying_axes(x), _private.varying_axes(jax.lax.psum(x, "replica"))))
        return x

    spec = PartitionSpec("replica")
    jax.shard_map(f, mesh=Mesh(np.array(jax.devices()[:2]), ("replica",)), in_specs=spec, out_specs=spec)(jnp.ones((2, 3)))
    assert seen == [(frozenset({"replica"}), frozenset())]


def test_the_former_name_is_read(monkeypatch):
    monkeypatch.setattr(jax, "typeof", lambda v: SimpleNamespace(vma=frozenset({"replica"})))
    assert _private.varying_axes(jnp.ones(3)) == {"replica"}


def test_without_either_name_the_error_says_the_version(monkeypatch):
    monkeypatch.setattr(jax, "typeof", lambda v: SimpleNamespace())
    with pytest.raises(RuntimeError, match=rf"Received: JAX {jax.__version__}, which has neither\. Install JAX 0\.10"):
        _private.varying_axes(jnp.ones(3))
