"""The function that launches a compiled kernel: its keywords reach the launcher at their places in the kernel's signature."""

from __future__ import annotations

import contextlib

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in Triton")

from syncbn.torch.triton import launch
from syncbn.torch.triton._private import Launcher
from syncbn.torch.triton.plan import ADDRESSES


class Kernel:
    """Stands for a kernel of Triton's, and for what compiling it returns."""

    __name__ = "kernel"
    arg_names = ("x_ptr", "mask_ptr", "parts_ptr", "A", "limit", "weight", "C", "EVICTION")

    def __init__(self):
        self.arg_names = list(self.arg_names)

    def warmup(self, *types, grid, num_warps, launch_pdl, **constants):
        self.compiled_for = types, num_warps, constants
        return self

    def _init_handles(self):
        self.loaded = True


@pytest.mark.parametrize("is_packed", [False, True])
def test_keywords_become_positions(monkeypatch, is_packed):
    started = []
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(
        launch, "launcher_of", lambda compiled: Launcher(lambda *a: started.append(a), ("function", None), is_packed)
    )
    kernel, x = Kernel(), torch.zeros(4)
    made = launch.Launch(
        kernel,
        {"x_ptr": torch.float32, "mask_ptr": torch.uint8, "parts_ptr": torch.float32, "A": 1, "limit": 1, "weight": 0.5},
        {"C": 3, "EVICTION": "", "BLOCK_P": 16},
        programs=5,
        warps=4,
        device=torch.device("cuda", 0),
        numbers={"A": 7},
        absent=frozenset({"mask_ptr", "limit", "rank"}),
        addresses=ADDRESSES,
    )
    assert kernel.compiled_for == ((torch.float32, torch.uint8, torch.float32, 1, 1, 0.5), 4, {"C": 3, "EVICTION": ""})
    assert kernel.loaded
    made.start(99, weight=0.25, limit=8, parts_ptr=4096, x_ptr=x, mask_ptr=None)
    values = (x.data_ptr(), 0, 4096, 7, 0, 0.25, 3, "")
    assert started == [(5, 1, 1, 99, "function", None, *((values,) if is_packed else values))]
    with pytest.raises(TypeError, match="weight"):
        made.start(99, x_ptr=x, parts_ptr=4096)
    with pytest.raises(TypeError, match="y_ptr"):
        made.start(99, x_ptr=x, y_ptr=x, parts_ptr=4096, weight=0.25)
