"""The module on several GPUs: `torchrun --standalone --nproc-per-node 2 tests/gpu/ranks.py`; SYNCBN_PEER_MEMORY=0 without the mailboxes.

Ragged batches, an empty one, both layouts and float64, against plain batch norm in float64 on the whole batch; the moving
statistics of all ranks must have the same bits. Prints one line a rank.
"""

import os
import time

import torch
import torch.distributed as dist

import syncbn
from syncbn.torch.groups import communicator_of
from syncbn.torch.peer_memory import mailbox_of

ROUNDS = int(os.environ.get("SYNCBN_ROUNDS", "300"))


def main():
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    world, device = dist.get_world_size(), torch.device("cuda", rank)
    mailbox = mailbox_of(communicator_of(None), device)
    bad = torch.zeros((), dtype=torch.int64, device=device)
    stamp = time.perf_counter()
    for turn in range(ROUNDS):
        generator = torch.Generator(device).manual_seed(turn)
        channels = (6, 64, 300)[turn % 3]
        dtype = torch.float64 if turn % 7 == 3 else torch.float32
        batches = [1 + (turn * 7 + r * 5) % 4 for r in range(world)]
        batches[turn % world] *= turn % 5 != 0
        draw = lambda n: torch.randn(n, channels, 5, 4, device=device, generator=generator, dtype=torch.float64)  # noqa: E731
        xs = [draw(n) * (1 + r) + r for r, n in enumerate(batches)]
        dys = [draw(n) for n in batches]
        layer = syncbn.SyncBatchNorm(channels).to(device)
        layout = torch.channels_last if turn % 2 else torch.contiguous_format
        x = xs[rank].to(dtype, copy=True).contiguous(memory_format=layout).requires_grad_()
        y = layer(x)
        y.backward(dys[rank].to(dtype))
        whole = torch.cat(xs).requires_grad_()
        right = torch.nn.functional.batch_norm(whole, None, None, None, None, True, 0.0, layer.eps)
        right.backward(torch.cat(dys))
        mine = slice(sum(batches[:rank]), sum(batches[: rank + 1]))
        bad += ((y - right[mine]).abs() > 1e-4).sum() + ((x.grad - whole.grad[mine]).abs() > 1e-4).sum()
        bad += (~torch.isfinite(y)).sum()
        both = torch.cat([layer.running_mean, layer.running_var])
        everybody = [torch.empty_like(both) for _ in range(world)]
        dist.all_gather(everybody, both)
        bad += sum((other != both).sum() for other in everybody)
    torch.cuda.synchronize()
    took = time.perf_counter() - stamp
    how = "all-reduce" if mailbox is None else "peer memory"
    print(f"rank {rank} of {world}, {how}: {int(bad)} wrong values in {ROUNDS} rounds, {took:.1f} s", flush=True)
    # What the exchange costs, in a graph.
    for channels, size in ((64, 8), (256, 14), (2048, 7)):
        layer = syncbn.SyncBatchNorm(channels).to(device)
        x = torch.randn(4, channels, size, size, device=device, requires_grad=True)
        print(f"rank {rank}: {channels} channels, {graph_time(layer, x):.1f} µs", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    assert int(bad) == 0


def graph_time(layer, x, calls=20):
    dy = torch.randn_like(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    step = lambda: torch.autograd.grad(layer(x), [x, *layer.parameters()], dy)  # noqa: E731
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(calls):
            step()
    times = []
    for _ in range(20):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    return sorted(times)[len(times) // 2]


if __name__ == "__main__":
    main()
