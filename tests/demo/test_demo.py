"""What a person sees who runs the command."""

from __future__ import annotations

import re
import sys

import pytest
from demo_output import NORMS, OPTIONS, check_table, rows, syncbn


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Two runs with the same seed. A backend of Keras that is set already is not the one that runs."""
    folders = [tmp_path_factory.mktemp("demo") for _ in range(2)]
    backends = ("tensorflow", "jax")
    runs = [syncbn("demo", *OPTIONS, "--output", f, KERAS_BACKEND=b) for f, b in zip(folders, backends, strict=True)]
    return folders, runs


def test_demo_shows_what_synchronising_does(demo):
    folders, [(code, text), _] = demo
    assert code == 0, text
    check_table(text)
    assert (folders[0] / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (folders[0] / "accuracy.svg").read_text()
    assert str(folders[0] / "accuracy.png") in text


def test_demo_shows_life_before_it_trains_and_a_sentence_after(demo):
    lines = demo[1][0][1].splitlines()
    assert re.match(r"syncbn \S+, tensorflow 2\.\S+, Python 3\.", lines[0])
    assert lines[2] == "2 replicas × 8 images, 1 epoch of 89 steps."
    for norm in NORMS:
        assert any(line.startswith(f"{norm}, epoch 1 of 1: ") for line in lines)
    assert re.fullmatch(r"syncbn( \+ renorm)?: \d+\.\d % of the test images right; local: \d+\.\d %\.", lines[-1])


def test_the_same_seed_gives_the_same_table_but_for_times(demo):
    _, outputs = demo
    first, second = (rows(text) for _, text in outputs)
    assert {name: cells[:1] + cells[2:] for name, cells in first.items()} == {
        name: cells[:1] + cells[2:] for name, cells in second.items()
    }


def test_help_tells_the_options():
    code, text = syncbn("demo", "--help")
    assert code == 0
    for option in (
        "--backend",
        "--replicas",
        "--batch",
        "--epochs",
        "--output",
        "--seed",
        "--sweep",
        "--seeds",
        "--steps",
        "--rows",
    ):
        assert option in text


WRONG = {
    ("--replicas", 0): "argument --replicas: must be an integer from 1 to 64. Received: 0.",
    ("--batch", "many"): "argument --batch: must be an integer from 1 to 64. Received: many.",
    ("--epochs", -1): "argument --epochs: must be an integer, at least 1. Received: -1.",
    ("--backend", "caffe"): "argument --backend: invalid choice: 'caffe'",
    ("--replicas", 64, "--batch", 64): "--replicas times --batch must be at most 1437, the training images.",
    ("--backend", "torch", "--batch", 1): "torch.nn.BatchNorm1d takes no single value per channel.",
    ("--seeds", 3): "--seeds needs --sweep.",
    ("--sweep", "--batch", 3): "--batch does not go with --sweep.",
    ("--sweep", "--rows", "nowhere.jsonl"): "--rows must name a file that `syncbn demo --sweep` wrote. Received: nowhere.jsonl",
}


@pytest.mark.parametrize("words", WRONG, ids=lambda words: " ".join(map(str, words)))
def test_options_that_make_no_sense(words, capsys):
    from syncbn import cli

    with pytest.raises(SystemExit) as ended:
        raise SystemExit(cli.main(["demo", *map(str, words)]))
    said = capsys.readouterr().err if isinstance(ended.value.code, int) else ended.value.code
    assert ended.value.code != 0
    assert WRONG[words] in said


def test_a_missing_package_is_one_sentence_with_the_extra(monkeypatch, capsys):
    from syncbn import cli

    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "jax", None)
    assert cli.main(["demo", "--backend", "jax"]) == 2
    said = capsys.readouterr().err
    assert said == 'The demo needs jax and rich. Install the extra: pip install "syncbn[demo,jax]"\n'


def test_version_and_doctor_need_no_extra():
    from syncbn import __version__

    without = (sys.executable, "-c", "import sys; sys.modules.update(dict.fromkeys(['rich', 'typer', 'sklearn', 'matplotlib']));"
               "from syncbn import cli; sys.exit(cli.main())")  # fmt: skip
    assert syncbn("--version", command=without) == (0, f"syncbn {__version__}\n")
    code, text = syncbn("doctor", "--backend", "torch", command=without)
    assert code == 0, text


def test_plain_numbers():
    from syncbn.demo.report import plain

    assert [plain(v) for v in (5.4, 0.061, 16.2, 142.0, 0, 4.2e-7, float("nan"))] == [
        "5.4",
        "0.061",
        "16",
        "142",
        "0",
        "4e-7",
        "nan",
    ]


def test_labels_of_lines_do_not_overlap():
    from syncbn.demo.plots import label_heights

    heights = label_heights([97.0, 99.0, 98.5, 20.0], gap=5)
    assert heights == [89.0, 99.0, 94.0, 20.0]


def test_best_row_is_bold(capsys, monkeypatch):
    from syncbn.demo import Run, Task, report

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    runs = [
        Run(Task(norm, 2, 3, 1, 0), [accuracy], 0.001, 0, 0, 0) for norm, accuracy in zip(NORMS, (0.5, 0.9, 0.8), strict=True)
    ]
    report.table(runs, "torch")
    bold = [line for line in capsys.readouterr().out.splitlines() if "\x1b[1m" in line and "%" in line]
    assert len(bold) == 1
    assert "90.0 %" in bold[0]
    assert report.verdict(runs) == "syncbn: 90.0 % of the test images right; local: 50.0 %."
    assert report.verdict([runs[0], runs[2]]) == "syncbn + renorm: 80.0 % of the test images right; local: 50.0 %."
