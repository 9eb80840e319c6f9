"""Every kernel compiles for a GPU that is not there; `syncbn doctor` says so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels are written in Triton")


def test_every_kernel_compiles_and_fits():
    # In a process of its own, where Triton does not interpret.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    found = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert found.returncode == 0, found.stderr[-2000:]
    assert len(found.stdout.splitlines()) == 3 * 28


def test_doctor_on_one_replica():
    from syncbn.doctor import torch as doctor

    found = doctor.report()
    lines = dict(found.lines)
    assert found.well
    assert lines["replicas"].startswith("1")
    assert lines["exchange"].startswith("none")
    assert found.verdict().startswith("OK: 1 replica agrees")


def test_doctor_sees_what_is_wrong(monkeypatch, capsys):
    import torch

    from syncbn import doctor

    original = torch.nn.functional.batch_norm
    monkeypatch.setattr(
        torch.nn.functional, "batch_norm", lambda x, *rest: original(x, *rest) * (1.01 if x.dtype == torch.float64 else 1)
    )
    assert doctor.check("torch") == 1
    said = capsys.readouterr().out
    assert "WRONG" in next(line for line in said.splitlines() if line.startswith("error of output"))
    assert "FAILED: wrong beside float64 on the whole batch: output (1e-02)" in said


def test_what_users_are_told(monkeypatch):
    from syncbn.torch import dispatch
    from syncbn.torch.peer_memory import lost_replica

    asked_for = dispatch.asked_for.__wrapped__
    monkeypatch.setenv("SYNCBN_KERNELS", "fast")
    with pytest.raises(ValueError, match=r"must be one of \['auto', 'eager', 'triton'\].*Received: 'fast'\. Unset it"):
        asked_for()
    monkeypatch.setenv("SYNCBN_KERNELS", "eager")
    assert asked_for() == "eager"
    assert "rank 3 did not come in time" in str(lost_replica("syncbn", 1, 3))
    assert "rank 3 sent the message of another call" in str(lost_replica("syncbn", 2, 3))
    monkeypatch.setattr(dispatch, "asked_for", lambda: "triton")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(RuntimeError, match="Install triton"):
        dispatch.cuda_kernels.__wrapped__()


def test_kernels_that_cannot_be_imported_leave_torchs_operators(monkeypatch):
    from syncbn.torch import dispatch, triton

    monkeypatch.delattr(triton, "backend", raising=False)
    monkeypatch.delitem(sys.modules, "syncbn.torch.triton.backend", raising=False)
    monkeypatch.setitem(sys.modules, "syncbn.torch.triton.plan", None)
    with pytest.warns(UserWarning, match=r"torch's operators run instead.*Received: Triton.*Install triton") as warned:
        assert dispatch.cuda_kernels.__wrapped__() is None
    assert len(warned) == 1
    monkeypatch.setattr(dispatch, "asked_for", lambda: "triton")
    with pytest.raises(ImportError):
        dispatch.cuda_kernels.__wrapped__()


def test_doctor_names_the_slow_launcher(monkeypatch):
    import triton

    from syncbn.doctor import torch as doctor

    monkeypatch.setattr(triton, "__version__", "3.7.1")
    assert doctor.launcher_note() == ""
    monkeypatch.setattr(triton, "__version__", "4.0.0")
    assert "slower: Triton is 4.0.0, not 3.6 or 3.7" in doctor.launcher_note()


def test_the_reference_can_be_asked_for(monkeypatch):
    import torch

    from syncbn.torch import cpu, dispatch, reference

    x = torch.randn(4, 3, 5, 5)
    assert dispatch.kernels_for(x, None) is cpu
    monkeypatch.setenv("SYNCBN_KERNELS", "eager")
    for cached in (dispatch.asked_for, dispatch.cuda_kernels):
        cached.cache_clear()
    try:
        assert dispatch.kernels_for(x, None) is reference
        assert dispatch.cuda_kernels() is None
    finally:
        monkeypatch.undo()
        for cached in (dispatch.asked_for, dispatch.cuda_kernels):
            cached.cache_clear()
