"""Runs the command in a process, and reads what it printed."""

from __future__ import annotations

import os
import subprocess
import sys

NORMS = ["local", "syncbn", "syncbn + renorm"]
ALONE = (sys.executable, "-m", "syncbn.cli")
OPTIONS = ("--replicas", 2, "--batch", 8, "--epochs", 1, "--seed", 5)


def syncbn(*words, command=ALONE, **environment):
    """(exit status, stdout and stderr)."""
    done = subprocess.run(
        [*command, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
        check=False,
    )
    return done.returncode, done.stdout


def rows(text):
    """The table as {run: cells}."""
    lines = [line.strip("│ ").split("│") for line in text.splitlines() if line.startswith("│")]
    return {cells[0].strip(): [c.strip() for c in cells[1:]] for cells in lines}


def check_table(text):
    """What synchronising does: the three rows of any framework."""
    table = rows(text)
    assert list(table) == NORMS
    for name, (accuracy, _, apart, output_error, gradient_error) in table.items():
        if name == "local":
            assert min(map(float, (apart, output_error, gradient_error))) > 1e-3
        else:
            assert float(accuracy.rstrip(" %")) > 50
            assert float(apart) == 0
            assert float(output_error) < 1e-5
            assert float(gradient_error) < 1e-4
    for heading in ("statistics", "differ by", "error of", "output", "gradient"):
        assert heading in text
    assert "error: largest difference from one device that has the whole batch." in text
    # What is wider than a terminal would be broken: paths of this test's folders apart.
    shown = text[text.index("┏") :].splitlines()
    assert max(len(line) for line in shown if not line.startswith("/")) <= 80
    assert "Traceback" not in text
    assert "Warning" not in text
