"""The laws of the house: who imports whom, what an import costs, and tests that can fail."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "syncbn"
FRAMEWORKS = {"tensorflow", "torch", "jax", "keras"}

# Each room: which rooms of ours, and which packages besides the standard library, it may import.
MAY_IMPORT = {
    "__init__": (set(), set()),
    "maths": (set(), set()),
    "policy": (set(), set()),
    "policy_migration": (set(), set()),
    "policy_torch": ({"policy"}, set()),
    "engines/__init__": ({"policy"}, {"keras"}),
    "engines/tensorflow": ({"engines", "kernels", "maths", "policy"}, {"tensorflow"}),
    "engines/tensorflow_replicas": ({"engines", "maths", "policy"}, {"tensorflow"}),
    "engines/jax": ({"engines", "policy"}, {"jax"}),
    "engines/jax_axes": ({"policy"}, {"jax", "numpy"}),
    "engines/jax_mapped": ({"engines", "maths"}, {"jax"}),
    "engines/jax_xla": (set(), {"jax"}),
    "functional": ({"policy"}, set()),
    "kernels/__init__": ({"policy"}, set()),
    "kernels/tensorflow": ({"maths", "policy"}, {"tensorflow"}),
    "layers/__init__": (set(), set()),
    "layers/distribution": ({"policy"}, {"keras"}),
    "layers/keras": ({"engines", "layers", "maths", "policy"}, {"keras"}),
    "engines/torch": ({"engines", "kernels", "maths", "policy", "policy_torch"}, {"torch"}),
    "engines/torch_autograd": ({"engines", "kernels", "policy"}, {"torch"}),
    "engines/torch_compiled": ({"engines", "kernels", "policy"}, {"torch"}),
    "engines/torch_context": ({"policy", "policy_torch"}, {"torch"}),
    "engines/torch_debug": ({"engines", "policy", "policy_torch"}, {"torch"}),
    "engines/torch_fold": (set(), {"torch"}),
    "engines/torch_groups": ({"policy", "policy_torch"}, {"torch"}),
    "engines/torch_join": (set(), {"torch"}),
    "engines/torch_fused": ({"engines", "kernels", "policy"}, {"torch"}),
    "engines/torch_lanes": ({"engines", "kernels", "policy_torch"}, {"torch"}),
    "kernels/choice": ({"kernels", "policy_torch"}, {"torch", "triton"}),
    "kernels/cuda": ({"kernels", "policy"}, {"torch"}),
    "kernels/exchange": (set(), {"triton"}),
    "kernels/fused": ({"kernels"}, {"torch"}),
    "kernels/launch": (set(), {"torch", "triton"}),
    "kernels/moments": ({"kernels"}, {"torch", "triton"}),
    "kernels/plans": ({"kernels"}, {"torch"}),
    "kernels/pointwise": ({"kernels"}, {"torch", "triton"}),
    "kernels/resident": ({"kernels"}, {"triton"}),
    "kernels/scratch": ({"kernels"}, {"torch"}),
    "kernels/sums": ({"kernels"}, {"torch", "triton"}),
    "kernels/tiles": (set(), {"triton"}),
    "kernels/tiling": ({"kernels"}, {"torch"}),
    "doctor": ({"", "engines", "kernels"}, {"torch", "triton"}),
    "kernels/eager": ({"kernels", "maths", "policy"}, {"torch"}),
    "kernels/native": ({"kernels", "maths", "policy"}, {"torch"}),
    "layers/torch": ({"engines", "maths", "policy", "policy_torch"}, {"torch"}),
    "layers/torch_lazy": ({"layers"}, {"torch"}),
    "conversion/__init__": ({"conversion", "policy_migration"}, set()),
    "conversion/exchange": (set(), set()),
    "conversion/keras": ({"conversion", "layers", "policy", "policy_migration"}, {"keras"}),
    "conversion/keras_fold": ({"conversion", "layers", "policy_migration"}, {"keras", "numpy"}),
    "conversion/legacy": ({"layers", "policy_migration"}, {"h5py", "keras", "tensorflow"}),
    "conversion/torch": ({"conversion", "layers", "policy", "policy_migration", "policy_torch"}, {"torch"}),
    "conversion/torch_fold": ({"conversion", "layers", "policy_migration", "policy_torch"}, {"torch"}),
    "conversion/weights": ({"policy_migration"}, {"h5py", "keras"}),
    "cli": ({"demo", "doctor"}, {"rich", "typer"}),
    "demo": ({"", "demo"}, {"jax", "keras", "matplotlib", "numpy", "rich", "sklearn", "tensorflow", "torch"}),
}


def modules():
    return [pytest.param(path, id=str(path.relative_to(SOURCE))) for path in sorted(SOURCE.rglob("*.py"))]


def room(path):
    name = path.relative_to(SOURCE).with_suffix("").as_posix()
    return "demo" if name.startswith("demo/") else name


def imports(tree):
    """Every module that is imported anywhere in a file, type checkers' imports apart."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for child in ast.walk(node):
                child.only_types = True
    for node in ast.walk(tree):
        if getattr(node, "only_types", False):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "syncbn":
                yield from (f"syncbn.{alias.name}" for alias in node.names)
            else:
                yield node.module


@pytest.mark.parametrize("path", modules())
def test_arrows_only_go_down(path):
    ours, others = MAY_IMPORT[room(path)]
    for name in imports(ast.parse(path.read_text())):
        top, _, rest = name.partition(".")
        if top == "syncbn":
            assert rest.split(".")[0] in ours, f"{room(path)} may not import {name}"
        elif top not in sys.stdlib_module_names:
            assert top in others, f"{room(path)} may not import {name}"


def test_the_lint_can_fail(tmp_path):
    found = list(imports(ast.parse("import numpy\nfrom syncbn import policy\nif TYPE_CHECKING:\n    import torch\n")))
    assert found == ["numpy", "syncbn.policy"]


@pytest.mark.parametrize("path", modules())
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) <= 400


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout


def test_importing_syncbn_imports_no_framework():
    code = f"import sys, syncbn; dir(syncbn); print(sorted(sys.modules.keys() & {FRAMEWORKS | {'numpy', 'rich', 'typer'}}))"
    assert python(code).strip() == "[]"


def test_the_front_door_is_real():
    import syncbn

    assert set(syncbn.__all__) <= set(dir(syncbn))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = syncbn.nothing


BANNED = {
    "a gradient of a sum, or of a sum of squares, which is 0 for batch norm": re.compile(
        r"reduce_sum\(y\)|(\by|(?<!square)\((?:[^()]|\([^()]*\))*\))(\.square\(\))?\.sum\(\)\.backward|gradient\(\s*y\s*,[^,\]]*\)$",
        re.M,
    ),
    "a tolerance from the environment": re.compile(r"TOLERANCE.*environ|environ.*TOLERANCE"),
}


@pytest.mark.parametrize("why", BANNED)
def test_tests_that_prove_nothing_are_banned(why):
    for path in (ROOT / "tests").glob("*.py"):
        if path.name != Path(__file__).name:
            found = BANNED[why].search(path.read_text())
            assert not found, f"{path.name}: {why}: {found.group()}"


def test_the_ban_can_fail():
    first, second = BANNED.values()
    assert first.search("tape.gradient(y, x)")
    assert first.search("loss = tf.reduce_sum(y)")
    assert first.search("layer(x).square().sum().backward()")
    assert first.search('SyncBatchNorm(5, activation="relu")(torch.randn(4, 5)).sum().backward()')
    assert not first.search("dx.square().sum().backward()")
    assert not first.search("tape.gradient(y, x, dy)")
    assert second.search('TOLERANCE = float(os.environ["T"])')


def test_the_oracle_shares_nothing_with_the_source():
    names = list(imports(ast.parse((ROOT / "tests" / "oracle.py").read_text())))
    assert not [n for n in names if n.split(".")[0] in FRAMEWORKS | {"syncbn"}]


def test_the_readme_says_what_the_rows_say():
    check = subprocess.run(
        [sys.executable, "benchmarks/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert check.returncode == 0, check.stderr
