"""What the doctor says of each framework, and of what is wrong."""

from __future__ import annotations

import pytest
from demo_output import syncbn

from syncbn import doctor


@pytest.fixture(scope="module")
def everything():
    return syncbn("doctor")


@pytest.mark.parametrize("framework", doctor.FRAMEWORKS)
def test_doctor_checks_each_framework(everything, framework):
    code, text = everything
    assert code == 0, text
    [section] = [part.splitlines() for part in text.split("\n\n") if part.startswith(f"{framework} ")]
    said = dict(line.split("  ", 1) for line in section if "  " in line)
    assert said["exchange"].strip()
    assert float(said["error of input gradient"]) < 1e-5
    assert section[-1].startswith("OK: ")
    if framework == "tensorflow":
        assert "MirroredStrategy over 2" in said["strategy"]
        assert "TensorFlow's operators on CPUs" in said["kernels"]
    if framework == "jax":
        assert said["devices"].strip() == "2 × CPU, made for this check"
    assert text.splitlines()[-1] == "OK: tensorflow, torch, jax."


@pytest.mark.parametrize("setting", [
    {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}, {"JAX_NUM_CPU_DEVICES": "4"},
], ids=lambda setting: next(iter(setting)))  # fmt: skip
def test_doctor_checks_all_devices_that_are_set(setting):
    code, text = syncbn("doctor", "--backend", "jax", **setting)
    assert code == 0, text
    assert "4 × CPU\n" in text
    assert text.splitlines()[-1].startswith("OK: 4 replicas agree")


def test_a_bad_setting_is_one_sentence():
    code, text = syncbn("doctor", "--backend", "torch", SYNCBN_KERNELS="fast")
    assert code == 1
    assert text.splitlines()[-1].startswith("FAILED: SYNCBN_KERNELS must be one of ['auto', 'eager', 'triton']")
    assert "Traceback" not in text


def test_no_framework_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "FRAMEWORKS", ("nothing",))
    assert doctor.run(None) == 1
    assert doctor.run("nothing") == 1
    said = capsys.readouterr().out
    assert 'nothing is not installed: pip install "syncbn[nothing]"' in said
    assert "FAILED: syncbn needs one of these frameworks." in said


def test_lines_of_ranks_that_differ_stand_apart():
    lines = [[("torch", "2.13"), ("kernels", "Triton")], [("torch", "2.13"), ("kernels", "torch operators")]]
    assert doctor.merged(lines) == [("torch", "2.13"), ("kernels", "rank 0: Triton"), ("", "rank 1: torch operators")]


def test_a_wrong_number_and_nan_are_told():
    for value in (1e-3, float("nan")):
        found = doctor.Report([("jax", "0")], 2, {"mean": 1e-7, "output": value})
        assert not found.well
        assert found.verdict().startswith("FAILED: wrong beside float64 on the whole batch: output (")
        assert doctor.table(found).splitlines()[-1].endswith("WRONG")
