"""The Keras layer on KERAS_BACKEND=torch: on the ranks of a process group, and on one process as Keras's own."""

from __future__ import annotations

import os
import random

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
import oracle
import pytest
import torch
import torch.nn as nn
from cases import RAGGED, Case
from checks import close
from test_engine_torch import numbers, tensor
from test_layer_torch_ranks import counting, equal_everywhere
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from versions import TORCH, needs_keras_renorm

import syncbn
from syncbn import SyncBatchNormalization

assert keras.backend.backend() == "torch"

# Keras 3.8 flattens the arguments of a call by optree, where torch 2.6 breaks the graph.
FULLGRAPH = TORCH >= (2, 11)

BY_NAME = [
    Case("ragged", RAGGED),
    Case("an empty replica", (3, 0, 2, 1)),
    Case("masked", RAGGED, mask="rows"),
    Case("channels first, masked", RAGGED, (3, 4, 5), (1,), mask="rows"),
    Case("two axes", RAGGED, (3, 4, 5), (1, 3)),
    Case("float64", RAGGED, dtype="float64"),
    Case("float16", RAGGED, dtype="float16"),
]


def made(case, **arguments):
    """A built layer with other weights than the initial ones."""
    axis = list(case.axes) if len(case.axes) > 1 else case.axes[0]
    layer = SyncBatchNormalization(axis=axis, dtype=case.dtype, **arguments)
    layer.build((None, *case.rest))
    rng = np.random.default_rng(5)
    layer.set_weights([rng.uniform(0.5, 2, w.shape).astype(w.dtype) for w in layer.get_weights()])
    return layer


def step(case, arguments, x, dy, mask):
    layer = made(case, **arguments)
    before = [np.ravel(w).copy() for w in layer.get_weights()]
    x = tensor(x, getattr(torch, case.dtype)).requires_grad_()
    with counting() as sizes:
        y = layer(x, training=True, mask=tensor(mask))
        y.backward(tensor(dy, y.dtype))
    gradients = [numbers(v.grad) for v in (x, layer.gamma.value, layer.beta.value)]
    return {
        "y": numbers(y),
        "gradients": gradients,
        "before": before,
        "after": [np.ravel(w) for w in layer.get_weights()],
        "sizes": sizes,
    }


@pytest.mark.parametrize("group_size", [None, 2])
@pytest.mark.parametrize("case", BY_NAME, ids=lambda case: case.name)
def test_a_step_equals_the_concatenated_batch(torch_world, case, group_size):
    xs, dys, masks = case.inputs(torch_world.replicas), case.cotangents(torch_world.replicas), case.masks(torch_world.replicas)
    got = torch_world.run(step, xs, dys, masks, common=(case, {"momentum": 0.6, "group_size": group_size}))
    truth = oracle.BatchNorm(xs, axes=case.axes, masks=masks, group_size=group_size)
    gamma, beta, mean, variance = got[0]["before"]
    close([g["y"] for g in got], truth.forward(gamma, beta), case, "output")
    for i, expected in enumerate(truth.backward(dys, gamma)):
        close([g["gradients"][i].reshape(e.shape) for g, e in zip(got, expected, strict=True)], expected, case, "gradient")
    for r, g in enumerate(got):
        _, group_mean, group_variance = truth.moments[r // truth.size]
        np.testing.assert_allclose(g["after"][2], oracle.moving_average(mean, group_mean, 0.6), atol=2e-6)
        np.testing.assert_allclose(g["after"][3], oracle.moving_average(variance, group_variance, 0.6), rtol=1e-5)
        assert [n for _, n in g["sizes"]] == [1 + 2 * case.channels(), 2 * case.channels()]


class Net(nn.Module):
    """Keras layers in a torch module. Torch's `model.train()` does not reach them: the call's `training` decides."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        # What Keras's initializers draw from. Its own function takes a folder named tensorflow for TensorFlow, in 3.8.
        random.seed(0)
        self.first = nn.Linear(5, 4, dtype=torch.float64)
        self.norm = SyncBatchNormalization(renorm=True, dtype="float64", activation="relu", name="norm")
        self.norm.build((None, 4))
        self.last = keras.layers.Dense(2, dtype="float64", name="last")
        self.last.build((None, 4))

    def forward(self, x):
        return self.last(self.norm(self.first(x), training=True))


def trained(form, rows, *batches):
    """Weights after steps of SGD, under DDP or with gradients reduced by hand."""
    model = Net()
    wrapped = {
        "DDP": lambda: DistributedDataParallel(model),
        "DDP(compile)": lambda: DistributedDataParallel(torch.compile(model, fullgraph=FULLGRAPH, backend="aot_eager")),
    }.get(form, lambda: model)()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    for x, n in zip(batches, rows, strict=True):
        optimizer.zero_grad()
        (wrapped(tensor(x)).square().sum() * (world / n)).backward()
        if form == "by hand":
            for p in model.parameters():
                if p.grad is not None:
                    torch.distributed.all_reduce(p.grad)
                    p.grad /= world
        optimizer.step()
    return {name: numbers(p) for name, p in model.named_parameters()}


@pytest.mark.parametrize("form", ["DDP", "DDP(compile)", "by hand"])
def test_training_equals_one_process(torch_world, form):
    xs = [
        Case(f"keras {i}", s, (5,), dtype="float64").inputs(torch_world.replicas)
        for i, s in enumerate([(4, 3, 6, 5), (2, 0, 5, 4)])
    ]
    rows = [sum(map(len, x)) for x in xs]
    got = torch_world.run(trained, *xs, common=(form, rows))
    equal_everywhere(got)
    full_batch = trained(None, rows, *(np.concatenate(x) for x in xs))
    assert len(full_batch) == 2 + 7 + 2
    for name, value in full_batch.items():
        # Keras's maximum makes float32 of float64 on torch: r and d are rounded.
        np.testing.assert_allclose(got[0][name], value, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        pytest.param({"renorm": True}, marks=needs_keras_renorm),
        {"axis": 1},
        {"scale": False},
        {"dtype": "float64"},
        {"dtype": "mixed_bfloat16"},
    ],
    ids=str,
)
def test_one_process_equals_keras(arguments):
    rng = np.random.default_rng(3)
    shape = (6, 5, 4, 3)
    x, dy = rng.normal(size=shape).astype("float32"), rng.normal(size=shape).astype("float32")
    layers = SyncBatchNormalization(**arguments), keras.layers.BatchNormalization(**arguments)
    results = []
    for layer in layers:
        layer.build(shape)
        layer.set_weights([np.linspace(0.5, 2, w.size).reshape(w.shape) for w in layer.get_weights()])
        inputs = torch.tensor(x, dtype=torch.float64 if arguments.get("dtype") == "float64" else None).requires_grad_()
        y = layer(inputs, training=True)
        y.backward(torch.tensor(dy).to(y.dtype))
        results.append(numbers([y, inputs.grad, *(w.value for w in layer.weights), layer(inputs)]))
    rounding = 2e-2 if "mixed" in str(arguments) else 1e-4
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=rounding, atol=rounding)


def test_renorm_compiled():
    """r and d of the backward pass are those of the forward pass, although the statistics they were computed from are updated by then."""
    rng = np.random.default_rng(0)
    x, dy = (rng.normal(size=(16, 6)).astype("float32") for _ in range(2))
    gradients = []
    for compiles in (False, True):
        layer = SyncBatchNormalization(renorm=True, momentum=0.5, renorm_momentum=0.5)
        layer.build((None, 6))
        call = (
            torch.compile(lambda v, layer=layer: layer(v, training=True))
            if compiles
            else lambda v, layer=layer: layer(v, training=True)
        )
        for _ in range(2):
            v = tensor(x, torch.float32).requires_grad_()
            call(v).backward(tensor(dy, torch.float32))
        gradients.append([numbers(g) for g in (v.grad, layer.gamma.value.grad, layer.beta.value.grad)])
    for eager, compiled in zip(*gradients, strict=True):
        np.testing.assert_allclose(compiled, eager, atol=1e-5)


def test_large_mean_where_keras_is_wrong():
    x = torch.randn(4000, 3) + 1e4
    layer = SyncBatchNormalization(momentum=0)
    y = layer(x, training=True)
    truth = oracle.BatchNorm([x.numpy()])
    np.testing.assert_allclose(numbers(layer.moving_variance.value), truth.moments[0][2], rtol=1e-5)
    np.testing.assert_allclose(numbers(y), truth.forward(np.ones(3), np.zeros(3))[0], atol=1e-5)


@pytest.mark.parametrize("renorm", [False, True])
def test_checkpointed_moves_once(renorm):
    x, dy = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))
    weights = []
    for how in (None, {"context_fn": syncbn.checkpoint_contexts}, {}):
        layer = made(Case("checkpoint", rest=(3,)), renorm=renorm)
        inputs = x.clone().requires_grad_()

        def run(v, layer=layer):
            return layer(v, training=True)

        y = run(inputs) if how is None else checkpoint(run, inputs, use_reentrant=False, **how)
        if renorm and how == {}:
            with pytest.raises(RuntimeError, match=r"context_fn=syncbn\.checkpoint_contexts"):
                y.backward(dy)
            continue
        y.backward(dy)
        weights.append([*layer.get_weights(), numbers(inputs.grad)])
    for other in weights[1:]:
        for a, b in zip(weights[0], other, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


def test_local_statistics_move_nothing():
    layer = made(Case("local", rest=(3,)))
    before = layer.get_weights()
    with syncbn.local_statistics():
        layer(torch.randn(5, 3), training=True)
    for a, b in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_fit_and_files(tmp_path):
    model = keras.Sequential(
        [keras.Input((5,)), keras.layers.Dense(4), SyncBatchNormalization(renorm=True), keras.layers.Dense(1)]
    )
    model.compile("sgd", "mse")
    rng = np.random.default_rng(0)
    history = model.fit(rng.normal(size=(12, 5)), rng.normal(size=(12, 1)), batch_size=5, epochs=2, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    model.save(tmp_path / "model.keras")
    x = rng.normal(size=(3, 5)).astype("float32")
    np.testing.assert_array_equal(
        model.predict(x, verbose=0), keras.saving.load_model(tmp_path / "model.keras").predict(x, verbose=0)
    )
