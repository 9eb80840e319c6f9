"""ResNet-50, training images/s: `torchrun --standalone --nproc-per-node 2 benchmarks/gpu_resnet.py`, or python for one process.

bf16 autocast, channels_last, random images, SGD, eager; DDP where there are several processes. The peers take turns in one run. Rows:
images/s of all GPUs together, each round's and their median. Without a GPU a few small steps, to try the program.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from gpu_figures import ALONE, LOCAL, OURS, TORCHS
from rows import provenance, write
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn.torch import peer_memory as lanes
from syncbn.torch.groups import link_of


class Size(NamedTuple):
    """Of an image, and of a run: steps before, rounds that are timed, steps in each."""

    pixels: int
    warm_up: int
    rounds: int
    steps: int


ON_GPUS, ON_CPUS = Size(224, 10, 3, 30), Size(32, 1, 3, 1)


def start() -> torch.device:
    """This process's device, and its group where there are several processes."""
    on_gpu, several = torch.cuda.is_available(), "RANK" in os.environ
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if several:
        dist.init_process_group("nccl" if on_gpu else "gloo", **({"device_id": device} if on_gpu else {}))
    return device


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def peers(device: torch.device) -> dict[str, Callable[[], nn.Module]]:
    """Models by name, with the same weights."""
    sys.path[:0] = [str(Path(__file__).parent.parent / "tests")]
    from vision import torchvision

    torch.manual_seed(0)
    plain = torchvision.models.resnet50()
    found = {LOCAL: lambda: copy.deepcopy(plain), OURS: lambda: syncbn.convert(copy.deepcopy(plain))}
    if world() > 1 and device.type == "cuda":
        found[ALONE] = lambda: syncbn.convert(copy.deepcopy(plain), group_size=1)
        found[TORCHS] = lambda: nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    return found


def trainer(model: nn.Module, device: torch.device, images: int, pixels: int) -> Callable[[], torch.Tensor]:
    """One step of training; its loss."""
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    if world() > 1:
        model = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    generator = torch.Generator(device).manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    x = torch.randn(images, 3, pixels, pixels, device=device, generator=generator).to(memory_format=torch.channels_last)
    labels = torch.randint(1000, (images,), device=device, generator=generator)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def seconds_of(step: Callable[[], torch.Tensor], steps: int, device: torch.device) -> float:
    """Of so many steps, on the slowest rank."""
    wait(device)
    if world() > 1:
        dist.barrier()
    begin = time.perf_counter()
    for _ in range(steps):
        loss = step()
    wait(device)
    seconds = torch.tensor(time.perf_counter() - begin, dtype=torch.float64, device=device)
    assert bool(loss.isfinite()), "the loss must be finite"
    if world() > 1:
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(images: int, device: torch.device, size: Size) -> dict[str, list[float]]:
    """images/s of all GPUs together in each round, by peer."""
    steps = {name: trainer(make(), device, images, size.pixels) for name, make in peers(device).items()}
    for step in steps.values():
        seconds_of(step, size.warm_up, device)
    rates: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for _ in range(size.rounds):
        for name in order:
            rates[name].append(world() * images * size.steps / seconds_of(steps[name], size.steps, device))
        order = order[1:] + order[:1]
    return rates


def rows_of(found: dict[int, dict[str, list[float]]], device: torch.device, size: Size) -> list[dict[str, Any]]:
    """With where they come from."""
    on_gpu = device.type == "cuda"
    where = {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "cuda": torch.version.cuda,
        "transport": transport(device),
        **provenance("torch", "torchvision"),
    }
    common = {"benchmark": "gpu-resnet", "quantity": "images per second", "model": "resnet50", "dtype": "bfloat16 autocast"}
    run = {"layout": "channels_last", "pixels": size.pixels, "replicas": world(), "steps": size.steps}
    return [
        {**common, "peer": peer, "images": images, **run, "median": statistics.median(rates), "rounds": rates, **where}
        for images, by_peer in found.items()
        for peer, rates in by_peer.items()
    ]


def transport(device: torch.device) -> str:
    """How our layers meet."""
    link = link_of(None)
    if link is None:
        return "none"
    return "peer memory" if lanes.lane_of(link, device) is not None else dist.get_backend()


def table(rows: list[dict[str, Any]]) -> str:
    """images/s, and ours over each peer's."""
    names = list(dict.fromkeys(row["peer"] for row in rows))
    others = [name for name in names if name != OURS]
    lines = [["images", *names, *[f"{OURS} / {name}" for name in others]]]
    for images in dict.fromkeys(row["images"] for row in rows):
        of = {row["peer"]: row["median"] for row in rows if row["images"] == images}
        ratios = [f"{of[OURS] / of[name]:.2f}" for name in others]
        lines.append([str(images), *[f"{of[name]:,.0f}" for name in names], *ratios])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, nargs="+", help="per GPU; 8, 32 and 128 if not given")
    parser.add_argument("--out", type=Path, help="where the rows go; benchmarks/results/gpu-resnet.jsonl if not given")
    given = parser.parse_args()
    device = start()
    size, usual = (ON_GPUS, [8, 32, 128]) if device.type == "cuda" else (ON_CPUS, [2])
    begin, found = time.time(), {}
    for images in given.images or usual:
        found[images] = measure(images, device, size)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        # After each size: a run that is cut off leaves what it found.
        rows = rows_of(found, device, size)
        if not dist.is_initialized() or dist.get_rank() == 0:
            path = write("gpu-resnet", rows, given.out)
            print(
                f"{world()} × {rows[0]['device']}, {rows[0]['transport']}, {time.time() - begin:.0f} s; {len(rows)} rows in {path}"
            )
            print(table(rows), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
