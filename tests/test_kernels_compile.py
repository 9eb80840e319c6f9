"""Every kernel compiles for a GPU that is not there; `syncbn doctor` says so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels are written in Triton")


def test_every_kernel_compiles_for_sm_90():
    # In a process of its own, where Triton does not interpret.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    found = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert found.returncode == 0, found.stderr[-2000:]
    assert len(found.stdout.splitlines()) == 11


def test_doctor_on_one_replica():
    from syncbn import doctor

    lines, well = doctor.report()
    said = dict(lines)
    assert well
    assert said["replicas"].startswith("1")
    assert said["exchange"].startswith("none")
    assert "right" in said["error of input gradient"]


def test_doctor_sees_what_is_wrong(monkeypatch):
    import torch

    from syncbn import doctor

    original = torch.nn.functional.batch_norm
    monkeypatch.setattr(
        torch.nn.functional, "batch_norm", lambda x, *rest: original(x, *rest) * (1.01 if x.dtype == torch.float64 else 1)
    )
    lines, well = doctor.report()
    assert not well
    assert "WRONG" in dict(lines)["error of output"]
