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
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn.demo import OnStep, Run, Settings
from syncbn.demo.data import Digits, digits
from syncbn.demo.model import NORMS, network

LEARNING_RATE = 0.02


def train(settings: Settings, on_step: OnStep) -> list[Run]:
    """The three runs, one after the other, in one set of processes."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return _as_one_of_many(settings, on_step)
    context = multiprocessing.get_context("spawn")
    messages: Any = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    processes = [context.Process(target=_worker, args=(rank, settings, address, messages)) for rank in range(settings.replicas)]
    for process in processes:
        process.start()
    try:
        return _listen(messages, processes, on_step)
    finally:
        for process in processes:
            process.join(5)
            process.kill()


def _listen(messages: Any, processes: list[Any], on_step: OnStep) -> list[Run]:
    """Shows the steps that the first process reports, until it reports the runs."""
    while True:
        try:
            kind, content = messages.get(timeout=1)
        except queue.Empty:
            if any(process.exitcode for process in processes):
                raise SystemExit("A process of the demo died.") from None
            continue
        if kind == "runs":
            return content
        if kind == "error":
            raise SystemExit(content)
        on_step(*content)


def _worker(rank: int, settings: Settings, address: str, messages: Any) -> None:
    try:
        # The replicas share the cores.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // settings.replicas))
        dist.init_process_group(_backend(settings.replicas), init_method=address, rank=rank, world_size=settings.replicas)
        runs = _runs(settings, (lambda *step: messages.put(("step", step))) if rank == 0 else _ignore)
        if rank == 0:
            messages.put(("runs", runs))
        dist.destroy_process_group()
    except Exception:
        messages.put(("error", traceback.format_exc()))


def _as_one_of_many(settings: Settings, on_step: OnStep) -> list[Run]:
    """Under torchrun: all train, the first one reports."""
    if int(os.environ["WORLD_SIZE"]) != settings.replicas:
        raise SystemExit(
            f"torchrun started {os.environ['WORLD_SIZE']} processes: give --replicas {os.environ['WORLD_SIZE']} too."
        )
    dist.init_process_group(_backend(settings.replicas))
    first = dist.get_rank() == 0
    runs = _runs(settings, on_step if first else _ignore)
    dist.destroy_process_group()
    if not first:
        raise SystemExit(0)
    return runs


def _backend(replicas: int) -> str:
    return "nccl" if torch.cuda.device_count() >= replicas else "gloo"


def _ignore(name: str, done: int, steps: int) -> None:
    pass


def _runs(settings: Settings, on_step: OnStep) -> list[Run]:
    device = "cpu"
    if dist.get_backend() == "nccl":
        device = f"cuda:{dist.get_rank() % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    with keras.device(device):
        images = digits()
        return [_run(name, settings, images, device, on_step) for name in NORMS]


def _run(name: str, settings: Settings, images: Digits, device: str, on_step: OnStep) -> Run:
    keras.utils.set_random_seed(settings.seed)
    model = network(NORMS[name])
    output_off, gradient_off = _off_from_one_replica(name, settings, model, images, device)
    replicated = DistributedDataParallel(model)
    optimizer = torch.optim.SGD([w.value for w in model.trainable_weights], LEARNING_RATE, momentum=0.9)
    x, labels = torch.tensor(images.train_images, device=device), torch.tensor(images.train_labels, device=device).long()
    steps, order = len(x) // (settings.batch * settings.replicas), torch.Generator().manual_seed(settings.seed)
    accuracies, seconds = [], []
    for epoch in range(settings.epochs):
        # Every replica draws the same order and takes its share of each batch.
        shuffled = torch.randperm(len(x), generator=order)
        for step in range(steps):
            start = time.perf_counter()
            mine = shuffled[step * settings.replicas * settings.batch :][dist.get_rank() * settings.batch :][: settings.batch]
            optimizer.zero_grad()
            # Torch's model.train() does not reach Keras layers: the call says what it is.
            torch.nn.functional.cross_entropy(replicated(x[mine], training=True), labels[mine]).backward()
            optimizer.step()
            seconds.append(time.perf_counter() - start)
            on_step(name, epoch * steps + step + 1, settings.epochs * steps)
        accuracies.append(_accuracy(model, images, device))
    return Run(
        name,
        accuracies,
        float(np.median(seconds[steps:] or seconds[1:] or seconds)),
        _statistics_apart(model),
        output_off,
        gradient_off,
    )


@torch.no_grad()
def _accuracy(model: Any, images: Digits, device: str) -> float:
    logits = model(torch.tensor(images.test_images, device=device), training=False)
    return float((logits.argmax(1).cpu().numpy() == images.test_labels).mean())


def _off_from_one_replica(name: str, settings: Settings, model: Any, images: Digits, device: str) -> tuple[float, float]:
    """How far the first batch norm's output and input gradient are from those of one replica with the whole batch."""
    convolution, norm = model.layers[0], model.layers[1]
    whole = settings.replicas * settings.batch
    with torch.no_grad():
        x = convolution(torch.tensor(images.train_images[:whole], device=device))
    dy = torch.tensor(np.random.default_rng(settings.seed).normal(size=x.shape).astype("float32"), device=device)

    def step(x: Any, dy: Any) -> tuple[Any, Any]:
        layer = NORMS[name]()
        layer.build(tuple(x.shape))
        layer.set_weights(norm.get_weights())
        x = x.clone().requires_grad_()
        y = layer(x, training=True)
        return y.detach(), torch.autograd.grad(y, x, dy)[0]

    share = slice(dist.get_rank() * settings.batch, (dist.get_rank() + 1) * settings.batch)
    many = [_gathered(v) for v in step(x[share], dy[share])]
    with syncbn.local_statistics():
        one = step(x, dy)
    y_off, dx_off = (float((torch.cat(list(m)) - o).abs().max()) for m, o in zip(many, one, strict=True))
    return y_off, dx_off


def _statistics_apart(model: Any) -> float:
    norms = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    statistics = torch.cat([w.value.detach().flatten() for layer in norms for w in layer.non_trainable_weights])
    gathered = _gathered(statistics)
    return float((gathered.amax(0) - gathered.amin(0)).max())


def _gathered(v: Any) -> Any:
    """[replicas, …]."""
    rows = [torch.empty_like(v) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, v.contiguous())
    return torch.stack(rows)
