"""`sync_batch_norm` on torch processes; what an `axis_name` of JAX does there."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
import torch.distributed as dist
from cases import RAGGED, Case
from checks import arguments, close
from test_engine_torch import numbers, tensor
from versions import TORCH

from syncbn.functional import sync_batch_norm
from syncbn.groups import Axes
from syncbn.torch import engine


def step(axes, pair, x, dy, scale, offset, mask):
    """Output, gradients and moments of one rank; with `pair` it meets only its neighbour."""
    x, scale, offset = (tensor(v).requires_grad_() for v in (x, scale, offset))
    group = dist.new_subgroups(2)[0] if pair else None
    y, mean, variance, count = sync_batch_norm(x, scale, offset, axis=axes, mask=tensor(mask), process_group=group)
    assert not any(v.requires_grad for v in (mean, variance, count))
    return {"y": numbers(y), "gradients": numbers(torch.autograd.grad(y, [x, scale, offset], tensor(dy))),
            "moments": numbers((count, mean, variance))}  # fmt: skip


@pytest.mark.parametrize("pair", [False, True])
def test_equals_the_concatenated_batch(torch_world, pair):
    case = Case("functional", RAGGED, (3, 4, 5), (1, 3), mask="rows")
    xs, dys, scale, offset, masks = args = arguments(case, torch_world.replicas)
    given = (*args[:4], [m[:, 0, :, 0] for m in masks])
    got = torch_world.run(step, *given, common=([1, 3], pair))
    truth = oracle.BatchNorm(xs, axes=case.axes, masks=masks, group_size=2 if pair else None)
    for r, out in enumerate(got):
        n, mean, variance = truth.moments[r // truth.size]
        assert out["moments"][0] == n
        assert out["moments"][1].shape == (1, 3, 1, 5)
        np.testing.assert_allclose(out["moments"][1].ravel(), mean, atol=2e-6)
        np.testing.assert_allclose(out["moments"][2].ravel(), variance, rtol=1e-5)
    close([out["y"] for out in got], truth.forward(scale, offset), case, "output")
    for i, expected in enumerate(truth.backward(dys, scale)):
        close([out["gradients"][i] for out in got], expected, case, "gradient")


def test_scale_and_offset_may_be_none():
    x = np.random.default_rng(0).normal(size=(6, 4, 3)).astype("float32")
    mask = np.arange(24).reshape(6, 4) % 3 > 0
    y, mean, *_ = sync_batch_norm(torch.tensor(x, requires_grad=True), mask=mask)
    truth = oracle.BatchNorm([x], masks=[mask[..., None]])
    np.testing.assert_allclose(y.detach(), truth.forward(np.ones(3), np.zeros(3))[0], atol=1e-5)
    assert mean.shape == (3,)
    assert y.requires_grad


@pytest.mark.parametrize("name", ["axis_name", "axis_index_groups"])
def test_keywords_of_other_frameworks(name):
    with pytest.raises(TypeError, match=f"`{name}` is for JAX arrays. Received: it with an array of PyTorch"):
        sync_batch_norm(torch.ones(4, 3), torch.ones(3), torch.zeros(3), **{name: "it"})


def with_an_axis_of_jax():
    try:
        engine.moments(torch.ones(4, 3), axes=(1,), group=Axes(("data",)))
    except ValueError as error:
        return str(error)


def test_an_axis_name_on_ranks(torch_world):
    for text in torch_world.run(with_an_axis_of_jax):
        assert "`axis_name` is for JAX: on PyTorch replicas are found without it." in text
    assert with_an_axis_of_jax() is None


@pytest.mark.skipif(TORCH < (2, 11), reason="torch 2.6 does not trace what tells the framework of an array")
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_without_a_graph_break(dynamic):
    x, dy = torch.randn(6, 4, 3, dtype=torch.float64, requires_grad=True), torch.randn(6, 4, 3, dtype=torch.float64)
    torch._dynamo.reset()
    plain = lambda x: sync_batch_norm(x, torch.ones(3, dtype=torch.float64))[:3]  # noqa: E731
    compiled = torch.compile(plain, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for got, right in zip(compiled(x), plain(x), strict=True):
        torch.testing.assert_close(got, right)
    (got,), (right,) = (torch.autograd.grad(f(x)[0], x, dy) for f in (compiled, plain))
    torch.testing.assert_close(got, right)
