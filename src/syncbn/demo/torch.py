"""The demo on PyTorch: one process a replica, NCCL where there is a GPU for each, else gloo on the CPU.

It starts its processes itself; started by torchrun, it is one of them: `torchrun --nproc-per-node 4 -m syncbn.cli demo --backend
torch`.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import socket
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn.demo import LOCAL, RENORM, Run, Task, Watch
from syncbn.demo.data import CLASSES, Digits, batches, digits

LEARNING_RATE = 0.02


def network(norm: str) -> nn.Sequential:
    """Two convolutions and a dense layer, each with a batch norm after it; [N, 1, 8, 8] to logits [N, 10]."""
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(32, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(),
        nn.Linear(32, CLASSES),
    )  # fmt: skip
    if norm == LOCAL:
        return model
    syncbn.convert(model, renorm=norm == RENORM)
    for layer in model:
        if isinstance(layer, syncbn.SyncBatchNorm):
            # Short runs: the default of 0.01 would still remember the initial statistics.
            layer.renorm_momentum = 0.1
    return model


def train(replicas: int, tasks: Sequence[Task], watch: Watch) -> Iterator[Run]:
    """The runs, one after the other, in one set of processes."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        yield from _as_one_of_many(replicas, tasks, watch)
        return
    context = multiprocessing.get_context("spawn")
    messages: Any = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    given = replicas, tasks, address, messages
    processes = [context.Process(target=_worker, args=(rank, *given)) for rank in range(replicas)]
    for process in processes:
        process.start()
    try:
        yield from _listen(messages, processes, len(tasks), watch)
    finally:
        for process in processes:
            process.join(5)
            process.kill()


def _listen(messages: Any, processes: list[Any], count: int, watch: Watch) -> Iterator[Run]:
    """Hands on the steps and epochs that the first process reports, and yields its runs."""
    while count:
        try:
            kind, content = messages.get(timeout=1)
        except queue.Empty:
            if any(process.exitcode for process in processes):
                raise SystemExit("A process of the demo died.") from None
            continue
        if kind == "run":
            count -= 1
            yield content
        elif kind == "error":
            raise SystemExit(content)
        else:
            getattr(watch, kind)(*content)


class _Messenger:
    """Sends what it is told to the process that a person looks at; from the first replica alone."""

    def __init__(self, messages: Any):
        self.messages = messages

    def step(self, task: Task) -> None:
        if dist.get_rank() == 0:
            self.messages.put(("step", (task,)))

    def epoch(self, task: Task, epoch: int, accuracy: float) -> None:
        if dist.get_rank() == 0:
            self.messages.put(("epoch", (task, epoch, accuracy)))


class _Nobody:
    """Watches for the replicas that report nothing."""

    def step(self, task: Task) -> None:
        pass

    def epoch(self, task: Task, epoch: int, accuracy: float) -> None:
        pass


def _worker(rank: int, replicas: int, tasks: Sequence[Task], address: str, messages: Any) -> None:
    try:
        # The replicas share the cores.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // replicas))
        dist.init_process_group(_backend(replicas), init_method=address, rank=rank, world_size=replicas)
        for run in _runs(tasks, _Messenger(messages)):
            if rank == 0:
                messages.put(("run", run))
        dist.destroy_process_group()
    except Exception:
        messages.put(("error", traceback.format_exc()))


def _as_one_of_many(replicas: int, tasks: Sequence[Task], watch: Watch) -> Iterator[Run]:
    """Under torchrun: all train, the first one reports."""
    if int(os.environ["WORLD_SIZE"]) != replicas:
        raise SystemExit(
            f"torchrun started {os.environ['WORLD_SIZE']} processes: give --replicas {os.environ['WORLD_SIZE']} too."
        )
    dist.init_process_group(_backend(replicas))
    if dist.get_rank() == 0:
        yield from _runs(tasks, watch)
        dist.destroy_process_group()
    else:
        for _ in _runs(tasks, _Nobody()):
            pass
        dist.destroy_process_group()
        raise SystemExit(0)


def _backend(replicas: int) -> str:
    return "nccl" if torch.cuda.device_count() >= replicas else "gloo"


def _runs(tasks: Sequence[Task], watch: Watch) -> Iterator[Run]:
    device = "cpu"
    if dist.get_backend() == "nccl":
        device = f"cuda:{dist.get_rank() % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    # The gradient of a kernel with one input channel has strides that DDP remarks on.
    warnings.filterwarnings("ignore", message="Grad strides do not match")
    images = digits()
    for task in tasks:
        yield _run(task, images, device, watch)


def _run(task: Task, images: Digits, device: str, watch: Watch) -> Run:
    torch.manual_seed(task.seed)
    model = network(task.norm).to(device)
    x, labels = _channels_first(images.train_images, device), torch.tensor(images.train_labels, device=device).long()
    errors = _errors_against_one_replica(task, model, x) if task.compare else ()
    replicated = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9)
    # Every replica draws the same rows and takes its share of each batch.
    rows = batches(task.batch * dist.get_world_size(), task.seed)
    share = slice(dist.get_rank() * task.batch, (dist.get_rank() + 1) * task.batch)
    accuracies, seconds = [], []
    for epoch in range(task.epochs):
        for drawn in islice(rows, task.steps):
            start = time.perf_counter()
            mine = torch.from_numpy(drawn[share])
            optimizer.zero_grad()
            nn.functional.cross_entropy(replicated(x[mine]), labels[mine]).backward()
            optimizer.step()
            seconds.append(time.perf_counter() - start)
            watch.step(task)
        accuracies.append(_accuracy(model, images, device))
        watch.epoch(task, epoch + 1, accuracies[-1])
    late = seconds[task.steps :] or seconds[1:] or seconds
    return Run(task, accuracies, float(np.median(late)), _statistics_apart(model), *errors)


def _channels_first(images: np.ndarray, device: str) -> torch.Tensor:
    return torch.tensor(images, device=device).movedim(-1, 1).contiguous()


@torch.no_grad()
def _accuracy(model: nn.Module, images: Digits, device: str) -> float:
    model.eval()
    logits = model(_channels_first(images.test_images, device))
    model.train()
    return float((logits.argmax(1).cpu().numpy() == images.test_labels).mean())


def _errors_against_one_replica(task: Task, model: nn.Sequential, images: torch.Tensor) -> tuple[float, float]:
    """How far the first batch norm's output and input gradient are from those of one replica with the whole batch."""
    with torch.no_grad():
        x = model[0](images[: dist.get_world_size() * task.batch])
    dy = torch.tensor(np.random.default_rng(task.seed).normal(size=x.shape).astype("float32"), device=x.device)

    def step(x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        layer = network(task.norm)[1].to(x.device)
        x = x.clone().requires_grad_()
        y = layer(x)
        return y.detach(), torch.autograd.grad(y, x, dy)[0]

    share = slice(dist.get_rank() * task.batch, (dist.get_rank() + 1) * task.batch)
    many = [_gathered(v) for v in step(x[share], dy[share])]
    with syncbn.local_statistics():
        one = step(x, dy)
    y_error, dx_error = (float((torch.cat(list(m)) - o).abs().max()) for m, o in zip(many, one, strict=True))
    return y_error, dx_error


def _statistics_apart(model: nn.Module) -> float:
    statistics = torch.cat([b.detach().flatten() for b in model.buffers() if b.is_floating_point()])
    gathered = _gathered(statistics)
    return float((gathered.amax(0) - gathered.amin(0)).max())


def _gathered(v: torch.Tensor) -> torch.Tensor:
    """[replicas, …]."""
    rows = [torch.empty_like(v) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, v.contiguous())
    return torch.stack(rows)
