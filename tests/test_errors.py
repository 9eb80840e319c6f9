"""The form of every error text in the source: the rule, "Received: …", then the mend, in sentences of at most 25 words."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import syncbn

SOURCE = Path(syncbn.__file__).parent
ERRORS = {"TypeError", "ValueError", "RuntimeError", "NotImplementedError"}
# Torch's own sentences, for which programs may look, and errors that are caught before a user sees them.
OTHERS = (
    "expected at least 2D input (got …D input)",
    "SyncBatchNorm number of input channels should be non-zero",
    "Expected more than 1 value per channel when training, got input size …",
    "cuStreamGetCaptureInfo_v2 returned …",
    "wire type …",
)


def texts(tree):
    """(line, text) of each error with a literal text, raised, returned or assigned first; a value in a text is "…"."""
    for node in ast.walk(tree):
        text = None
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) in ERRORS and len(node.args) == 1:
            text = literal(node.args[0])
        elif isinstance(node, ast.Assign):
            text = literal(node.value)
            text = text if text and "Received: " in text else None
        if text is not None:
            yield node.lineno, text


def literal(node):
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    return None


def sentences(text):
    return re.split(r"(?<=[.!?…])\s+(?=[A-Z`…])", text)


def faults(text):
    """What an error text lacks."""
    rule, received, rest = text.partition("Received: ")
    if not received:
        yield "no `Received: `"
    if not re.search(r"[.:…] $", rule):
        yield "no rule before `Received: `"
    if len(sentences(rest)) < 2:
        yield "no mend after what was received"
    if not text.endswith((".", "…")):
        yield "no full stop"
    for sentence in sentences(text):
        if len(sentence.split()) > 25:
            yield f"{len(sentence.split())} words: {sentence}"


CASES = [
    pytest.param(text, id=f"{path.relative_to(SOURCE)}:{line}")
    for path in sorted(SOURCE.rglob("*.py"))
    if "device" not in path.relative_to(SOURCE).parts
    for line, text in texts(ast.parse(path.read_text()))
    if text not in OTHERS
]


@pytest.mark.parametrize("text", CASES)
def test_an_error_gives_the_rule_what_was_received_and_the_mend(text):
    assert list(faults(text)) == []


def test_the_texts_are_found():
    """An error whose text is made elsewhere would escape: nearly all of them are literal."""
    assert len(CASES) > 60


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("`axis` must be an integer. Give -1.", "no `Received: `"),
        ("Received: axis=…. Give -1.", "no rule"),
        ("`axis` must be an integer. Received: axis=….", "no mend"),
        ("`axis` must be an integer. Received: axis=…. Give -1", "no full stop"),
        (f"`axis` must be an integer{' or so' * 12}. Received: axis=…. Give -1.", "29 words"),
    ],
)
def test_each_rule_can_fail(text, fault):
    assert [found for found in faults(text) if found.startswith(fault)]


def test_the_reader_finds_an_f_string():
    tree = ast.parse("raise ValueError(f'Received: {x}' ' of it')\nreturn TypeError('text')\nraise KeyError('no')")
    assert [text for _, text in texts(tree)] == ["Received: … of it", "text"]
