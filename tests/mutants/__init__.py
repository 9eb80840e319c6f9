"""Deliberate faults, each of which the suite must catch: a module a framework, with its list `MUTANTS`.

All of them take half an hour of a core, so that by default only those run that no synchronised batch norm may survive, and
those of the kernels, which are quick.
"""

from __future__ import annotations

from typing import NamedTuple

ESSENTIAL = frozenset(
    {
        "no collective",
        "mean of means",
        "E[x²] − E[x]² in float32",
        "dropped term in the input gradient",
        "local count in the backward pass",
        "moving statistics from local moments",
    }
)


class Mutant(NamedTuple):
    """A fault: in which file, what becomes what, and which tests must go red."""

    name: str
    file: str
    old: str
    new: str
    tests: str
    select: str
