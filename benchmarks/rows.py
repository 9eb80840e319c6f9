"""The rows: one JSON object a line in `benchmarks/results/SUITE.jsonl`, all of one schema.

How to add the suite `my-suite`:

1. Write `benchmarks/my_suite.py` with two functions. `options(parser)` adds what the suite has besides --out, --no-rows and
   --commit. `measure(given, record)` measures, and for every figure calls
   `record(case=..., measure=..., unit=..., values=..., subject=..., device=..., versions=(...))`. That is `write` below, with
   the path, the suite and the commit filled in. What `measure` returns is the exit status: None, or an error's text.
2. Name it in `run.SUITES`. `python benchmarks/run.py my-suite` then measures, prints the ratios and keeps the rows.
3. For a line in README.md, add it to `figures.py`, then run `python benchmarks/figures.py`.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from math import exp, isfinite, log
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

# Every row has these keys and no others. `machine` is None in rows that did not record it.
SCHEMA: dict[str, type | tuple[type, ...]] = {
    "suite": str,  # the name of the file, and of the command
    "measure": str,  # the quantity, for example "step in a CUDA graph"
    "unit": str,  # one of UNITS
    "case": str,  # dtype, layout and shape, or the size of a model's batch
    "subject": str,  # what was measured: "syncbn", a baseline, or a part of syncbn
    "replicas": int,
    "values": dict,  # "median", which for a single value is that value; also "p25", "p75", "best" and "each", a list
    "details": dict,  # what only this suite has, for example "floor", in the row's unit
    "device": str,  # the accelerator, or the processor
    "machine": (dict, type(None)),
    "python": str,
    "versions": dict,
    "commit": str,
    "date": str,
}
UNITS = ("s", "µs", "images/s", "inputs", "1")


def write(
    path: Path | None,
    *,
    suite: str,
    case: str,
    measure: str,
    unit: str,
    values: float | Sequence[float] | dict[str, Any],
    subject: str = "syncbn",
    **extra: Any,
) -> dict[str, Any]:
    """Appends one row to `path`, and returns it. With `path=None` it writes nothing: ranks other than 0 do so.

    `values` is a number, a list of which median and quartiles are kept, or a dict with a "median". `extra` may have `replicas`
    (default 1), `device` (default the processor), `versions` (names of packages, default none) and `commit` (default git's).
    All else of `extra` goes into the row's `details`. Raises ValueError if the row does not fit the schema. The docstring of
    this module says how a suite is added.
    """
    row = {
        "suite": suite,
        "measure": measure,
        "unit": unit,
        "case": case,
        "subject": subject,
        "replicas": extra.pop("replicas", 1),
        "values": values if isinstance(values, dict) else quantiles(values if isinstance(values, Sequence) else [values]),
        "device": extra.pop("device", None) or _machine()["processor"],
        "machine": _machine(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in extra.pop("versions", ())},
        "commit": extra.pop("commit", None) or commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "details": extra,
    }
    # In the schema's order, and as JSON has it: a shape is a list.
    row = json.loads(json.dumps({key: row[key] for key in SCHEMA}))
    check(row)
    if path:
        with path.open("a", encoding="utf-8") as file:
            file.write(line(row))
    return row


def check(row: dict[str, Any]) -> None:
    """Raises ValueError if a row does not fit the schema."""
    if list(row) != list(SCHEMA):
        raise ValueError(f"A row has the keys {list(SCHEMA)}, in this order. Received: {list(row)}.")
    for key, kind in SCHEMA.items():
        if not isinstance(row[key], kind) or row[key] == "":
            raise ValueError(f"A row's {key!r} must be a {kind}, not empty. Received: {row[key]!r}.")
    if row["unit"] not in UNITS:
        raise ValueError(f"A row's unit must be one of {UNITS}. Received: {row['unit']!r}. Add a new one to rows.UNITS.")
    if not isinstance(row["values"].get("median"), float | int):
        raise ValueError(f"A row's values must have a median, a number. Received: {row['values']}.")
    numbers = [n for value in row["values"].values() for n in (value if isinstance(value, list) else [value])]
    if not all(isfinite(n) for n in numbers):
        raise ValueError(f"A row's values must be finite. Received: {row['values']}.")


def read(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a suite, or of a file; none where there is no file."""
    path = path if isinstance(path, Path) else RESULTS / f"{path}.jsonl"
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def merge(path: Path, new: list[dict[str, Any]]) -> None:
    """Replaces the rows of a file that `new` has measured again, and keeps its other rows."""
    measured = {identity(row) for row in new}
    rows = [row for row in read(path) if identity(row) not in measured] + new
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(map(line, rows)), encoding="utf-8")


def identity(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row measures. Several rows may share it: rounds, or tiles that were tried."""
    # Runs with SYNCBN_PEER_MEMORY=0 stand beside the others.
    return (*(row[key] for key in ("measure", "case", "subject", "replicas")), row["details"].get("transport") == "all-reduce")


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles; of a single value the median alone."""
    if len(values) == 1:
        return {"median": values[0]}
    low, median, high = statistics.quantiles(values, n=4)
    return {"p25": low, "median": median, "p75": high}


def geometric_mean(values: Iterable[float]) -> float:
    values = list(values)
    return exp(sum(map(log, values)) / len(values))


@functools.cache
def commit() -> str:
    """What git says, with "-dirty" where the source has changed since. Raises where there is no repository, or no git."""
    head = _git("rev-parse", "--short", "HEAD")
    if not head:
        raise ValueError("A row names the commit that was measured. Received: no git repository. Give --commit.")
    return head + ("-dirty" if _git("status", "--porcelain", "--", "../src") else "")


def _git(*words: str) -> str:
    try:
        return subprocess.run(["git", *words], capture_output=True, text=True, cwd=RESULTS.parent, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


@functools.cache
def _machine() -> dict[str, Any]:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    processor = names[0].split(":", 1)[1].strip() if names else platform.processor()
    return {"processor": processor or "unknown", "cores": len(os.sched_getaffinity(0)), "system": platform.platform()}
