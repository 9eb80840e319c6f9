"""In the place of torch's layers on the ranks of a process group: DDP models that convert, DTensors, what cannot be done."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from test_engine_torch import numbers
from test_layer_torch_ranks import equal_everywhere, state
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn import SyncBatchNorm

# ------------------------------------------------------------------------------------------------- a model in DDP


def rank_data(*shape, seed=0):
    """Other numbers on each rank."""
    generator = torch.Generator().manual_seed(seed * 100 + dist.get_rank())
    return torch.randn(shape, generator=generator) * 2 + dist.get_rank()


def net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def trains(wrapped_first, arguments):
    """Two steps of a model that is converted before or after DDP wraps it."""
    model = net()
    if wrapped_first:
        model = DistributedDataParallel(model)
        syncbn.convert(model, **arguments)
    else:
        model = DistributedDataParallel(syncbn.convert(model, **arguments))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(2):
        optimizer.zero_grad()
        model(rank_data(3 + dist.get_rank(), 3, seed=step)).square().mean().backward()
        optimizer.step()
    return state(model.module)


@pytest.mark.parametrize("arguments", [{}, {"renorm": True}], ids=str)
def test_a_model_trains_the_same_converted_before_or_after_ddp(torch_world, arguments):
    before, after = (torch_world.run(trains, common=(first, arguments)) for first in (False, True))
    equal_everywhere(after)
    for name, value in before[0].items():
        np.testing.assert_array_equal(value, after[0][name], err_msg=name)


def disagreeing_renorm():
    """What DDP makes of statistics that were registered after it wrapped the model, and differ."""
    model = DistributedDataParallel(net())
    SyncBatchNorm.convert_sync_batchnorm(model)
    syncbn.convert(model, renorm=True)
    layer = model.module[1]
    layer.renorm_mean.fill_(dist.get_rank() + 0.5)
    model(rank_data(4, 3))
    return state(layer), numbers(layer.renorm_mean)


def test_ddp_sends_the_buffers_of_renorm_that_it_did_not_know(torch_world):
    """So that renorm=True needs no refusal: DDP lists a model's buffers anew before each forward pass."""
    got = torch_world.run(disagreeing_renorm)
    equal_everywhere([s for s, _ in got])
    assert abs(got[1][1] - 0.5).max() < 0.3


# ------------------------------------------------------------------------------------------------- DTensors


def on_a_mesh(arguments, shape, sizes, sharded, masked):
    """A layer on DTensors, and the same on the whole batch in this process: everything that two steps compute."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor

    mesh = init_device_mesh("cpu", shape)
    placements = [Shard(0) if i == sharded else Replicate() for i in range(len(shape))]
    plain = SyncBatchNorm(3, **arguments, dtype=torch.float64)
    plain.group_size = 1
    layer = SyncBatchNorm(3, **arguments, dtype=torch.float64)
    distribute_module(layer, mesh)
    got, expected = [], []
    for step, size in enumerate(sizes):
        torch.manual_seed(step)
        x, dy, r = (torch.randn(size, 3, 4, dtype=torch.float64) + step for _ in range(3))
        mask = torch.rand(size, 4) < 0.7 if masked else None
        values = [distribute_tensor(v, mesh, placements) for v in (x, dy, r)]
        distributed = distribute_tensor(mask, mesh, placements) if masked else None
        for module, (v, g, residual), m, seen in ((layer, values, distributed, got), (plain, (x, dy, r), mask, expected)):
            v = v.detach().requires_grad_()
            y = module(v, mask=m, residual=residual)
            y.backward(g)
            seen += [y.detach(), v.grad, *(p.grad for p in module.parameters()), *(b.clone() for b in module.buffers())]
            if len(list(module.parameters())):
                torch.optim.SGD(module.parameters(), 0.1).step()
            seen += [p.detach() for p in module.parameters()]
            module.zero_grad()
    layer.eval(), plain.eval()
    got.append(layer(values[0]))
    expected.append(plain(x))
    assert list(got[0].placements) == placements
    assert layer.process_group is None
    assert layer.group_size is None
    return [numbers(v.full_tensor()) for v in got], [numbers(v) for v in expected]


MESHES = {"sharded": ((4,), 0), "replicated": ((4,), None), "outer": ((2, 2), 0), "inner": ((2, 2), 1)}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "arguments", [{}, {"renorm": True}, {"activation": "relu"}, {"activation": nn.GELU()}, {"affine": False}], ids=str
)
@pytest.mark.parametrize("mesh", MESHES)
def test_a_dtensor_gives_what_the_whole_batch_gives(torch_world, mesh, arguments, masked):
    """The batch in uneven parts, at last fewer than there are ranks."""
    shape, sharded = MESHES[mesh]
    if torch_world.replicas != 4:
        shape, sharded = (torch_world.replicas,), sharded and 0
    for got, expected in torch_world.run(on_a_mesh, common=(arguments, shape, (7, 3), sharded, masked)):
        for g, e in zip(got, expected, strict=True):
            np.testing.assert_allclose(g, e, rtol=1e-9, atol=1e-11)


def refused_dtensor(kind):
    """The error of a DTensor that cannot be served."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Shard, distribute_module, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x = distribute_tensor(torch.randn(4, 4, 4), mesh, [Shard(1 if kind == "channels" else 0)])
    layer = SyncBatchNorm(4, group_size=1 if kind == "group" else None)
    if kind != "plain":
        distribute_module(layer, mesh)
    if kind == "partial":
        x = DTensor.from_local(torch.randn(4, 4), mesh, [Partial()])
    if kind == "sharded weight":
        layer.weight = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    mask = {"mask": torch.ones(4, 4, dtype=torch.bool)} if kind == "mask" else {}
    try:
        layer(x, **mask)
    except ValueError as error:
        return str(error)


PLACED = "A DTensor must be replicated, or sharded along the batch by one mesh dimension."
REFUSED = {
    "channels": PLACED,
    "partial": PLACED,
    "plain": PLACED,
    "mask": PLACED,
    "sharded weight": "The parameters and buffers of a layer that takes a DTensor must be replicated.",
    "group": "The mesh of a DTensor says which ranks share their statistics",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_dtensors_that_are_refused(torch_world, kind):
    for said in torch_world.run(refused_dtensor, common=(kind,)):
        assert said.startswith(REFUSED[kind]), said


# ------------------------------------------------------------------------------------------------- groups of one


def one_value(kind):
    """What a layer makes of one value a channel."""
    arguments, call = {}, torch.randn(1, 3)
    if kind == "group":
        arguments = {"process_group": [dist.new_group([r]) for r in range(dist.get_world_size())][dist.get_rank()]}
    elif kind == "size":
        arguments = {"group_size": 1}
    elif kind == "eval":
        arguments = {"track_running_stats": False}
    layer = SyncBatchNorm(3, **arguments)
    layer.train(kind != "eval")
    try:
        return numbers(layer(call))
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("kind", ["group", "size", "eval"])
def test_one_value_a_channel_in_a_group_of_one_is_torchs_error(torch_world, kind):
    """Which torch's own layer raises in a process group of one."""
    for said in torch_world.run(one_value, common=(kind,)):
        assert said == "Expected more than 1 value per channel when training, got input size [1, 3]"


def test_one_value_a_channel_on_each_rank_is_fine(torch_world):
    for y in torch_world.run(one_value, common=("all",)):
        assert np.isfinite(y).all()


# ------------------------------------------------------------------------------------------------- an epsilon of 0


def constant_channel():
    """A channel that is the same number on every rank, then one that is a number of each rank's."""
    layer = SyncBatchNorm(3, eps=0)
    x = rank_data(3, 3, 4)
    x[:, 0], x[:, 1] = 0.1, 0.1 + dist.get_rank()
    x.requires_grad_()
    y = layer(x)
    y.backward(rank_data(3, 3, 4, seed=1))
    return numbers(y), numbers(x.grad)


def test_a_constant_channel_with_epsilon_0_on_ranks(torch_world):
    got = torch_world.run(constant_channel)
    for y, dx in got:
        assert np.abs(y[:, 0]).max() < 1e-12
        assert np.abs(dx[:, 0]).max() < 1e-12
        assert np.isfinite(dx).all()
    second = np.concatenate([y[:, 1].ravel() for y, _ in got])
    np.testing.assert_allclose([second.mean(), second.std()], [0, 1], atol=1e-5)


# ------------------------------------------------------------------------------------------------- what cannot be done


def attempt(kind):
    """The error of a training step that is traced or differentiated in another way; what a trace in eval mode gives."""
    import torch.autograd.forward_ad as forward

    layer, x = SyncBatchNorm(3), rank_data(4, 3)
    try:
        if kind == "trace":
            torch.jit.trace(layer, x)
        elif kind == "jvp":
            torch.func.jvp(layer, (x,), (x,))
        elif kind == "grad":
            torch.func.grad(lambda v: layer(v).square().mean())(x)
        elif kind == "vmap":
            torch.vmap(layer)(x[None])
        else:
            with forward.dual_level():
                layer(forward.make_dual(x, x))
    except RuntimeError as error:
        assert layer.num_batches_tracked == 0
        layer.eval()
        torch.testing.assert_close(torch.jit.trace(layer, x)(x), layer(x))
        return str(error)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["trace", "jvp", "grad", "vmap", "forward mode"])
def test_tracing_and_transforms_of_a_training_step(torch_world, kind):
    rule = "A synchronised training step has gradients in reverse mode alone."
    if kind == "trace":
        rule = "torch.jit.trace cannot record the messages of a synchronised training step."
    for said in torch_world.run(attempt, common=(kind,)):
        assert said.startswith(rule), said
