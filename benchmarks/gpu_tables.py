"""The tables of docs/kernels.md, from the rows of the suites gpu, gpu-host and gpu-resnet."""

from __future__ import annotations

import statistics
from typing import Any

from baselines import ADD_RELU, COMPILED, LOCAL, ONE_REPLICA, OURS, OURS_COMPILED, TORCH_SYNC
from rows import geometric_mean, read

SMALL_MEGABYTES = 5
# Two exchanges of two H200s' replicas, each of them 4.6 µs: what the goals for several GPUs allow for.
BARRIERS = 9.2
LAUNCHES = ("moments", "normalize", "sums", "input_gradient")
# How many tensors each launch moves at the least, of a layer's eight; one that keeps its batch in registers reads it once.
MOVED = {"moments": 1, "normalize": 2, "sums": 2, "input_gradient": 3, "forward": 2, "backward": 3}


class Figures:
    """Of one run of the suite gpu: so many replicas, which exchange through each other's memory, on GPUs of a kind."""

    def __init__(self, replicas: int, device: str = ""):
        transport = "none" if replicas == 1 else "peer memory"
        rows = read("gpu")
        self.rows = [
            row
            for row in rows
            if (row["replicas"], row["details"]["transport"]) == (replicas, transport) and device in row["device"]
        ]
        # {case: {subject: µs}} in the order of the rows, each case's floor in µs, and the cases over 5 MB.
        self.found: dict[str, dict[str, float]] = {}
        self.floors: dict[str, float] = {}
        self.large: set[str] = set()
        for row in self.of_measure("step in a CUDA graph"):
            case, details = row["case"], row["details"]
            self.found.setdefault(case, {})[row["subject"]] = row["values"]["median"]
            self.floors[case] = details["floor"]
            if details["megabytes"] > SMALL_MEGABYTES:
                self.large.add(case)

    def of_measure(self, measure: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["measure"] == measure]

    def ratios(self, theirs: str, ours: str = OURS) -> dict[str, float]:
        """Their time over ours, by case."""
        return {case: t[theirs] / t[ours] for case, t in self.found.items() if theirs in t and ours in t}

    def against(self, baseline: str) -> str:
        """Geometric mean; the worst over 5 MB; what ours takes more below that, at most."""
        of = self.ratios(baseline)
        worst, more = min(of[case] for case in of if case in self.large), self.more(baseline)
        return f"{geometric_mean(of.values()):.2f}; {worst:.2f}; {more:+.1f} µs"

    def more(self, baseline: str) -> float:
        """How many µs ours takes more than a baseline in a case below 5 MB, at most."""
        return max(t[OURS] - t[baseline] for case, t in self.found.items() if case not in self.large)

    def at_the_floor(self, baseline: str) -> str:
        """What the geometric mean and the worst over 5 MB would be of a layer that took the floor and two barriers."""
        of = {case: t[baseline] / (self.floors[case] + BARRIERS) for case, t in self.found.items()}
        return f"{geometric_mean(of.values()):.2f}; {min(of[case] for case in of if case in self.large):.2f}"

    def more_than(self, theirs: dict[str, float]) -> str:
        """µs that ours takes more than theirs, by case."""
        costs = [t[OURS] - theirs[case] for case, t in self.found.items()]
        return f"{statistics.median(costs):.0f}, median; {min(costs):.0f} to {max(costs):.0f}"

    def of(self, baseline: str) -> dict[str, float]:
        """µs of a subject, by case."""
        return {case: t[baseline] for case, t in self.found.items()}

    def mean_and_worst(self, theirs: str, ours: str = OURS) -> str:
        of = self.ratios(theirs, ours).values()
        return f"{geometric_mean(of):.2f} ({min(of):.2f} to {max(of):.2f})"

    def over_floor(self) -> str:
        return f"{geometric_mean(t[OURS] / self.floors[case] for case, t in self.found.items() if self.floors[case] > 40):.2f}"

    def exchange(self) -> str:
        """µs that an exchange costs two virtual replicas, the smallest inputs first."""
        at = {(row["case"], row["subject"]): row for row in self.of_measure("step of virtual replicas")}
        costs: dict[float, list[float]] = {}
        for (case, subject), row in at.items():
            if subject == "without":
                cost = at[case, "with the exchange"]["values"]["median"] - row["values"]["median"]
                costs.setdefault(row["details"]["megabytes"], []).append(cost)
        return "; ".join(f"{min(us):.1f} to {max(us):.1f} at {size:.1f} MB" for size, us in sorted(costs.items()))

    def launches(self, case: str) -> str:
        """µs of each launch, over its own floor in brackets."""
        rows = [row for row in self.of_measure("launch in a CUDA graph") if row["case"] == case]
        of = {row["subject"]: row["values"]["median"] for row in rows}
        names = [*(["forward"] if "forward" in of else LAUNCHES[:2]), *(["backward"] if "backward" in of else LAUNCHES[2:])]
        return "; ".join(f"{of[name]:.1f} ({of[name] / (MOVED[name] * self.floors[case] / 8):.2f})" for name in names)

    def where(self) -> str:
        """The device, what travels how, the versions and the commit of the run."""
        row = self.rows[0]
        versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items() if name != "numpy")
        speed, transport = f"{row['details']['bytes per second'] / 1e12:.2f} TB/s, measured", row["details"]["transport"]
        commits = " and ".join(dict.fromkeys(row["commit"] for row in self.rows))
        return f"{row['replicas']} × {row['device']} ({speed}), transport: {transport}; {versions}; commit {commits}"


def host_times(replicas: int) -> dict[str, list[float]]:
    """µs of the suite gpu-host, forward + backward, a figure a round."""
    of: dict[str, dict[str, list[float]]] = {}
    for row in read("gpu-host"):
        if row["replicas"] == replicas:
            of.setdefault(row["subject"], {}).setdefault(row["measure"], []).append(row["values"]["median"])
    return {name: [sum(both) for both in zip(*passes.values(), strict=True)] for name, passes in of.items()}


def host(replicas: int) -> str:
    """Ours over BatchNorm2d's host time, a figure a round."""
    of = host_times(replicas)
    return " and ".join(f"{ours / theirs:.2f}" for ours, theirs in zip(of[OURS], of[LOCAL], strict=True))


def host_steps(replicas: int) -> str:
    """µs of each step of the suite gpu-host, a figure a round: a list."""
    return "\n".join(f"* {what}: {' and '.join(f'{us:.0f}' for us in each)}" for what, each in host_times(replicas).items())


def training(replicas: int, baseline: str) -> list[float]:
    """Images/s of ResNet-50 over a baseline's, by the number of images."""
    rows = [row for row in read("gpu-resnet") if row["replicas"] == replicas]
    at = {(row["subject"], row["case"]): row["values"]["median"] for row in rows}
    return [at[OURS, case] / at[baseline, case] for case in dict.fromkeys(case for _, case in at)]


def rates(replicas: int, baseline: str) -> str:
    return "; ".join(f"{ratio:.2f}" for ratio in training(replicas, baseline))


def short(case: str) -> str:
    return case.replace("bfloat16", "bf16").replace("float32", "fp32")


def one_gpu() -> str:
    """Two runs: the latest, and an earlier one of what the latest has not measured again."""
    return f"{latest_run_on_one_gpu()}\n{earlier_run_on_one_gpu()}"


GOALS = ["", "| goal (set for an H200) | figure | reached |", "|---|---|---|"]


def latest_run_on_one_gpu() -> str:
    f = Figures(1, device="H200")
    goals = [
        ("BatchNorm2d / ours, geometric mean; worst over 5 MB; below 5 MB", "≥ 1.9; ≥ 1.0; at most +5 µs", f.against(LOCAL)),
        ("ours / floor where the floor is over 40 µs", "≤ 1.2", f.over_floor()),
        ("host µs a layer over BatchNorm2d's, 20 in a row, two rounds", "≤ 1.25", host(1)),
        ("ResNet-50 over BatchNorm2d, images/s, 8, 32, 128 images", "≥ 0.97; ≥ 0.97; ≥ 1.0", rates(1, LOCAL)),
    ]
    others = [row for suite in ("gpu-host", "gpu-resnet") for row in read(suite) if row["replicas"] == 1]
    commits = " and ".join(dict.fromkeys(row["commit"] for row in others))
    lines = [f"{f.where()}; the host and ResNet-50: {commits}", *GOALS, *(f"| {' | '.join(line)} |" for line in goals), ""]
    lines += ["Where the host's time goes, µs a layer, forward + backward, two rounds:", "", host_steps(1), ""]
    lines += [
        "µs in a graph; of each launch of ours alone, with its time over its own floor in brackets (under 1: out of L2). A way that is",
        "one launch has one figure; two launches are moments and normalize, or gradient sums and input gradient.",
        "",
        "| case | floor | syncbn | BatchNorm2d | launches |",
        "|---|---|---|---|---|",
    ]
    for case, t in f.found.items():
        us = [f.floors[case], t[OURS], t[LOCAL]]
        lines.append(f"| {short(case)} | {' | '.join(f'{v:.1f}' for v in us)} | {f.launches(case)} |")
    return "\n".join(lines) + "\n"


def earlier_run_on_one_gpu() -> str:
    f = Figures(1, device="H100")
    goals = [
        ("BatchNorm2d compiled / ours compiled", "≥ 1.0", f.mean_and_worst(COMPILED, OURS_COMPILED)),
        (
            "the same, both followed by add and ReLU",
            "≥ 1.0",
            f.mean_and_worst(f"{LOCAL}, {ADD_RELU}, compiled", f"{OURS}, {ADD_RELU}, compiled"),
        ),
        (
            "BatchNorm2d + add + ReLU compiled / ours with both inside, not compiled",
            "–",
            f.mean_and_worst(f"{LOCAL}, {ADD_RELU}, compiled", f"{OURS}, {ADD_RELU} inside"),
        ),
        (
            "ours compiled / ours not compiled, both followed by add and ReLU",
            "–",
            f.mean_and_worst(f"{OURS}, {ADD_RELU}, compiled", f"{OURS}, {ADD_RELU}"),
        ),
        (
            "ours + add + ReLU / both inside, 25 MB and more",
            "≥ 2",
            f.mean_and_worst(f"{OURS}, {ADD_RELU}", f"{OURS}, {ADD_RELU} inside"),
        ),
        ("2 virtual replicas minus the same without the exchange, C ≤ 256", "≤ 7 µs", f.exchange()),
    ]
    lines = [f"An earlier run: {f.where()}", *GOALS, *(f"| {' | '.join(line)} |" for line in goals), ""]
    lines += ["| case, µs in a graph | floor | BatchNorm2d compiled | syncbn compiled |", "|---|---|---|---|"]
    for case, t in f.found.items():
        us = [f.floors[case], t[COMPILED], t[OURS_COMPILED]]
        lines.append(f"| {short(case)} | {' | '.join(f'{v:.1f}' for v in us)} |")
    return "\n".join(lines) + "\n"


def two_gpus() -> str:
    f = Figures(2)
    of = f.ratios(TORCH_SYNC)
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
        (
            "the two lines above, if ours took the floor and 9.2 µs",
            "–",
            f"{f.at_the_floor(TORCH_SYNC)} and {f.at_the_floor(LOCAL)}",
        ),
        ("ours / floor where the floor is over 40 µs", "≤ 1.25", f.over_floor()),
        ("2 replicas minus one of the same run", "≤ 10 µs", f.more_than(f.of(ONE_REPLICA))),
        ("ResNet-50, images/s over torch's SyncBatchNorm, 8, 32, 128 images", "≥ 2.4; ≥ 2.5; ≥ 1.8", rates(2, TORCH_SYNC)),
        ("the same over BatchNorm2d", "≥ 0.95 each", rates(2, LOCAL)),
        ("host µs a layer, 20 in a row, over BatchNorm2d's", "≤ 1.25", host(2)),
    ]
    lines = [f.where(), "", "| goal (set for H200s) | figure | reached |", "|---|---|---|"]
    lines += [f"| {' | '.join(line)} |" for line in goals]
    lines += ["", "Host, µs a layer, forward + backward, two rounds:", "", host_steps(2), ""]
    lines += [
        "| case, each GPU's, µs in a graph | floor | syncbn | one replica | torch SyncBatchNorm | BatchNorm2d, local |",
        "|---|---|---|---|---|---|",
    ]
    for case, t in f.found.items():
        us = [f.floors[case], *(t[name] for name in (OURS, ONE_REPLICA, TORCH_SYNC, LOCAL))]
        lines.append(f"| {short(case)} | {' | '.join(f'{v:.1f}' for v in us)} |")
    return "\n".join(lines) + "\n"
