"""Run by `make smoke-…` in a fresh environment that holds the wheel and one framework, or none: what a user does first."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

# Which docstring's example runs, by framework.
EXAMPLES = {
    "none": None,
    "tensorflow": "from syncbn.keras.layer import SyncBatchNormalization as it",
    "torch": "from syncbn.torch import SyncBatchNorm as it",
    "jax": "from syncbn.functional import sync_batch_norm as it",
}
RUN_EXAMPLE = """
import doctest
{found}
runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
for test in doctest.DocTestFinder(recurse=False).find(it, it.__name__, globs={{}}):
    runner.run(test)
assert runner.tries > 2 and not runner.failures, runner
"""
# An error that is not ignored means a wrong type; an ignore that is not needed, that the name is Any.
TYPED = """
import syncbn
from syncbn.functional import sync_batch_norm

def length(text: str) -> int:
    return len(text)

length(syncbn.__version__)
length(syncbn.convert)  # type: ignore[arg-type]
length(sync_batch_norm)  # type: ignore[arg-type]
model = syncbn.convert({"layers": 3}, group_size=2)
model["layers"].upper()  # type: ignore[attr-defined]
length(syncbn.__all__)  # type: ignore[arg-type]
"""


def run(*command: str) -> str:
    """What a command prints; fails where it does."""
    # Accelerators are not what this is about, and what the framework says of them neither.
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "KERAS_BACKEND": "tensorflow"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, f"{' '.join(command)[:200]}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    print(f"passed: {' '.join(command)[:100]!r}", flush=True)
    return done.stdout


def python(code: str) -> str:
    """The same for Python code."""
    return run(sys.executable, "-c", code)


def main(framework: str) -> None:
    """All of it."""
    assert "site-packages" in python("import syncbn; print(syncbn.__file__)")
    assert (
        python("from syncbn import *; print(__version__)").strip() == python("import syncbn; print(syncbn.__version__)").strip()
    )
    assert "Batch normalization" in python("import syncbn; help(syncbn)")
    python("import inspect, syncbn; inspect.getmembers(syncbn); [hasattr(syncbn, name) for name in dir(syncbn)]")
    command = str(Path(sys.executable).with_name("syncbn"))
    assert python("import syncbn; print(syncbn.__version__)").strip() in run(command, "--version")
    if framework != "none":
        python(RUN_EXAMPLE.format(found=EXAMPLES[framework]))
        run(command, "doctor")
    script = Path(tempfile.mkdtemp()) / "typed.py"
    script.write_text(TYPED)
    run(sys.executable, "-m", "mypy", "--strict", "--warn-unused-ignores", str(script))


if __name__ == "__main__":
    main(sys.argv[1])
