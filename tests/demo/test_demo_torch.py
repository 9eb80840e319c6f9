"""The demo on torch: processes that it starts itself, and the same under torchrun."""

from __future__ import annotations

import subprocess
import sys

import pytest
from test_demo import rows

OPTIONS = ("demo", "--backend", "torch", "--replicas", "2", "--batch", "8", "--epochs", "1", "--seed", "5", "--output")
STARTED = {
    "by itself": [sys.executable, "-m", "syncbn.cli"],
    "by torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "syncbn.cli"],
}


@pytest.mark.parametrize("started", STARTED)
def test_demo_shows_what_synchronising_does(started, tmp_path):
    command = [*STARTED[started], *OPTIONS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    table = rows(done.stdout)
    assert list(table) == ["keras BatchNormalization", "SyncBatchNormalization", "SyncBatchNormalization, renorm"]
    for name, (accuracy, _, apart, output_off, gradient_off) in table.items():
        if name.startswith("Sync"):
            assert float(accuracy.rstrip("%")) > 50
            assert float(apart) == 0
            assert float(output_off) < 1e-5
            assert float(gradient_off) < 1e-4
        else:
            assert min(map(float, (apart, output_off, gradient_off))) > 1e-3
    assert done.stdout.count("Handwritten digits on torch") == 1
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert "Traceback" not in text
