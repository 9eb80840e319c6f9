"""One framework, and one number of replicas, a process."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# What several suites share, for the processes that tests start too.
sys.path[:0] = [str(TESTS), str(TESTS / "torch"), str(TESTS.parent / "examples")]
importlib.import_module("absent")
os.environ["PYTHONPATH"] = os.pathsep.join([p for p in [os.environ.get("PYTHONPATH")] if p] + [str(TESTS)])

# oneDNN's convolution gives a wrong shape for an empty batch; the rest keeps TensorFlow quiet and on the CPU.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

# JAX has as many host devices as it is told before it starts; Keras reads its backend when it is imported.
if any("jax" in Path(argument).name and "demo" not in Path(argument).name for argument in sys.argv):
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    os.environ["KERAS_BACKEND"] = "jax"


# Torch's tests on a GPU, or through its kernels on the CPU, before Triton is imported.
if os.environ.get("SYNCBN_TEST_DEVICE") == "cuda":
    import torch

    torch.set_default_device("cuda")
elif os.environ.get("SYNCBN_TEST_DEVICE") == "interpreter":
    import through_kernels  # noqa: F401


def pytest_addoption(parser):
    parser.addoption("--replicas", type=int, default=4, help="how many replicas the tests run on")
    parser.addoption("--passes", choices=["cpu", "gpu"], default="cpu", help="TensorFlow: whose passes run, on this device")
    parser.addoption("--all-mutants", action="store_true", help="every deliberate fault, not the essential ones alone")


@pytest.fixture(scope="session")
def world(request):
    """The replicas of this process."""
    from worlds import TensorFlowWorld

    return TensorFlowWorld(request.config.getoption("--replicas"))


@pytest.fixture(scope="session")
def torch_world(request):
    """The same for torch: processes, made when the first test asks for them."""
    from worlds import TorchWorld

    world = TorchWorld(request.config.getoption("--replicas"))
    yield world
    world.close()


@pytest.fixture(autouse=True)
def _passes_of_gpus(request, monkeypatch):
    """With --passes gpu: the clusters of GPUs, and messages that replicas copy to each other, on the CPU too."""
    if request.config.getoption("--passes") == "gpu" and sys.modules.get("tensorflow"):
        from syncbn.tensorflow import engine, passes_gpu, replicas

        monkeypatch.setattr(engine, "passes_for", lambda x: passes_gpu)
        monkeypatch.setattr(replicas, "copies_messages", lambda strategy: True)


@pytest.fixture(scope="session", autouse=True)
def _replicas_first(request):
    """Logical devices can only be made before anything else runs on TensorFlow."""
    if sys.modules.get("tensorflow"):
        request.getfixturevalue("world")
