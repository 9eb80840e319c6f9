"""What the site does to its pages: links into the repository, files of its root, and formulas as MathML.

A browser shows MathML without a script, so formulas need no network.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

ROOT = Path(__file__).parent.parent
REPOSITORY = "https://github.com/syncbn/syncbn/blob/main/"
INCLUDE = re.compile(r"<!-- include: (\S+) -->")
INTO_REPOSITORY = re.compile(r"\]\((?:\.\./)+((?:examples|src|tests|benchmarks)/[^)]*)\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.S)
# What tests read stands in comments; a page shows none of it.
FOR_TESTS = re.compile(r"^ *<!-- (?:setup|block):.*?-->\n", re.M | re.S)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Before Markdown is read."""
    markdown = INCLUDE.sub(lambda found: _file(found[1]), markdown)
    markdown = FOR_TESTS.sub("", markdown)
    return INTO_REPOSITORY.sub(lambda found: f"]({REPOSITORY}{found[1]})", markdown)


def on_page_content(content: str, **_: Any) -> str:
    """After Markdown is HTML."""
    return FORMULA.sub(_mathml, content)


def _file(name: str) -> str:
    path = ROOT / name
    return path.read_text(encoding="utf-8") if path.exists() else f"See [{name}]({REPOSITORY}{name})."


def _mathml(found: re.Match[str]) -> str:
    tag, bracket, formula = found.groups()
    display = "block" if bracket == "[" else "inline"
    return f'<{tag} class="formula">{convert(html.unescape(formula).strip(), display=display)}</{tag}>'
