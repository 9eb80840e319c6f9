"""ResNet-50 in PyTorch, training images/s; on several GPUs with DistributedDataParallel.

bf16 autocast, channels_last, random images, SGD, eager. The models take turns in one run. Rows: images/s of all GPUs together, each
round's and their median. Without a GPU it takes a few small steps and keeps no rows.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from baselines import torch_adapters
from gpu_cases import start, where, world
from timing import in_turns
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class Size(NamedTuple):
    """Of an image, and of a run: steps before, rounds that are timed, steps in each."""

    pixels: int
    warm_up: int
    rounds: int
    steps: int


ON_GPUS, ON_CPUS = Size(224, 10, 3, 30), Size(32, 1, 3, 1)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, nargs="+", help="per GPU; 8, 32 and 128 if not given")


def models() -> dict[str, nn.Module]:
    """By name, with the same weights."""
    sys.path[:0] = [str(Path(__file__).parent.parent / "tests")]
    from vision import torchvision

    torch.manual_seed(0)
    plain = torchvision.models.resnet50()
    # Torch's synchronised layer runs on GPUs alone.
    adapters = torch_adapters(world() > 1 and torch.cuda.is_available())
    return {name: adapter.convert(copy.deepcopy(plain)) for name, adapter in adapters.items()}


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


def rates(images: int, device: torch.device, size: Size) -> dict[str, list[float]]:
    """images/s of all GPUs together in each round, by model."""
    steps = {name: trainer(model, device, images, size.pixels) for name, model in models().items()}
    for step in steps.values():
        seconds_of(step, size.warm_up, device)
    return in_turns(steps, size.rounds, lambda step: world() * images * size.steps / seconds_of(step, size.steps, device))


def measure(given: argparse.Namespace, record: Callable[..., Any]) -> None:
    device = start()
    on_gpu = device.type == "cuda"
    given.no_rows |= not on_gpu
    torch.backends.cudnn.benchmark = on_gpu
    size, usual = (ON_GPUS, [8, 32, 128]) if on_gpu else (ON_CPUS, [2])
    run = {"dtype": "bfloat16 autocast", "layout": "channels_last", "pixels": size.pixels, "steps": size.steps}
    for images in given.images or usual:
        found = rates(images, device, size)
        if on_gpu:
            torch.cuda.empty_cache()
        run |= where(device, "torchvision")
        for name, each in found.items():
            values = {"median": statistics.median(each), "each": each}
            record(case=f"ResNet-50, {images} images", measure="training", unit="images/s", subject=name, values=values,
                   images=images, **run)  # fmt: skip
            print(f"{images} images, {name}: {values['median']:,.0f} images/s", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()
