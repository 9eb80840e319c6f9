"""Several processes on one GPU, their messages by gloo (NCCL refuses that): the same kernels with an all-reduce between them."""

import sys

import torch
from processes import run_as_ranks

WORLD = 2


def body(rank, port):
    import torch.distributed as dist

    import syncbn

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    for turn, (dtype, layout, activation) in enumerate(
        [(torch.float32, torch.contiguous_format, None), (torch.float32, torch.channels_last, "relu"), (torch.float64, torch.contiguous_format, None),
         (torch.float32, torch.channels_last, "silu")]):  # fmt: skip
        generator = torch.Generator().manual_seed(turn)
        batches = [(3, 5), (4, 0), (1, 2), (0, 6)][turn]
        xs = [torch.randn(n, 6, 5, 4, generator=generator, dtype=torch.float64) * (1 + r) + r for r, n in enumerate(batches)]
        dys = [torch.randn(n, 6, 5, 4, generator=generator, dtype=torch.float64) for n in batches]
        rs = [torch.randn(n, 6, 5, 4, generator=generator, dtype=torch.float64) for n in batches]
        layer = syncbn.SyncBatchNorm(6, activation=activation).cuda()
        x = xs[rank].to("cuda", dtype).contiguous(memory_format=layout).requires_grad_()
        y = layer(x, residual=rs[rank].to("cuda", dtype) if activation else None)
        y.backward(dys[rank].to("cuda", dtype))
        whole = torch.cat(xs).requires_grad_()
        z = torch.nn.functional.batch_norm(whole, None, None, None, None, True, 0.0, layer.eps)
        z = z + torch.cat(rs) if activation else z
        right = {None: z, "relu": torch.relu(z), "silu": torch.nn.functional.silu(z)}[activation]
        right.backward(torch.cat(dys))
        start = sum(batches[:rank])
        torch.testing.assert_close(y.double().cpu(), right[start : start + batches[rank]], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(x.grad.double().cpu(), whole.grad[start : start + batches[rank]], rtol=1e-4, atol=1e-4)
        flat = torch.cat(xs).transpose(0, 1).flatten(1)
        torch.testing.assert_close(layer.running_var.double().cpu(), 0.9 + 0.1 * flat.var(1), rtol=1e-5, atol=1e-5)
        assert int(layer.num_batches_tracked) == 1
    dist.destroy_process_group()


def test_two_processes_on_one_gpu():
    run_as_ranks(__file__, WORLD)


if __name__ == "__main__":
    body(int(sys.argv[1]), int(sys.argv[2]))
