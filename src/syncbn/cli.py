"""The command `syncbn`. It needs no package but the standard library, until the demo runs."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from syncbn import __version__, _missing

BACKENDS = ("tensorflow", "jax", "torch")
# What the demo imports, each with the name of its package.
DEMO_NEEDS = {"matplotlib": "matplotlib", "rich": "rich", "sklearn": "scikit-learn"}
BACKEND_NEEDS = {"tensorflow": ("tensorflow", "keras"), "jax": ("jax", "keras"), "torch": ("torch",)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command with these arguments, by default the process's; gives the exit status."""
    given = _parser().parse_args(arguments)
    return given.command(given)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="syncbn", description="Batch normalization whose statistics come from all replicas that train a model."
    )
    parser.add_argument("--version", action="version", version=f"syncbn {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    about = "Trains a small network on handwritten digits with and without synchronised batch normalization."
    demo = commands.add_parser("demo", help=about, description=about)
    demo.set_defaults(command=_demo)
    add = demo.add_argument
    add("--backend", choices=BACKENDS, default="tensorflow", help="the framework that trains (default: tensorflow)")
    replicas = "number of replicas: GPUs where there are any, else logical CPU devices or processes (default: 4)"
    add("--replicas", type=_from(1, 64), default=4, metavar="N", help=replicas)
    add("--batch", type=_from(1, 64), metavar="N", help="images per replica and step (default: 2)")
    add("--epochs", type=_from(1), metavar="N", help="passes over the training images (default: 5)")
    add("--seed", type=_from(0), metavar="N", help="of weights and order of images; a seed gives the same table (default: 0)")
    add("--output", type=Path, default=Path("demo-results"), metavar="FOLDER", help="for plots and rows (default: demo-results)")
    sweep = demo.add_argument_group("accuracy against images per device: 1, 2, 4, 8 and 16")
    sweep.add_argument("--sweep", action="store_true", help="trains every batch norm with each; takes minutes")
    sweep.add_argument("--steps", type=_from(1), metavar="N", help="of each run (default: 500)")
    sweep.add_argument("--seeds", type=_from(1), metavar="N", help="runs of each kind (default: 5)")
    sweep.add_argument("--rows", type=Path, metavar="FILE", help="draws the figure of rows that were kept, and trains nothing")
    about = "Says which code runs here for each framework, and checks its numbers. Alone, or under torchrun on every rank."
    doctor = commands.add_parser("doctor", help=about, description=about)
    doctor.set_defaults(command=_doctor)
    doctor.add_argument("--backend", choices=BACKENDS, help="one framework (default: each that is installed)")
    return parser


def _from(low: int, high: int | None = None) -> Callable[[str], int]:
    """A parser of integers from low to high."""
    rule = f"must be an integer from {low} to {high}" if high else f"must be an integer, at least {low}"

    def integer(text: str) -> int:
        if text.lstrip("-").isdigit() and low <= int(text) <= (high or int(text)):
            return int(text)
        raise argparse.ArgumentTypeError(f"{rule}. Received: {text}.")

    return integer


def _doctor(given: argparse.Namespace) -> int:
    from syncbn import doctor

    return doctor.run(given.backend)


def _demo(given: argparse.Namespace) -> int:
    of_other = ("batch", "epochs", "seed") if given.sweep else ("steps", "seeds", "rows")
    wrong = [f"--{name}" for name in of_other if getattr(given, name) is not None]
    if wrong:
        kind = "does not go with" if given.sweep else "needs"
        return _refuse(f"{wrong[0]} {kind} --sweep.")
    missing = _not_installed(() if given.rows else BACKEND_NEEDS[given.backend])
    if missing:
        extras = "demo" if given.rows else f"demo,{given.backend}"
        return _refuse(f'The demo needs {" and ".join(missing)}. Install the extra: pip install "syncbn[{extras}]"')
    return _sweep(given) if given.sweep else _compare(given)


def _refuse(sentence: str) -> int:
    print(sentence, file=sys.stderr)
    return 2


def _not_installed(modules: Sequence[str]) -> list[str]:
    """The names of packages that the demo needs and that are not installed."""
    needed = {**{name: name for name in modules}, **DEMO_NEEDS}
    return [package for module, package in needed.items() if not _missing.is_installed(module)]


def _first() -> bool:
    """Whether this process prints: all but the ranks above 0 of torchrun."""
    return os.environ.get("RANK", "0") == "0"


def _announce(given: argparse.Namespace, what: str) -> None:
    """Versions and what will be done, before a framework is imported: that takes seconds."""
    if _first():
        package = "tensorflow-cpu" if given.backend == "tensorflow" and not _version("tensorflow") else given.backend
        print(f"syncbn {__version__}, {given.backend} {_version(package)}, Python {platform.python_version()}")
        print(what, flush=True)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _compare(given: argparse.Namespace) -> int:
    from syncbn.demo import LOCAL, TRAIN_IMAGES, demo_tasks, refuses

    batch, epochs = given.batch or 2, given.epochs or 5
    tasks = demo_tasks(given.replicas, batch, epochs, given.seed or 0)
    steps = tasks[0].steps
    if not steps:
        return _refuse(
            f"--replicas times --batch must be at most {TRAIN_IMAGES}, the training images. Received: a larger product."
        )
    if refuses(given.backend, LOCAL, batch):
        return _refuse("torch.nn.BatchNorm1d takes no single value per channel. Received: --batch 1. Give --batch 2, or more.")
    _announce(
        given,
        f"Trains a small network on {TRAIN_IMAGES:,} handwritten digits, once with each of three batch norms:\n"
        f"{given.replicas} replicas × {batch} images, {epochs} epoch{'s' * (epochs > 1)} of {steps} steps.",
    )
    from syncbn.demo import plots, report

    with report.watching(tasks) as watch:
        runs = list(_trainer(given.backend).train(given.replicas, tasks, watch))
    report.table(runs, given.backend)
    for path in plots.curves(runs, given.replicas, given.output):
        print(path)
    print(report.verdict(runs))
    return 0


def _sweep(given: argparse.Namespace) -> int:
    from syncbn.demo import sweep

    if given.rows:
        rows = sweep.read(given.rows)
    else:
        tasks = sweep.tasks(given.backend, given.seeds or 5, given.steps or 500)
        path = given.output / "images-per-device.jsonl"
        _announce(given, f"{len(tasks)} runs of {tasks[0].steps} steps on {given.replicas} replicas; rows go to {path}.")
        from syncbn.demo import report

        with report.watching(tasks) as watch:
            runs = _trainer(given.backend).train(given.replicas, tasks, watch)
            shared = {"devices": given.replicas, "backend": given.backend, "versions": _versions(given.backend)}
            rows = list(sweep.write(runs, path, **shared))
    from syncbn.demo import plots

    print(sweep.summary(rows))
    for path in plots.sweep(rows, given.output):
        print(path)
    return 0


def _versions(backend: str) -> dict[str, str]:
    names = ("syncbn", *BACKEND_NEEDS[backend], "tensorflow-cpu") if backend == "tensorflow" else BACKEND_NEEDS[backend]
    return {"syncbn": __version__, **{name: version for name in names if (version := _version(name))}}


def _trainer(backend: str) -> Any:
    return importlib.import_module(f"syncbn.demo.{backend}")


if __name__ == "__main__":
    sys.exit(main())
