"""Rows of data: what was measured, where, with which versions, at which commit (SYNCBN_COMMIT, where there is no repository)."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable
from math import exp, log
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def provenance(*packages: str) -> dict[str, Any]:
    """The machine, the versions and the commit of a run."""

    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": {"processor": _processor(), "cores": _cores(), "system": platform.platform()},
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "commit": _commit(),
    }


def _commit() -> str:
    given = os.environ.get("SYNCBN_COMMIT")
    if given:
        return given
    return _git("rev-parse", "--short", "HEAD") + ("-dirty" if _git("status", "--porcelain", "--", "../src") else "")


def _git(*words: str) -> str:
    """What git says; nothing where there is no repository, or no git."""
    try:
        return subprocess.run(["git", *words], capture_output=True, text=True, cwd=RESULTS.parent, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def _processor() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].split(":", 1)[1].strip() if names else platform.processor()


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(seconds, n=4)
    return {"p25": low, "median": median, "p75": high}


def geometric_mean(values: Iterable[float]) -> float:
    values = list(values)
    return exp(sum(map(log, values)) / len(values))


def write(name: str, rows: list[dict[str, Any]], path: Path | None = None) -> Path:
    """One JSON object a line under benchmarks/results/, or elsewhere."""
    RESULTS.mkdir(exist_ok=True)
    path = path or RESULTS / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(name: str) -> list[dict[str, Any]]:
    """The rows that are there."""
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
