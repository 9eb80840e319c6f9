"""FSDP2 with mixed precision: convert the model before `fully_shard`, which exchanges the classes of modules.

    torchrun --nproc-per-node 2 examples/fsdp2.py

It runs on GPUs with NCCL, or on the CPU with gloo.
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import syncbn


def main(steps=5):
    """Trains in bfloat16, and prints the dtypes and the loss."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    device = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 1)).to(device)
    syncbn.convert(model)  # the one line: before fully_shard
    # Weights and activations in bfloat16. The layer keeps its statistics in float32.
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model, mesh=init_device_mesh(kind, (dist.get_world_size(),)), mp_policy=policy)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    torch.manual_seed(1 + dist.get_rank())  # every rank has other data
    x = torch.randn(4, 8, device=device)
    for step in range(steps):
        y = model(x)
        loss = (y.float() - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if dist.get_rank() == 0:
            print(f"step {step}: output {y.dtype}, statistics {model[1].running_mean.dtype}, loss {loss.item():.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
