"""Torch models out of training: folded, and exported as plain batch norm."""

from __future__ import annotations

import copy
import functools
import itertools

import numpy as np
import pytest
import torch
import torch.nn as nn
from architectures import ARCHITECTURES, timm
from batch_norms import norms, randomised

import syncbn
from syncbn import SyncBatchNorm

ROUNDING = {torch.float16: 5e-3, torch.bfloat16: 4e-2, torch.float32: 1e-5, torch.float64: 1e-12}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(7)
    torch.set_num_threads(1)


def trained(model):
    """In eval, with other statistics and parameters than the initial ones."""
    return randomised(model).eval()


def close(got, expected, rounding=1e-5):
    torch.testing.assert_close(got, expected, rtol=rounding, atol=rounding * float(expected.abs().max()))


# ---------------------------------------------------------------------------------------------------------------- fold

LAYERS = {
    "Linear": (lambda: nn.Linear(4, 6), (5, 4)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, bias=False), (2, 4, 9)),
    "Conv2d, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 9, 9)),
    "Conv3d": (lambda: nn.Conv3d(4, 6, 2), (2, 4, 3, 3, 3)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 9)),
    "ConvTranspose2d, groups": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), (2, 4, 5, 5)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(4, 6, 2), (2, 4, 3, 3, 3)),
}


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_fold_computes_the_same(kind, dtype):
    make, shape = LAYERS[kind]
    model = trained(nn.Sequential(make(), SyncBatchNorm(6, activation="relu"))).to(dtype)
    x = torch.randn(shape).to(dtype)
    kept = copy.deepcopy(model.state_dict())
    folded = syncbn.fold(model)
    assert not norms(folded)
    close(folded(x).double(), model(x).double(), ROUNDING[dtype])
    for key, value in model.state_dict().items():
        assert torch.equal(value, kept[key]), "the model itself changed"


NORMS = {
    "torch's": lambda: nn.BatchNorm2d(6),
    "torch's synchronised": lambda: nn.SyncBatchNorm(6),
    "without weight": lambda: SyncBatchNorm(6, affine=False),
    "without bias": lambda: SyncBatchNorm(6, bias=False),
    "leaky": lambda: SyncBatchNorm(6, activation="leaky_relu", eps=0.1),
    "function": lambda: SyncBatchNorm(6, activation=torch.tanh),
    "module": lambda: SyncBatchNorm(6, activation=nn.GELU()),
    "renorm": lambda: SyncBatchNorm(6, renorm=True),
    "timm": lambda: timm.layers.BatchNormAct2d(6, act_layer=nn.SiLU),
    "timm's as ours": lambda: syncbn.convert(timm.layers.BatchNormAct2d(6, act_layer=nn.SiLU)),
}


@pytest.mark.parametrize("kind", NORMS)
def test_fold_takes_every_batch_norm(kind):
    model = trained(nn.Sequential(nn.Conv2d(4, 6, 3), NORMS[kind]()))
    x = torch.randn(2, 4, 5, 5)
    folded = syncbn.fold(model)
    assert not norms(folded)
    close(folded(x), model(x))


class Net(nn.Module):
    """Where a batch norm may not be folded, beside one where it may."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.conv, self.bn, self.other = nn.Conv2d(3, 3, 1), SyncBatchNorm(3), nn.BatchNorm2d(3)
        self.last, self.last_bn = nn.Conv2d(3, 3, 1), SyncBatchNorm(3)
        if how == "hook":
            self.conv.register_forward_hook(lambda m, args, y: 2 * y)
        if how == "tied":
            self.other_conv = nn.Conv2d(3, 3, 1)
            self.other_conv.weight = self.conv.weight

    def forward(self, x):
        y = self.conv(x)
        if self.how == "used twice":
            return self.last_bn(self.last(self.bn(y) + y))
        if self.how == "two batch norms":
            return self.last_bn(self.last(self.bn(y) + self.other(y)))
        if self.how == "called twice":
            return self.last_bn(self.last(self.bn(self.conv(self.bn(y)))))
        if self.how == "something between":
            return self.last_bn(self.last(self.bn(y.relu())))
        if self.how == "residual":
            return self.last_bn(self.last(self.bn(y, residual=x)))
        if self.how == "weight read":
            return self.last_bn(self.last(self.bn(y) * self.conv.weight.sum()))
        if self.how == "tied":
            return self.last_bn(self.last(self.bn(y) + self.other_conv(x)))
        return self.last_bn(self.last(self.bn(y)))


HOW = ["used twice", "two batch norms", "called twice", "something between", "residual", "weight read", "tied", "hook"]


@pytest.mark.parametrize("how", HOW)
def test_fold_leaves_what_others_use(how):
    model, x = trained(Net(how)), torch.randn(2, 3, 4, 4)
    folded = syncbn.fold(model)
    assert isinstance(folded.bn, SyncBatchNorm)
    assert not isinstance(folded.last_bn, SyncBatchNorm)
    close(folded(x), model(x))


class Optional(nn.Module):
    """The batch norm in the middle runs only where this argument is given; "no labels": only where the labels are not."""

    def __init__(self, where):
        super().__init__()
        self.where = where
        self.first, self.bn, self.last, self.last_bn = nn.Conv2d(3, 4, 1), SyncBatchNorm(4), nn.Conv2d(4, 4, 1), SyncBatchNorm(4)

    def forward(self, x, required, labels=None, *, masks=None):
        given = {"required": required is not None, "labels": labels is not None, "masks": masks is not None}
        given["no labels"] = labels is None
        y = self.first(x)
        if given[self.where]:
            y = self.bn(y)
        return self.last_bn(self.last(y))


@pytest.mark.parametrize("where", ["required", "labels", "no labels", "masks"])
def test_fold_leaves_what_only_some_calls_run(where):
    """A trace's argument is never None. The caller of a part that is traced alone may give None for what the part requires."""
    model, x, given = trained(Untraceable(Optional(where))), torch.randn(2, 3, 4, 4), torch.zeros(2)
    folded = syncbn.fold(model)
    assert isinstance(folded.block.bn, SyncBatchNorm)
    assert not isinstance(folded.block.last_bn, SyncBatchNorm)
    for required, labels, masks in itertools.product((None, given), repeat=3):
        close(folded.block(x, required, labels, masks=masks), model.block(x, required, labels, masks=masks))


class OtherForwards(nn.Module):
    """The batch norm in the middle runs in no call that the test makes, but in a trace."""

    def __init__(self, how):
        super().__init__()
        self.first, self.bn, self.last, self.last_bn = nn.Conv2d(3, 4, 1), SyncBatchNorm(4), nn.Conv2d(4, 4, 1), SyncBatchNorm(4)
        if how == "of the object":
            self.forward = functools.partial(self.run, runs=False)

    def forward(self, x=None, h=None, *, a=None, **named):
        x = h if x is None else x
        return self.run(x, named.get("skip") is not None or (h is not None and a is None))

    def run(self, x, runs):
        y = self.first(x)
        return self.last_bn(self.last(self.bn(y) if runs else y))


class FirstIsOptional(OtherForwards):
    def forward(self, x=None, h=None):
        return self.run(h if x is None else x, x is not None)


class OneOfThree(OtherForwards):
    def forward(self, x, a=None, b=None, c=None):
        return self.run(x, not (a is None and b is None and c is not None))


@pytest.mark.parametrize(("model", "given"), [
    (FirstIsOptional("class"), {"h": 1}), (OtherForwards("class"), {"x": 1}), (OtherForwards("of the object"), {"x": 1}),
    (OneOfThree("class"), {"x": 1}), (OneOfThree("class"), {"x": 1, "c": 1}),
], ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else str(sorted(v)))  # fmt: skip
def test_fold_takes_no_trace_that_a_call_may_leave(model, given):
    model, x = trained(model), torch.randn(2, 3, 4, 4)
    given = dict.fromkeys(given, x)
    close(syncbn.fold(model)(**given), model(**given))


class Untraceable(nn.Module):
    def __init__(self, block=None):
        super().__init__()
        self.block = block or nn.Sequential(nn.Conv2d(3, 4, 1), SyncBatchNorm(4))

    def forward(self, x):
        return self.block(x) if x.sum() > 0 else -self.block(-x)


def test_fold_reads_the_parts_of_what_cannot_be_traced():
    model = trained(Untraceable())
    folded = syncbn.fold(model)
    assert not norms(folded)
    for x in (torch.rand(2, 3, 4, 4), -torch.rand(2, 3, 4, 4)):
        close(folded(x), model(x))


def test_fold_is_right_or_loud_where_channels_are_not_on_dim_1():
    model = trained(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    with pytest.raises(
        ValueError, match=r"takes that layer's output with the channels on dim 1, so of rank 2\. Received: shape \[2, 4, 4\]"
    ):
        syncbn.fold(model)(torch.randn(2, 4, 4))


def test_folded_models_can_be_traced_and_scripted():
    folded, x = syncbn.fold(trained(nn.Sequential(nn.Linear(4, 6), SyncBatchNorm(6, activation="relu")))), torch.randn(5, 4)
    for made in (torch.fx.symbolic_trace(folded), torch.jit.script(folded)):
        close(made(x).detach(), folded(x).detach())
        with pytest.raises(Exception, match="channels on dim 1, so of rank 2"):
            made(x[None])


def test_fold_wants_eval_mode():
    with pytest.raises(ValueError, match=r"syncbn\.fold takes a model in eval mode.*Call model\.eval\(\) first"):
        syncbn.fold(Net("plain"))
    with pytest.raises(TypeError, match=r"syncbn\.fold takes"):
        syncbn.fold("model")


@pytest.mark.parametrize("name", ["torchvision resnet50", "timm resnet10t", "timm regnet", "torchvision densenet121"])
def test_fold_of_real_architectures(name):
    with torch.device("meta"):
        model = ARCHITECTURES[name]()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=max(p[0].numel(), 1) ** -0.5)
    trained(model)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected, folded = model(x), syncbn.fold(syncbn.convert(model))
        close(folded(x), expected, 1e-4)
    # Of a dense net every second one stands before its convolution.
    assert len(norms(folded)) < 0.55 * len(norms(model))


# ------------------------------------------------------------------------------------------------------------- export


def exported():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), SyncBatchNorm(4, activation="relu"), nn.MaxPool2d(2), SyncBatchNorm(4, affine=False)
    )
    return trained(model), torch.randn(2, 3, 8, 8)


def test_torch_export():
    model, x = exported()
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("batch_norm" in name for name in names)
    assert not any(word in name for name in names for word in ("c10d", "syncbn", "all_reduce"))
    for batch in (x, torch.randn(5, 3, 8, 8)):
        close(program.module()(batch), model(batch))


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5, 5)], ids=["rank 2", "rank 4"])
def test_torch_export_of_a_batch_whose_size_depends_on_data(shape):
    """A trace knows of it only that it is one at least."""
    model, x = trained(SyncBatchNorm(3)), torch.randn(shape)
    chosen = torch.tensor([True, False, False, False])

    class Chosen(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = model

        def forward(self, x, chosen):
            rows = x[chosen]
            torch._check(rows.shape[0] >= 1)
            return self.norm(rows)

    program = torch.export.export(Chosen().eval(), (x, chosen))
    close(program.module()(x, chosen), model(x[:1]))


@pytest.mark.filterwarnings("ignore")
def test_onnx(tmp_path):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    model, x = exported()
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        model, (x,), path, dynamo=True, optimize=False, dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), verbose=False
    )
    assert "BatchNormalization" in {node.op_type for node in onnx.load(path).graph.node}
    session = onnxruntime.InferenceSession(path)
    for batch in (x, torch.randn(5, 3, 8, 8)):
        (y,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
        np.testing.assert_allclose(y, model(batch).detach().numpy(), rtol=1e-5, atol=1e-5)
