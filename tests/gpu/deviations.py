"""How far ranks are from what is right: the largest deviation of each quantity, and float64 batch norm of all ranks' inputs."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncbn

# Of the largest right value, float32: a hundred times what rounding does, and less than a count that is off by a thousandth.
TOLERANCES = {
    "output": 1e-4,
    "input gradient": 2e-4,
    "parameter gradients": 2e-4,
    "moving statistics": 1e-4,
    "against uncheckpointed": 1e-5,
    "loss": 1e-4,
    "trained statistics": 1e-4,
    "trained parameters": 2e-4,
    "between ranks": 0.0,
}


class Ranks(NamedTuple):
    """This rank, and how many there are."""

    rank: int
    size: int
    device: torch.device

    def steps(self, on_gpus: int, on_cpus: int) -> int:
        return on_gpus if self.device.type == "cuda" else on_cpus

    def draw(self, seed: int, sizes: list[int], *shape: int) -> list[Tensor]:
        """float64 batches of all ranks, the same wherever they are drawn, each rank's about a mean and deviation of its own."""
        generator = torch.Generator().manual_seed(seed)
        whole = [torch.randn(n, *shape, generator=generator, dtype=torch.float64) * (1 + r) + r for r, n in enumerate(sizes)]
        return [batch.to(self.device) for batch in whole]

    def everybodys(self, mine: Tensor, sizes: list[int]) -> list[Tensor]:
        """The batches of all ranks, whose sizes differ."""
        batches = [mine.contiguous() if r == self.rank else mine.new_empty(n, *mine.shape[1:]) for r, n in enumerate(sizes)]
        for r, batch in enumerate(batches):
            dist.broadcast(batch, r)
        return batches

    def totals(self, tensors: list[Tensor]) -> list[Tensor]:
        """Each summed over all ranks."""
        copies = [v.clone() for v in tensors]
        for v in copies:
            dist.all_reduce(v)
        return copies


def meet() -> Ranks:
    """By NCCL, a GPU each, or by gloo where there are none. float32 means float32."""
    rank, timeout = int(os.environ["LOCAL_RANK"]), datetime.timedelta(seconds=120)
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
        dist.init_process_group("gloo", timeout=timeout)
        return Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    dist.init_process_group("nccl", device_id=device, timeout=timeout)
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


class Worst:
    """The largest deviation of each quantity on any rank. Nothing is raised before all ranks know: the others would wait."""

    def __init__(self, ranks: Ranks):
        self.ranks, self.found, self.seen = ranks, {}, 0

    def see(self, quantity: str, got: Tensor, right: Tensor) -> None:
        """What is not finite, or of another shape, is infinitely wrong."""
        self.seen += 1
        error = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        if got.shape != right.shape:
            error += float("inf")
        elif got.numel():
            scale = right.abs().amax().double().clamp_min(1e-30)
            error = ((got.double() - right.double()).abs().amax() / scale).nan_to_num(nan=float("inf"), posinf=float("inf"))
        self.found[quantity] = torch.maximum(self.found[quantity], error) if quantity in self.found else error

    def see_all(self, quantity: str, got: Iterable[Tensor], right: Iterable[Tensor]) -> None:
        """Each by its own scale."""
        for one, its_right in zip(got, right, strict=True):
            self.see(quantity, one, its_right)

    def same_bits(self, model: nn.Module, *, parameters: bool) -> None:
        """Moving statistics (and parameters) against those of rank 0."""
        values = [*model.buffers(), *(model.parameters() if parameters else [])]
        mine = flat(values).double()
        first = mine.clone()
        dist.broadcast(first, 0)
        self.see("between ranks", mine, first)

    def all_right(self, name: str, note: str) -> bool:
        """Prints a line on rank 0; the same answer on all ranks."""
        worst = torch.stack(list(self.found.values()))
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        found = dict(zip(self.found, worst.tolist(), strict=True))
        right = all(error <= TOLERANCES[quantity] for quantity, error in found.items())
        if self.ranks.rank == 0:
            said = ", ".join(f"{quantity} {error:.1e} (≤ {TOLERANCES[quantity]:g})" for quantity, error in found.items())
            print(f"{name}: {'ok' if right else 'WRONG'}: {said}; {self.seen} comparisons a rank; {note}", flush=True)
        return right


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """All in one."""
    return torch.cat([v.detach().flatten() for v in tensors])


class Audit:
    """What went through each synchronised layer of a model under DDP in one step, both ways."""

    def __init__(self, model: nn.Module):
        self.records: dict[Any, dict[str, Tensor]] = {}
        layers = [m for m in model.modules() if isinstance(m, syncbn.SyncBatchNorm)]
        self.handles = [layer.register_forward_hook(self._keep) for layer in layers]

    def _keep(self, layer: nn.Module, inputs: Any, y: Tensor) -> None:
        # Copies: what follows may work in place.
        record = self.records[layer] = {"x": inputs[0].detach().clone(), "y": y.detach().clone()}
        inputs[0].register_hook(lambda dx: record.update(dx=dx.clone()))
        y.register_hook(lambda dy: record.update(dy=dy.clone()))

    def compare(self, ranks: Ranks, worst: Worst, sizes: list[int]) -> None:
        """With float64 batch norm of all ranks' inputs, before the optimizer's step."""
        for handle in self.handles:
            handle.remove()
        assert len(self.records) == len(self.handles) > 0, "every layer must have been called"
        mine = slice(sum(sizes[: ranks.rank]), sum(sizes[: ranks.rank + 1]))
        for layer, record in self.records.items():
            x, dy = (torch.cat(ranks.everybodys(record[name], sizes)).double() for name in ("x", "dy"))
            inputs = [v.detach().double().requires_grad_() for v in (x, layer.weight, layer.bias)]
            right = nn.functional.batch_norm(inputs[0], None, None, *inputs[1:], True, 0.0, layer.eps)
            dx, dweight, dbias = torch.autograd.grad(right, inputs, dy)
            worst.see("output", record["y"], right[mine])
            worst.see("input gradient", record["dx"], dx[mine])
            # DDP leaves the mean over ranks.
            worst.see("parameter gradients", layer.weight.grad * ranks.size, dweight)
            worst.see("parameter gradients", layer.bias.grad * ranks.size, dbias)
