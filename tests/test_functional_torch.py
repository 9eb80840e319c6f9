"""`sync_batch_norm` on torch tensors."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
import torch.distributed as dist
from cases import RAGGED, Case
from checks import arguments, close
from test_engine_torch import numbers, tensor

from syncbn.functional import sync_batch_norm


def step(pairs, x, dy, scale, offset, mask):
    """One replica; `pairs` makes process groups of two ranks."""
    group = None
    if pairs:
        groups = [dist.new_group([i, i + 1]) for i in range(0, dist.get_world_size(), 2)]
        group = groups[dist.get_rank() // 2]
    x, scale, offset = (tensor(v).requires_grad_() for v in (x, scale, offset))
    y, mean, variance, count = sync_batch_norm(x, scale, offset, axis=[1, 3], mask=tensor(mask[:, 0, :, 0]), process_group=group)
    gradients = torch.autograd.grad(y, [x, scale, offset], tensor(dy))
    return numbers(y), numbers(gradients), numbers((count, mean, variance))


@pytest.mark.parametrize("pairs", [False, True])
def test_equals_the_concatenated_batch(torch_world, pairs):
    case = Case("functional", RAGGED, (3, 4, 5), (1, 3), mask="rows")
    xs, dys, scale, offset, masks = arguments(case, torch_world.replicas)
    got = torch_world.run(step, xs, dys, scale, offset, masks, common=(pairs,))
    truth = oracle.BatchNorm(xs, axes=case.axes, masks=masks, group_size=2 if pairs else None)
    for r, (_, _, (count, got_mean, got_variance)) in enumerate(got):
        n, mean, variance = truth.moments[r // truth.size]
        assert count == n
        assert got_mean.shape == (1, 3, 1, 5)
        np.testing.assert_allclose(got_mean.ravel(), mean, atol=2e-6)
        np.testing.assert_allclose(got_variance.ravel(), variance, rtol=1e-5)
    close([y for y, _, _ in got], truth.forward(scale, offset), case, "output")
    for i, expected in enumerate(truth.backward(dys, scale)):
        close([gradients[i] for _, gradients, _ in got], expected, case, "gradient")


@pytest.mark.parametrize(("name", "owner"), [("axis_name", "JAX"), ("axis_index_groups", "JAX")])
def test_keywords_of_other_frameworks(name, owner):
    with pytest.raises(TypeError, match=f"`{name}` is for {owner} arrays. Received: it with an array of PyTorch"):
        sync_batch_norm(torch.ones(4, 3), torch.ones(3), torch.zeros(3), **{name: "it"})
