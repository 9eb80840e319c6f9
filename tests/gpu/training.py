"""What training brings, on several GPUs: `torchrun --standalone --nproc-per-node 2 tests/gpu/training.py [CHECK …]`.

SYNCBN_PEER_MEMORY=0 without the mailboxes; without GPUs the same runs by gloo, in few steps. One line a check: the largest deviation of each
quantity on any rank, and what it may be. The exit status is 1 where one is larger or a check raised, which does not keep the next from
running; a check that hangs ends all at its limit, with stacks.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import faulthandler
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deviations import Audit, Ranks, Worst, meet
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as checkpointed

import syncbn
from syncbn.torch.groups import communicator_of
from syncbn.torch.peer_memory import mailbox_of

IMAGE = (3, 8, 8)
OUTPUTS = 4


class Net(nn.Module):
    """Convolutions with batch norms; with `branch` also one without, which each sample takes or not."""

    def __init__(self, branch: bool = False, width: int = 16):
        super().__init__()
        torch.manual_seed(0)

        def block(a: int, b: int, stride: int) -> list[nn.Module]:
            # Smooth: rounding that takes a value over ReLU's kink changes gradients by far more than rounding.
            return [nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.SiLU()]

        self.stem = nn.Sequential(*block(3, width, 1))
        self.branch = nn.Sequential(nn.Conv2d(width, width, 1), nn.Tanh()) if branch else None
        self.rest = nn.Sequential(*block(width, 2 * width, 2), *block(2 * width, 2 * width, 1))
        self.head = nn.Linear(2 * width, OUTPUTS)

    def forward(self, x: Tensor, used: Any = None, part: Callable[..., Tensor] = lambda module, v: module(v)) -> Tensor:
        h = part(self.stem, x)
        if used is not None:
            h = h + used * self.branch(h)
        return self.head(part(self.rest, h).mean((2, 3)))


def twins(ranks: Ranks, branch: bool = False) -> tuple[nn.Module, nn.Module]:
    """With torch's batch norm, for the whole batch, and with ours."""
    plain = Net(branch).to(ranks.device)
    return plain, syncbn.convert(copy.deepcopy(plain))


def ragged(ranks: Ranks, step: int = 0) -> list[int]:
    """Every rank's batch size."""
    return [3 + (step * 7 + r * 5) % 4 for r in range(ranks.size)]


def one_empty(ranks: Ranks, step: int = 0) -> list[int]:
    return [n * (r != (step - 1) % ranks.size) for r, n in enumerate(ragged(ranks, step))]


# ------------------------------------------------------------------------------------------------- a captured graph


def graph(ranks: Ranks, worst: Worst) -> str:
    """Inputs change from replay to replay; every 100th is compared."""
    turns, every = ranks.steps(1000, 20), ranks.steps(100, 5)
    for sizes in (ragged(ranks), one_empty(ranks)):
        replays(ranks, worst, sizes, turns, every)
    return f"2 × {turns} replays, ragged and with an empty rank"


def replays(ranks: Ranks, worst: Worst, sizes: list[int], turns: int, every: int) -> None:
    plain, ours = twins(ranks)
    plain.double()
    x = torch.zeros(sizes[ranks.rank], *IMAGE, device=ranks.device, requires_grad=True)
    dy = torch.zeros(sizes[ranks.rank], OUTPUTS, device=ranks.device)
    got: dict[str, Any] = {}

    def step() -> None:
        y = ours(x)
        got.update(y=y, gradients=torch.autograd.grad(y, [x, *ours.parameters()], dy))
        got["mailbox"] = mailbox_of(communicator_of(None), ranks.device)

    replay = captured(ranks, step, got.clear)
    assert bool(got["mailbox"]) == has_mailboxes(ranks), "the graph must take the transport that the group has"
    with torch.no_grad():
        # The warm-up moved the statistics.
        for v, initial in zip(ours.buffers(), plain.buffers(), strict=True):
            v.copy_(initial)
    for turn in range(turns):
        xs, dys = ranks.draw(2 * turn, sizes, *IMAGE), ranks.draw(2 * turn + 1, sizes, OUTPUTS)
        with torch.no_grad():
            x.copy_(xs[ranks.rank])
            dy.copy_(dys[ranks.rank])
        replay()
        whole = torch.cat(xs).requires_grad_()
        right = plain(whole)
        if (turn + 1) % every == 0:
            dx, *gradients = torch.autograd.grad(right, [whole, *plain.parameters()], torch.cat(dys))
            worst.see("output", got["y"], right.split(sizes)[ranks.rank])
            worst.see("input gradient", got["gradients"][0], dx.split(sizes)[ranks.rank])
            worst.see_all("parameter gradients", ranks.totals(got["gradients"][1:]), gradients)
            worst.see_all("moving statistics", ours.buffers(), plain.buffers())
            worst.same_bits(ours, parameters=False)


def captured(ranks: Ranks, step: Callable[[], None], forget: Callable[[], None]) -> Callable[[], None]:
    """The step as a graph to replay; where there are none, the step.

    The nodes that take the leaves' gradients belong to the stream of the first step that made them, for as long as anything holds
    what that step left, and a capture may not wait for the default stream: so none runs there, and all is forgotten.
    """
    on_gpu = ranks.device.type == "cuda"
    stream = torch.cuda.Stream() if on_gpu else None
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
            forget()
    if stream is None:
        step()
        return step
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # The watchdog of NCCL asks for events meanwhile, in a thread of its own.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        step()
    return graph.replay


# ------------------------------------------------------------------------------------------------- activation checkpointing

WAYS: dict[str, dict[str, Any] | None] = {"plain": None, "recomputed": {}, "recorded": {"context_fn": syncbn.checkpoint_contexts}}


def checkpoint(ranks: Ranks, worst: Worst) -> str:
    """Recomputed and recorded against neither, and that against the whole batch; a rank is empty in some steps."""
    plain, ours = twins(ranks)
    plain.double()
    nets = {way: copy.deepcopy(ours) for way in WAYS}
    steps = 6
    for step in range(steps):
        sizes = (ragged, one_empty)[step % 2](ranks, step)
        xs, dys = ranks.draw(2 * step, sizes, *IMAGE), ranks.draw(2 * step + 1, sizes, OUTPUTS)
        found = {way: gradients_by(nets[way], xs[ranks.rank].float(), dys[ranks.rank].float(), WAYS[way]) for way in WAYS}
        whole = gradients_by(plain, torch.cat(xs), torch.cat(dys), None)
        dx, *dparameters = found["plain"]
        for way in list(WAYS)[1:]:
            worst.see_all("against uncheckpointed", found[way], [dx, *dparameters])
            worst.see_all("against uncheckpointed", nets[way].buffers(), nets["plain"].buffers())
        worst.see("input gradient", dx, whole[0].split(sizes)[ranks.rank])
        worst.see_all("parameter gradients", ranks.totals(dparameters), whole[1:])
        worst.see_all("moving statistics", nets["plain"].buffers(), plain.buffers())
        worst.same_bits(nets["plain"], parameters=False)
    return f"{steps} steps, with and without context_fn"


def gradients_by(net: nn.Module, x: Tensor, dy: Tensor, how: dict[str, Any] | None) -> list[Tensor]:
    """dx, and the parameters' gradients."""
    x = x.clone().requires_grad_()
    part = (
        (lambda module, v: module(v)) if how is None else (lambda module, v: checkpointed(module, v, use_reentrant=False, **how))
    )
    net.zero_grad()
    net(x, part=part).backward(dy)
    return [x.grad, *(p.grad for p in net.parameters())]


# ------------------------------------------------------------------------------------------------- training


def problem(ranks: Ranks, seed: int, sizes: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Images, and something to be learned from them, float32."""
    xs = ranks.draw(seed, sizes, *IMAGE)
    return [x.float() for x in xs], [torch.cat([x.mean((2, 3)), x[:, :1].std((2, 3))], 1).float() for x in xs]


def step_of(forward: Callable[[], Tensor], target: Tensor, share: float, optimizer: Any) -> Tensor:
    """One step; the loss, times `share` of what its gradient must be of."""
    optimizer.zero_grad()
    loss = (forward() - target).square().sum() * share
    loss.backward()
    optimizer.step()
    return loss.detach()


def follow(ranks: Ranks, worst: Worst, steps: int, branch: bool, **ddp: Any) -> tuple[float, float]:
    """Ours under DDP beside one process with the whole batch; the first loss and the last."""
    plain, ours = twins(ranks, branch)
    wrapped = DistributedDataParallel(ours, **ddp)
    # Without momentum: it doubles a deviation every twenty steps, whatever the deviation comes from.
    mine, alone = (torch.optim.SGD(net.parameters(), 0.02) for net in (ours, plain))
    losses = []
    for step in range(steps):
        sizes = ragged(ranks, step)
        xs, targets = problem(ranks, step, sizes)
        # One rank takes the branch, each in its turn.
        takes = [float((r + step) % ranks.size == 0) for r in range(ranks.size)]
        used = torch.cat([x.new_full((len(x), 1, 1, 1), t) for x, t in zip(xs, takes, strict=True)]) if branch else None
        own = (1.0 if takes[ranks.rank] else None) if branch else None
        x, n = xs[ranks.rank], sum(sizes)
        # DDP takes the mean over ranks of what is to be a sum over them.
        loss = step_of(lambda: wrapped(x, own), targets[ranks.rank], ranks.size / n, mine)
        dist.all_reduce(loss)
        right = step_of(lambda: plain(torch.cat(xs), used), torch.cat(targets), 1 / n, alone)
        worst.see("loss", loss / ranks.size, right)
        worst.see_all("trained statistics", ours.buffers(), plain.buffers())
        losses.append(float(right))
    worst.see_all("trained parameters", ours.parameters(), plain.parameters())
    worst.same_bits(ours, parameters=True)
    return losses[0], sum(losses[-10:]) / len(losses[-10:])


def whole_batch(ranks: Ranks, worst: Worst) -> str:
    """300 steps follow one process that has the whole batch."""
    steps = ranks.steps(300, 60)
    first, last = follow(ranks, worst, steps, False, broadcast_buffers=False)
    return f"{steps} steps, loss from {first:.3g} to {last:.3g}"


def unused(ranks: Ranks, worst: Worst) -> str:
    """A branch of convolutions that in each step only some ranks use."""
    steps = ranks.steps(100, 20)
    first, last = follow(ranks, worst, steps, True, find_unused_parameters=True)
    return f"{steps} steps, loss from {first:.3g} to {last:.3g}"


def ddp_compile(ranks: Ranks, worst: Worst) -> str:
    """DDP(torch.compile(model)) beside DDP(model)."""
    _, eager = twins(ranks)
    inner = copy.deepcopy(eager)
    nets = [DistributedDataParallel(net, broadcast_buffers=False) for net in (torch.compile(inner, dynamic=False), eager)]
    optimizers = [torch.optim.SGD(net.parameters(), 0.02, momentum=0.9) for net in nets]
    steps, sizes = 10, ragged(ranks)
    for step in range(steps):
        xs, targets = problem(ranks, step, sizes)
        losses = []
        for net, optimizer in zip(nets, optimizers, strict=True):
            losses.append(step_of(lambda: net(xs[ranks.rank]), targets[ranks.rank], 1 / sizes[ranks.rank], optimizer))
        worst.see("loss", *losses)
        worst.see_all("trained statistics", inner.buffers(), eager.buffers())
    worst.see_all("trained parameters", inner.parameters(), eager.parameters())
    worst.same_bits(inner, parameters=True)
    return f"{steps} steps"


# ------------------------------------------------------------------------------------------------- smallest buckets


def buckets(ranks: Ranks, worst: Worst) -> str:
    """A ResNet-50 whose gradients go a parameter at a time, between our messages."""
    sys.path[:0] = [str(Path(__file__).parent.parent)]
    from vision import torchvision

    torch.manual_seed(0)
    model = syncbn.convert(torchvision.models.resnet50(num_classes=10)).to(ranks.device)
    wrapped = DistributedDataParallel(model, bucket_cap_mb=0.001, broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    sizes = [4 + r % 2 for r in range(ranks.size)]
    rounds, each = ranks.steps(5, 2), ranks.steps(100, 2)
    seconds = 0.0
    for turn in range(rounds):
        resnet_step(ranks, wrapped, optimizer, sizes, turn * each, worst)
        synchronize(ranks)
        stamp = time.perf_counter()
        for step in range(1, each):
            resnet_step(ranks, wrapped, optimizer, sizes, turn * each + step)
        synchronize(ranks)
        seconds += time.perf_counter() - stamp
    worst.same_bits(model, parameters=True)
    connections = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "as ever")
    return f"{rounds * each} steps, {rounds * (each - 1) / seconds:.1f} steps/s, CUDA_DEVICE_MAX_CONNECTIONS {connections}"


def resnet_step(
    ranks: Ranks, wrapped: nn.Module, optimizer: Any, sizes: list[int], seed: int, worst: Worst | None = None
) -> None:
    """One step, each of its layers compared where there is a `worst`."""
    images = ranks.draw(seed, sizes, 3, 64, 64)[ranks.rank].float()
    labels = torch.randint(10, (len(images),), generator=torch.Generator().manual_seed(seed * ranks.size + ranks.rank))
    audit = Audit(wrapped) if worst else None
    optimizer.zero_grad()
    nn.functional.cross_entropy(wrapped(images), labels.to(ranks.device)).backward()
    if audit and worst:
        audit.compare(ranks, worst, sizes)
    optimizer.step()


def synchronize(ranks: Ranks) -> None:
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------- the runner

# What each check may take, in seconds.
CHECKS: dict[str, tuple[Callable[[Ranks, Worst], str], int]] = {
    "graph": (graph, 180),
    "checkpoint": (checkpoint, 120),
    "ddp_compile": (ddp_compile, 240),
    "whole_batch": (whole_batch, 120),
    "unused": (unused, 120),
    "buckets": (buckets, 400),
}


def has_mailboxes(ranks: Ranks) -> bool:
    """Whether the ranks meet inside the kernels; sets the group up."""
    return mailbox_of(communicator_of(None), ranks.device) is not None


def attempt(ranks: Ranks, name: str) -> bool:
    """Runs a check and prints its line; the same answer on all ranks. What it raises on any of them is said, and the next can run."""
    check, limit = CHECKS[name]
    faulthandler.dump_traceback_later(limit, exit=True)
    worst, note, raised, stamp = Worst(ranks), "", "", time.perf_counter()
    try:
        note = check(ranks, worst)
        synchronize(ranks)
    except Exception as error:
        traceback.print_exc()
        raised = f"{type(error).__name__}: {' '.join(str(error).split())}"
    failures = [f"rank {r}: {text}" for r, text in enumerate(everybody_says(ranks, name, raised, limit)) if text]
    right = not failures and worst.all_right(name, f"{note}; {time.perf_counter() - stamp:.0f} s in all")
    if failures and ranks.rank == 0:
        print(f"{name}: FAILED: {'; '.join(failures)}", flush=True)
    faulthandler.cancel_dump_traceback_later()
    return right


def everybody_says(ranks: Ranks, name: str, text: str, limit: int) -> list[str]:
    """Every rank's text, through the store: a collective would meet whatever a check that raised has left behind."""
    store = dist.distributed_c10d._get_default_store()
    keys = [f"training.py/{name}/{r}" for r in range(ranks.size)]
    store.set(keys[ranks.rank], text)
    store.wait(keys, datetime.timedelta(seconds=limit))
    return [store.get(key).decode() for key in keys]


def main() -> None:
    # The newer name is younger than the oldest torch that we serve.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
    names = list(dict.fromkeys(sys.argv[1:])) or list(CHECKS)
    if set(names) - set(CHECKS):
        sys.exit(f"Checks are {', '.join(CHECKS)}. Received: {' '.join(names)}")
    ranks = meet()
    transport = "peer memory" if has_mailboxes(ranks) else dist.get_backend()
    if ranks.rank == 0:
        print(f"{ranks.size} ranks on {ranks.device.type}, {transport}", flush=True)
    if ranks.device.type == "cuda" and os.environ.get("SYNCBN_PEER_MEMORY") == "1" and transport != "peer memory":
        sys.exit("SYNCBN_PEER_MEMORY=1, and the ranks cannot reach each other's memory")
    right = [attempt(ranks, name) for name in names]
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group()
    sys.exit(0 if all(right) else 1)


if __name__ == "__main__":
    main()
