"""Names of torch and Triton that are not public: which of them have vanished, and what happens then."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch
from versions import TORCH, version

from syncbn.torch import _private, peer_memory
from syncbn.torch.groups import Communicator

# Only the newest of the names, which torch 2.6 lacks; the key then stays in its thread, with False.
LACKING = ["torch._C._remove_obj_from_tls"] if TORCH < (2, 11) else []


def test_all_private_names_are_there():
    assert _private.MISSING == LACKING


def test_private_names_of_triton_and_of_cuda_are_there():
    if version("triton") < (3, 4):
        pytest.skip("older versions have no names that the kernels need")
    from syncbn.torch.triton import _private as of_triton

    # From 3.8 on kernels are started by Triton itself, which `syncbn doctor` says.
    assert of_triton.has_known_launcher() == (version("triton") < (3, 8))
    if torch.backends.cuda.is_built():
        assert hasattr(torch._C, "_cuda_getCurrentRawStream")
        assert hasattr(torch._C, "_cuda_isCurrentStreamCapturing")


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_a_name_that_has_vanished_is_listed_and_layers_train_without_it():
    """As in a version of torch in which torch.func tells nothing of its tensors."""
    found = python(
        "import torch\n"
        "del torch._C._functorch.is_dead_tensor_wrapper, torch._C._are_functorch_transforms_active\n"
        "import syncbn\n"
        "from syncbn.torch import _private\n"
        "syncbn.SyncBatchNorm(3)(torch.randn(4, 3))\n"
        "print(_private.MISSING, _private.is_dead_tensor_wrapper(None))\n"
    )
    names = [*LACKING, "torch._C._are_functorch_transforms_active", "torch._C._functorch.is_dead_tensor_wrapper"]
    assert found.stdout.strip() == f"{names} True", found.stderr


def test_a_name_that_nothing_replaces_gives_an_error_that_names_it():
    found = python(
        "import torch\n"
        "del torch._C._current_graph_task_id\n"
        "import syncbn\n"
        "syncbn.SyncBatchNorm(3).eval()(torch.randn(4, 3))\n"
        "syncbn.SyncBatchNorm(3)(torch.randn(4, 3))\n"
    )
    assert "RuntimeError: syncbn needs torch._C._current_graph_task_id of PyTorch: it tells a recomputed block" in found.stderr


@pytest.mark.parametrize(
    "name", ["utils.checkpoint._checkpoint_hook.__init__.unpack_hook", "autograd.graph._engine_run_backward"]
)
def test_without_a_name_every_forward_pass_in_a_backward_pass_is_a_recomputation(name):
    """As it was before they were asked for."""
    change = (
        "torch.utils.checkpoint._checkpoint_hook.__init__ = lambda hook, frame: None"
        if "unpack" in name
        else "run = torch.autograd._engine_run_backward\ndel torch.autograd.graph._engine_run_backward"
    )
    found = python(
        f"import torch\nimport torch.utils.checkpoint\n{change}\n"
        "import syncbn\n"
        "from syncbn.torch import _private\n"
        "layer, x = syncbn.SyncBatchNorm(3), torch.randn(4, 3, requires_grad=True)\n"
        "y = x * 2\n"
        "y.register_hook(layer)\n"
        "y.backward(torch.randn(4, 3))\n"
        "print(_private.MISSING, int(layer.num_batches_tracked))\n"
    )
    said, batches = found.stdout.rsplit(maxsplit=1)
    assert batches == "0", found.stderr
    assert len(said.split(",")) == 1 + len(LACKING)
    assert name.rsplit(".", 1)[1] in said


def test_without_the_state_of_threads_layers_train_and_nothing_is_local():
    found = python(
        "import torch\n"
        "del torch._C._is_key_in_tls, torch._C._stash_obj_in_tls\n"
        "import syncbn\n"
        "syncbn.SyncBatchNorm(3)(torch.randn(4, 3))\n"
        "with syncbn.local_statistics(): pass\n"
    )
    assert "RuntimeError: syncbn needs torch._C._stash_obj_in_tls of PyTorch: it tells a backward pass" in found.stderr


def test_a_key_that_cannot_be_removed_means_nothing():
    found = python(
        "import torch\n"
        "vars(torch._C).pop('_remove_obj_from_tls', None)\n"
        "import syncbn\n"
        "from syncbn.torch.local import is_local\n"
        "with syncbn.local_statistics(): print(is_local())\n"
        "print(is_local())\n"
        "with syncbn.local_statistics(): print(is_local())\n"
    )
    assert found.stdout.split() == ["True", "False", "True"], found.stderr


def test_triton_without_a_needed_name_is_an_import_error():
    """Which `dispatch` takes as a reason to use torch's operators."""
    pytest.importorskip("triton")
    code = "import triton.compiler\ndel triton.compiler.CompiledKernel._init_handles\nfrom syncbn.torch.triton import backend\n"
    found = python(code)
    assert "ImportError: CompiledKernel._init_handles is not in Triton" in found.stderr
    found = python(code.replace("from syncbn.torch.triton import backend", "from syncbn.torch import dispatch"
                                "\nprint(dispatch.cuda_kernels())"))  # fmt: skip
    assert found.stdout.strip() == "None"
    assert "torch's operators run instead" in found.stderr


def test_an_old_triton_is_told_once():
    """Versions before 3.4 cannot launch dependent kernels."""
    pytest.importorskip("triton")
    found = python(
        "import sys, triton.language.extra.cuda\n"
        # Triton may load this module twice: an import finds the one that is listed.
        "vars(sys.modules['triton.language.extra.cuda']).pop('gdc_launch_dependents', None)\n"
        "from syncbn.torch import dispatch\n"
        "print(dispatch.cuda_kernels(), dispatch.cuda_kernels())\n"
    )
    assert found.stdout.strip() == "None None", found.stderr
    assert found.stderr.count("Install triton 3.6 or later") == 1
    assert "cannot import name 'gdc_launch_dependents'" in found.stderr


class Group:
    """A process group without the private names."""


def test_process_groups_that_tell_nothing():
    assert _private.timeout_of(Group()) == torch.distributed.default_pg_timeout
    with pytest.raises(Exception, match=r"(?i)group|initialized|invariant"):
        _private.backend_name(Group(), torch.device("cpu"))


def test_what_a_rank_says_raises_nothing(monkeypatch):
    """The others wait for it."""

    def broken(*arguments):
        raise RuntimeError("no driver")

    monkeypatch.setattr(torch.cuda, "device_count", broken)
    facts = peer_memory._facts(Communicator(2, "a group", Group), torch.device("cuda", 0))
    assert not facts["triton"]
    assert facts["error"] == "RuntimeError: no driver"
    assert not peer_memory.agreed([facts, {**facts, "device": 1}])


def test_the_modules_are_the_only_ones_with_private_names():
    """Elsewhere a name of torch with an underscore would go unnoticed when it vanishes."""
    import ast
    from pathlib import Path

    folder = Path(importlib.import_module("syncbn.torch").__file__).parent
    for path in folder.rglob("*.py"):
        if path.name != "_private.py":
            found = [
                node.attr
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Attribute) and ast.unparse(node).startswith(("torch._", "torch.ops._", "dist._"))
            ]
            assert not found, f"{path.name}: {found}"
