"""Faults of the command: what it prints, and what it decides."""

from __future__ import annotations

from mutants import Mutant

MUTANTS = [
    Mutant(
        "the doctor takes NaN for right",
        "doctor/__init__.py",
        "return all(error <= self.limit for",
        "return not any(error > self.limit for",
        "demo/test_doctor.py",
        "nan",
    ),
    Mutant(
        "the doctor's lines of other ranks are lost",
        "doctor/__init__.py",
        "if len(set(same)) == 1:",
        "if same:",
        "demo/test_doctor.py",
        "ranks_that_differ",
    ),
    Mutant(
        "each rank prints the doctor's table",
        "doctor/__init__.py",
        'return int(os.environ.get("RANK", "0"))',
        "return 0",
        "demo/test_demo_torch.py",
        "doctor_under_torchrun",
    ),
    Mutant(
        "the doctor overrides XLA_FLAGS",
        "doctor/jax.py",
        '"xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")',
        "False",
        "demo/test_doctor.py",
        "devices_that_are_set and XLA",
    ),
    Mutant(
        "the doctor overrides JAX_NUM_CPU_DEVICES",
        "doctor/jax.py",
        ' or getattr(jax.config, "jax_num_cpu_devices", -1) > 0',
        "",
        "demo/test_doctor.py",
        "devices_that_are_set and NUM",
    ),
    Mutant(
        "the worst row is bold",
        "demo/report.py",
        "best = max(run.accuracies[-1] for run in runs)",
        "best = min(run.accuracies[-1] for run in runs)",
        "demo/test_demo.py",
        "best_row",
    ),
    Mutant(
        "a backend that is set already runs",
        "demo/tensorflow.py",
        'os.environ["KERAS_BACKEND"] = "tensorflow"',
        'os.environ.setdefault("KERAS_BACKEND", "tensorflow")',
        "demo/test_demo.py",
        "same_seed",
    ),
    Mutant(
        "the last sentence does not name the better run",
        "demo/report.py",
        "{ours.task.norm}:",
        "Synchronising:",
        "demo/test_demo.py",
        "best_row",
    ),
    Mutant(
        "labels of lines overlap",
        "demo/plots.py",
        "limit = heights[i] - gap",
        "limit = top",
        "demo/test_demo.py",
        "labels",
    ),
    Mutant(
        "an option without an effect is taken",
        "cli.py",
        "if wrong:",
        "if False:",
        "demo/test_demo.py",
        "make_no_sense",
    ),
    Mutant(
        "the demo on torch trains the local layer alone",
        "demo/torch.py",
        "if norm == LOCAL:",
        "if norm:",
        "demo/test_demo_torch.py",
        "convert_makes_it_ours",
    ),
]
