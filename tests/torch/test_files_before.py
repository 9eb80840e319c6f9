"""Files that version 0.1.0 wrote: pickled modules and a state_dict load, and compute what they computed then."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import timm
from torch import nn

import syncbn
from syncbn.torch.convert import SyncBatchNormAct

FOLDER = Path(__file__).parents[1] / "data" / "version_0_1_0"
BEFORE = np.load(FOLDER / "torch.npz")
X = torch.from_numpy(BEFORE["x"])


def close(got, name):
    torch.testing.assert_close(got.detach(), torch.from_numpy(BEFORE[name]), rtol=1e-5, atol=1e-6)


def load(name):
    # A whole module is a pickle. The file comes with these tests.
    return torch.load(FOLDER / f"torch_{name}.pt", weights_only=False)


@pytest.mark.parametrize("name", ["layers", "converted", "converted_timm"])
def test_a_pickled_module_of_version_0_1_0_computes_what_it_did(name):
    model = load(name)
    close(model.eval()(X), name)
    close(model.train()(X), f"{name}_training")
    close(next(v for key, v in model.state_dict().items() if key.endswith("running_mean")), f"{name}_running_mean")


def test_the_classes_of_a_pickled_module_are_the_present_ones():
    assert {type(module) for module in load("layers")} == {syncbn.SyncBatchNorm}
    assert type(load("converted_timm")[1]) is SyncBatchNormAct


@pytest.mark.parametrize(("name", "original"), [("converted", nn.BatchNorm2d), ("converted_timm", timm.layers.BatchNormAct2d)])
def test_a_converted_module_of_version_0_1_0_can_be_reverted(name, original):
    model = syncbn.revert(load(name))
    assert type(model[1]) is original
    close(model.eval()(X), name)


def test_a_state_dict_of_version_0_1_0_loads():
    model = nn.Sequential(
        syncbn.SyncBatchNorm(3),
        syncbn.SyncBatchNorm(3, activation="leaky_relu"),
        syncbn.SyncBatchNorm(3, renorm=True),
        syncbn.SyncBatchNorm(3, affine=False),
    )
    model.load_state_dict(torch.load(FOLDER / "torch_layers_state_dict.pt"))
    close(model.eval()(X), "layers_state_dict")
