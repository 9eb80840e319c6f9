"""What to launch for an input: kernels, constants and grids, worked out once per shape, dtype, layout and device."""

from __future__ import annotations

from typing import Any

import torch

from syncbn.torch.triton.device import gradient_sums as sums
from syncbn.torch.triton.device import moments, pointwise
from syncbn.torch.triton.device import peer_exchange as exchange
from syncbn.torch.triton.device import single_launch as resident
from syncbn.torch.triton.launch import INTERPRETED, Launch, power_of_2
from syncbn.torch.triton.tiling import BESIDE, CHOICES, UNDER_WAY, Fold, Machine, Tile, order, resident_tile, tile_for

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Whether the kernels of one replica overlap their starts (tiles.follow), where the GPU can: from sm_90 on.
PDL = True
L2_BYTES = 60e6


def machine_of(device: torch.device) -> Machine:
    """What tiles depend on of a device."""
    if INTERPRETED:
        return Machine(4, UNDER_WAY + BESIDE, False)
    found = torch.cuda.get_device_properties(device)
    shared = getattr(found, "shared_memory_per_block_optin", 48 << 10)
    return Machine(found.multi_processor_count, shared, (found.major, found.minor) >= (9, 0))


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
        overlap: bool,
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
            "S": tile.stages,
            **flags,
            "PDL": overlap,
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
    each way, `normalize`, which measures too, and `backward`, which are then all that the plan has.
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
        assert not at_once or (replicas == 1 and not sent and not raw and moves < 2), "one launch: of one replica alone"
        machine = machine_of(device)
        self.overlap = PDL and machine.overlaps
        held = ((tiles or {}).get("resident") or resident_tile(f, dtype.itemsize, machine)) if at_once else None
        self.resident = held is not None
        # The moments, and room for five float32 coefficients a channel where a launch leaves them for the next.
        self.stats_size = 2 * f.C + 1 if sent or self.resident else 2 * f.C + 2 + -(-5 * f.C // 2)
        if held is not None:
            self._hold(held, dtype, masked, scale, activation, residual, moving, moves)
            return
        # The activation's slope needs the output (x's dtype) or, for silu, the residual.
        saved = (residual or dtype) if activation == "silu" else dtype
        read = {"sums": 2 * dtype.itemsize + (saved.itemsize if activation and residual else 0)}
        chosen = {k: (tiles or {}).get(k) or tile_for(k, f, dtype.itemsize, machine, read.get(k)) for k in CHOICES}
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
            self.overlap,
        )
        # Tensors that L2 holds: let it forget first what nobody reads again. Larger ones are the slower for it.
        drop = "evict_first" if f.A * f.C * f.B * dtype.itemsize < L2_BYTES else ""
        self.normalize_numbers: tuple[int, ...] = (f.A, forward.share, *order(f, forward, of_moments))
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
                "PDL": self.overlap,
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
            self.overlap,
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
                "PDL": self.overlap,
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
        """One launch each way, of a fold that registers hold."""
        f, byte, f32, f64 = self.fold, torch.uint8, torch.float32, torch.float64
        vector, other = scale or f32, residual or dtype
        saved = other if activation == "silu" else dtype
        constants = {
            "C": f.C,
            "B": f.B,
            "T": tile.T,
            "K": tile.K,
            "EVEN": f.A * f.B == tile.T,
            "PDL": self.overlap,
            "MASKED": masked,
            "SCALE": scale is not None,
            "ACTIVATION": pointwise.ACTIVATIONS[activation],
            "RESIDUAL": residual is not None,
        }
        programs, moved = -(-f.C // tile.K), (moving or f32, moving or f32, torch.int64)
        self.normalize_numbers = (f.A,)
        self.normalize = Launch(
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


def even(f: Fold, tile: Tile, before: Tile) -> dict[str, bool]:
    """`common`, for turns: no turn is one too many either."""
    across, length = order(f, tile, before)
    found = common(f, tile)
    return {**found, "EVEN": found["EVEN"] and across * length % tile.share == 0}


def pointwise_programs(f: Fold, tile: Tile, before: Tile) -> int:
    """How many programs write a tensor; at least one, which moves the statistics."""
    across, length = order(f, tile, before)
    return -(-f.C // tile.K) * -(-across * length // tile.share)
