"""What is said where a framework is not installed: one sentence with the extra, and only where a name is used."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import syncbn

SOURCE = Path(syncbn.__file__).parents[1]
FRAMEWORKS = ("torch", "keras", "tensorflow", "jax")
HIDE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
"""
# What completion, help, a star import and a test for a feature do.
LOOK = """
import contextlib, inspect, io, pydoc
import syncbn

namespace = {}
exec("from syncbn import *", namespace)
names = set(dir(syncbn)) | {"SyncBatchNorm", "EmptySteps", "debug", "local_statistics", "checkpoint_contexts", "torch", "keras"}
names |= {"SyncBatchNormalization", "load_legacy", "load_weights", "compiled_step", "convert", "revert", "fold", "functional"}
assert all(hasattr(syncbn, name) for name in names)
assert {name for name, _ in inspect.getmembers(syncbn)} >= set(syncbn.__all__)
text = pydoc.render_doc(syncbn)
assert set(syncbn.__all__) <= set(dir(syncbn)) and set(syncbn.__all__) <= set(namespace)
for name in names:
    value = getattr(syncbn, name)
    repr(value), inspect.isclass(value), inspect.isroutine(value), inspect.unwrap(value), callable(value), bool(value)
print(sorted(syncbn.__all__))
"""
ALWAYS = ["__version__", "convert", "fold", "load_weights", "revert"]
TORCH = ["EmptySteps", "SyncBatchNorm", "checkpoint_contexts", "debug", "local_statistics"]
KERAS = ["SyncBatchNormalization", "load_legacy"]


def run(code, hidden=(), **environment):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", HIDE.format(hidden=tuple(hidden)) + code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(SOURCE), **environment},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


LISTED = {
    "no framework": (FRAMEWORKS, ALWAYS),
    "torch alone": (("keras", "tensorflow", "jax"), [*ALWAYS, *TORCH]),
    "TensorFlow alone": (("torch", "jax"), [*ALWAYS, *KERAS, "compiled_step"]),
    # Keras is there, and its backend is not: the names are listed, and say so when they are used.
    "Keras without a backend": (("torch", "tensorflow", "jax"), [*ALWAYS, *KERAS]),
}


@pytest.mark.parametrize("case", LISTED)
def test_nothing_raises_before_a_name_is_used(case):
    hidden, names = LISTED[case]
    assert run(LOOK, hidden) == str(sorted(names))


USES = """
def uses(value):
    yield "called", lambda: value()
    yield "read", lambda: value.any_attribute
    yield "subclassed", lambda: type("Mine", (value,), {}) if isinstance(value, type) else exec("class Mine(value): ...", {"value": value})

import syncbn
for name in %r:
    for use, act in uses(getattr(syncbn, name)):
        try:
            act()
        except ImportError as error:
            assert type(error) is ModuleNotFoundError, (name, use, type(error))
            text = str(error)
            assert text.startswith(f"syncbn.{name} needs the package `%s`. Received: a Python environment without it. "), (name, use, text)
            assert %r in text, text
        else:
            raise AssertionError((name, use))
assert not isinstance(3, syncbn.%s) and not issubclass(int, syncbn.%s)
"""


@pytest.mark.parametrize(
    ("hidden", "names", "package", "mend"),
    [
        (["torch"], [*TORCH, "torch"], "torch", 'Run pip install "syncbn[torch]".'),
        (
            ["keras"],
            [*KERAS, "keras"],
            "keras",
            'Run pip install "syncbn[tensorflow]"; on the JAX or PyTorch backend pip install keras.',
        ),
        (
            ["tensorflow"],
            ["compiled_step", *KERAS, "keras"],
            "tensorflow",
            'Run pip install "syncbn[tensorflow]". For Keras on another',
        ),
        (["h5py"], KERAS, "h5py", 'Run pip install "syncbn[tensorflow]".'),
    ],
    ids=["torch", "keras", "tensorflow", "a package of a framework's"],
)
def test_a_missing_framework_is_one_sentence_with_the_extra(hidden, names, package, mend):
    run(USES % (names, package, mend, names[0], names[0]), hidden, KERAS_BACKEND="tensorflow")


@pytest.mark.parametrize(("package", "extra"), [("torch", "torch"), ("keras", "tensorflow")])
def test_an_import_of_the_package_says_it_too(package, extra):
    code = f"try:\n    import syncbn.{package}.convert\nexcept ModuleNotFoundError as error:\n    print(error)"
    said = run(code, [package])
    assert said.startswith(f"syncbn.{package} needs the package `{package}`.")
    assert f'pip install "syncbn[{extra}]"' in said


def test_a_framework_that_is_too_old_is_said():
    """Keras 2 has no `keras.ops`."""
    code = """
import sys, types
for name in ("keras", "keras.activations"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["keras"].activations = sys.modules["keras.activations"]
sys.modules["keras"].__spec__ = types.SimpleNamespace(name="keras")
import syncbn
try:
    syncbn.SyncBatchNormalization()
except ImportError as error:
    print(error)
"""
    said = run(code)
    assert said.startswith(
        'syncbn.SyncBatchNormalization needs the versions that the extra "tensorflow" of syncbn names. Received: '
    )
    assert "cannot import name 'ops' from 'keras'" in said
    assert said.endswith('Run pip install --upgrade "syncbn[tensorflow]".')


def test_in_an_environment_without_any_framework(tmp_path):
    venv.create(tmp_path / "empty", with_pip=False)
    python = tmp_path / "empty" / "bin" / "python"
    code = LOOK + "try:\n    syncbn.SyncBatchNorm(3)\nexcept ModuleNotFoundError as error:\n    print(error)"
    done = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(SOURCE)}
    )
    assert done.returncode == 0, done.stderr
    names, said = done.stdout.strip().splitlines()
    assert names == str(sorted(ALWAYS))
    assert said.endswith('without it. Run pip install "syncbn[torch]".')


REGISTERED = "print(keras.saving.get_registered_object('syncbn>SyncBatchNormalization').__module__)"


@pytest.mark.parametrize(
    "order",
    [
        "import keras, syncbn",
        "import syncbn, keras",
        "import syncbn, tensorflow; tensorflow.keras.layers; keras = sys.modules['keras']",
    ],
)
def test_the_keras_class_is_registered_whichever_is_imported_first(order):
    assert run(f"{order}\n{REGISTERED}", KERAS_BACKEND="tensorflow") == "syncbn.keras.layer"


def test_the_search_for_keras_imports_nothing_and_keeps_the_loader():
    code = """
import importlib.machinery, importlib.util
import syncbn
spec = importlib.util.find_spec("keras")
assert isinstance(spec.loader, importlib.machinery.SourceFileLoader)
assert not {"keras", "syncbn.keras"} & set(sys.modules)
import keras
assert "syncbn.keras" in sys.modules
assert isinstance(keras.__spec__.loader, importlib.machinery.SourceFileLoader)
assert not any(type(finder).__module__ == "syncbn._registration" for finder in sys.meta_path)
"""
    run(code)


def test_an_import_of_keras_never_fails_because_of_us():
    code = "import syncbn, sys\nsys.modules['syncbn.keras.layer'] = None\nimport keras\nprint(keras.layers.Dense(2).units)"
    assert run(code) == "2"
    assert (
        run("import syncbn\ntry:\n    import keras\nexcept ModuleNotFoundError as error:\n    print(error.name)", ["keras"])
        == "keras"
    )


def test_torch_modules_are_told_before_keras_is_imported():
    code = """
import syncbn, torch
try:
    syncbn.load_weights(torch.nn.Linear(2, 2), "weights.pt")
except TypeError as error:
    print(error)
assert "keras" not in sys.modules and "tensorflow" not in sys.modules
"""
    assert run(code).endswith("Received: torch.nn.modules.linear.Linear. A torch module loads its own files by load_state_dict.")
