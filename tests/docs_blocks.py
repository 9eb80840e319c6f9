"""The code blocks of README.md and the site, and a program that runs those of one kind: `python tests/docs_blocks.py KIND`.

A block of Python has a comment above it: `<!-- block: KIND -->`, KIND one of KINDS, or `<!-- block: skip, REASON -->`. What a page
takes for granted, such as a model, stands in `<!-- setup: KIND`, code, `-->`. Blocks of one kind on one page share their names.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import sys
import tempfile
import textwrap
import traceback
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
KINDS = ("torch", "torch ranks", "tensorflow", "jax")
# tests/jax/test_examples_jax.py runs this page.
UNMARKED = {"docs/jax.md"}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"^(?P<in>[ ]*)<!-- setup: (?P<setup>[\w ]+)\n(?P<hidden>.*?)^-->$"
    r"|(?:^[ ]*<!-- block: (?P<kind>[^\n]*) -->\n)?^(?P<indent>[ ]*)```python\n(?P<code>.*?)^(?P=indent)```$",
    re.M | re.S,
)


class Block(NamedTuple):
    """kind: one of KINDS, or "skip" and a reason; None where a block has no comment."""

    kind: str | None
    code: str
    line: int


def blocks_of(text: str) -> list[Block]:
    """A page's blocks of Python and its hidden code, in their order."""
    found = []
    for match in BLOCK.finditer(text):
        start = match.start("hidden" if match["setup"] else "code")
        code = textwrap.dedent(match["hidden"] or match["code"])
        found.append(Block(match["setup"] or match["kind"], code, text.count("\n", 0, start)))
    return found


def pages_of(kind: str) -> list[Path]:
    """The pages that have blocks of this kind."""
    return [page for page in PAGES if any(block.kind == kind for block in blocks_of(page.read_text(encoding="utf-8")))]


def run(page: Path, kind: str) -> str | None:
    """Runs a page's blocks of a kind in an empty folder; what went wrong, or None."""
    names: dict[str, Any] = {"__name__": "__main__", "ROOT": ROOT}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for block in blocks_of(page.read_text(encoding="utf-8")):
                if block.kind == kind:
                    # Lines in a traceback are the page's.
                    exec(compile("\n" * block.line + block.code, str(page), "exec"), names)
        except Exception:
            return traceback.format_exc()
        finally:
            os.chdir(ROOT)
    return None


def prepare(kind: str) -> None:
    """What has to happen before a framework starts."""
    if kind == "jax":
        os.environ.update(XLA_FLAGS="--xla_force_host_platform_device_count=4", JAX_PLATFORMS="cpu", KERAS_BACKEND="jax")
    elif kind == "tensorflow":
        os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", KERAS_BACKEND="tensorflow")
        import tensorflow as tf

        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
        # One strategy a process: a second one would break TensorFlow's collectives.
        mirrored = tf.distribute.MirroredStrategy
        strategy = mirrored(["CPU:0", "CPU:1"])

        class Once(type):
            def __call__(cls, *_: Any) -> Any:
                return strategy

            def __instancecheck__(cls, instance: Any) -> bool:
                return isinstance(instance, mirrored)

        tf.distribute.MirroredStrategy = Once("MirroredStrategy", (), {})
    else:
        import torch

        torch.set_num_threads(1)
        if kind == "torch ranks":
            import torch.distributed as dist

            # Once for all pages: a second group under one torchrun would find the first one's addresses.
            dist.init_process_group(timeout=datetime.timedelta(seconds=60))
            dist.init_process_group = lambda: None
            from vision import allow_detection

            allow_detection()


def main(kind: str) -> None:
    prepare(kind)
    for page in pages_of(kind):
        wrong = run(page, kind)
        if os.environ.get("RANK", "0") == "0" or wrong:
            print("\n" + json.dumps({"page": str(page.relative_to(ROOT)), "wrong": wrong}), flush=True)
        if wrong and kind == "torch ranks":
            # Another rank may wait for this one.
            os._exit(1)
    if kind == "torch ranks":
        import torch.distributed as dist

        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
