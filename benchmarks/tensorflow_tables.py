"""The tables of docs/tensorflow.md, from the rows of the suite tensorflow-gpu."""

from __future__ import annotations

from baselines import IN_COMPILED_STEP, KERAS_LOCAL, KERAS_SYNC, OURS
from rows import geometric_mean, read

KERAS_SYNC_IN_STEP = f"{KERAS_SYNC}, {IN_COMPILED_STEP}"
GRAPH, COMPILED = "layer", "layer, step compiled by XLA"
TRAINING, TRAINING_COMPILED = "training", "training, step compiled by XLA"


def times(measure: str, replicas: int) -> dict[str, dict[str, float]]:
    """{case: {subject: median}}, in the order of the rows."""
    found: dict[str, dict[str, float]] = {}
    for row in read("tensorflow-gpu"):
        if (row["measure"], row["replicas"]) == (measure, replicas):
            found.setdefault(row["case"], {})[row["subject"]] = row["values"]["median"]
    return found


def layers() -> str:
    """µs a layer, a row each case."""
    two, one, compiled = times(GRAPH, 2), times(GRAPH, 1), times(COMPILED, 2)
    columns = (
        (two, (OURS, KERAS_SYNC, KERAS_LOCAL)),
        (one, (OURS, KERAS_LOCAL)),
        (compiled, (OURS, KERAS_SYNC, KERAS_SYNC_IN_STEP, KERAS_LOCAL)),
    )
    lines = [
        "| µs a layer, forward + backward | 2 GPUs: ours | Keras sync | Keras local | 1 GPU: ours | Keras local "
        "| 2 GPUs, compiled: ours | Keras sync, by TensorFlow | Keras sync, by `compiled_step` | Keras local |",
        "|---" * 10 + "|",
    ]
    for case in one:
        cells = [f"{of[case][subject]:,.0f}" if case in of else "not run" for of, subjects in columns for subject in subjects]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    means = [
        ("2 GPUs, over Keras sync", two, KERAS_SYNC),
        ("2 GPUs, over Keras local", two, KERAS_LOCAL),
        ("1 GPU, over Keras local", one, KERAS_LOCAL),
        ("2 GPUs, compiled, over Keras sync by TensorFlow", compiled, KERAS_SYNC),
        ("2 GPUs, compiled, over Keras sync by `compiled_step`", compiled, KERAS_SYNC_IN_STEP),
    ]
    lines += ["", "| ours / theirs | cases | geometric mean | largest |", "|---|---|---|---|"]
    for name, of, baseline in means:
        found = [case[OURS] / case[baseline] for case in of.values()]
        lines.append(f"| {name} | {len(found)} | {geometric_mean(found):.2f} | {max(found):.2f} |")
    return "\n".join(lines) + "\n"


def resnet() -> str:
    """Images a second of two GPUs together."""
    subjects = (OURS, KERAS_SYNC, KERAS_SYNC_IN_STEP, KERAS_LOCAL)
    lines = ["| images/s of two GPUs | ours | Keras sync | Keras sync, by `compiled_step` | Keras local |", "|---" * 5 + "|"]
    for measure, note in ((TRAINING, ""), (TRAINING_COMPILED, ", compiled")):
        for case, of in times(measure, 2).items():
            cells = [f"{of[subject]:,.0f}" if subject in of else "–" for subject in subjects]
            lines.append(f"| {case}{note} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def exchange() -> str:
    """µs of an exchange between two GPUs."""
    lines = ["| one message | copies, µs | all-reduce, µs |", "|---|---|---|"]
    for case, of in times("exchange", 2).items():
        lines.append(f"| {case} | {of['copies']:,.0f} | {of['all_reduce']:,.0f} |")
    return "\n".join(lines) + "\n"
