"""Private and experimental names of JAX that the engine uses: what this version lacks is named here."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from syncbn.jax import _private, xla


def test_jax_still_keeps_calls_from_being_inlined():
    assert _private.set_xla_metadata is not None, f"JAX {jax.__version__} has no jax.experimental.xla_metadata.set_xla_metadata"


def test_without_it_arrays_are_the_same(monkeypatch):
    monkeypatch.setattr(_private, "set_xla_metadata", None)
    x = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
    np.testing.assert_array_equal(jax.jit(xla.materialised)(x), x)


def test_jax_still_takes_operators_of_ones_own():
    assert _private.Primitive is not None, (
        f"JAX {jax.__version__} lacks jax.extend.core.Primitive or jax.interpreters' ad, batching or mlir"
    )


def test_without_them_the_default_runs(monkeypatch):
    monkeypatch.setattr(_private, "Primitive", None)
    assert _private.identity_operator("name", cpu=abs, default=jnp.negative) is jnp.negative


def test_the_operator_under_transformations():
    """An identity, linear, along each axis of a batch."""
    x, t = np.random.default_rng(0).normal(size=(2, 4, 3)).astype("float32")

    def f(x):
        return jnp.sin(xla.materialised(jnp.cos(x)))

    def plain(x):
        return jnp.sin(jnp.cos(x))

    for got, expected in zip(*((jax.jvp(g, (x,), (t,)), jax.vjp(g, x)[1](t), jax.vmap(g, 1, 1)(x),
                                jax.jvp(jax.grad(lambda x, g=g: jnp.vdot(g(x), t)), (x,), (t,))) for g in (f, plain)), strict=True):  # fmt: skip
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_jax_still_says_along_which_axes_an_array_varies():
    seen = []

    def f(x):
        seen.append((_private.varying_axes(x), _private.varying_axes(jax.lax.psum(x, "replica"))))
        return x

    spec = PartitionSpec("replica")
    jax.shard_map(f, mesh=Mesh(np.array(jax.devices()[:2]), ("replica",)), in_specs=spec, out_specs=spec)(jnp.ones((2, 3)))
    assert seen == [(frozenset({"replica"}), frozenset())]


def mapped_along_replicas(f, *axes):
    mesh = Mesh(np.array(jax.devices()[:2]), ("replica",))
    return jax.shard_map(f, mesh=mesh, in_specs=PartitionSpec("replica"), out_specs=PartitionSpec(*axes))(
        jnp.arange(6.0).reshape(2, 3)
    )


def former_all_gather(x, axis_name, *, axis=0, tiled=False):
    """The signature of JAX before 0.10."""
    raise AssertionError("its result is typed as varying")


@pytest.mark.parametrize("former", [False, True])
def test_a_gather_is_typed_as_the_same_everywhere(former, monkeypatch):
    if former:
        # JAX 0.12 has the public gather alone.
        parallel, gather = pytest.importorskip("jax._src.lax.parallel"), lax.all_gather
        if not hasattr(parallel, "all_gather_invariant"):
            stand_in = lambda v, names: gather(v, names, to="invarying")  # noqa: E731
            monkeypatch.setattr(parallel, "all_gather_invariant", stand_in, raising=False)
        monkeypatch.setattr(lax, "all_gather", former_all_gather)
    rows = mapped_along_replicas(lambda x: _private.gather_invariant(x[0], ("replica",)))
    np.testing.assert_array_equal(rows, np.arange(6.0).reshape(2, 3))


def test_without_such_a_gather_the_error_says_the_version(monkeypatch):
    monkeypatch.setattr(lax, "all_gather", former_all_gather)
    monkeypatch.setitem(sys.modules, "jax._src.lax.parallel", ModuleType("parallel"))
    with pytest.raises(RuntimeError, match=rf"Received: JAX {jax.__version__}, which has neither\. Install JAX 0\.10"):
        _private.gather_invariant(jnp.ones(3), ("replica",))


@pytest.mark.parametrize("former", [False, True])
def test_a_value_becomes_varying(former, monkeypatch):
    if former:
        monkeypatch.setattr(
            lax, "pvary", getattr(lax, "pvary", None) or (lambda v, names: pcast(v, names, to="varying")), raising=False
        )
        pcast = getattr(lax, "pcast", None)
        monkeypatch.delattr(lax, "pcast", raising=False)
    seen = []
    mapped_along_replicas(
        lambda x: seen.append(_private.varying_axes(_private.to_varying(jnp.ones(3), ("replica",)))) or x,
        "replica",
    )
    assert seen == [{"replica"}]


def test_the_former_name_is_read(monkeypatch):
    monkeypatch.setattr(jax, "typeof", lambda v: SimpleNamespace(vma=frozenset({"replica"})))
    assert _private.varying_axes(jnp.ones(3)) == {"replica"}


def test_without_either_name_the_error_says_the_version(monkeypatch):
    monkeypatch.setattr(jax, "typeof", lambda v: SimpleNamespace())
    with pytest.raises(RuntimeError, match=rf"Received: JAX {jax.__version__}, which has neither\. Install JAX 0\.10"):
        _private.varying_axes(jnp.ones(3))
