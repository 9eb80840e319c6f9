"""What the rows of the GPU benchmarks say: the tables of docs/kernels.md, written by benchmarks/readme.py."""

from __future__ import annotations

import statistics
from typing import Any

from rows import geometric_mean, read

SMALL_MEGABYTES = 5
OURS, LOCAL, COMPILED, TORCHS = "syncbn", "BatchNorm2d", "BatchNorm2d, compiled", "torch SyncBatchNorm"
ALONE = "syncbn, one replica"
# Two exchanges of two H200s' replicas, each of them 4.6 µs: what the goals for several GPUs allow for.
BARRIERS = 9.2
THEN = "then add and ReLU"
LAUNCHES = ("moments", "normalize", "sums", "input_gradient")
# How many tensors each launch moves at the least, of a layer's eight; one that keeps its batch in registers reads it once.
MOVED = {"moments": 1, "normalize": 2, "sums": 2, "input_gradient": 3, "forward": 2, "backward": 3}


def by_case(rows: list[dict[str, Any]]) -> tuple[dict[str, dict[str, float]], dict[str, float], set[str]]:
    """{case: {peer: µs}} in the order of the rows, each case's floor in µs, and the cases over 5 MB."""
    found: dict[str, dict[str, float]] = {}
    floors, large = {}, set()
    for row in rows:
        if row["what"] == "graph":
            found.setdefault(row["case"], {})[row["peer"]] = row["us"]
            floors[row["case"]] = row["floor"]
            if row["megabytes"] > SMALL_MEGABYTES:
                large.add(row["case"])
    return found, floors, large


class Figures:
    """Of one run of benchmarks/gpu.py."""

    def __init__(self, name: str):
        self.rows = read(name)
        self.found, self.floors, self.large = by_case(self.rows)

    def ratios(self, theirs: str, ours: str = OURS) -> dict[str, float]:
        """Their time over ours, by case."""
        return {case: t[theirs] / t[ours] for case, t in self.found.items() if theirs in t and ours in t}

    def against(self, peer: str) -> str:
        """Geometric mean; the worst over 5 MB; what ours takes more below that, at most."""
        of = self.ratios(peer)
        worst, more = min(of[case] for case in of if case in self.large), self.more(peer)
        return f"{geometric_mean(of.values()):.2f}; {worst:.2f}; {more:+.1f} µs"

    def more(self, peer: str) -> float:
        """How many µs ours takes more than a peer in a case below 5 MB, at most."""
        return max(t[OURS] - t[peer] for case, t in self.found.items() if case not in self.large)

    def at_the_floor(self, peer: str) -> str:
        """What the geometric mean and the worst over 5 MB would be of a layer that took the floor and two barriers."""
        of = {case: t[peer] / (self.floors[case] + BARRIERS) for case, t in self.found.items()}
        return f"{geometric_mean(of.values()):.2f}; {min(of[case] for case in of if case in self.large):.2f}"

    def more_than(self, theirs: dict[str, float]) -> str:
        """µs that ours takes more than theirs, by case."""
        costs = [t[OURS] - theirs[case] for case, t in self.found.items()]
        return f"{statistics.median(costs):.0f}, median; {min(costs):.0f} to {max(costs):.0f}"

    def of(self, peer: str) -> dict[str, float]:
        """µs of a peer, by case."""
        return {case: t[peer] for case, t in self.found.items()}

    def mean_and_worst(self, theirs: str, ours: str = OURS) -> str:
        of = self.ratios(theirs, ours).values()
        return f"{geometric_mean(of):.2f} ({min(of):.2f} to {max(of):.2f})"

    def over_floor(self) -> str:
        return f"{geometric_mean(t[OURS] / self.floors[case] for case, t in self.found.items() if self.floors[case] > 40):.2f}"

    def exchange(self) -> str:
        """µs that an exchange costs two virtual replicas, the smallest inputs first."""
        at = {(row["case"], row["peer"]): row for row in self.rows if row["what"] == "virtual replicas"}
        costs: dict[float, list[float]] = {}
        for (case, peer), row in at.items():
            if peer == "without":
                costs.setdefault(row["megabytes"], []).append(at[case, "with the exchange"]["us"] - row["us"])
        return "; ".join(f"{min(us):.1f} to {max(us):.1f} at {size:.1f} MB" for size, us in sorted(costs.items()))

    def launches(self, case: str) -> str:
        """µs of each launch, over its own floor in brackets."""
        of = {row["peer"]: row["us"] for row in self.rows if row["what"] == "kernel" and row["case"] == case}
        names = [name for name in ("forward", "backward") if name in of] or LAUNCHES
        return "; ".join(f"{of[name]:.1f} ({of[name] / (MOVED[name] * self.floors[case] / 8):.2f})" for name in names)


def host(replicas: int) -> str:
    """Ours over BatchNorm2d's host time, a figure a round."""
    of: dict[str, list[float]] = {}
    for row in read("gpu-host"):
        if row["replicas"] == replicas:
            of.setdefault(row["what"], []).append(row["forward"] + row["backward"])
    return " and ".join(f"{ours / theirs:.2f}" for ours, theirs in zip(of[OURS], of[LOCAL], strict=True))


def host_steps(replicas: int) -> str:
    """µs of each step of benchmarks/gpu_host.py, a figure a round."""
    of: dict[str, list[str]] = {}
    for row in read("gpu-host"):
        if row["replicas"] == replicas:
            of.setdefault(row["what"], []).append(f"{row['forward'] + row['backward']:.0f}")
    return "; ".join(f"{what} {' and '.join(both)}" for what, both in of.items())


def training(replicas: int, peer: str) -> str:
    """Images/s of ResNet-50 over a peer's, by the number of images."""
    at = {(row["peer"], row["images"]): row["median"] for row in read("gpu-resnet") if row["replicas"] == replicas}
    return "; ".join(f"{at[OURS, images] / at[peer, images]:.2f}" for images in dict.fromkeys(images for _, images in at))


def where(rows: list[dict[str, Any]]) -> str:
    """The device, what travels how, the versions and the commit of a run."""
    row = rows[0]
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items() if name != "numpy")
    speed = f"{row['bytes per second'] / 1e12:.2f} TB/s, measured"
    return f"{row['replicas']} × {row['device']} ({speed}), transport: {row['transport']}; {versions}; commit {row['commit']}"


def short(case: str) -> str:
    return case.replace("bfloat16", "bf16").replace("float32", "fp32")


def one_gpu() -> str:
    f = Figures("gpu")
    goals = [
        ("BatchNorm2d / ours, geometric mean; worst over 5 MB; below 5 MB", "≥ 1.9; ≥ 1.0; at most +5 µs", f.against(LOCAL)),
        ("BatchNorm2d compiled / ours, the same", "≥ 1.1; ≥ 0.95; at most +2 µs", f.against(COMPILED)),
        ("BatchNorm2d compiled / ours compiled", "≥ 1.0", f.mean_and_worst(COMPILED, "syncbn, compiled")),
        (
            "the same, both followed by add and ReLU",
            "≥ 1.0",
            f.mean_and_worst(f"BatchNorm2d, {THEN}, compiled", f"syncbn, {THEN}, compiled"),
        ),
        (
            "BatchNorm2d + add + ReLU compiled / ours with both inside, not compiled",
            "–",
            f.mean_and_worst(f"BatchNorm2d, {THEN}, compiled", f"syncbn, {THEN} inside"),
        ),
        ("ours compiled / ours not compiled, alone", "–", f.mean_and_worst("syncbn, compiled", OURS)),
        ("the same, followed by add and ReLU", "–", f.mean_and_worst(f"syncbn, {THEN}, compiled", f"syncbn, {THEN}")),
        ("ours / floor where the floor is over 40 µs", "≤ 1.2", f.over_floor()),
        ("ours + add + ReLU / both inside, 25 MB and more", "≥ 2", f.mean_and_worst(f"syncbn, {THEN}", f"syncbn, {THEN} inside")),
        ("host µs a layer over BatchNorm2d's, 20 in a row", "≤ 1.25", host(1)),
        ("2 virtual replicas minus the same without the exchange, C ≤ 256", "≤ 7 µs", f.exchange()),
        ("ResNet-50 over BatchNorm2d, images/s, 8, 32, 128 images", "≥ 0.97; ≥ 0.97; ≥ 1.0", training(1, LOCAL)),
    ]
    lines = [where(f.rows), "", "| goal (set for an H200) | figure | reached |", "|---|---|---|"]
    lines += [f"| {' | '.join(line)} |" for line in goals]
    lines += ["", f"Where the host's time goes, µs a layer, forward + backward, two rounds: {host_steps(1)}.", ""]
    lines += [
        "µs in a graph; of each launch of ours alone, with its time over its own floor in brackets (under 1: out of L2). Two launches:"
    ]
    lines += ["registers hold the batch. Four: moments, normalize, gradient sums, input gradient.", ""]
    lines += ["| case | floor | syncbn | BatchNorm2d | compiled | syncbn compiled | launches |", "|---|---|---|---|---|---|---|"]
    for case, t in f.found.items():
        us = [f.floors[case], *(t[peer] for peer in (OURS, LOCAL, COMPILED, "syncbn, compiled"))]
        lines.append(f"| {short(case)} | {' | '.join(f'{v:.1f}' for v in us)} | {f.launches(case)} |")
    return "\n".join(lines) + "\n"


def two_gpus() -> str:
    f, by_nccl = Figures("gpu-x2"), Figures("gpu-x2-nccl")
    of = f.ratios(TORCHS)
    goals = [
        (
            "torch.nn.SyncBatchNorm / ours, geometric mean of 28; worst",
            "≥ 2.3; ≥ 1.2",
            f"{geometric_mean(of.values()):.2f}; {min(of.values()):.2f}",
        ),
        (
            "local BatchNorm2d / ours, geometric mean; worst over 5 MB; below 5 MB",
            "≥ 1.65; ≥ 1.0; at most +10 µs",
            f.against(LOCAL),
        ),
        ("the two lines above, if ours took the floor and 9.2 µs", "–", f"{f.at_the_floor(TORCHS)} and {f.at_the_floor(LOCAL)}"),
        ("ours / floor where the floor is over 40 µs", "≤ 1.25", f.over_floor()),
        ("2 replicas minus one of the same run", "≤ 10 µs", f.more_than(f.of(ALONE))),
        ("messages by NCCL minus the same through peer memory", "–", by_nccl.more_than(f.of(OURS))),
        ("ResNet-50, images/s over torch's SyncBatchNorm, 8, 32, 128 images", "≥ 2.4; ≥ 2.5; ≥ 1.8", training(2, TORCHS)),
        ("the same over BatchNorm2d", "≥ 0.95 each", training(2, LOCAL)),
        ("host µs a layer, 20 in a row, over BatchNorm2d's", "≤ 1.25", host(2)),
    ]
    lines = [where(f.rows), "", "| goal (set for H200s) | figure | reached |", "|---|---|---|"]
    lines += [f"| {' | '.join(line)} |" for line in goals]
    lines += ["", f"Host, µs a layer, forward + backward, two rounds: {host_steps(2)}.", ""]
    lines += [
        "| case, each GPU's, µs in a graph | floor | syncbn | by NCCL | one replica | torch SyncBatchNorm | BatchNorm2d, local |",
        "|---|---|---|---|---|---|---|",
    ]
    for case, t in f.found.items():
        us = [f.floors[case], t[OURS], by_nccl.found[case][OURS], *(t[peer] for peer in (ALONE, TORCHS, LOCAL))]
        lines.append(f"| {short(case)} | {' | '.join(f'{v:.1f}' for v in us)} |")
    return "\n".join(lines) + "\n"
