"""What to launch for an input: tiles, splits and constants, worked out once per shape, dtype, layout and device.

Fold: an input [N, C, …] is seen as [A, C, B] without a copy where it is contiguous (A = N) or has its channels last (B = 1).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncbn.kernels import exchange, moments, pointwise, resident, sums
from syncbn.kernels.launch import INTERPRETED, Launch, power_of_2

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Whether the kernels of one replica overlap their starts (tiles.follow).
PDL = not INTERPRETED
L2_BYTES = 60e6
# A program's share of values: float32 counts stay exact, and it is plenty.
MOST_VALUES = 1 << 23


class Fold(NamedTuple):
    """An input as [A, C, B]."""

    A: int
    C: int
    B: int


class Tile(NamedTuple):
    """T positions of K channels a step, by so many warps, `share` steps a program; `unroll` of them at a time."""

    T: int
    K: int
    warps: int
    share: int
    unroll: int = 1


def fold(x: Tensor) -> Fold | None:
    """How x [N, C, …] lies in memory; None where it must be copied first."""
    N, C, rest = x.shape[0], x.shape[1], x.shape[2:].numel()
    if x.is_contiguous():
        return Fold(N * rest, C, 1) if rest == 1 else Fold(N, C, rest)
    if x.movedim(1, -1).is_contiguous():
        return Fold(N * rest, C, 1)
    return None


class Choice(NamedTuple):
    """T·K values a step, by so many warps; `waves`: programs a processor, 0 for one split, where that is enough programs, or, in
    the kernels that write, steps a program less one."""

    T: int
    K: int
    warps: int
    waves: int = 0
    unroll: int = 1


# Found on an H200 by benchmarks/gpu_tiles.py; docs/kernels.md has what each costs. By kernel, and: channels last; planes of
# 512 values and more; smaller planes; few channels; channels of few values. Two columns: 2-byte and 4-byte dtypes.
FEW = 8192
CHOICES = {
    "moments": {
        "last": (Choice(16, 32, 4, 8, 4), Choice(128, 16, 4, 4, 2)),
        "planes": (Choice(512, 4, 4, 6, 2), Choice(512, 2, 4, 8, 2)),
        "small planes": (Choice(128, 8, 4, 8), Choice(128, 8, 4, 6, 2)),
        "last, narrow": (Choice(128, 16, 4, 8, 2), Choice(64, 32, 4, 4)),
        "last, few": (Choice(128, 16, 4, 4, 2), Choice(128, 16, 4, 4, 2)),
        "planes, few": (Choice(4096, 1, 8), Choice(4096, 1, 8)),
        "small planes, few": (Choice(256, 4, 4), Choice(256, 4, 4)),
    },
    "sums": {
        "last": (Choice(64, 32, 4, 5), Choice(64, 32, 4, 6)),
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


def tile_for(kernel: str, f: Fold, itemsize: int, processors: int) -> Tile:
    """The tile of a kernel for a fold. From the fold alone: what is not a multiple of it is masked."""
    J = f.A * f.B
    kind = "last" if f.B == 1 else "planes" if f.B >= 512 else "small planes"
    few = f"{kind}, few"
    if kind == "last" and f.C <= 64:
        kind = "last, narrow"
    # Few values a channel and enough channels for all processors, or a tensor so small that splits would cost more.
    most = FEW // 4 if kernel == "moments" and kind == "small planes" else FEW
    if few in CHOICES[kernel] and most >= J and (J * f.C <= 1 << 20 or (f.B > 1 and processors <= f.C)):
        kind = few
    T, K, warps, waves, unroll = CHOICES[kernel][kind][itemsize == 4]
    channels = power_of_2(f.C)
    if channels < K:
        T, K = T * (K // channels), channels
    T = min(T, power_of_2(J))
    steps = max(1, -(-J // T))
    if kernel in ("normalize", "input_gradient"):
        return Tile(T, K, warps, waves + 1)
    splits = 1 if not waves else max(1, min(steps, round(processors * waves / -(-f.C // K))))
    splits = max(splits, min(steps, -(-J // MOST_VALUES)))
    return Tile(T, K, warps, -(-steps // splits), unroll)


# Values that a program's registers hold of one tensor, and how many positions a channel may have.
HELD, LONGEST = 1 << 14, 1 << 13
HELD_BY_WARP = 1 << 10


def resident_tile(f: Fold, itemsize: int) -> Tile | None:
    """The tile that is all of its channels, of a fold that registers can hold."""
    T = power_of_2(f.A * f.B)
    if f.A * f.B == 0 or T > LONGEST or T * f.C >= 2**31:
        return None
    # Channels last a sector of memory a row, if that can be.
    K = min(32 // itemsize, HELD // T) if f.B == 1 else max(1, 2048 // T)
    K = min(K, power_of_2(f.C))
    if f.B == 1 and 8 > K * itemsize and f.C > K:
        return None
    return Tile(T, K, max(1, min(16, T * K // HELD_BY_WARP)), 1)


class Reduction:
    """Moments or gradient sums of one fold: a launch, and the scratch that it needs."""

    def __init__(
        self,
        kernel: Any,
        parts: int,
        f: Fold,
        types: tuple[Any, ...],
        flags: dict[str, Any],
        device: torch.device,
        replicas: int,
        tile: Tile,
        messages: dict[str, bool],
    ):
        J = f.A * f.B
        steps = -(-J // tile.T)
        self.share = tile.share
        self.splits = max(1, -(-steps // tile.share))
        X = tile.K if replicas == 1 else exchange.block_channels(f.C)
        # Eight values a thread: more would cost all programs the registers that only the last ones use.
        rows = min(power_of_2(self.splits), max(1, 256 * tile.warps // X))
        alone = self.splits == 1 and replicas == 1
        channel_tiles = -(-f.C // tile.K)
        self.blocks = -(-f.C // X)
        self.parts = self.splits * parts * f.C
        if alone:
            self.blocks = self.parts = 0
        constants = {
            "C": f.C,
            "B": f.B,
            "T": tile.T,
            "K": tile.K,
            "X": X,
            "R": rows,
            **common(f, tile),
            "U": tile.unroll,
            **flags,
            "PDL": PDL,
            "ALONE": alone,
            "W": replicas,
            **messages,
        }
        programs = channel_tiles * self.splits
        self.launch = Launch(kernel, types, constants, programs, tile.warps, device)


def common(f: Fold, tile: Tile) -> dict[str, bool]:
    """EVEN: no tile is cut off. WIDE: addresses do not fit 32 bits."""
    J = f.A * f.B
    return {"EVEN": J > 0 and J % tile.T == 0, "WIDE": (J + tile.T) * f.C >= 2**31}


class Plan:
    """All launches of one kind of call. `replicas` of them exchange inside the kernels; 1: none does.

    sent: what moments and gradient sums write is a message, which replicas add up before the next launch. raw: the moments come
    in as that sum. at_once: nobody comes between the moments and the output; then `resident` says whether it is one launch
    each way, `forward` and `backward`, which are then all that the plan has.
    scale, residual, moving, gradients: the dtypes of scale and offset, of the residual, of the moving statistics and of scale's
    and offset's gradients; None where there are none (gradients: scale's).
    """

    def __init__(
        self,
        f: Fold,
        dtype: torch.dtype,
        device: torch.device,
        *,
        masked: bool = False,
        scale: torch.dtype | None = None,
        activation: str | None = None,
        residual: torch.dtype | None = None,
        moving: torch.dtype | None = None,
        moves: int = 0,
        replicas: int = 1,
        gradients: torch.dtype | None = None,
        sent: bool = False,
        raw: bool = False,
        at_once: bool = False,
        tiles: dict[str, Tile] | None = None,
    ):
        self.fold, self.device, self.sent = f, device, sent
        held = ((tiles or {}).get("resident") or resident_tile(f, dtype.itemsize)) if at_once else None
        self.resident = held is not None
        # The moments, and room for five float32 coefficients a channel where a launch leaves them for the next.
        self.stats_size = 2 * f.C + 1 if sent or self.resident else 2 * f.C + 2 + -(-5 * f.C // 2)
        if held is not None:
            self._hold(held, dtype, masked, scale, activation, residual, moving, moves)
            return
        processors = 4 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count
        chosen = {k: (tiles or {}).get(k) or tile_for(k, f, dtype.itemsize, processors) for k in CHOICES}
        of_moments, of_sums = chosen["moments"], chosen["sums"]
        forward, backward = chosen["normalize"], chosen["input_gradient"]
        byte, f32, f64, i32, i64 = torch.uint8, torch.float32, torch.float64, torch.int32, torch.int64
        vector = scale or f32
        other = residual or dtype
        act = {"ACTIVATION": pointwise.ACTIVATIONS[activation], "RESIDUAL": residual is not None}
        self.moments = Reduction(
            moments.moments_kernel,
            4,
            f,
            (dtype, byte, f32, i32, f64, i64, 1, 1, 1, 1, 1, 1),
            {"MASKED": masked},
            device,
            replicas,
            of_moments,
            {"SENT": sent},
        )
        # Tensors that L2 holds: let it forget first what nobody reads again. Larger ones are the slower for it.
        drop = "evict_first" if f.A * f.C * f.B * dtype.itemsize < L2_BYTES else ""
        self.normalize_numbers = (f.A, forward.share, *order(f, forward, of_moments))
        self.normalize = Launch(
            pointwise.normalize_kernel,
            (dtype, dtype, other, byte, f64, vector, vector, moving or f32, moving or f32, i64, 1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5),
            {
                "C": f.C,
                "B": f.B,
                "T": forward.T,
                "K": forward.K,
                **even(f, forward, of_moments),
                "DROP": drop,
                "PDL": PDL,
                "MASKED": masked,
                "SCALE": scale is not None,
                **act,
                "MOVES": moves,
                "RAW": raw,
            },
            pointwise_programs(f, forward, of_moments),
            forward.warps,
            device,
        )
        # The activation's slope needs the output (x's dtype) or, for silu, the residual.
        saved = other if activation == "silu" else dtype
        self.sums = Reduction(
            sums.sums_kernel,
            2,
            f,
            (
                dtype,
                dtype,
                saved,
                byte,
                f64,
                vector,
                vector,
                f32,
                i32,
                gradients or vector,
                gradients or vector,
                f64 if sent else f32,
                i64,
                1,
                1,
                1,
                1,
                1,
                1,
                0.5,
                0.5,
            ),
            {"MASKED": masked, "SCALE": scale is not None, **act, "LOCAL": scale is not None or gradients is not None},
            device,
            replicas,
            of_sums,
            {"SENT": sent, "RAW": raw},
        )
        self.gradient_numbers = (f.A, backward.share, *order(f, backward, of_sums))
        self.input_gradient = Launch(
            pointwise.input_gradient_kernel,
            (dtype, dtype, dtype, saved, other, byte, f64 if sent else f32, f64, vector, vector, 1, 1, 1, 1, 0.5, 0.5),
            {
                "C": f.C,
                "B": f.B,
                "T": backward.T,
                "K": backward.K,
                **even(f, backward, of_sums),
                "DROP": drop,
                "PDL": PDL,
                "MASKED": masked,
                **act,
                "SCALE": scale is not None,
                "SENT": sent,
                "RAW": raw,
            },
            pointwise_programs(f, backward, of_sums),
            backward.warps,
            device,
        )


    def _hold(
        self,
        tile: Tile,
        dtype: torch.dtype,
        masked: bool,
        scale: torch.dtype | None,
        activation: str | None,
        residual: torch.dtype | None,
        moving: torch.dtype | None,
        moves: int,
    ) -> None:
        """The two launches of a fold that registers hold."""
        f, byte, f32, f64 = self.fold, torch.uint8, torch.float32, torch.float64
        vector, other = scale or f32, residual or dtype
        saved = other if activation == "silu" else dtype
        constants = {
            "C": f.C,
            "B": f.B,
            "T": tile.T,
            "K": tile.K,
            "EVEN": f.A * f.B == tile.T,
            "PDL": PDL,
            "MASKED": masked,
            "SCALE": scale is not None,
            "ACTIVATION": pointwise.ACTIVATIONS[activation],
            "RESIDUAL": residual is not None,
        }
        programs, moved = -(-f.C // tile.K), (moving or f32, moving or f32, torch.int64)
        self.forward = Launch(
            resident.forward_kernel,
            (dtype, dtype, other, byte, f64, vector, vector, *moved, 1, 0.5, 0.5, 0.5, 0.5),
            {**constants, "MOVES": moves},
            programs,
            tile.warps,
            self.device,
        )
        self.backward = Launch(
            resident.backward_kernel,
            (dtype, dtype, dtype, saved, other, byte, f64, vector, vector, vector, vector, 1, 0.5, 0.5),
            constants,
            programs,
            tile.warps,
            self.device,
        )


def order(f: Fold, tile: Tile, before: Tile) -> tuple[int, int]:
    """(across, length): see pointwise.tile_in_order. Its turns must be the tiles, each once, or tiles that do not exist."""
    J = f.A * f.B
    steps = max(1, -(-J // tile.T))
    stretch = before.T * before.share
    if J and stretch % tile.T == 0 and J % stretch == 0:
        return J // stretch, stretch // tile.T
    return 1, steps


def even(f: Fold, tile: Tile, before: Tile) -> dict[str, bool]:
    """`common`, for turns: no turn is one too many either."""
    across, length = order(f, tile, before)
    found = common(f, tile)
    return {**found, "EVEN": found["EVEN"] and across * length % tile.share == 0}


def pointwise_programs(f: Fold, tile: Tile, before: Tile) -> int:
    """How many programs write a tensor; at least one, which moves the statistics."""
    across, length = order(f, tile, before)
    return -(-f.C // tile.K) * -(-across * length // tile.share)
