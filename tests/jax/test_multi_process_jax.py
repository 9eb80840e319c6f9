"""Two JAX processes of two devices each, on the loopback address."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
from cases import Case
from checks import close
from worlds import free_ports

HERE = Path(__file__).parent


def test_two_processes_of_two_devices_one_of_them_masked(tmp_path):
    (port,) = free_ports(1)
    workers = []
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    for rank in range(2):
        log = (tmp_path / f"{rank}.log").open("w")
        command = [sys.executable, str(HERE / "multi_process_jax.py"), str(port), str(rank), str(tmp_path / f"{rank}.npz")]
        workers.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    try:
        codes = [worker.wait(timeout=150) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert codes == [0, 0], "\n".join((tmp_path / f"{rank}.log").read_text()[-3000:] for rank in range(2))
    seen = [np.load(tmp_path / f"{rank}.npz") for rank in range(2)]

    case = Case("two processes", (3, 3, 3, 3), (4, 3), mask="one replica")
    truth = oracle.BatchNorm(case.inputs(4), masks=case.masks(4))
    scale, offset = (v[0] for v in case.parameters(4))
    dxs, dscales, doffsets = truth.backward(case.cotangents(4), scale)
    close([y for s in seen for y in np.split(s["y"], 2)], truth.forward(scale, offset), case, "output")
    close([dx for s in seen for dx in np.split(s["dx"], 2)], dxs, case, "gradient")
    n, mean, variance = truth.moments[0]
    for name, value in (("dscale", sum(dscales)), ("doffset", sum(doffsets)), ("mean", mean), ("variance", variance)):
        np.testing.assert_array_equal(seen[0][name], seen[1][name])
        np.testing.assert_allclose(seen[0][name], value, rtol=1e-5, atol=1e-5)
    assert seen[0]["count"] == seen[1]["count"] == n
