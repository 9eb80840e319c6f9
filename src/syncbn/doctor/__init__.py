"""What `syncbn doctor` says: which code runs here for each framework, and whether its numbers are right."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from syncbn import __version__

FRAMEWORKS = ("tensorflow", "torch", "jax")
WIDTH = 24


@dataclass
class Report:
    """What was found in one framework, over all replicas that were started.

    lines: names, and what was found.
    errors: quantities, and the largest error of each over the replicas, relative to the largest value.
    limit: the largest error that is right.
    """

    lines: list[tuple[str, str]]
    replicas: int = 1
    errors: dict[str, float] = field(default_factory=dict)
    limit: float = 1e-5

    @property
    def well(self) -> bool:
        """Whether every number is right; NaN is not."""
        return all(error <= self.limit for error in self.errors.values())

    def verdict(self) -> str:
        """The last sentence."""
        who = f"{self.replicas} replicas agree" if self.replicas > 1 else "1 replica agrees"
        if self.well:
            return f"OK: {who} with float64 on the whole batch to {max(self.errors.values()):.0e}.".replace("e-0", "e-")
        wrong = ", ".join(f"{name} ({error:.0e})" for name, error in self.errors.items() if not error <= self.limit)
        return f"FAILED: wrong beside float64 on the whole batch: {wrong}. At most {self.limit:.0e} is right."


def run(framework: str | None) -> int:
    """Prints what was found for one framework, or for each that is installed; gives the exit status.

    Of several, each is checked in a process of its own. Under torchrun all ranks check PyTorch, and rank 0 prints.
    """
    if framework is None and "RANK" in os.environ:
        framework = "torch"
    if _rank() == 0:
        print(f"syncbn {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}", flush=True)
    if framework:
        return check(framework)
    there = [name for name in FRAMEWORKS if importlib.util.find_spec(name)]
    failed = [name for name in there if _in_a_process(name) != 0]
    for name in FRAMEWORKS:
        if name not in there:
            print(f'\n{name} is not installed: pip install "syncbn[{name}]"')
    if not there:
        print("\nFAILED: syncbn needs one of these frameworks.")
    elif len(there) > 1:
        print(f"\nFAILED: {', '.join(failed)}." if failed else f"\nOK: {', '.join(there)}.")
    return 1 if failed or not there else 0


def _in_a_process(framework: str) -> int:
    """Frameworks do not share a process: each may take all memory of a GPU, and one may end the process."""
    code = f"import sys; from syncbn import doctor; sys.exit(doctor.check({framework!r}))"
    return subprocess.run([sys.executable, "-c", code]).returncode


def check(framework: str) -> int:
    """Checks one framework in this process, prints what was found, and gives the exit status."""
    if importlib.util.find_spec(framework) is None:
        return _fail(f'{framework} is not installed: pip install "syncbn[{framework}]"')
    try:
        found = importlib.import_module(f"syncbn.doctor.{framework}").report()
    except (ImportError, RuntimeError, ValueError) as error:
        # A wrong setting, or a framework that does not start: its own sentence is what helps.
        return _fail(str(error))
    if _rank() == 0:
        print(f"\n{table(found)}\n{found.verdict()}", flush=True)
    return 0 if found.well else 1


def _fail(sentence: str) -> int:
    if _rank() == 0:
        print(f"\nFAILED: {sentence}", flush=True)
    return 1


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def table(found: Report) -> str:
    """The report as lines of a name and what was found."""
    errors = [
        (f"error of {name}", f"{error:.1e}{'' if error <= found.limit else '  WRONG'}") for name, error in found.errors.items()
    ]
    return "\n".join(f"{name:{WIDTH}}  {value}" for name, value in [*found.lines, *errors])


def merged(lines: Sequence[Sequence[tuple[str, str]]]) -> list[tuple[str, str]]:
    """The lines of all ranks as one table: what they share stands once, what differs once for each rank."""
    table = []
    for same in zip(*lines, strict=True):
        if len(set(same)) == 1:
            table.append(same[0])
        else:
            table += [(name if rank == 0 else "", f"rank {rank}: {value}") for rank, (name, value) in enumerate(same)]
    return table


def version(package: str) -> str:
    """A package's version, or that it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
