"""The tables of docs/tensorflow.md, from the rows of the suite tensorflow-gpu."""

from __future__ import annotations

from baselines import OURS
from rows import geometric_mean, read

SYNCHRONISED, LOCAL = "keras synchronized", "keras unsynchronised"
GRAPH, COMPILED = "layer", "layer, step compiled by XLA"


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
    three = (OURS, SYNCHRONISED, LOCAL)
    columns = ((two, three), (one, (OURS, LOCAL)), (compiled, three))
    lines = [
        "| µs a layer, forward + backward | 2 GPUs: ours | Keras sync | Keras local | 1 GPU: ours | Keras local "
        "| 2 GPUs, compiled: ours | Keras sync | Keras local |",
        "|---" * 9 + "|",
    ]
    for case in one:
        cells = [f"{of[case][subject]:,.0f}" if case in of else "not run" for of, subjects in columns for subject in subjects]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    means = [
        ("2 GPUs, over Keras sync", two, SYNCHRONISED),
        ("2 GPUs, over Keras local", two, LOCAL),
        ("1 GPU, over Keras local", one, LOCAL),
        ("2 GPUs, compiled, over Keras sync", compiled, SYNCHRONISED),
    ]
    lines += ["", "| ours / theirs | cases | geometric mean | largest |", "|---|---|---|---|"]
    for name, of, baseline in means:
        found = [case[OURS] / case[baseline] for case in of.values()]
        lines.append(f"| {name} | {len(found)} | {geometric_mean(found):.2f} | {max(found):.2f} |")
    return "\n".join(lines) + "\n"


def resnet() -> str:
    """Images a second of two GPUs together."""
    lines = ["| images/s of two GPUs | ours | Keras sync | Keras local |", "|---|---|---|---|"]
    for measure, note in (("training", ""), ("training, step compiled by XLA", ", compiled")):
        for case, of in times(measure, 2).items():
            lines.append(f"| {case}{note} | {of[OURS]:,.0f} | {of[SYNCHRONISED]:,.0f} | {of[LOCAL]:,.0f} |")
    return "\n".join(lines) + "\n"


def exchange() -> str:
    """µs of an exchange between two GPUs."""
    lines = ["| one message | copies, µs | all-reduce, µs |", "|---|---|---|"]
    for case, of in times("exchange", 2).items():
        lines.append(f"| {case} | {of['copies']:,.0f} | {of['all_reduce']:,.0f} |")
    return "\n".join(lines) + "\n"
