"""README.md and the pages of docs: no sentence over 25 words, no link into nothing, no command that is not there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIMIT = 25
PAGES = {str(path.relative_to(ROOT)): path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))}


def prose(text: str) -> list[str]:
    """The paragraphs and items of a page; code, formulas, tables, headings, comments and the targets of links apart."""
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r"^( *)```.*?^\1```", "", text, flags=re.S | re.M)
    text = re.sub(r"\$\$.*?\$\$", "\n\n", text, flags=re.S)
    text = re.sub(r"\$[^$\n]+\$|`[^`]+`", "CODE", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    kept, paragraphs = [], []
    for line in [*text.splitlines(), ""]:
        item = re.match(r"\s*([-*>]|\d+\.)\s+", line)
        # Tables, headings, and code that is indented outside of lists and tabs.
        other = re.match(r"\s*(\||#|<|===|:::|!!!)", line) or (re.match(r" {4,}\S", line) and not kept and not item)
        if not line.strip() or item or other:
            paragraphs.append(" ".join(kept))
            kept = []
        if line.strip() and not other:
            kept.append(line[item.end() :].strip() if item else line.strip())
    return [paragraph for paragraph in paragraphs if paragraph]


def sentences(text: str) -> list[str]:
    """Sentences end at a full stop, a question mark or an exclamation mark before a space."""
    return [s for paragraph in prose(text) for s in re.split(r"(?<=[.!?])[\"”')*]*\s+", paragraph) if s]


def words(sentence: str) -> int:
    return len(re.findall(r"[^\W_][\w.,'’%/×·-]*", sentence))


def long_sentences(text: str) -> list[str]:
    return [f"{words(s)} words: {s}" for s in sentences(text) if words(s) > LIMIT]


@pytest.mark.parametrize("name", PAGES)
def test_sentences_are_short(name):
    assert not long_sentences(PAGES[name].read_text(encoding="utf-8"))


def test_the_count_can_fail():
    text = "# A heading\n\nOne " + "word " * LIMIT + "more. Short.\n\n* item\n\n```python\n" + "code " * 40 + "\n```\n"
    assert [s[:8] for s in long_sentences(text)] == ["27 words"]
    assert sentences("One. Two `a. b` [three. four](x.md)! Five\n\n| a | table. |\n") == [
        "One.",
        "Two CODE three.",
        "four!",
        "Five",
    ]


LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    page = PAGES[name]
    targets = [match[1] for match in LINK.finditer(page.read_text(encoding="utf-8"))]
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


def test_commands_of_make_are_there():
    targets = "|".join(re.findall(r"^([\w%-]+):(?!=)", (ROOT / "Makefile").read_text(), re.M)).replace("%", r"\w+")
    for name, page in PAGES.items():
        asked = set(re.findall(r"(?:^|`)make ([a-z][\w-]*)", page.read_text(encoding="utf-8"), re.M))
        missing = [target for target in asked if not re.fullmatch(targets, target)]
        assert not missing, name


def test_what_troubleshooting_quotes_stands_in_the_source():
    """Headings of the second half are texts of errors: each must be a text of ours, or one that is known to be a framework's."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").split("## By the text of the message")[1]
    source = "".join(
        text.value
        for path in sorted((ROOT / "src").rglob("*.py"))
        for text in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(text, ast.Constant) and isinstance(text.value, str)
    )
    headings = re.findall(r"^### (.*)$", page, re.M)
    assert headings == sorted(headings, key=lambda text: text.strip("`").lower())
    missing = {text for text in headings if not all(part in source for part in text.split(" … "))}
    assert missing == OF_OTHERS


OF_OTHERS = {
    "Received data size doesn't match expected size",
    "Unknown layer: 'SyncBatchNormalization'",
    "Watchdog caught collective operation timeout: WorkNCCL",
}
