"""In the place of torch.nn.SyncBatchNorm: what it has, what other libraries do to our layers, and what cannot be done."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from architectures import timm
from batch_norms import randomised

import syncbn
from syncbn import SyncBatchNorm

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(7)


# ------------------------------------------------------------------------------------------------- what torch's has


def public(layer):
    return {name for name in dir(layer) if not name.startswith("_")}


def test_ours_has_what_torchs_has():
    ours, theirs = public(SyncBatchNorm(3)), public(nn.SyncBatchNorm(3))
    assert theirs - ours == set()
    assert ours - theirs == {"activation", "group_size", "renorm", "renorm_clipping", "renorm_momentum"}
    for name in theirs:
        a, b = (inspect.getattr_static(cls, name, None) for cls in (SyncBatchNorm, nn.SyncBatchNorm))
        assert isinstance(a, classmethod) == isinstance(b, classmethod), name
    assert SyncBatchNorm.__constants__ == nn.SyncBatchNorm.__constants__


def test_convert_sync_batchnorm_is_convert():
    """Also of one batch norm, and on the class of a layer that was converted."""
    ours, theirs = (inspect.signature(c.convert_sync_batchnorm) for c in (SyncBatchNorm, nn.SyncBatchNorm))
    assert [(p.name, p.default) for p in ours.parameters.values()] == [(p.name, p.default) for p in theirs.parameters.values()]
    model, group = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), object()
    layer = model[1]
    assert SyncBatchNorm.convert_sync_batchnorm(model) is model
    assert type(layer) is SyncBatchNorm
    assert layer is model[1]
    assert layer.process_group is None
    assert type(layer).convert_sync_batchnorm(nn.BatchNorm2d(3), group).process_group is group
    with pytest.warns(UserWarning, match=r"syncbn\.convert expects a model that holds batch norms") as caught:
        SyncBatchNorm.convert_sync_batchnorm(nn.Linear(2, 2))
    assert caught[0].filename == __file__


def test_an_argument_by_its_name_in_keras():
    for make in (SyncBatchNorm, lambda n, **named: type("Own", (SyncBatchNorm,), {})(n, **named)):
        with pytest.raises(TypeError, match=r"argument is `eps`, as in torch\.nn\.BatchNorm2d\. Received: epsilon=0\.1\."):
            make(3, epsilon=0.1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'center'"):
        SyncBatchNorm(3, center=True)


# ------------------------------------------------------------------------------------------------- other libraries


CONVERTERS = {"torch": nn.SyncBatchNorm.convert_sync_batchnorm, "timm": timm.layers.convert_sync_batchnorm}
LOST = {
    "renorm": ({"renorm": True}, ", which loses renorm=True"),
    "activation": ({"activation": "relu"}, ", which loses activation='relu'"),
    "module": ({"activation": nn.GELU()}, ", which loses activation=GELU"),
    "group": ({"group_size": 2}, ", which loses group_size=2"),
    "nothing": ({}, r"\. Leave that converter out"),
}


@pytest.mark.parametrize("lost", LOST)
@pytest.mark.parametrize("library", CONVERTERS)
def test_a_converter_that_replaces_ours_warns(library, lost):
    arguments, said = LOST[lost]
    model = nn.Sequential(nn.Sequential(SyncBatchNorm(3, **arguments)))
    with pytest.warns(UserWarning, match=rf"{library}\..*convert_sync_batchnorm on a SyncBatchNorm{said}") as caught:
        assert type(CONVERTERS[library](model)[0][0]) is nn.SyncBatchNorm
    assert [w.filename for w in caught] == [__file__]


def test_timms_activation_that_is_lost_is_named():
    layer = syncbn.convert(timm.layers.BatchNormAct2d(3))
    with pytest.warns(UserWarning, match=r"SyncBatchNormAct, which loses act\. "):
        CONVERTERS["timm"](nn.Sequential(layer))


def test_who_else_asks_for_children_is_not_warned():
    model = nn.Sequential(SyncBatchNorm(3, activation=nn.GELU(), renorm=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [name for name, _ in model[0].named_children()] == ["activation"]
        assert len(list(model[0].children())) == 1
        model.apply(lambda m: None)
        SyncBatchNorm.convert_sync_batchnorm(model)
        nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3)))


def test_frozen_batch_norms_are_made_before_the_conversion():
    """timm's function does not see our class; what it froze stays frozen."""
    from timm.utils.model import freeze_batch_norm_2d

    assert type(freeze_batch_norm_2d(SyncBatchNorm(3))) is SyncBatchNorm
    model = freeze_batch_norm_2d(nn.Sequential(nn.BatchNorm2d(3)))
    with pytest.warns(UserWarning, match="none at all"):
        syncbn.convert(model)
    assert type(model[0]).__name__ == "FrozenBatchNorm2d"


def test_precise_statistics_by_torchs_own_function():
    """fvcore's does not see our class; torch's does."""
    from torch.optim.swa_utils import update_bn

    batches = [torch.randn(8, 3) + i for i in range(3)]
    ours, theirs = nn.Sequential(SyncBatchNorm(3)), nn.Sequential(nn.BatchNorm1d(3))
    for model in (ours, theirs):
        update_bn(batches, model)
    torch.testing.assert_close(ours[0].running_mean, theirs[0].running_mean)
    assert ours[0].momentum == 0.1


def test_an_optimizer_made_before_the_conversion_keeps_its_groups():
    """For code that tells weights that do not decay by torch's classes."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    plain = [p for m in model.modules() if type(m) is nn.BatchNorm1d for p in m.parameters()]
    optimizer = torch.optim.SGD([{"params": plain, "weight_decay": 0}, {"params": model[0].parameters()}], 0.1)
    syncbn.convert(model)
    assert optimizer.param_groups[0]["params"][0] is model[1].weight


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fusing_takes_the_reverted_model():
    from torch.ao.quantization import fuse_modules

    model = randomised(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval())
    x = torch.randn(2, 3, 5, 5)
    expected = model(x)
    syncbn.convert(model)
    with pytest.raises(AssertionError, match="did not find fuser method"):
        fuse_modules(model, [["0", "1"]])
    torch.testing.assert_close(fuse_modules(syncbn.revert(model), [["0", "1"]])(x), expected)


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="Lightning is not installed")
def test_lightnings_plugin_synchronises_while_it_fits():
    code = "import runpy, vision; runpy.run_path('examples/lightning_layer_sync.py', run_name='__main__')"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    # Two processes write: the end of a line may come after another one's text.
    said = dict(re.findall(r"(rank \d|after): (\w+(?: \[[^]]*\])?)", done.stdout))
    assert said["rank 0"] == said["rank 1"], done.stdout
    assert said["rank 0"].startswith("SyncBatchNorm [")
    assert said["after"] == "BatchNorm1d"


# ------------------------------------------------------------------------------------------------- what cannot be done


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("training", [True, False])
def test_scripting_says_what_serves(training):
    model = nn.Sequential(nn.Linear(3, 3), SyncBatchNorm(3)).train(training)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script cannot compile a synchronised layer\. .* in eval mode"):
        torch.jit.script(model)
    # What the error names.
    x = torch.randn(4, 3)
    for scripted in (torch.jit.trace(model.eval(), x), torch.jit.script(syncbn.revert(model, example=x))):
        torch.testing.assert_close(scripted(x), model(x))


NOT_BACKWARD = r"A synchronised training step has gradients in reverse mode alone\. Received: a layer in training mode under"
# What torch's own operator does not do, on one process too.
OURS = {
    "mask": ({}, {"mask": torch.ones(4, dtype=torch.bool)}),
    "activation": ({"activation": "relu"}, {}),
    "renorm": ({"renorm": True}, {}),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("kind", OURS)
def test_tracing_and_transforms_of_a_training_step(kind):
    arguments, call = OURS[kind]
    layer, x = SyncBatchNorm(3, **arguments), torch.randn(4, 3)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace cannot record"):
        torch.jit.trace(layer, (x, *call.values()))
    with pytest.raises(RuntimeError, match=NOT_BACKWARD):
        torch.func.grad(lambda v: layer(v, **call).square().mean())(x)
    with pytest.raises(RuntimeError, match=NOT_BACKWARD):
        torch.vmap(lambda v: layer(v, **call))(x[None])
    with pytest.raises(RuntimeError, match=NOT_BACKWARD):
        torch.func.jvp(lambda v: layer(v, **call), (x,), (x,))
    assert layer.num_batches_tracked == 0


def test_forward_mode_of_the_parameters_alone():
    import torch.autograd.forward_ad as forward

    layer, x = SyncBatchNorm(3, activation="relu"), torch.randn(4, 3)
    with forward.dual_level():
        tangent = {"weight": forward.make_dual(layer.weight.detach(), torch.ones(3))}
        with pytest.raises(RuntimeError, match=NOT_BACKWARD):
            torch.func.functional_call(layer, tangent, (x,))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_torchs_operator_traces_and_maps_on_one_process():
    """As torch's own layer does."""
    ours, theirs, x = SyncBatchNorm(3), nn.BatchNorm1d(3), torch.randn(4, 3)
    torch.testing.assert_close(torch.jit.trace(ours, x)(x), theirs(x))
    a, b = (torch.func.jvp(c(3, track_running_stats=False), (x,), (x * x,)) for c in (SyncBatchNorm, nn.BatchNorm1d))
    torch.testing.assert_close(a, b)
