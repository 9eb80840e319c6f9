"""W virtual replicas on one GPU: each on a stream of its own, their mailboxes W buffers of the same device."""

from __future__ import annotations

import torch

from syncbn.torch.triton import ops, tiling
from syncbn.torch.triton.device import peer_exchange
from syncbn.torch.triton.exchange import Exchange
from syncbn.torch.triton.plan import Plan, PlanOptions

EPSILON = 1e-5


class Replicas:
    """Mailboxes of W replicas in one process. A first launch must not wait: `load` it with the exchange already answered."""

    def __init__(self, size, limit=10_000_000):
        self.size, self.limit = size, limit
        self.streams = [torch.cuda.Stream() for _ in range(size)]
        self.buffers = [torch.zeros(peer_exchange.words(size), dtype=torch.int64, device="cuda") for _ in range(size)]
        self.statuses = [torch.zeros(1, dtype=torch.int64, pin_memory=True) for _ in range(size)]
        addresses = [b.data_ptr() for b in self.buffers]
        self.tables = [torch.tensor([*addresses, s.data_ptr()], dtype=torch.int64, device="cuda") for s in self.statuses]
        torch.cuda._sleep(1)
        torch.cuda.synchronize()

    def exchange(self, rank, tag=1):
        return Exchange(self.tables[rank].data_ptr(), rank, self.limit, tag)

    def reset(self):
        """As new."""
        torch.cuda.synchronize()
        for buffer in self.buffers:
            buffer.zero_()
        for status in self.statuses:
            status.zero_()
        torch.cuda.synchronize()

    def plan(self, x, **options):
        """A plan, its kernels loaded."""
        return Plan(tiling.channel_view(x), x.dtype, x.device, PlanOptions(EPSILON, replicas=self.size, **options))

    def each(self, step):
        """step(rank) on every replica's stream; not awaited."""
        now = torch.cuda.current_stream()
        # All before any: streams come from a pool, and the current one may be one of these.
        for stream in self.streams:
            stream.wait_stream(now)
        for rank, stream in enumerate(self.streams):
            with torch.cuda.stream(stream):
                step(rank)

    def join(self):
        for stream in self.streams:
            torch.cuda.current_stream().wait_stream(stream)


def step(replicas, plan, rank, x, dy, scale, offset):
    """One replica's whole step."""
    stats = ops.measure(plan, x, None, replicas.exchange(rank, 2))
    y = ops.normalize(plan, x, stats, scale, offset)
    dscale, doffset, message = ops.gradient_sums(plan, x, dy, stats, scale, offset, exchange=replicas.exchange(rank, 3))
    dx, _ = ops.input_gradient(plan, x, dy, message, stats, scale, offset)
    return {"stats": stats[: 2 * plan.view.C + 1], "y": y, "dx": dx, "dscale": dscale, "doffset": doffset}


def reference(xs, dys, scale, offset):
    """(mean, variance, ys, dxs) of plain batch norm on the concatenated batch, in float64 on the GPU."""
    sizes = [len(x) for x in xs]
    x = torch.cat([x.double() for x in xs]).requires_grad_()
    y = torch.nn.functional.batch_norm(x, None, None, scale.double(), offset.double(), True, 0.0, EPSILON)
    (dx,) = torch.autograd.grad(y, x, torch.cat([d.double() for d in dys]))
    dims = [0, *range(2, x.dim())]
    return x.detach().mean(dims), x.detach().var(dims, unbiased=False), y.detach().split(sizes), dx.split(sizes)
