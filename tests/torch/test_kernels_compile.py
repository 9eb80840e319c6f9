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
    assert len(found.stdout.splitlines()) == 3 * 22


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


def test_what_users_are_told():
    from syncbn import policy_torch

    with pytest.raises(ValueError, match=r"must be one of \['auto', 'eager', 'triton'\].*Received: 'fast'\. Unset it"):
        policy_torch.kernels("fast")
    assert policy_torch.kernels("eager") == "eager"
    assert "rank 3 did not come in time" in str(policy_torch.lost_replica("syncbn", 1, 3))
    assert "rank 3 sent the message of another call" in str(policy_torch.lost_replica("syncbn", 2, 3))
    assert "Run one step before the capture" in str(policy_torch.first_call_in_capture())
    assert "Install triton" in str(policy_torch.no_triton())


def test_the_reference_can_be_asked_for(monkeypatch):
    import torch

    from syncbn.torch import cpu as native
    from syncbn.torch import dispatch as choice
    from syncbn.torch import reference as eager

    x = torch.randn(4, 3, 5, 5)
    assert choice.kernels_for(x, None) is native
    monkeypatch.setenv("SYNCBN_KERNELS", "eager")
    for cached in (choice.asked_for, choice.cuda_kernels):
        cached.cache_clear()
    try:
        assert choice.kernels_for(x, None) is eager
        assert choice.cuda_kernels() is None
    finally:
        monkeypatch.undo()
        for cached in (choice.asked_for, choice.cuda_kernels):
            cached.cache_clear()
