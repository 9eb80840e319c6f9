"""Every deliberate fault must be caught: tests that stayed green would prove nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mutants import ESSENTIAL, command, conversion, jax, kernels, tensorflow, torch

ROOT = Path(__file__).resolve().parent.parent
LISTS = {"tensorflow": tensorflow, "torch": torch, "jax": jax, "kernels": kernels, "conversion": conversion, "command": command}
MUTANTS = {
    f"{name}: {mutant.name}": (mutant, getattr(faults, "OPTIONS", ()))
    for name, faults in LISTS.items()
    for mutant in faults.MUTANTS
}


def pytest_generate_tests(metafunc):
    if "name" in metafunc.fixturenames:
        everything = metafunc.config.getoption("--all-mutants")
        metafunc.parametrize(
            "name", [n for n, (m, _) in MUTANTS.items() if everything or m.name in ESSENTIAL or m in kernels.MUTANTS]
        )


@pytest.fixture(scope="module")
def verdicts(request, tmp_path_factory):
    """The result of pytest for each selected mutant. Two run at a time."""
    asked = [item.callspec.params["name"] for item in request.session.items if hasattr(item, "callspec")]
    pool = ThreadPoolExecutor(2)
    yield {name: pool.submit(run, *MUTANTS[name], tmp_path_factory.mktemp("mutant")) for name in asked}
    pool.shutdown(cancel_futures=True)


def run(mutant, options, folder):
    shutil.copytree(ROOT / "src" / "syncbn", folder / "syncbn", ignore=shutil.ignore_patterns("__pycache__"))
    file = folder / "syncbn" / mutant.file
    text = file.read_text()
    assert text.count(mutant.old) == 1, f"{mutant.name}: the code to break stands {text.count(mutant.old)} times in {mutant.file}"
    file.write_text(text.replace(mutant.old, mutant.new))
    tests = [str(ROOT / "tests" / mutant.tests), "-k", mutant.select, *options]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT)


@pytest.mark.parametrize("mutant", [mutant for mutant, _ in MUTANTS.values()], ids=lambda mutant: mutant.name)
def test_the_text_of_a_mutant_stands_in_the_source_once(mutant):
    assert (ROOT / "src" / "syncbn" / mutant.file).read_text().count(mutant.old) == 1


def test_mutant_is_caught(name, verdicts):
    verdict = verdicts[name].result()
    # 1: tests ran and one failed. Anything else (no test selected, an import error) catches nothing.
    assert verdict.returncode == 1, verdict.stdout[-3000:] + verdict.stderr[-1000:]
    assert "1 failed" in verdict.stdout
    assert "1 error" not in verdict.stdout
    assert "SyntaxError" not in verdict.stdout
