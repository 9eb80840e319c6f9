"""The sums of a pass in the form for GPUs: XLA makes the same numbers of it on the CPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, LARGE_MEAN
from checks import equals_oracle
from jax import export
from test_engine_jax import equal_shards, joined, step
from worlds import JaxWorld

from syncbn import xla_sums
from syncbn.jax import mapped, sums
from syncbn.jax.sums import column_sums, deviations, plain_sums, products, sums_in_stages

SHAPES = [(0, 3), (1, 5), (7, 2), (147, 96), (1568, 128), (20_011, 3), (30_000, 256)]


@pytest.fixture
def many_parts(monkeypatch):
    """Small inputs are summed in parts too."""
    monkeypatch.setattr(xla_sums, "ROWS_OF_PART", 1)
    monkeypatch.setattr(xla_sums, "RESULTS", 12)


def operands_of(shape, dtype, arrays):
    rng = np.random.default_rng(shape)
    values = [jnp.asarray(rng.normal(3, 2, shape), dtype) for _ in range(arrays)]
    return *values, jnp.asarray(rng.normal(3, 0.1, shape[1]), "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("terms", [deviations, products])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stages_equal_float64(shape, terms, dtype):
    *arrays, about = operands_of(shape, dtype, terms.__code__.co_argcount - 1)
    *wide, k = (np.asarray(v, "float64") for v in (*arrays, about))
    rest = wide[-1] - k
    expected = [rest, rest * rest] if terms is deviations else [wide[0], wide[0] * rest]
    got = jax.jit(lambda *v: sums_in_stages(*v, terms=terms))(*arrays, about)
    for found, values in zip(got, expected, strict=True):
        size = max(np.abs(values).sum(0).max(initial=0), 1)
        np.testing.assert_allclose(found, values.sum(0), rtol=0, atol=3e-6 * size)


@pytest.mark.parametrize("case", [c for c in [*CASES, *LARGE_MEAN] if c.dtype != "float64"], ids=lambda case: case.name)
@pytest.mark.parametrize("how", ["checked", "unchecked"])
def test_a_step_in_stages_equals_the_concatenated_batch(monkeypatch, many_parts, how, case):
    monkeypatch.setattr(mapped, "column_sums", sums_in_stages)
    args = equal_shards(case, 4)
    equals_oracle(joined(JaxWorld(4, how).run(step(case), *args)), case, args)


@pytest.mark.parametrize("terms", [deviations, products])
def test_derivatives_and_batches_are_those_of_plain_sums(terms):
    *arrays, about = operands_of((6, 4), "float32", terms.__code__.co_argcount - 1)
    cotangents = [jnp.asarray(v, "float32") for v in np.random.default_rng(1).normal(size=(2, 4))]

    def pulled(function, *values):
        return jax.vjp(lambda *v: function(*v, terms=terms), *values)[1](cotangents)

    ours, plain = (pulled(f, *arrays, about) for f in (column_sums, plain_sums))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, plain)
    # About a constant, as in a first derivative.
    ours, plain = (pulled(lambda *v, terms, f=f: f(*v, about, terms=terms), *arrays) for f in (column_sums, plain_sums))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, plain)
    members = [jnp.stack([v, 2 * v, v - 1]) for v in arrays]
    ours, plain = (jax.vmap(lambda *v, f=f: f(*v, about, terms=terms))(*members) for f in (column_sums, plain_sums))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, plain)


@pytest.mark.parametrize(("platform", "staged"), [("cuda", True), ("cpu", False), ("rocm", False), ("tpu", False)])
def test_only_programs_for_nvidia_have_stages(platform, staged):
    parts = xla_sums.parts_of_rows(1568, 128)
    assert parts == 98
    operands = operands_of((1568, 128), "float32", 1)
    lowered = jax.jit(lambda *v: column_sums(*v, terms=deviations)).trace(*operands).lower(lowering_platforms=(platform,))
    assert (f"tensor<{parts}x{1568 // parts}x128xf32>" in lowered.as_text()) == staged


def test_an_export_for_gpus_may_leave_the_batch_open():
    (rows,) = export.symbolic_shape("n")
    arguments = jax.ShapeDtypeStruct((rows, 3), "float32"), jax.ShapeDtypeStruct((3,), "float32")
    function = jax.jit(lambda *v: column_sums(*v, terms=deviations))
    assert export.export(function, platforms=["cuda", "cpu"])(*arguments).serialize()


def test_the_largest_share_of_rows_that_fills_a_gpu():
    assert xla_sums.parts_of_rows(100_352, 256) == 64
    assert xla_sums.parts_of_rows(100_352, 256, half=True) == 128
    assert xla_sums.parts_of_rows(1568, 2048, half=True) == 8
    assert xla_sums.parts_of_rows(20_011, 3) == 1  # a prime
    assert xla_sums.parts_of_rows(0, 3) == 1
    assert sums.column_sums is not plain_sums
