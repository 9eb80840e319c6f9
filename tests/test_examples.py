"""Every file of examples/ runs, in processes of its own, and its numbers are right."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from worlds import free_ports

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
# Files that other tests run.
ELSEWHERE = {
    "lightning_layer_sync.py": "tests/torch/test_drop_in_torch.py",
    "keras_xla.py": "tests/tensorflow/test_passes_gpu.py",
    **dict.fromkeys(("equinox_module.py", "flax_linen.py", "flax_nnx.py", "haiku_module.py"), "tests/jax/test_examples_jax.py"),
}
# One thread each: processes share the cores. A GPU is not what is tested here.
QUIET = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "2", "KERAS_BACKEND": "tensorflow"}


def start(*command, **environment):
    environment = {**os.environ, **QUIET, **environment}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([sys.executable, *map(str, command)], text=True, env=environment, cwd=ROOT, **streams)


def finish(*processes):
    """What the processes printed; all must have ended well."""
    try:
        said = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, said, strict=True):
        assert process.returncode == 0, text[-4000:]
    return "".join(said)


def torchrun(path, *options):
    return finish(start("-m", "torch.distributed.run", *(options or ("--standalone",)), "--nproc-per-node", 2, path))


def number(pattern, text):
    found = re.search(pattern, text)
    assert found, text[-4000:]
    return float(found.group(1))


def test_torch_ddp():
    assert number(r"test accuracy ([\d.]+)", torchrun(EXAMPLES / "torch_ddp.py")) > 0.8


def test_torch_detection_with_a_rank_without_boxes():
    said = torchrun(ROOT / "tests" / "detection_example.py")
    losses = [float(x) for x in re.findall(r"rank 1, 1 boxes: loss ([\d.]+)", said)]
    assert len(losses) == said.count("rank 0, 0 boxes") == 4
    assert losses[-1] < losses[0]
    assert number(r"running means are (\S+) apart", said) == 0
    assert "found by rank 0 alone" in said


def test_torch_accelerate():
    assert number(r"2 processes, running means (\S+) apart", torchrun(EXAMPLES / "torch_accelerate.py")) == 0


def test_fsdp2():
    said = torchrun(EXAMPLES / "fsdp2.py")
    losses = [float(x) for x in re.findall(r"output torch.bfloat16, statistics torch.float32, loss ([\d.]+)", said)]
    assert len(losses) == 5
    assert losses[-1] < losses[0]


def test_keras_mirrored():
    assert number(r"2 replicas, test accuracy ([\d.]+)", finish(start(EXAMPLES / "keras_mirrored.py"))) > 0.8


def test_legacy_to_keras3(tmp_path):
    old = ROOT / "tests" / "data" / "tf2.2"
    said = finish(start(EXAMPLES / "legacy_to_keras3.py", old / "functional.h5", old / "functional.ckpt", tmp_path / "exported"))
    assert len(re.search("loaded, synchronised: (.*)", said).group(1).split(", ")) == 2
    first, last = re.search(r"trained on 2 replicas, loss (\S+) to (\S+)", said).groups()
    assert float(last) < float(first)
    assert number(r"outputs (\S+) apart", said) < 1e-5


def test_contrastive_shortcut():
    """With a quarter of its steps."""
    code = "import contrastive as c; print('local', c.train(None, 250), 'synchronised', c.train('device', 250))"
    said = finish(start("-c", code, PYTHONPATH=os.pathsep.join([str(EXAMPLES), os.environ.get("PYTHONPATH", "")])))
    assert number(r"local ([\d.]+)", said) > 0.2
    assert 0.08 < number(r"synchronised ([\d.]+)", said) < 0.17


def same_for_both(pattern, text):
    found = re.findall(pattern, text)
    assert len(found) == 2, text[-4000:]
    assert found[0] == found[1]


def test_two_hosts_torch():
    (port,) = free_ports(1)
    options = ("--nnodes", 2, "--nproc-per-node", 1, "--master-addr", "127.0.0.1", "--master-port", port)
    hosts = [start("-m", "torch.distributed.run", *options, "--node-rank", r, "-m", "syncbn.cli", "doctor") for r in range(2)]
    assert "OK: 2 replicas agree" in finish(*hosts)


def test_two_hosts_tensorflow():
    workers = ", ".join(f'"127.0.0.1:{port}"' for port in free_ports(2))
    config = '{"cluster": {"worker": [%s]}, "task": {"type": "worker", "index": %d}}'
    hosts = [start(EXAMPLES / "two_hosts_tensorflow.py", TF_CONFIG=config % (workers, r)) for r in range(2)]
    same_for_both(r"of 2 replicas, moving mean (.*)", finish(*hosts))


def test_two_hosts_jax():
    (port,) = free_ports(1)
    given = {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    hosts = [start(EXAMPLES / "two_hosts_jax.py", f"127.0.0.1:{port}", 2, r, **given) for r in range(2)]
    same_for_both(r"of 2, 8 values per channel, mean (.*)", finish(*hosts))


def test_every_example_has_a_test():
    said = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        test = (ROOT / ELSEWHERE[path.name]).read_text() if path.name in ELSEWHERE else said
        assert path.stem in test, f"{path.name} has no test"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_hides_no_package_that_it_imports(path):
    """A script's own folder comes first on Python's path: a file accelerate.py would be imported in place of the package."""
    imported = re.findall(r"^(?:import|from) (\w+)", path.read_text(), re.M)
    assert path.stem not in imported
