"""What to launch for an input: kernels, constants and grids, worked out once per shape, dtype, layout and device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from syncbn.groups import Activation
from syncbn.torch.triton.device import gradient_sums, moments, peer_exchange, pointwise, single_backward, single_forward
from syncbn.torch.triton.launch import INTERPRETED, Launch, power_of_2
from syncbn.torch.triton.tiling import (
    BESIDE,
    CHOICES,
    L2_BYTES,
    UNDER_WAY,
    ChannelView,
    Machine,
    SingleLaunchTile,
    Tile,
    order,
    single_launch_tile,
    stages_for,
    tile_for,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Whether the kernels of one replica overlap their starts (tiles.follow), where the GPU can: from sm_90 on.
PDL = True

# How often a program polls at the barrier of a single launch, about 1 µs each time (barrier.py). The interpreter runs one program
# after the other, so waiting is useless there.
MAX_POLLS = 2 if INTERPRETED else 256

# Arguments of kernels that hold no tensor of their own, or one that lies behind another.
ADDRESSES = frozenset({"parts_ptr", "arrivals_ptr", "coefficients_ptr", "mailboxes_ptr"})
EXCHANGE = frozenset({"mailboxes_ptr", "limit", "tag", "rank"})


def machine_of(device: torch.device) -> Machine:
    """What tiles depend on of a device."""
    if INTERPRETED:
        return Machine(4, UNDER_WAY + BESIDE, False)
    found: Any = torch.cuda.get_device_properties(device)
    return Machine(
        found.multi_processor_count,
        getattr(found, "shared_memory_per_block_optin", 48 << 10),
        (found.major, found.minor) >= (9, 0),
        getattr(found, "L2_cache_size", L2_BYTES),
    )


class PlanOptions(NamedTuple):
    """What a kind of call asks of its launches.

    scale, residual, statistics, gradients: the dtypes of scale and offset, of the residual, of the moving statistics, and of the
    gradients of scale and offset; None where there are none (gradients: as scale).
    update: when moving statistics are updated: 0 never, 1 always, 2 where all of the batch's are finite.
    replicas: how many exchange inside the kernels; 1: none does.
    partial_sums: what moments and gradient sums write is a message, which replicas add up before the next launch.
    reduced_sums: the moments come in as that sum.
    single_launch: nobody comes between the moments and the output.
    """

    epsilon: float
    masked: bool = False
    scale: torch.dtype | None = None
    activation: Activation | None = None
    residual: torch.dtype | None = None
    statistics: torch.dtype | None = None
    update: int = 0
    replicas: int = 1
    gradients: torch.dtype | None = None
    partial_sums: bool = False
    reduced_sums: bool = False
    single_launch: bool = False


class Reduction(NamedTuple):
    """A launch that sums over a view, and the scratch that it needs, in float32 and in counters."""

    launch: Launch
    parts: int
    counters: int


class Plan:
    """All launches of one kind of call.

    forward, backward: the single launch of that way, or None: then it is two launches. tiles: in place of those that `tiling`
    chooses.
    """

    forward: Reduction | None = None
    backward: Reduction | None = None

    def __init__(
        self,
        view: ChannelView,
        dtype: torch.dtype,
        device: torch.device,
        options: PlanOptions,
        tiles: Mapping[str, Tile | SingleLaunchTile] | None = None,
    ):
        o, tiles = options, tiles or {}
        self.view, self.dtype, self.device, self.options = view, dtype, device, o
        one_replica = o.replicas == 1 and not o.partial_sums and not o.reduced_sums and o.update < 2
        assert not o.single_launch or one_replica, "a single launch is of one replica"
        self._machine = machine_of(device)
        self._types, self._absent, self._flags = types_of(dtype, o), absent_of(o), self._flags_of(o)
        if o.single_launch:
            self.forward = self._single_launch("forward", tiles)
            self.backward = self._single_launch("backward", tiles)
        # The moments, and room for five float32 coefficients a channel where a launch leaves them for the next.
        room = 0 if o.partial_sums or self.backward else 1 + -(-5 * view.C // 2)
        self.stats_size = 2 * view.C + 1 + room
        self._plan_launches(tiles)

    def _flags_of(self, o: PlanOptions) -> dict[str, Any]:
        """The constants that do not depend on a tile."""
        # Tensors that L2 holds: let it forget first what nobody reads again. Larger ones are the slower for it.
        fits = self.view.A * self.view.C * self.view.B * self.dtype.itemsize < self._machine.l2
        return {
            "C": self.view.C,
            "B": self.view.B,
            "EVICTION": "evict_first" if fits else "",
            "PDL": PDL and self._machine.overlaps,
            "MASKED": o.masked,
            "SCALE": o.scale is not None,
            "ACTIVATION": pointwise.ACTIVATIONS[o.activation and o.activation.name],
            "RESIDUAL": o.residual is not None,
            "UPDATE": o.update,
            "LOCAL": o.scale is not None or o.gradients is not None,
            "WORLD_SIZE": o.replicas,
            "PARTIAL_SUMS": o.partial_sums,
            "REDUCED_SUMS": o.reduced_sums,
        }

    def _launch(
        self, kernel: Any, tile: Tile | SingleLaunchTile, programs: int, constants: dict[str, Any], numbers: Mapping[str, float]
    ) -> Launch:
        o = self.options
        numbers = {"A": self.view.A, "epsilon": o.epsilon, "slope": o.activation.slope if o.activation else 0.0, **numbers}
        return Launch(
            kernel,
            self._types,
            {**self._flags, "BLOCK_P": tile.block_p, "BLOCK_C": tile.block_c, **constants},
            programs=programs,
            warps=tile.warps,
            device=self.device,
            numbers={name: value for name, value in numbers.items() if name in kernel.arg_names},
            absent=self._absent,
            addresses=ADDRESSES,
        )

    def _plan_launches(self, tiles: Mapping[str, Any]) -> None:
        """Two launches each way, where it is not one: a reduction, and what writes a tensor."""
        view, itemsize = self.view, self.dtype.itemsize
        read = {"sums": 2 * itemsize + self._saved()}
        chosen = {k: tiles.get(k) or tile_for(k, view, itemsize, self._machine, read.get(k)) for k in CHOICES}
        if self.forward is None:
            self.moments = self._reduction(moments.moments_kernel, int(moments.PARTS.value), chosen["moments"])
            self.normalize = self._pointwise(pointwise.normalize_kernel, chosen["normalize"], chosen["moments"])
        if self.backward is None:
            self.sums = self._reduction(gradient_sums.sums_kernel, 2, chosen["sums"])
            self.input_gradient = self._pointwise(pointwise.input_gradient_kernel, chosen["input_gradient"], chosen["sums"])

    def _saved(self) -> int:
        """The bytes of a value of what the activation's slope needs besides x and dy: with a residual, one tensor more."""
        return self._types["saved_ptr"].itemsize if self.options.activation and self.options.residual else 0

    def _reduction(self, kernel: Any, parts: int, tile: Tile) -> Reduction:
        C, replicas = self.view.C, self.options.replicas
        steps = -(-self.view.A * self.view.B // tile.block_p)
        splits = max(1, -(-steps // tile.tiles_per_program))
        merged = tile.block_c if replicas == 1 else peer_exchange.block_channels(C)
        single_program = splits == 1 and replicas == 1
        constants = {
            "MERGE_C": merged,
            # Eight values a thread: more would cost all programs the registers that only the last ones use.
            "MERGE_S": min(power_of_2(splits), max(1, 256 * tile.warps // merged)),
            **common(self.view, tile),
            "UNROLL": tile.unroll,
            "STAGES": tile.stages,
            "SINGLE_PROGRAM": single_program,
        }
        numbers = {"splits": splits, "tiles_per_program": tile.tiles_per_program}
        launch = self._launch(kernel, tile, -(-C // tile.block_c) * splits, constants, numbers)
        return Reduction(launch, 0, 0) if single_program else Reduction(launch, splits * parts * C, -(-C // merged))

    def _pointwise(self, kernel: Any, tile: Tile, before: Tile) -> Launch:
        across, length = order(self.view, tile, before)
        numbers = {"tiles_per_program": tile.tiles_per_program, "across": across, "length": length}
        programs = pointwise_programs(self.view, tile, before)
        return self._launch(kernel, tile, programs, even(self.view, tile, before), numbers)

    def _single_launch(self, way: str, tiles: Mapping[str, Any]) -> Reduction | None:
        """A launch that does all of one way, or None."""
        view, o, itemsize = self.view, self.options, self.dtype.itemsize
        extra_bytes = (o.residual.itemsize if o.residual else 0) if way == "forward" else itemsize + self._saved()
        tile = tiles.get(way) or single_launch_tile(way, view, itemsize, extra_bytes, self._machine)
        if tile is None:
            return None
        blocks, J = -(-view.C // tile.block_c), view.A * view.B
        splits = -(-J // (tile.block_p * tile.tiles_per_program))
        constants = {
            "MERGE_S": min(power_of_2(splits), max(1, 256 * tile.warps // tile.block_c)),
            "REGISTER_TILES": tile.register_tiles,
            "STAGES": min(5, stages_for(tile.block_p * tile.block_c * (itemsize + extra_bytes), self._machine)),
            "EVEN": J % tile.block_p == 0,
            # Two 16-bit values share a register if a thread has two neighbours.
            "PACKED": itemsize == 2 and not INTERPRETED and tile.block_p * tile.block_c >= 64 * tile.warps,
            "THREADS": 32 * tile.warps,
            "REREAD": tile.register_tiles < tile.tiles_per_program,
            "BARRIER": splits > 1,
        }
        numbers = {"splits": splits, "tiles_per_program": tile.tiles_per_program, "max_polls": MAX_POLLS}
        kernel, parts = single_backward.backward_kernel, 2
        if way == "forward":
            kernel, parts = single_forward.forward_kernel, int(moments.PARTS.value)
        launch = self._launch(kernel, tile, blocks * splits, constants, numbers)
        return Reduction(launch, splits * parts * view.C, 2 * blocks) if splits > 1 else Reduction(launch, 0, 0)


def types_of(dtype: torch.dtype, o: PlanOptions) -> dict[str, Any]:
    """By the name of a kernel's argument, the dtype that a pointer points to, or a number of its kind."""
    f32, f64, i32, i64 = torch.float32, torch.float64, torch.int32, torch.int64
    vector, residual = o.scale or f32, o.residual or dtype
    return {
        **dict.fromkeys(("x_ptr", "y_ptr", "dy_ptr", "dx_ptr"), dtype),
        **dict.fromkeys(("residual_ptr", "dresidual_ptr"), residual),
        # The activation's slope needs the output or, for silu, the residual.
        "saved_ptr": residual if o.activation and o.activation.name == "silu" else dtype,
        "mask_ptr": torch.uint8,
        **dict.fromkeys(("scale_ptr", "offset_ptr"), vector),
        **dict.fromkeys(("dscale_ptr", "doffset_ptr"), o.gradients or vector),
        **dict.fromkeys(("moving_mean_ptr", "moving_variance_ptr"), o.statistics or f32),
        "batches_ptr": i64,
        "stats_ptr": f64,
        "parts_ptr": f32,
        "arrivals_ptr": i32,
        "coefficients_ptr": f64 if o.partial_sums else f32,
        "mailboxes_ptr": i64,
        **dict.fromkeys(("A", "splits", "tiles_per_program", "across", "length", "limit", "tag", "rank", "max_polls"), 1),
        **dict.fromkeys(("epsilon", "slope", "weight", "weight_rest"), 0.5),
    }


def absent_of(o: PlanOptions) -> frozenset[str]:
    """The arguments that no kernel of such a call looks at."""
    absent = set() if o.replicas > 1 else set(EXCHANGE)
    for names, there in (
        ("mask_ptr", o.masked),
        ("scale_ptr offset_ptr", o.scale),
        ("dscale_ptr doffset_ptr", o.scale or o.gradients),
        ("residual_ptr", o.residual),
        ("saved_ptr dresidual_ptr", o.residual and o.activation),
        ("moving_mean_ptr moving_variance_ptr batches_ptr weight weight_rest", o.update),
    ):
        absent |= set() if there else set(names.split())
    return frozenset(absent)


def common(view: ChannelView, tile: Tile) -> dict[str, bool]:
    """EVEN: no tile is cut off. WIDE: addresses do not fit 32 bits."""
    J = view.A * view.B
    return {"EVEN": J > 0 and J % tile.block_p == 0, "WIDE": (J + tile.block_p) * view.C >= 2**31}


def even(view: ChannelView, tile: Tile, before: Tile) -> dict[str, bool]:
    """`common`, for steps: no step is one too many either."""
    across, length = order(view, tile, before)
    found = common(view, tile)
    return {**found, "EVEN": found["EVEN"] and across * length % tile.tiles_per_program == 0}


def pointwise_programs(view: ChannelView, tile: Tile, before: Tile) -> int:
    """How many programs write a tensor; at least one, which updates the statistics."""
    across, length = order(view, tile, before)
    return -(-view.C // tile.block_c) * -(-across * length // tile.tiles_per_program)
