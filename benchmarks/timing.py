"""How implementations take turns. Each is timed in every round, so that what else the machine does slows none of them alone."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def in_turns(steps: dict[str, Callable[[], Any]], rounds: int, timed: Callable[[Callable[[], Any]], T]) -> dict[str, list[T]]:
    """What `timed` returns for each step in each round; the order rotates."""
    found: dict[str, list[T]] = {name: [] for name in steps}
    order = list(steps)
    for _ in range(rounds):
        for name in order:
            found[name].append(timed(steps[name]))
        order = order[1:] + order[:1]
    return found


def seconds(step: Callable[[], Any], repeats: int = 1) -> float:
    """Of one call of `repeats`."""
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - start) / repeats


def case_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", default="", metavar="TEXT", help="only cases whose name contains this")


def rounds_option(parser: argparse.ArgumentParser, rounds: int) -> None:
    parser.add_argument("--rounds", type=int, default=rounds, help=f"rounds per case ({rounds}); the layers take turns in each")


def chosen(cases: Any, part: str, name: Callable[[Any], str]) -> list[Any]:
    """The cases whose name contains `part`. Exits where there are none."""
    found = [case for case in cases if part in name(case)]
    if not found:
        raise SystemExit(f"--cases must be part of one of these names: {[name(case) for case in cases]}. Received: {part!r}.")
    return found


def case_name(shape: tuple[int, ...], dtype: str = "float32") -> str:
    return f"{dtype} {'×'.join(map(str, shape))}"
