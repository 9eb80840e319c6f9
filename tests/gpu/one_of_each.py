"""A small case of each kernel, for compute-sanitizer: `compute-sanitizer --tool memcheck python tests/gpu/one_of_each.py exchange`.

`exchange`: two replicas on two streams too; not for racecheck, which cannot know that the others' writes are waited for.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from kernel_checks import KernelCase, check
from virtual import Replicas, step

from syncbn.torch.triton.tiling import SingleLaunchTile, Tile

SPLIT = {
    "moments": Tile(64, 4, 4, 2),
    "sums": Tile(64, 4, 4, 2),
    "normalize": Tile(64, 4, 4, 2),
    "input_gradient": Tile(64, 4, 4, 3),
}
STAGED = {kernel: Tile(16, 4, 4, 5, 1, 4) for kernel in ("moments", "sums")}

# A barrier, and tiles that are read twice.
SHARED = {way: SingleLaunchTile(64, 4, 4, 1, 2) for way in ("forward", "backward")}

for case in (
    KernelCase((5, 6, 9, 7)),
    KernelCase((5, 70, 9), last=True, dtype="bfloat16"),
    KernelCase((5, 6, 9, 7), mask=True, activation="silu", residual=True),
):
    for tiles in ({}, SPLIT, STAGED):
        check(case, "cuda", tiles=tiles)
    check(case, "cuda", tiles=SPLIT, way="partial sums")
    check(case, "cuda", way="single launch")
    check(case, "cuda", tiles=SHARED, way="single launch")
if "exchange" in sys.argv:
    replicas = Replicas(2, limit=1_000_000)
    x, dy = (torch.randn(5, 70, 9, device="cuda") for _ in range(2))
    scale, offset = torch.ones(70, device="cuda"), torch.zeros(70, device="cuda")
    plan = replicas.plan(x, scale=torch.float32)
    for _ in range(3):
        replicas.each(lambda rank: step(replicas, plan, rank, x, dy, scale, offset))
        replicas.join()
    torch.cuda.synchronize()
    # Where the tool lets one kernel run at a time, the first ends at the bound: nothing is wrong with its addresses then either.
    print("exchanged" if not any(int(status) for status in replicas.statuses) else "one replica ran at a time")
torch.cuda.synchronize()
print("ran")
