"""How an input is cut: folds, tiles and splits. Here is what was tuned.

Fold: an input [N, C, …] is seen as [A, C, B] without a copy where it is contiguous (A = N) or has its channels last (B = 1).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from syncbn.torch.triton.launch import power_of_2

# A program's share of values: float32 counts stay exact, and it is plenty.
MOST_VALUES = 1 << 23


class Machine(NamedTuple):
    """What matters of a GPU: its processors, the bytes of shared memory that a program may have, whether starts overlap."""

    processors: int
    shared: int
    overlaps: bool


class Fold(NamedTuple):
    """An input as [A, C, B]."""

    A: int
    C: int
    B: int


class Tile(NamedTuple):
    """T positions of K channels a step, by so many warps, `share` steps a program; `unroll` of them at a time, or the loads of
    `stages` under way at once."""

    T: int
    K: int
    warps: int
    share: int
    unroll: int = 1
    stages: int = 1


def fold(x: Tensor) -> Fold | None:
    """How x [N, C, …] lies in memory; None where it must be copied first."""
    N, C, rest = x.shape[0], x.shape[1], x.shape[2:].numel()
    if x.is_contiguous():
        return Fold(N * rest, C, 1) if rest == 1 else Fold(N, C, rest)
    if is_channels_last(x):
        return Fold(N * rest, C, 1)
    return None


def is_channels_last(x: Tensor) -> bool:
    """Whether x [N, C, …] lies as [N, …, C] in memory."""
    if x.dim() == 4:
        # Without making a view, which costs the host half a launch.
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.movedim(1, -1).is_contiguous()


class Choice(NamedTuple):
    """T·K values a step, by so many warps; `waves`: programs a processor, 0 for one split, where that is enough programs, or, in
    the kernels that write, steps a program less one."""

    T: int
    K: int
    warps: int
    waves: int = 0
    unroll: int = 1
    stages: int = 1


# Found on an H100 and an H200 by benchmarks/gpu_tiles.py; docs/kernels.md has what each costs. By kernel, and: channels last,
# also those of few positions or few channels; planes of 512 values and more; smaller planes; channels of few values. Two columns:
# 2-byte and 4-byte dtypes.
FEW = 8192
# So few positions that a program has no time to get its loads under way.
SHORT = 4096
CHOICES = {
    "moments": {
        "last": (Choice(64, 64, 4, 3, 1, 5), Choice(64, 64, 4, 3, 1, 5)),
        "last, short": (Choice(16, 32, 4, 8, 4), Choice(128, 16, 4, 4, 2)),
        "planes": (Choice(2048, 1, 4, 4, 1, 4), Choice(512, 2, 4, 8, 2)),
        "small planes": (Choice(128, 8, 4, 8), Choice(128, 8, 4, 6, 2)),
        "last, narrow": (Choice(64, 64, 4, 3, 1, 5), Choice(64, 32, 4, 4)),
        "last, few": (Choice(128, 16, 4, 4, 2), Choice(128, 16, 4, 4, 2)),
        "planes, few": (Choice(4096, 1, 8), Choice(4096, 1, 8)),
        "small planes, few": (Choice(256, 4, 4), Choice(256, 4, 4)),
    },
    "sums": {
        "last": (Choice(64, 64, 4, 3, 1, 5), Choice(64, 64, 4, 3, 1, 5)),
        "last, short": (Choice(64, 32, 4, 5), Choice(64, 32, 4, 6)),
        "planes": (Choice(1024, 1, 4, 12, 2), Choice(2048, 1, 8, 4, 2)),
        "small planes": (Choice(512, 1, 2, 16, 2), Choice(512, 1, 2, 16, 2)),
        "last, narrow": (Choice(128, 32, 8, 3), Choice(128, 32, 8, 3)),
        "last, few": (Choice(128, 16, 8, 4, 2), Choice(128, 16, 8, 4, 2)),
        "planes, few": (Choice(4096, 1, 8), Choice(4096, 1, 8)),
        "small planes, few": (Choice(1024, 1, 4, 0, 2), Choice(1024, 1, 4, 0, 2)),
    },
    "normalize": {
        "last": (Choice(16, 128, 4), Choice(32, 64, 4)),
        "last, narrow": (Choice(64, 64, 4, 1), Choice(16, 64, 4)),
        "planes": (Choice(2048, 1, 4), Choice(1024, 1, 4)),
        "small planes": (Choice(2048, 1, 4), Choice(1024, 2, 4)),
    },
    "input_gradient": {
        "last": (Choice(16, 128, 4), Choice(16, 64, 4)),
        "last, narrow": (Choice(32, 64, 4), Choice(8, 64, 4, 1)),
        "planes": (Choice(512, 4, 4), Choice(512, 4, 4)),
        "small planes": (Choice(256, 8, 4), Choice(256, 4, 4)),
    },
}


# Bytes of loads under way that were tuned, and what else a program has in shared memory.
UNDER_WAY, BESIDE = 1 << 17, 1 << 12


def tile_for(kernel: str, f: Fold, itemsize: int, machine: Machine, read: int | None = None) -> Tile:
    """The tile of a kernel for a fold; what is no multiple of it is masked. read: bytes of a value, of all tensors together."""
    J = f.A * f.B
    kind = "last" if f.B == 1 else "planes" if f.B >= 512 else "small planes"
    few = f"{kind}, few"
    if kind == "last" and f.C <= 64:
        kind = "last, narrow"
    elif kind == "last" and J <= SHORT and kernel in ("moments", "sums"):
        kind = "last, short"
    # Few values a channel and enough channels for all processors, or a tensor so small that splits would cost more.
    most = FEW // 4 if kernel == "moments" and kind == "small planes" else FEW
    if few in CHOICES[kernel] and most >= J and (J * f.C <= 1 << 20 or (f.B > 1 and machine.processors <= f.C)):
        kind = few
    T, K, warps, waves, unroll, stages = CHOICES[kernel][kind][itemsize == 4]
    channels = power_of_2(f.C)
    if channels < K:
        T, K = T * (K // channels), channels
    T = min(T, power_of_2(J))
    steps = max(1, -(-J // T))
    if kernel in ("normalize", "input_gradient"):
        return Tile(T, K, warps, waves + 1)
    room = min(UNDER_WAY, machine.shared - BESIDE)
    stages = max(1, min(stages, 1 + room // (T * K * (read or itemsize))))
    splits = 1 if not waves else max(1, min(steps, round(machine.processors * waves / -(-f.C // K))))
    splits = max(splits, min(steps, -(-J // MOST_VALUES)))
    return Tile(T, K, warps, -(-steps // splits), unroll, stages)


# The most positions of a channel that registers hold, and of a row of memory where a sector is all that a program reads of it.
LONGEST = {"planes": 8192, "last": 512}
# Values of one tensor that a warp holds: 32 a thread.
HELD = 1024


def resident_tile(f: Fold, itemsize: int, machine: Machine) -> Tile | None:
    """The tile that is all of its channels; None for a fold that registers cannot hold."""
    J, longest = f.A * f.B, LONGEST["last" if f.B == 1 else "planes"]
    if J == 0 or longest < J or J * f.C >= 2**31:
        return None
    T = power_of_2(J)
    K = 32 // itemsize if f.B == 1 else max(1, min(4 * HELD // T, power_of_2(f.C // (4 * machine.processors))))
    K = min(K, power_of_2(f.C))
    return Tile(T, K, max(1, T * K // HELD), 1)


def order(f: Fold, tile: Tile, before: Tile) -> tuple[int, int]:
    """(across, length): see pointwise.tile_in_order. Its turns must be the tiles, each once, or tiles that do not exist."""
    J = f.A * f.B
    steps = max(1, -(-J // tile.T))
    stretch = before.T * before.share
    if J and stretch % tile.T == 0 and J % stretch == 0:
        return J // stretch, stretch // tile.T
    return 1, steps
