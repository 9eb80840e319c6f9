"""What README.md and the pages of the site show runs: each block of Python, in a process per framework. `make test-docs`."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import docs_blocks
import pytest
from docs_blocks import KINDS, PAGES, ROOT, UNMARKED, blocks_of, pages_of

CASES = [(kind, str(page.relative_to(ROOT))) for kind in KINDS for page in pages_of(kind)]


@functools.cache
def results(kind: str) -> tuple[dict[str, str | None], str]:
    """What went wrong on each page, and all that was printed."""
    command = [sys.executable]
    if kind == "torch ranks":
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, docs_blocks.__file__, kind],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
        check=False,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"page": ')]
    found: dict[str, str | None] = {}
    for row in rows:
        found[row["page"]] = found.get(row["page"]) or row["wrong"]
    return found, done.stdout


@pytest.mark.parametrize(("kind", "page"), CASES)
def test_blocks_run(kind, page):
    found, printed = results(kind)
    assert page in found, printed[-3000:]
    assert found[page] is None, found[page]


@pytest.mark.parametrize("page", [page for page in PAGES if str(page.relative_to(ROOT)) not in UNMARKED], ids=str)
def test_every_block_says_where_it_runs_or_why_not(page):
    for block in blocks_of(page.read_text(encoding="utf-8")):
        skipped, _, reason = (block.kind or "").partition(", ")
        assert block.kind in KINDS or (skipped == "skip" and reason), f"{page.name}, line {block.line}: {block.kind}"


def test_a_wrong_block_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- setup: torch\na = 1\n-->\ntext\n\n    <!-- block: torch -->\n    ```python\n    assert a == 2\n    ```\n"
    )
    assert [(block.kind, block.code) for block in blocks_of(page.read_text())] == [
        ("torch", "a = 1\n"),
        ("torch", "assert a == 2\n"),
    ]
    assert "line 8" in docs_blocks.run(page, "torch")
    page.write_text(page.read_text().replace("a = 1", "a = 2"))
    assert docs_blocks.run(page, "torch") is None
