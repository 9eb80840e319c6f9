"""Deliberate faults, each of which the suite must catch: a module a framework, with its list `MUTANTS`."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """A fault: in which file, what becomes what, and which tests must go red."""

    name: str
    file: str
    old: str
    new: str
    tests: str
    select: str
