"""The exchange inside the kernels, in two processes over shared memory under Triton's interpreter."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from exchange_peer import CHANNELS, data

pytest.importorskip("triton", reason="the kernels are written in Triton")

from syncbn.torch.triton.device import peer_exchange

HERE = Path(__file__).parent
ROUNDS = 4


def start(folder, rank, rounds, limit, tag=1):
    command = [sys.executable, str(HERE / "exchange_peer.py"), str(folder), *map(str, (rank, rounds, limit, tag))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def said(process):
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-2000:]
    return [json.loads(line) for line in out.splitlines()]


@pytest.fixture
def folder(tmp_path):
    for rank in range(2):
        torch.from_file(str(tmp_path / f"buffer{rank}"), shared=True, size=peer_exchange.words(2), dtype=torch.int64).zero_()
    return tmp_path


def test_two_replicas_agree_with_the_oracle_and_bitwise(folder):
    peers = [start(folder, rank, ROUNDS, 10**9) for rank in range(2)]
    heard = [said(peer) for peer in peers]
    for turn in range(ROUNDS):
        mine, theirs = (h[turn] for h in heard)
        assert mine["stats"] == theirs["stats"]
        xs, dys = zip(*(data(turn, rank) for rank in range(2)), strict=True)
        truth = oracle.BatchNorm(xs, axes=(1,), epsilon=1e-3)
        n, mean, variance = truth.moments[0]
        stats = np.array(mine["stats"])
        assert stats[-1] == n
        np.testing.assert_allclose(stats[:CHANNELS], mean, rtol=1e-7, atol=1e-6)
        np.testing.assert_allclose(stats[CHANNELS:-1], variance, rtol=1e-5)
        dxs, _, _ = truth.backward(dys, np.ones(CHANNELS))
        for x, dy, dx, peer in zip(xs, dys, dxs, (mine, theirs), strict=True):
            hi, a, _, through, rest = np.array(peer["coefficients"]).reshape(5, CHANNELS, 1)
            got = a * dy.double().numpy() + through * (x.double().numpy() - hi) + rest
            np.testing.assert_allclose(got, dx, rtol=0, atol=1e-5 * max(np.abs(d).max(initial=0) for d in dxs))


def test_a_peer_that_is_killed_ends_the_wait(folder):
    first, second = start(folder, 0, 4, 300), start(folder, 1, 1, 10**9)
    lines = said(first)
    said(second)
    sound = [not math.isnan(line["stats"][0]) for line in lines]
    assert sound == [True, False, False, False]
    assert [line["status"] >> 32 for line in lines] == [0, 1, 1, 1]
    assert lines[-1]["status"] & 0xFFFFFFFF == 1
    assert all(map(math.isnan, lines[1]["coefficients"][3 * CHANNELS :]))


def test_another_call_is_not_taken_for_this_one(folder):
    """Ranks that take different paths hear of it, instead of adding up what does not belong together."""
    peers = [start(folder, rank, 1, 10**9, tag) for rank, tag in ((0, 1), (1, 7))]
    for rank, peer in enumerate(peers):
        (line,) = said(peer)
        assert all(map(math.isnan, line["stats"]))
        assert (line["status"] >> 32, line["status"] & 0xFFFFFFFF) == (peer_exchange.STRANGER.value, 1 - rank)


def test_agreement():
    from syncbn.torch.peer_memory import agreed

    one = {"host": "a", "device": 0, "reaches": [0, 1], "backend": "nccl", "triton": True, "wants": True}
    two = {**one, "device": 1}
    assert agreed([one, two])
    for change in ({"host": "b"}, {"device": 0}, {"reaches": [1]}, {"backend": "gloo"}, {"triton": False}, {"wants": False}):
        assert not agreed([one, {**two, **change}]), change
