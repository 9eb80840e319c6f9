"""The demo on torch: processes that it starts itself, and the same under torchrun. The doctor under torchrun."""

from __future__ import annotations

import sys

import pytest
from demo_output import ALONE, OPTIONS, check_table, syncbn

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "syncbn.cli")
STARTED = {"by itself": ALONE, "by torchrun": TORCHRUN}


@pytest.mark.parametrize("started", STARTED)
def test_demo_shows_what_synchronising_does(started, tmp_path):
    words = ("demo", "--backend", "torch", *OPTIONS, "--output", tmp_path)
    # torchrun warns of threads unless it is told their number.
    code, text = syncbn(*words, command=STARTED[started], OMP_NUM_THREADS="1")
    assert code == 0, text
    check_table(text)
    assert "local: torch.nn.BatchNorm2d. syncbn: syncbn.SyncBatchNorm." in text
    assert text.count("Synchronising:") == text.count("Trains a small network") == 1
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_the_network_is_torchs_own_and_convert_makes_it_ours():
    import torch

    import syncbn as library
    from syncbn.demo.torch import network

    kinds = {
        norm: [type(m) for m in network(norm) if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
        for norm in ("local", "syncbn")
    }
    assert kinds["local"] == [torch.nn.BatchNorm2d, torch.nn.BatchNorm2d, torch.nn.BatchNorm1d]
    assert kinds["syncbn"] == [library.SyncBatchNorm] * 3


def test_doctor_under_torchrun_prints_one_table_and_a_verdict():
    code, text = syncbn("doctor", command=TORCHRUN, OMP_NUM_THREADS="1")
    assert code == 0, text
    for name in ("syncbn ", "torch ", "replicas ", "exchange ", "error of output "):
        assert sum(line.startswith(name) for line in text.splitlines()) == 1
    assert "replicas                  2 over gloo" in text
    assert text.splitlines()[-1].startswith("OK: 2 replicas agree with float64 on the whole batch to ")
