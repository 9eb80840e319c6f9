"""The demo on JAX, over host devices."""

from __future__ import annotations

import subprocess
import sys

from test_demo import rows


def test_demo_shows_what_synchronising_does(tmp_path):
    options = (
        "demo",
        "--backend",
        "jax",
        "--replicas",
        "2",
        "--batch",
        "8",
        "--epochs",
        "1",
        "--seed",
        "5",
        "--output",
        str(tmp_path),
    )
    done = subprocess.run([sys.executable, "-m", "syncbn.cli", *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
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
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
