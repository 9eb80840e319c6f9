"""A small case of each kernel, for compute-sanitizer: `compute-sanitizer --tool memcheck python tests/gpu/one_of_each.py`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from kernel_checks import KernelCase, check

from syncbn.kernels.tiling import Tile

SPLIT = {
    "moments": Tile(64, 4, 4, 2),
    "sums": Tile(64, 4, 4, 2),
    "normalize": Tile(64, 4, 4, 2),
    "input_gradient": Tile(64, 4, 4, 3),
}

for case in (
    KernelCase((5, 6, 9, 7)),
    KernelCase((5, 70, 9), last=True, dtype="bfloat16"),
    KernelCase((5, 6, 9, 7), mask=True, activation="silu", residual=True),
):
    check(case, "cuda")
    check(case, "cuda", tiles=SPLIT)
torch.cuda.synchronize()
print("ran")
