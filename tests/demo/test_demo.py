"""What a person sees who runs the command."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SYNCBN = Path(sys.executable).with_name("syncbn")


def syncbn(*words):
    done = subprocess.run([SYNCBN, *map(str, words)], capture_output=True, text=True, timeout=300, env={"COLUMNS": "120"})
    return done.returncode, done.stdout + done.stderr


def rows(text):
    """The table as {run: cells}."""
    lines = [line.strip("│ ").split("│") for line in text.splitlines() if line.startswith("│")]
    return {cells[0].strip(): [c.strip() for c in cells[1:]] for cells in lines}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Two runs with the same seed."""
    folders = [tmp_path_factory.mktemp("demo") for _ in range(2)]
    options = ("--replicas", 2, "--batch", 8, "--epochs", 1, "--seed", 5)
    return folders, [syncbn("demo", *options, "--output", folder) for folder in folders]


def test_demo_shows_what_synchronising_does(demo):
    folders, [(code, text), _] = demo
    assert code == 0, text
    table = rows(text)
    assert list(table) == ["keras BatchNormalization", "SyncBatchNormalization", "SyncBatchNormalization, renorm"]
    for name, (accuracy, _, apart, output_off, gradient_off) in table.items():
        if name.startswith("Sync"):
            assert float(accuracy.rstrip("%")) > 50
            assert float(apart) == 0
            assert float(output_off) < 1e-5
            assert float(gradient_off) < 1e-4
        else:
            assert min(map(float, (apart, output_off, gradient_off))) > 1e-3
    assert "89/89 steps" in text
    assert (folders[0] / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (folders[0] / "accuracy.svg").read_text()
    assert str(folders[0] / "accuracy.png") in text.replace("\n", "")
    assert "Traceback" not in text


def test_the_same_seed_gives_the_same_table_but_for_times(demo):
    _, outputs = demo
    first, second = (rows(text) for _, text in outputs)
    assert {name: cells[:1] + cells[2:] for name, cells in first.items()} == {
        name: cells[:1] + cells[2:] for name, cells in second.items()
    }


def test_help_tells_the_options():
    code, text = syncbn("demo", "--help")
    assert code == 0
    for option in ("--backend", "--replicas", "--batch", "--epochs", "--output", "--seed"):
        assert option in text


@pytest.mark.parametrize("words", [("--replicas", 0), ("--batch", "many"), ("--epochs", -1), ("--backend", "caffe")], ids=str)
def test_options_that_make_no_sense(words):
    code, text = syncbn("demo", *words)
    assert code == 2
    assert re.search(r"Invalid value for '--\w+'", text)
