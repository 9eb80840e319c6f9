"""Torch models to ours and back: what holds, real architectures, lazy layers, what is refused."""

from __future__ import annotations

import copy
import doctest
import functools
import pickle
import time
import warnings

import pytest
import torch
import torch.nn as nn
from architectures import ARCHITECTURES, timm
from batch_norms import norms, randomised
from torch.nn.utils import parametrize, prune

import syncbn
from syncbn import SyncBatchNorm
from syncbn.torch.convert import SyncBatchNormAct
from syncbn.torch.lazy import LazySyncBatchNorm


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(7)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Small inputs: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def net():
    return randomised(
        nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Sequential(nn.Conv1d(4, 5, 3), nn.BatchNorm1d(5)))
    )


def same(a, b):
    assert list(a) == list(b)
    for key in a:
        assert torch.equal(a[key], b[key]), key


def flat(y):
    return list(y.values()) if isinstance(y, dict) else [y]


# ---------------------------------------------------------------------------------------------- real architectures


@functools.cache
def architecture(name):
    """Built without torch's initialisation, which is what costs."""
    with torch.device("meta"):
        model = ARCHITECTURES[name]()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=max(p[0].numel(), 1) ** -0.5)
        for m in norms(model):
            m.num_batches_tracked.zero_()
    return randomised(model)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_round_trip_is_bit_identical(name):
    """State and outputs, in training and in eval, and as ours the same function."""
    model = copy.deepcopy(architecture(name))
    x = torch.randn(2, 3, 32, 32)

    def outputs(model):
        torch.manual_seed(1)
        trained = flat(model.train()(x))
        return [*flat(model.eval()(x)), *trained]

    state, classes = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    count = len(norms(model))
    assert count > 5
    with torch.no_grad():
        expected = outputs(model)
        trained = copy.deepcopy(model.state_dict())
        model.load_state_dict(state)
        assert syncbn.convert(model) is model
        assert sum(isinstance(m, SyncBatchNorm) for m in model.modules()) == count
        same(model.state_dict(), state)
        for got, e in zip(outputs(model), expected, strict=True):
            torch.testing.assert_close(got, e, rtol=2e-5, atol=2e-5 * float(e.abs().max()))
        model.load_state_dict(state)
        assert syncbn.revert(model) is model
        assert [type(m) for m in model.modules()] == classes
        assert [set(vars(m)) for m in model.modules()] == attributes
        same(model.state_dict(), state)
        for got, e in zip(outputs(model), expected, strict=True):
            assert torch.equal(got, e)
        same(model.state_dict(), trained)


def test_resnet50_in_50_ms_without_a_copy():
    model = architecture("torchvision resnet50")
    kept = {key: (v, v.data_ptr()) for key, v in model.state_dict(keep_vars=True).items()}
    syncbn.revert(syncbn.convert(model))  # what is imported and made once a process
    start = time.perf_counter()
    syncbn.convert(model)
    seconds = time.perf_counter() - start
    for key, v in model.state_dict(keep_vars=True).items():
        assert v is kept[key][0]
        assert v.data_ptr() == kept[key][1]
    syncbn.revert(model)
    assert seconds < 0.05


# ----------------------------------------------------------------------------------------------------- what holds


@pytest.mark.parametrize("cls", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_each_class_comes_back_as_itself(cls):
    layer = cls(3, eps=0.5, momentum=0.3)
    attributes = dict(vars(layer))
    assert type(syncbn.convert(layer)) is SyncBatchNorm
    assert type(syncbn.revert(layer)) is cls
    assert set(vars(layer)) == set(attributes)
    assert (layer.eps, layer.momentum) == (0.5, 0.3)


def test_rank_check_comes_back():
    layer = syncbn.convert(nn.BatchNorm2d(3))
    layer(torch.randn(4, 3))
    with pytest.raises(ValueError, match="expected 4D input"):
        syncbn.revert(layer)(torch.randn(4, 3))


def test_everything_on_the_object_holds():
    layer = nn.BatchNorm1d(3, dtype=torch.float64).eval()
    layer.weight.requires_grad_(False)
    layer.qconfig, layer.mine = "qconfig", [1]
    calls = []
    layer.register_forward_hook(lambda *a: calls.append(1))
    optimizer = torch.optim.SGD([layer.bias], 0.1)
    twice = nn.Sequential(layer, layer)
    syncbn.convert(twice)
    assert twice[0] is twice[1] is layer
    assert not layer.training
    assert not layer.weight.requires_grad
    assert layer.weight.dtype == torch.float64
    assert layer.qconfig == "qconfig"
    assert optimizer.param_groups[0]["params"][0] is layer.bias
    layer(torch.ones(2, 3, dtype=torch.float64))
    assert calls == [1]
    syncbn.revert(twice)
    assert type(twice[1]) is nn.BatchNorm1d
    assert layer.mine == [1]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_come_back_too(copied):
    model = copied(syncbn.convert(net()))
    assert [type(m) for m in norms(model)] == [SyncBatchNorm] * 2
    syncbn.revert(model)
    assert [type(m) for m in norms(model)] == [nn.BatchNorm1d] * 2


def test_pruned_layers_stay_pruned():
    layer = nn.BatchNorm1d(4)
    prune.l1_unstructured(layer, "weight", 0.5)
    y = syncbn.convert(layer).eval()(torch.ones(2, 4))
    assert (y == 0).sum() == 4


def test_converted_learns_what_the_original_learns():
    ours, theirs = net(), None
    theirs = copy.deepcopy(ours)
    syncbn.convert(ours)
    x, dy = torch.randn(4, 3, 9), torch.randn(4, 5, 5)
    for model in (ours, theirs):
        model(x).backward(dy)
        torch.optim.SGD(model.parameters(), 0.1).step()
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


def test_track_running_stats_switched_off_holds():
    """Torch's own layers read it at every call."""
    layer = syncbn.convert(nn.BatchNorm1d(3))
    layer.track_running_stats = False
    layer(torch.randn(4, 3) + 5)
    assert not layer.running_mean.any()
    assert layer.num_batches_tracked == 0


def test_timm_keeps_activation_and_drop():
    class Half(nn.Module):
        def forward(self, x):
            return x / 2

    layer = timm.layers.BatchNormAct2d(3, act_layer=nn.GELU, drop_layer=Half).eval()
    randomised(layer)
    x = torch.randn(2, 3, 4, 4)
    expected = layer(x)
    assert type(syncbn.convert(layer)) is SyncBatchNormAct
    torch.testing.assert_close(layer(x), expected)
    assert type(syncbn.revert(layer)) is timm.layers.BatchNormAct2d
    theirs = timm.layers.convert_sync_batchnorm(nn.Sequential(layer))
    kind = type(theirs[0])
    torch.testing.assert_close(syncbn.convert(theirs).eval()(x), expected)
    assert type(syncbn.revert(theirs)[0]) is kind


def test_instance_norms_stay():
    model = nn.Sequential(nn.InstanceNorm2d(3, affine=True), nn.GroupNorm(1, 3), nn.LayerNorm(3), nn.BatchNorm2d(3))
    syncbn.convert(model)
    assert [type(m) for m in model] == [nn.InstanceNorm2d, nn.GroupNorm, nn.LayerNorm, SyncBatchNorm]


def test_qat_modules_train_on():
    """Torch's ConvBn2d reads the statistics of its batch norm and calls it."""
    from torch.ao.nn.intrinsic.qat import ConvBn2d
    from torch.ao.quantization import get_default_qat_qconfig

    model = nn.Sequential(ConvBn2d(3, 4, 3, qconfig=get_default_qat_qconfig("x86")))
    x = torch.randn(2, 3, 5, 5)
    expected = copy.deepcopy(model)(x)
    syncbn.convert(model)
    assert type(model[0].bn) is SyncBatchNorm
    torch.testing.assert_close(model(x), expected, rtol=1e-2, atol=1e-2)
    assert model[0].qconfig is not None


# ------------------------------------------------------------------------------------------------------ arguments


def test_group_size_and_process_group_are_given():
    model = syncbn.convert(net(), group_size=2)
    assert [m.group_size for m in norms(model)] == [2, 2]
    group = object()
    syncbn.convert(model, process_group=group)
    assert [(m.group_size, m.process_group) for m in norms(model)] == [(None, group)] * 2
    syncbn.convert(model)
    assert norms(model)[0].process_group is group
    syncbn.convert(model, group_size=4)
    assert [(m.group_size, m.process_group) for m in norms(model)] == [(4, None)] * 2


def test_process_group_of_torchs_own_layer_stays():
    group = object()
    layer = syncbn.convert(nn.SyncBatchNorm(3, process_group=group))
    assert layer.process_group is group
    assert syncbn.revert(layer).process_group is group
    assert "process_group" not in vars(syncbn.revert(syncbn.convert(nn.BatchNorm1d(3), process_group=group)))


def test_only_one_way_to_say_who_meets():
    with pytest.raises(ValueError, match="Only one of `process_group` and `group_size`"):
        syncbn.convert(net(), process_group=object(), group_size=2)
    with pytest.raises(ValueError, match="`group_size` must be None or a positive integer"):
        syncbn.convert(net(), group_size=0)


def test_renorm_starts_from_the_models_own_statistics():
    model = net()
    state = copy.deepcopy(model.state_dict())
    for layer in norms(syncbn.convert(model, renorm=True)):
        stddev = torch.sqrt(layer.running_var.double() + layer.eps)
        torch.testing.assert_close(layer.renorm_stddev.double(), stddev, rtol=1e-6, atol=0)
        torch.testing.assert_close(layer.moving_stddev.double(), stddev, rtol=1e-6, atol=0)
        assert torch.equal(layer.renorm_mean, layer.running_mean)
        assert layer.renorm_mean.data_ptr() != layer.running_mean.data_ptr()
        assert layer.renorm_stddev.data_ptr() != layer.moving_stddev.data_ptr()
    # With the moving statistics' own mean and deviation, training gives what eval does.
    x = torch.randn(6, 3, 9) * 3 + 2
    expected = copy.deepcopy(model).eval()(x)
    torch.testing.assert_close(model.train()(x), expected, rtol=1e-4, atol=1e-4)
    syncbn.revert(model)
    assert list(model.state_dict()) == list(state)
    assert not any("renorm" in key for m in norms(model) for key in vars(m))


def test_renorm_needs_statistics():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(ValueError, match=r"Received: 1 \(track_running_stats=False\)"):
        syncbn.convert(model, renorm=True)
    assert [type(m) for m in model] == [nn.BatchNorm1d] * 2


def test_filter_takes_name_and_module():
    model = net()
    seen = []
    syncbn.convert(model, filter=lambda name, m: seen.append((name, m)) or name == "3.1")
    assert seen == [("1", model[1]), ("3.1", model[3][1])]
    assert [type(m) for m in norms(model)] == [nn.BatchNorm1d, SyncBatchNorm]
    syncbn.convert(model)
    syncbn.revert(model, filter=lambda name, m: name == "1")
    assert [type(m) for m in norms(model)] == [nn.BatchNorm1d, SyncBatchNorm]


# ----------------------------------------------------------------------------------------------------------- lazy


LAZY = {nn.LazyBatchNorm1d: (2, 3, 4), nn.LazyBatchNorm2d: (2, 3, 4, 4), nn.LazyBatchNorm3d: (2, 3, 4, 4, 4)}


@pytest.mark.parametrize("renorm", [False, True])
@pytest.mark.parametrize("cls", LAZY)
def test_lazy_becomes_ours_at_the_first_batch(cls, renorm):
    x = torch.randn(LAZY[cls])
    layer = syncbn.convert(cls(eps=0.5), renorm=renorm)
    assert type(layer) is LazySyncBatchNorm
    assert type(syncbn.revert(layer)) is cls
    syncbn.convert(layer, renorm=renorm)
    y = layer(x)
    assert type(layer) is SyncBatchNorm
    assert layer.num_features == 3
    if renorm:
        # The first step has the statistics of an untrained layer: mean 0, √(1 + eps).
        assert layer.renorm_stddev.shape == (3,)
        torch.testing.assert_close(y, x / 1.5**0.5, rtol=1e-5, atol=1e-6)
    else:
        torch.testing.assert_close(y, cls(eps=0.5)(x))
    assert type(syncbn.revert(layer)) is cls.cls_to_become
    torch.testing.assert_close(layer.eval()(x), copy.deepcopy(syncbn.convert(layer))(x))


@pytest.mark.parametrize("given", [
    {}, {"bias": False}, {"affine": False, "eps": 0.5}, {"track_running_stats": False}, {"dtype": torch.float64},
    {"renorm": True, "renorm_momentum": 0.2, "renorm_clipping": {"rmax": 2.0}}, {"activation": "relu", "group_size": 1},
    {"activation": nn.Tanh(), "process_group": 3},
], ids=str)  # fmt: skip
def test_lazy_takes_what_the_layer_takes(given):
    lazy, layer = LazySyncBatchNorm(**given), SyncBatchNorm(3, **given)
    assert lazy.process_group == layer.process_group
    x = torch.randn(5, 3, 4).to(given.get("dtype", torch.float32))
    if "process_group" in given:
        lazy.eval(), layer.eval()
    torch.testing.assert_close(lazy(x), layer(x))
    assert type(lazy) is SyncBatchNorm
    assert repr(lazy) == repr(layer)
    same(lazy.state_dict(), layer.state_dict())


@pytest.mark.parametrize(
    "kept",
    [("weight", "bias", "running_mean", "running_var", "num_batches_tracked"), ("running_mean", "running_var"), ("weight",)],
)
def test_lazy_keeps_what_a_checkpoint_brings(kept):
    """What it does not bring gets its initial values, renorm's from the running statistics."""
    state, x = randomised(nn.BatchNorm1d(3)).state_dict(), torch.randn(5, 3)
    state = {name: state[name] for name in kept}
    lazy = syncbn.convert(nn.LazyBatchNorm1d(), renorm=True)
    lazy.load_state_dict(state, strict=False)
    layer = SyncBatchNorm(3, renorm=True)
    layer.load_state_dict(state, strict=False)
    torch.testing.assert_close(lazy.eval()(x), layer.eval()(x))
    stddev = (layer.running_var + layer.eps) ** 0.5
    starts = {"moving_stddev": stddev, "renorm_stddev": stddev, "renorm_mean": layer.running_mean}
    same(lazy.state_dict(), {**layer.state_dict(), **starts})


def test_lazy_refuses_what_the_layer_refuses():
    with pytest.raises(ValueError, match="Received: track_running_stats=False"):
        LazySyncBatchNorm(renorm=True, track_running_stats=False)
    with pytest.raises(TypeError, match="Rename it"):
        LazySyncBatchNorm(epsilon=0.1)


@pytest.mark.parametrize("first", ["converted", "loaded and run"])
def test_lazy_loads_a_checkpoint(first):
    """Torch's own then has num_features 0."""
    state, x = randomised(nn.BatchNorm2d(3)).state_dict(), torch.randn(2, 3, 4, 4)
    layer = nn.LazyBatchNorm2d()
    if first == "converted":
        syncbn.convert(layer)
    layer.load_state_dict(state)
    layer.eval()(x)
    syncbn.convert(layer)(x)
    assert type(layer) is SyncBatchNorm
    assert layer.num_features == 3
    same(layer.state_dict(), state)


# -------------------------------------------------------------------------------------------------------- unknown


class OnlyInit(nn.BatchNorm2d):
    """Overrides nothing but its constructor."""

    mark: int

    def __init__(self, channels):
        super().__init__(channels, eps=0.1)


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Mixin:
    def extra_repr(self):
        return "mixed"


class Mixed(Mixin, nn.BatchNorm2d):
    pass


def with_own_forward():
    layer = nn.BatchNorm2d(3)
    layer.forward = lambda x: x
    return layer


def parametrised():
    layer = nn.BatchNorm2d(3)
    parametrize.register_parametrization(layer, "weight", nn.Softplus())
    return layer


UNKNOWN = {
    "subclass": (lambda: Doubled(3), r"0 \(a test_convert_torch\.Doubled, which overrides forward\)"),
    "mixin": (lambda: Mixed(3), r"0 \(a test_convert_torch\.Mixed, which overrides extra_repr\)"),
    "own forward": (with_own_forward, r"0 \(a torch\.nn\.modules\.batchnorm\.BatchNorm2d with a `forward` of its own\)"),
    "parametrised": (parametrised, r"0 \(a .*\.ParametrizedBatchNorm2d, which overrides .*weight"),
}


def test_subclass_that_overrides_only_init():
    layer = randomised(OnlyInit(3)).eval()
    x = torch.randn(2, 3, 4, 4)
    expected = layer(x)
    assert type(syncbn.convert(layer)) is SyncBatchNorm
    torch.testing.assert_close(layer(x), expected)
    assert type(syncbn.revert(layer)) is OnlyInit


@pytest.mark.parametrize("kind", UNKNOWN)
def test_unknown_ones_are_named_and_left(kind):
    make, message = UNKNOWN[kind]
    model = nn.Sequential(make(), nn.BatchNorm2d(3))
    kinds = [type(m) for m in model]
    with pytest.raises(ValueError, match=message):
        syncbn.convert(model)
    assert [type(m) for m in model] == kinds
    with pytest.warns(UserWarning, match=message):
        syncbn.convert(model, on_unknown="warn")
    assert [type(m) for m in model] == [kinds[0], SyncBatchNorm]
    syncbn.revert(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        syncbn.convert(model, on_unknown="skip")
        assert [type(m) for m in model] == [kinds[0], SyncBatchNorm]
        syncbn.revert(model)
        syncbn.convert(model, filter=lambda name, m: name == "1")
    assert [type(m) for m in model] == [kinds[0], SyncBatchNorm]


def test_on_unknown_is_checked():
    with pytest.raises(ValueError, match=r"`on_unknown` must be one of .*Received: on_unknown='ignore'"):
        syncbn.convert(net(), on_unknown="ignore")


# ------------------------------------------------------------------------------------------- models made as ours


class TwoRanks(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.never = SyncBatchNorm(3), SyncBatchNorm(3)

    def forward(self, x):
        return self.bn(x) + self.bn(x[..., 0])[..., None]


@pytest.mark.parametrize(("shape", "cls"), [((2, 3), "1d"), ((2, 3, 4), "1d"), ((2, 3, 4, 4), "2d"), ((2, 3, 4, 4, 4), "3d")])
def test_made_as_ours_gets_the_class_that_its_use_implies(shape, cls):
    model = nn.Sequential(nn.Identity(), randomised(SyncBatchNorm(3)))
    state = copy.deepcopy(model.state_dict())
    for example in (torch.randn(shape), (torch.randn(shape),)):
        again = syncbn.revert(copy.deepcopy(model), example=example)
        assert type(again[1]) is getattr(nn, f"BatchNorm{cls}")
        same(again.state_dict(), state)
        assert again.training
        assert again[1].training


def test_made_as_ours_without_a_known_use():
    model = TwoRanks()
    with pytest.raises(ValueError, match=r"bn \(no input seen\); never \(no input seen\)\. Give an input"):
        syncbn.revert(model)
    with pytest.raises(ValueError, match=r"Received: bn \(inputs of ranks \[3, 4\]\); never \(no input seen\)"):
        syncbn.revert(model, example=torch.randn(2, 3, 4, 4))
    assert type(model.bn) is SyncBatchNorm
    assert not model.bn._forward_pre_hooks


def test_activation_has_no_place_in_torchs_own():
    model = nn.Sequential(syncbn.convert(nn.BatchNorm1d(3)), SyncBatchNorm(3, activation="relu"))
    with pytest.raises(ValueError, match=r"Only what torch's batch norm can do .* 1 \(activation='relu'\)"):
        syncbn.revert(model, example=torch.randn(2, 3))
    assert [type(m) for m in model] == [SyncBatchNorm] * 2


def test_nothing_to_do_is_a_warning():
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.warns(
        UserWarning, match="syncbn.convert expects a model that holds batch norms. Received: a model with none at all"
    ):
        assert syncbn.convert(model) is model
    with pytest.warns(UserWarning, match="syncbn.revert expects a model that holds synchronised batch norms"):
        assert syncbn.revert(net())[0] is not None
    with pytest.warns(UserWarning, match="with none that `filter` takes"):
        syncbn.convert(net(), filter=lambda name, m: False)


# ---------------------------------------------------------------------------------------------------- bad input


def test_not_a_model():
    with pytest.raises(
        TypeError, match=r"syncbn.convert takes a torch.nn.Module or a Keras 3 layer or model. Received: builtins.dict"
    ):
        syncbn.convert({})
    with pytest.raises(TypeError, match=r"syncbn.revert takes .* Received: builtins.int"):
        syncbn.revert(3)
    with pytest.raises(TypeError, match=r"Received: torch\.optim\.sgd\.SGD\. Give the model itself\."):
        syncbn.convert(torch.optim.SGD([torch.zeros(1)], 0.1))


def compiled_in_place():
    model = net()
    model[3].compile(backend="eager")
    return model


def quantised():
    return nn.Sequential(torch.ao.nn.quantized.BatchNorm2d(3))


STATES = {
    "compiled": (lambda: torch.compile(net(), backend="eager"), r"a torch\._dynamo\.eval_frame\.OptimizedModule, which is compiled\. Take the model that was given to torch\.compile"),
    "part compiled": (compiled_in_place, r"the submodule '3', a torch.*Sequential, which is compiled"),
    "scripted": (lambda: torch.jit.script(net()), r"which is scripted\. Take the Python model"),
    "quantised": (quantised, r"the submodule '0', a torch\.ao\.nn\.quantized.*BatchNorm2d, which is quantised"),
    "DataParallel": (lambda: nn.DataParallel(net()), r"DataParallel, which is wrapped\. Take the bare model"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("verb", ["convert", "revert"])
@pytest.mark.parametrize("state", STATES)
def test_wrong_state_says_what_to_do_first(state, verb):
    make, message = STATES[state]
    with pytest.raises(ValueError, match=rf"syncbn\.{verb} takes a plain model\. Received: .*{message}"):
        getattr(syncbn, verb)(make())


@pytest.fixture
def one_process():
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_sharded_models_are_refused(one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    sharded = net()
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(sharded[3], mesh=mesh)
    for verb in (syncbn.convert, syncbn.revert):
        with pytest.raises(ValueError, match=r"the submodule '3', a .*FSDPSequential, which is sharded\. Build the model again"):
            verb(sharded)
    model = syncbn.convert(net())
    fully_shard(model, mesh=mesh)
    model(torch.randn(4, 3, 9)).backward(torch.randn(4, 5, 5))
    nn.parallel.DistributedDataParallel(syncbn.convert(net()))(torch.randn(4, 3, 9))


def test_fully_sharded_data_parallel_is_known_by_name():
    from torch.distributed.fsdp import FullyShardedDataParallel

    from syncbn.torch.convert import _state

    assert _state(FullyShardedDataParallel) == "wrapped"


def test_a_model_in_ddp_converts_and_comes_back(one_process):
    """Every parameter stays the same object, which is what DDP holds."""
    wrapped = nn.parallel.DistributedDataParallel(net())
    parameters = list(wrapped.parameters())
    assert SyncBatchNorm.convert_sync_batchnorm(wrapped, process_group=None) is wrapped
    assert [type(m) for m in norms(wrapped)] == [SyncBatchNorm] * 2
    assert all(a is b for a, b in zip(parameters, wrapped.parameters(), strict=True))
    wrapped(torch.randn(4, 3, 9)).backward(torch.randn(4, 5, 5))
    syncbn.revert(wrapped)
    assert [type(m) for m in norms(wrapped)] == [nn.BatchNorm1d] * 2
    wrapped(torch.randn(4, 3, 9))


WRONG = {
    "momentum": (lambda: nn.BatchNorm1d(3, momentum=1.5), r"momentum=1\.5"),
    "negative momentum": (lambda: nn.SyncBatchNorm(3, momentum=-0.1), r"momentum=-0\.1"),
    "lazy": (lambda: nn.LazyBatchNorm1d(momentum=2), "momentum=2"),
    "eps": (lambda: nn.BatchNorm1d(3, eps=-1e-5), "eps=-1e-05"),
    "nan": (lambda: nn.BatchNorm1d(3, eps=float("nan")), "eps=nan"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_settings_that_the_constructor_refuses(kind):
    """Refused before anything is changed."""
    make, said = WRONG[kind]
    model = nn.Sequential(nn.BatchNorm1d(3), make())
    kinds = [type(m) for m in model]
    with pytest.raises(ValueError, match=rf"`momentum` must be None or lie in \[0, 1\].*Received: 1 \({said}\)\."):
        syncbn.convert(model)
    assert [type(m) for m in model] == kinds
    assert "_class_before" not in vars(model[0])


@pytest.mark.parametrize("arguments", [{"momentum": None}, {"momentum": 0}, {"momentum": 1}, {"eps": 0}], ids=str)
def test_settings_at_the_edge_convert(arguments):
    layer = syncbn.convert(nn.BatchNorm1d(3, **arguments))
    made = SyncBatchNorm(3, **arguments)
    for name, value in arguments.items():
        assert getattr(layer, name) is value
        assert getattr(made, name) is value


# --------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("cls", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_checkpoints_load_unchanged(cls, tmp_path):
    """Apex's layer has the same five keys as torch's own."""
    theirs = randomised(cls(3))
    torch.save(theirs.state_dict(), tmp_path / "checkpoint.pt")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for ours in (SyncBatchNorm(3), syncbn.convert(cls(3))):
        ours.load_state_dict(state, strict=True)
        same(ours.state_dict(), theirs.state_dict())
        cls(3).load_state_dict(ours.state_dict(), strict=True)


def test_examples_in_the_docs_run():
    import syncbn.conversion

    found = doctest.testmod(syncbn.conversion)
    assert found.attempted > 8
    assert found.failed == 0
