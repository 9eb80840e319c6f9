"""`local_statistics` in the thread in which autograd runs CUDA's backward pass: a checkpointed block is recomputed there."""

import sys
import threading

import pytest
import torch
from processes import run_as_ranks
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn.torch.local import is_local

WORLD = 2


class Block(torch.nn.Module):
    """Says in which thread it runs, and whether that is local."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.passes = layer, []

    def forward(self, x):
        self.passes.append((threading.get_ident(), is_local()))
        y = self.layer(x)
        return y * y


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_block_is_as_local_as_its_backward_pass(inside, reentrant):
    block = Block(syncbn.SyncBatchNorm(4)).cuda()
    y = checkpoint(block, torch.randn(6, 4, device="cuda", requires_grad=True), use_reentrant=reentrant)
    block.passes.clear()
    if inside:
        with syncbn.local_statistics():
            y.backward(torch.randn_like(y))
    else:
        y.backward(torch.randn_like(y))
    ((thread, local),) = block.passes
    assert thread != threading.get_ident()
    assert local == inside
    assert int(block.layer.num_batches_tracked) == 1


def test_a_hook_in_autograds_thread_trains_its_layer():
    critic, x = syncbn.SyncBatchNorm(4).cuda(), torch.randn(6, 4, device="cuda", requires_grad=True)
    y = x * 2
    y.register_hook(lambda g: critic(g))
    y.backward(torch.randn_like(y))
    assert int(critic.num_batches_tracked) == 1


def body(rank, port):
    """Rank 0 alone runs a checkpointed block inside, both passes; not local, its recomputation would wait for the other rank."""
    import datetime

    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD, timeout=datetime.timedelta(seconds=30)
    )
    x = torch.randn(6, 4, device="cuda", requires_grad=True)
    for arguments in ({}, {"activation": "relu"}, {"renorm": True}):
        for reentrant in (True, False):
            layer = syncbn.SyncBatchNorm(4, **arguments).cuda()
            # Together first, so that the group and its memory are there.
            layer(x)
            before = {k: v.clone() for k, v in layer.state_dict().items()}
            if rank == 0:
                with syncbn.local_statistics():
                    y = checkpoint(layer, x, use_reentrant=reentrant)
                    y.backward(torch.randn_like(y))
                torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
            # And together again: nothing of the other was taken for this.
            torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
            layer(x)
            both = [torch.empty_like(layer.running_mean).cpu() for _ in range(WORLD)]
            dist.all_gather(both, layer.running_mean.cpu())
            torch.testing.assert_close(both[0], both[1], rtol=0, atol=0)
    dist.destroy_process_group()


def test_one_rank_alone_recomputes_a_block_inside():
    run_as_ranks(__file__, WORLD)


if __name__ == "__main__":
    body(int(sys.argv[1]), int(sys.argv[2]))
