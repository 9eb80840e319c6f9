"""The benchmarks' rows: every row that is kept fits the schema, and what does not fit is refused."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import figures  # noqa: E402
import plots as benchmark_plots  # noqa: E402
import rows  # noqa: E402
import run  # noqa: E402

FIGURE = {"suite": "gpu", "case": "float32 4×8", "measure": "step", "unit": "µs", "commit": "abc", "versions": ("pytest",)}


@pytest.mark.parametrize("path", sorted(rows.RESULTS.glob("*.jsonl")), ids=lambda path: path.name)
def test_every_kept_row_fits_the_schema(path):
    found = rows.read(path)
    assert found
    assert path.stem in run.SUITES
    for row in found:
        rows.check(row)
        assert row["suite"] == path.stem


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peer": "x"}, "has the keys"),
        ({"replicas": "2"}, "'replicas' must be"),
        ({"commit": ""}, "'commit' must be"),
        ({"unit": "us"}, "unit must be one of"),
        ({"values": {"p25": 1.0}}, "must have a median"),
        ({"values": {"median": float("nan")}}, "must be finite"),
        ({"values": {"median": 1.0, "each": [1.0, float("inf")]}}, "must be finite"),
    ],
)
def test_a_row_that_does_not_fit_is_refused(change, message):
    row = rows.write(None, **FIGURE, values=1.0)
    rows.check(row)
    with pytest.raises(ValueError, match=message):
        rows.check(row | change)


@pytest.mark.parametrize("values", [2.0, [1.0, 2.0, 3.0], {"median": 2.0, "each": [2.0]}])
def test_write_appends_a_row_with_its_provenance(tmp_path, values):
    path = tmp_path / "gpu.jsonl"
    returned = [rows.write(path, **FIGURE, subject=name, values=values, floor=1.5) for name in ("syncbn", "other")]
    assert rows.read(path) == returned
    row = returned[1]
    assert (row["subject"], row["values"]["median"], row["details"]) == ("other", 2.0, {"floor": 1.5})
    assert row["versions"] == {"pytest": pytest.__version__}
    assert row["machine"]["cores"] >= 1
    assert row["replicas"] == 1


def test_merging_keeps_what_was_not_measured_again(tmp_path):
    path = tmp_path / "gpu.jsonl"
    for transport, value in (("peer memory", 1.0), ("all-reduce", 2.0)):
        rows.write(path, **FIGURE, values=value, transport=transport)
    rows.write(path, **{**FIGURE, "case": "float32 2×2"}, values=3.0)
    rows.merge(path, [rows.write(None, **FIGURE, values=value, transport="peer memory") for value in (4.0, 5.0)])
    assert [row["values"]["median"] for row in rows.read(path)] == [2.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize("suite", run.SUITES)
def test_every_suite_has_the_two_functions(suite):
    tree = ast.parse((ROOT / "benchmarks" / f"{suite.replace('-', '_')}.py").read_text())
    found = {node.name: len(node.args.args) for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert (found["options"], found["measure"]) == (1, 2)


def test_the_runner_measures_shows_and_keeps(tmp_path, monkeypatch, capsys):
    out = tmp_path / "new.jsonl"

    def measure(given, record):
        for subject, value in (("syncbn", 1.0), ("baseline", given.factor)):
            record(case="float32 2×2", measure="step", unit="s", subject=subject, values=value)
        return "wrong"

    suite = SimpleNamespace(options=lambda parser: parser.add_argument("--factor", type=float), measure=measure)
    monkeypatch.setattr(run.importlib, "import_module", lambda name: suite)
    for more in (["--no-rows"], []):
        with pytest.raises(SystemExit, match="wrong"):
            run.main(["gpu", "--factor", "4", "--commit", "abc", "--out", str(out), *more])
        assert "| float32 2×2 | 1 | 4 | 0.25 |" in capsys.readouterr().out
        assert out.exists() == (not more)
    assert [(row["suite"], row["commit"]) for row in rows.read(out)] == [("gpu", "abc")] * 2
    assert list(tmp_path.iterdir()) == [out]


def test_the_check_of_the_tables_can_fail(tmp_path, monkeypatch):
    """A row with another figure gives another table."""
    text = (ROOT / "README.md").read_text()
    assert figures.written(text, figures.TABLES["README.md"]) == text
    for path in rows.RESULTS.glob("*.jsonl"):
        (tmp_path / path.name).write_text(path.read_text())
    changed = rows.read("torch-cpu")
    changed[0]["values"]["median"] *= 2
    (tmp_path / "torch-cpu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    assert figures.written(text, figures.TABLES["README.md"]) != text


def test_the_figure_of_accuracy_has_all_its_points(monkeypatch):
    from syncbn.demo import NORMS, plots, sweep

    drawn = []
    monkeypatch.setattr(plots, "sweep", lambda found, folder: drawn.extend(found))
    benchmark_plots.training()
    seeds = {row["seed"] for row in drawn}
    assert len(seeds) >= 5
    expected = {(norm, size, seed) for norm in NORMS for size in sweep.IMAGES_PER_DEVICE for seed in seeds}
    assert {(row["norm"], row["images_per_device"], row["seed"]) for row in drawn} == expected
    assert len(drawn) == len(expected)
    assert len({(row["steps"], row["devices"]) for row in drawn}) == 1
    first = rows.read("images-per-device")[0]
    assert [row["accuracy"] for row in drawn if (row["norm"], row["images_per_device"]) == (first["subject"], 1)] == first[
        "values"
    ]["each"]
