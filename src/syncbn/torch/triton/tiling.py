"""How an input is cut: views, tiles and splits. Here is what was tuned.

An input [N, C, …] is seen as [A, C, B] without a copy where it is contiguous (A = N) or has its channels last (B = 1).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from syncbn.torch.triton.device import barrier
from syncbn.torch.triton.launch import power_of_2

# The values of one program: float32 counts stay exact, and it is plenty.
MOST_VALUES = 1 << 23


# Where torch does not say: about what an H100 and an H200 have.
L2_BYTES = 60_000_000


class Machine(NamedTuple):
    """What matters of a GPU: its processors, the bytes of shared memory that a program may have, whether starts overlap, and the
    bytes of L2."""

    processors: int
    shared: int
    overlaps: bool
    l2: int = L2_BYTES


class ChannelView(NamedTuple):
    """An input as [A, C, B]."""

    A: int
    C: int
    B: int


class Tile(NamedTuple):
    """block_p positions of block_c channels a step, by so many warps, so many steps a program; `unroll` of them at a time, or the
    loads of `stages` under way at once."""

    block_p: int
    block_c: int
    warps: int
    tiles_per_program: int
    unroll: int = 1
    stages: int = 1


def channel_view(x: Tensor) -> ChannelView | None:
    """How x [N, C, …] lies in memory; None where it must be copied first."""
    N, C, rest = x.shape[0], x.shape[1], x.shape[2:].numel()
    if x.is_contiguous():
        return ChannelView(N * rest, C, 1) if rest == 1 else ChannelView(N, C, rest)
    if is_channels_last(x):
        return ChannelView(N * rest, C, 1)
    return None


def is_channels_last(x: Tensor) -> bool:
    """Whether x [N, C, …] lies as [N, …, C] in memory."""
    if x.dim() == 4:
        # Without making a view, which costs the host half a launch.
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.movedim(1, -1).is_contiguous()


class Choice(NamedTuple):
    """block_p·block_c values a step, by so many warps; `waves`: programs a processor, 0 for one split, where that is enough
    programs, or, in the kernels that write, steps a program less one."""

    block_p: int
    block_c: int
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
        "last": (Choice(64, 64, 4, 2, 1, 5), Choice(64, 64, 4, 1, 1, 5)),
        "last, short": (Choice(16, 32, 4, 8, 4), Choice(128, 16, 4, 4, 2)),
        "planes": (Choice(2048, 1, 4, 4, 1, 4), Choice(512, 2, 4, 8, 2)),
        "small planes": (Choice(128, 8, 4, 8), Choice(128, 8, 4, 6, 2)),
        "last, narrow": (Choice(64, 32, 4, 2, 1, 5), Choice(64, 32, 4, 2, 1, 5)),
        "last, few": (Choice(128, 16, 4, 4, 2), Choice(128, 16, 4, 4, 2)),
        "planes, few": (Choice(4096, 1, 8), Choice(4096, 1, 8)),
        "small planes, few": (Choice(256, 4, 4), Choice(256, 4, 4)),
    },
    "sums": {
        "last": (Choice(64, 64, 4, 2, 1, 5), Choice(64, 32, 4, 1, 1, 5)),
        "last, short": (Choice(64, 32, 4, 5), Choice(64, 32, 4, 6)),
        "planes": (Choice(1024, 1, 4, 12, 2), Choice(2048, 1, 8, 4, 2)),
        "small planes": (Choice(512, 1, 2, 16, 2), Choice(512, 1, 2, 16, 2)),
        "last, narrow": (Choice(64, 64, 4, 1, 1, 5), Choice(64, 32, 4, 1, 1, 5)),
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


def tile_for(kernel: str, view: ChannelView, itemsize: int, machine: Machine, read: int | None = None) -> Tile:
    """The tile of a kernel for a view; what is no multiple of it is masked. read: bytes of a value, of all tensors together."""
    J = view.A * view.B
    kind = "last" if view.B == 1 else "planes" if view.B >= 512 else "small planes"
    few = f"{kind}, few"
    if kind == "last" and view.C <= 64:
        kind = "last, narrow"
    elif kind == "last" and J <= SHORT and kernel in ("moments", "sums"):
        kind = "last, short"
    # Few values a channel and enough channels for all processors, or a tensor so small that splits would cost more.
    most = FEW // 4 if kernel == "moments" and kind == "small planes" else FEW
    if few in CHOICES[kernel] and most >= J and (J * view.C <= 1 << 20 or (view.B > 1 and machine.processors <= view.C)):
        kind = few
    block_p, block_c, warps, waves, unroll, stages = CHOICES[kernel][kind][itemsize == 4]
    channels = power_of_2(view.C)
    if channels < block_c:
        block_p, block_c = block_p * (block_c // channels), channels
    block_p = min(block_p, power_of_2(J))
    steps = max(1, -(-J // block_p))
    if kernel in ("normalize", "input_gradient"):
        return Tile(block_p, block_c, warps, waves + 1)
    stages = min(stages, stages_for(block_p * block_c * (read or itemsize), machine))
    splits = 1 if not waves else max(1, min(steps, round(machine.processors * waves / -(-view.C // block_c))))
    splits = max(splits, min(steps, -(-J // MOST_VALUES)))
    tiles = -(-steps // splits)
    if view.B == 1:
        # Where all programs can have as many, `order` can follow them: from half as many to 5 % more.
        near = (t for d in range(tiles - max(1, tiles // 2) + 1) for t in (tiles - d, min(tiles + d, tiles + tiles // 20)))
        tiles = next((t for t in near if steps % t == 0), tiles)
    return Tile(block_p, block_c, warps, tiles, unroll, stages)


def stages_for(step: int, machine: Machine) -> int:
    """How many steps of so many bytes may be under way at once, with the present one."""
    return max(1, 1 + min(UNDER_WAY, machine.shared - BESIDE) // step)


class SingleLaunchTile(NamedTuple):
    """How a single launch divides a view into tiles of block_p positions × block_c channels.

    A program keeps `register_tiles` of its tiles in registers, and reads the others twice.

    The last program of a block of channels may have fewer than `tiles_per_program` tiles, but has at least `register_tiles`.
    """

    block_p: int
    block_c: int
    warps: int
    register_tiles: int = 1
    tiles_per_program: int = 1


# Found on an H200 (docs/decisions/0013): the bytes of tiles that a thread keeps in registers, by way and by the itemsize of x.
# Two 16-bit values share a register, but each takes one while it is used.
REGISTER_BYTES = {"forward": {2: 416, 4: 608}, "backward": {2: 544, 4: 640}}
# The smallest part of the tiles in registers. Below it two launches are faster, because they have more programs to read x again.
MIN_IN_REGISTERS = {"forward": 0.6, "backward": 0.4}
# The most positions of a channel that one tile covers.
ONE_TILE = {"planes": 8192, "last": 512}
# Below so many values, programs of half the size fill the GPU better.
SMALL_VALUES = 2_000_000


def single_launch_tile(way: str, view: ChannelView, itemsize: int, extra_bytes: int, machine: Machine) -> SingleLaunchTile | None:
    """The tiles of a single launch, or None where too few of them fit in registers.

    way: "forward" or "backward". extra_bytes: the itemsizes, added up, of the tensors that are kept with x.
    """
    J, C, processors = view.A * view.B, view.C, machine.processors
    if J == 0 or J * C >= 2**31:
        return None
    last = view.B == 1
    if ONE_TILE["last" if last else "planes"] >= J and (last or J <= 2048 or 2 * processors > C):
        return _one_tile(view, itemsize, machine)
    if last:
        # Rows of 64 bytes and more; with few channels, more programs matter more.
        block_c = 32 if 25 * processors < 32 * barrier.MAX_PROGRAMS * -(-C // 32) else 16
        block_c, warps = min(block_c, power_of_2(C)), 4 if J * C < SMALL_VALUES else 8
    else:
        block_c, warps = 1, 4 if J <= 8192 or (way == "forward" and itemsize == 2 and processors <= C) else 8
    # Eight values a thread.
    block_p, blocks = 256 * warps // block_c, -(-C // block_c)
    steps, capacity = -(-J // block_p), REGISTER_BYTES[way][itemsize] // (8 * (itemsize + extra_bytes))
    # One program a processor, so that the programs of a block can run at the same time.
    found = partition_tiles(steps, min(barrier.MAX_PROGRAMS, max(1, processors // blocks)), max(1, capacity))
    tile = SingleLaunchTile(block_p, block_c, warps, *found)
    programs = blocks * -(-steps // tile.tiles_per_program)
    return tile if tile.register_tiles >= MIN_IN_REGISTERS[way] * tile.tiles_per_program and 4 * programs >= processors else None


def _one_tile(view: ChannelView, itemsize: int, machine: Machine) -> SingleLaunchTile:
    """All positions of some channels, 32 values a thread."""
    block_p, channels = power_of_2(view.A * view.B), power_of_2(view.C)
    block_c = 32 // itemsize if view.B == 1 else max(1, min(4096 // block_p, power_of_2(view.C // (4 * machine.processors))))
    block_c = min(block_c, channels)
    return SingleLaunchTile(block_p, block_c, max(1, block_p * block_c // 1024))


def partition_tiles(tiles: int, max_programs: int, capacity: int) -> tuple[int, int]:
    """(register_tiles, tiles_per_program) for a block of so many tiles.

    capacity: the most tiles that a program can keep in registers. The partition minimises the work of the longest program,
    where a tile that is read twice counts twice. Between equal partitions, the one with fewer such tiles is taken. All programs
    keep the same number of tiles in registers, so the last program must have that many.
    """

    def cost(programs: int) -> tuple[int, int]:
        each = -(-tiles // programs)
        twice = each - min(capacity, last_of(each))
        return each + twice, twice

    def last_of(each: int) -> int:
        return (tiles - 1) % each + 1

    each = -(-tiles // min(range(min(max_programs, tiles), 0, -1), key=cost))
    return min(capacity, last_of(each)), each


def order(view: ChannelView, tile: Tile, before: Tile) -> tuple[int, int]:
    """(across, length): see pointwise.tile_in_order. Its steps must be the tiles, each once, or tiles that do not exist."""
    J = view.A * view.B
    steps = max(1, -(-J // tile.block_p))
    stretch = before.block_p * before.tiles_per_program
    if J and stretch % tile.block_p == 0 and J % stretch == 0:
        return J // stretch, stretch // tile.block_p
    return 1, steps
