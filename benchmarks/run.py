"""Measures a suite: `python benchmarks/run.py SUITE [options]`. Prints medians and ratios, and keeps the rows."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import io
import os
import sys
from pathlib import Path
from typing import Any

from baselines import OURS
from rows import RESULTS, commit, geometric_mean, merge, read, write

SUITES = {
    "tensorflow-cpu": "TensorFlow, 4 replicas on logical CPU devices",
    "tensorflow-gpu": "TensorFlow, layers and a ResNet-50 on the GPUs of one process",
    "torch-cpu": "PyTorch, one process and two over gloo",
    "jax-cpu": "JAX, 4 host devices",
    "gpu": "PyTorch's layers; on several GPUs under torchrun",
    "gpu-host": "PyTorch, where the host's time goes; on several GPUs under torchrun",
    "gpu-resnet": "PyTorch, training ResNet-50; on several GPUs under torchrun",
    "gpu-tiles": "PyTorch, a search for the kernels' tiles",
    "jax-gpu": "JAX, on all GPUs of one process",
    "images-per-device": "test accuracy of the demo's network on JAX, 4 host devices",
    "accuracy": "the variance's error at large means on the CPU, each framework in a process",
}


def main(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help"):
        print(__doc__, "\nSuites (`run.py SUITE --help` prints a suite's options):")
        print("\n".join(f"  {name:16}{text}" for name, text in SUITES.items()))
        return
    if words[0] not in SUITES:
        sys.exit(f"SUITE must be one of {', '.join(SUITES)}. Received: {words[0]}.")
    name, *words = words
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    suite = importlib.import_module(name.replace("-", "_"))
    parser = argparse.ArgumentParser(f"run.py {name}", description=suite.__doc__, formatter_class=argparse.RawTextHelpFormatter)
    out = RESULTS / f"{name}.jsonl"
    parser.add_argument("--out", type=Path, default=out, help="where the rows go; rows of other cases there stay")
    parser.add_argument("--no-rows", action="store_true", help="keep no rows: to try something out")
    parser.add_argument("--commit", help="the commit that is measured, where there is no git repository")
    suite.options(parser)
    given = parser.parse_args(words)
    first = os.environ.get("RANK", "0") == "0"
    # A run that is cut off leaves its rows here, beside those that were complete.
    partial = given.out.with_suffix(".partial.jsonl")
    if first:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
    record = functools.partial(write, partial if first else None, suite=name, commit=given.commit or commit())
    # Only the first rank prints.
    with contextlib.redirect_stdout(sys.stdout if first else io.StringIO()):
        wrong = suite.measure(given, record)
    if first:
        found = read(partial)
        partial.unlink(missing_ok=True)
        show(found)
        if not given.no_rows:
            merge(given.out, found)
            print(f"{len(found)} rows in {given.out}")
    sys.exit(wrong)


def show(rows: list[dict[str, Any]]) -> None:
    """A table a quantity: medians, and ours over each baseline and, where there is one, over the floor."""
    for of in dict.fromkeys((row["measure"], row["unit"], row["replicas"]) for row in rows):
        print("\n{}, {}, replicas: {}".format(*of))
        part = [row for row in rows if (row["measure"], row["unit"], row["replicas"]) == of]
        print("\n".join(table(part)))


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of Markdown."""
    at: dict[str, dict[str, float]] = {}
    for row in rows:
        at.setdefault(row["case"], {})[row["subject"]] = row["values"]["median"]
        if "floor" in row["details"]:
            at[row["case"]]["floor"] = row["details"]["floor"]
    subjects = list(dict.fromkeys(name for of in at.values() for name in of))
    # Errors are not compared.
    others = [name for name in subjects if name != OURS] if OURS in subjects and rows[0]["unit"] != "1" else []
    lines = [["", *subjects, *[f"{OURS} / {name}" for name in others]], ["---"] * (1 + len(subjects) + len(others))]
    ratios = {case: {name: of[OURS] / of[name] for name in others if of.get(name) and of.get(OURS)} for case, of in at.items()}
    for case, of in at.items():
        medians = [f"{of[name]:.4g}" if name in of else "" for name in subjects]
        lines.append([case, *medians, *[f"{ratios[case][name]:.2f}" if name in ratios[case] else "" for name in others]])
    means = [[of[name] for of in ratios.values() if name in of] for name in others]
    if others:
        lines.append(["geometric mean", *[""] * len(subjects), *[f"{geometric_mean(m):.2f}" if m else "" for m in means]])
    return ["| " + " | ".join(line) + " |" for line in lines]


if __name__ == "__main__":
    main(sys.argv[1:])
