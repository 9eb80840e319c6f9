"""The architecture: who imports whom, what an import costs, and tests that can fail."""

from __future__ import annotations

import ast
import fnmatch
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "syncbn"
FRAMEWORKS = {"tensorflow", "torch", "jax", "keras"}

SHARED = (
    "syncbn._missing",
    "syncbn.maths",
    "syncbn.contract",
    "syncbn.groups",
    "syncbn.validation",
    "syncbn.settings",
    "syncbn.xla_sums",
)
# The first pattern that matches a module's path gives its imports: modules of syncbn, and packages.
RULES = {
    "syncbn": (("syncbn._missing", "syncbn._moved", "syncbn._registration"), ()),
    "syncbn._missing": ((), ()),
    "syncbn._moved": ((), ()),
    "syncbn._registration": ((), ()),
    "syncbn.maths": ((), ()),
    "syncbn.class_swap": ((), ()),
    "syncbn.xla_sums": ((), ()),
    "syncbn.groups": ((), ()),
    "syncbn.settings": ((), ()),
    "syncbn.validation": (("syncbn.groups",), ()),
    "syncbn.contract": (("syncbn.maths", "syncbn.groups"), ()),
    # Inside of functions.
    "syncbn.functional": (
        (*SHARED, "syncbn.jax.engine", "syncbn.tensorflow.engine", "syncbn.torch.engine"),
        ("jax", "tensorflow", "torch"),
    ),
    "syncbn.conversion": (("syncbn.validation",), ()),
    "syncbn.loading": (("syncbn.validation",), ()),
    "syncbn.torch.triton.device*": (("syncbn.torch.triton.device",), ("triton",)),
    "syncbn.torch.triton*": (
        (*SHARED, "syncbn.torch.triton", "syncbn.torch.reference", "syncbn.torch._private"),
        ("torch", "triton"),
    ),
    "syncbn.torch.dispatch": (("syncbn.torch", "syncbn.settings"), ("torch", "triton")),
    "syncbn.torch*": ((*SHARED, "syncbn.class_swap", "syncbn.torch"), ("torch",)),
    "syncbn.tensorflow*": ((*SHARED, "syncbn.tensorflow"), ("tensorflow",)),
    "syncbn.jax*": ((*SHARED, "syncbn.jax"), ("jax", "numpy")),
    # Checkpoints are read with TensorFlow, inside functions.
    "syncbn.keras.checkpoints": (("syncbn.keras",), ("keras", "tensorflow")),
    "syncbn.keras*": ((*SHARED, "syncbn.class_swap", "syncbn.keras"), ("h5py", "keras", "ml_dtypes", "numpy")),
    # Neither the command nor the doctor needs an extra.
    "syncbn.doctor*": (("syncbn",), ("jax", "numpy", "tensorflow", "torch", "triton")),
    "syncbn.cli": (("syncbn", "syncbn._missing", "syncbn.demo", "syncbn.doctor"), ()),
    "syncbn.demo*": (("syncbn",), ("jax", "keras", "matplotlib", "numpy", "rich", "sklearn", "tensorflow", "torch")),
}


def modules():
    return [pytest.param(path, id=module_name(path)) for path in sorted(SOURCE.rglob("*.py"))]


def module_name(path):
    return ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")


def imports(tree):
    """The full path of every module that is imported anywhere in a file, type checkers' imports apart."""
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
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            # `from package import module` imports the module; `from module import name` imports the module that it names.
            yield from (name if is_module(name) else node.module for name in names)


def is_module(name):
    path = SOURCE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def rule_of(module):
    return next(pattern for pattern in RULES if fnmatch.fnmatchcase(module, pattern))


def forbidden(module, name):
    """Whether the rules forbid this module to import that one."""
    ours, others = RULES[rule_of(module)]
    top = name.partition(".")[0]
    if top == "syncbn":
        return not any(name == allowed or name.startswith(f"{allowed}.") for allowed in ours)
    return top not in sys.stdlib_module_names and top not in others


@pytest.mark.parametrize("path", modules())
def test_imports_follow_the_rules(path):
    wrong = [name for name in imports(ast.parse(path.read_text())) if forbidden(module_name(path), name)]
    assert not wrong, f"{module_name(path)} may not import {wrong}"


FORBIDDEN = [
    ("syncbn", "torch"),
    ("syncbn._missing", "torch"),
    ("syncbn._moved", "syncbn.torch.module"),
    ("syncbn._registration", "keras"),
    ("syncbn.loading", "keras"),
    ("syncbn.class_swap", "torch"),
    ("syncbn.conversion", "syncbn.torch.convert"),
    ("syncbn.torch.dispatch", "syncbn.class_swap"),
    ("syncbn.torch.engine", "syncbn.conversion"),
    ("syncbn.keras.checkpoints", "h5py"),
    ("syncbn.keras.weights", "tensorflow"),
    ("syncbn.keras.legacy", "torch"),
    ("syncbn.doctor", "rich"),
    ("syncbn.cli", "rich"),
    ("syncbn.demo.model", "scipy"),
    ("syncbn.maths", "numpy"),
    ("syncbn.groups", "syncbn.validation"),
    ("syncbn.validation", "syncbn.contract"),
    ("syncbn.settings", "torch"),
    ("syncbn.contract", "torch"),
    ("syncbn.functional", "keras"),
    ("syncbn.xla_sums", "jax"),
    ("syncbn.torch.triton.device.moments", "torch"),
    ("syncbn.torch.triton.device.moments", "syncbn.torch.triton.launch"),
    ("syncbn.torch.triton.plan", "syncbn.torch.engine"),
    ("syncbn.torch.engine", "triton"),
    ("syncbn.torch.engine", "syncbn.keras.layer"),
    ("syncbn.jax.mapped", "torch"),
    ("syncbn.tensorflow.engine", "keras"),
    ("syncbn.keras.layer", "tensorflow"),
    ("syncbn.keras.layer", "syncbn.jax.engine"),
]


@pytest.mark.parametrize(("module", "name"), FORBIDDEN)
def test_each_rule_can_fail(module, name):
    assert forbidden(module, name)


def test_no_rule_is_left_out():
    assert {rule_of(module) for module, _ in FORBIDDEN} == set(RULES)


def test_no_import_goes_round():
    """No module is imported by what it imports: arrows go down."""
    graph = {module_name(p.values[0]): set(imports(ast.parse(p.values[0].read_text()))) for p in modules()}
    # A package's `__init__` hands on the names of its modules, which import each other past it.
    packages = {
        name for name in graph if is_module(name) and not SOURCE.parent.joinpath(*name.split(".")).with_suffix(".py").exists()
    }
    graph = {name: found - packages for name, found in graph.items()}
    graphlib.TopologicalSorter(graph).prepare()


def test_the_lint_can_fail():
    found = list(imports(ast.parse("import numpy\nfrom syncbn import groups\nif TYPE_CHECKING:\n    import torch\n")))
    assert found == ["numpy", "syncbn.groups"]
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()


@pytest.mark.parametrize("path", modules())
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) <= 400


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout


def test_importing_syncbn_imports_no_framework():
    code = (
        f"import sys, syncbn; dir(syncbn), syncbn.__all__; print(sorted(sys.modules.keys() & {FRAMEWORKS | {'numpy', 'rich'}}))"
    )
    assert python(code).strip() == "[]"


def test_the_public_names_exist():
    import syncbn

    assert set(syncbn.__all__) <= set(dir(syncbn))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = syncbn.nothing


BANNED = {
    "a gradient of a sum, or of a sum of squares, which is 0 for batch norm": re.compile(
        r"reduce_sum\(y\)|(\by|(?<!square)\((?:[^()]|\([^()]*\))*\))(\.square\(\))?\.sum\(\)\.backward"
        r"|\w\(x\)(\.square\(\))?\.sum\(\) / \w+\)\.backward|gradient\(\s*y\s*,[^,\]]*\)$",
        re.M,
    ),
    "a tolerance from the environment": re.compile(r"TOLERANCE.*environ|environ.*TOLERANCE"),
}


@pytest.mark.parametrize("why", BANNED)
def test_tests_that_prove_nothing_are_banned(why):
    shown = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.py")]
    for path in [*(ROOT / "tests").rglob("*.py"), *shown]:
        if path.name != Path(__file__).name:
            found = BANNED[why].search(path.read_text())
            assert not found, f"{path.name}: {why}: {found.group()}"


def test_the_ban_can_fail():
    first, second = BANNED.values()
    assert first.search("tape.gradient(y, x)")
    assert first.search("loss = tf.reduce_sum(y)")
    assert first.search("layer(x).square().sum().backward()")
    assert first.search('SyncBatchNorm(5, activation="relu")(torch.randn(4, 5)).sum().backward()')
    assert first.search("(model(x).square().sum() / 8).backward()")
    assert not first.search("dx.square().sum().backward()")
    assert not first.search("tape.gradient(y, x, dy)")
    assert second.search('TOLERANCE = float(os.environ["T"])')


def test_the_oracle_shares_nothing_with_the_source():
    names = list(imports(ast.parse((ROOT / "tests" / "oracle.py").read_text())))
    assert not [n for n in names if n.split(".")[0] in FRAMEWORKS | {"syncbn"}]


def test_the_readme_says_what_the_rows_say():
    check = subprocess.run(
        [sys.executable, "benchmarks/figures.py", "--check"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert check.returncode == 0, check.stderr


@pytest.mark.parametrize(
    ("old", "new"), [("syncbn.layers.torch", "syncbn.torch.module"), ("syncbn.conversion.torch", "syncbn.torch.convert")]
)
def test_module_paths_in_old_pickles_lead_to_the_same_module(old, new):
    code = f"import importlib; print(importlib.import_module({old!r}) is importlib.import_module({new!r}))"
    assert python(code).strip() == "True"
