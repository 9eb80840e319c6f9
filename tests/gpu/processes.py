"""Starts a test file as the ranks of one job, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from worlds import free_ports


def run_as_ranks(file: str, ranks: int) -> None:
    """Runs `file RANK PORT` for every rank; all must end well."""
    port = free_ports(1)[0]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(file).parent), *sys.path])}
    peers = [
        subprocess.Popen([sys.executable, file, str(rank), str(port)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    try:
        for peer in peers:
            _, err = peer.communicate(timeout=180)
            assert peer.returncode == 0, err[-3000:]
    finally:
        for peer in peers:
            peer.kill()
