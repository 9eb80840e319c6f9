"""MultiWorkerMirroredStrategy: two processes on the loopback address, in a training loop of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
from cases import Case
from worlds import free_ports

HERE = Path(__file__).parent


def test_two_workers_one_of_them_empty_once(tmp_path):
    addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
    workers = []
    for rank in range(2):
        config = json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}})
        log = (tmp_path / f"{rank}.log").open("w")
        command = [sys.executable, str(HERE / "multi_worker.py"), str(rank), str(tmp_path / f"{rank}.npz")]
        workers.append(
            subprocess.Popen(
                command, env={**os.environ, "TF_CONFIG": config, "CUDA_VISIBLE_DEVICES": str(rank)}, stdout=log, stderr=log
            )
        )
    try:
        codes = [worker.wait(timeout=150) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert codes == [0, 0], "\n".join((tmp_path / f"{rank}.log").read_text()[-3000:] for rank in range(2))
    seen = [np.load(tmp_path / f"{rank}.npz") for rank in range(2)]

    gamma, beta, mean, variance = np.ones(3), np.zeros(3), np.zeros(3), np.ones(3)
    for i, batches in enumerate([(3, 4, 0, 0), (5, 0, 0, 0), (2, 6, 0, 0)]):
        case = Case(f"step {i}", batches, (4, 3))
        truth, dys = oracle.BatchNorm(case.inputs(2)), case.cotangents(2)
        dxs, dgammas, dbetas = truth.backward(dys, gamma)
        for rank in range(2):
            np.testing.assert_allclose(seen[rank][f"y{i}"], truth.forward(gamma, beta)[rank], atol=1e-5)
            np.testing.assert_allclose(seen[rank][f"dx{i}"], dxs[rank], atol=1e-5)
        gamma, beta = gamma - 0.1 * sum(dgammas), beta - 0.1 * sum(dbetas)
        _, m, v = truth.moments[0]
        mean, variance = oracle.moving_average(mean, m, 0.5), oracle.moving_average(variance, v, 0.5)
    for name, value in (("gamma", gamma), ("beta", beta), ("mean", mean), ("variance", variance)):
        np.testing.assert_array_equal(seen[0][name], seen[1][name])
        np.testing.assert_allclose(seen[0][name], value, atol=1e-5)
