"""Launching a kernel with as little host work as Triton allows.

`kernel[grid](…)` binds and inspects every argument at each call, 13 to 17 µs. Here a kernel is compiled once for its constants
and dtypes, and each launch hands addresses and numbers to the compiled kernel's own launcher.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Launch:
    """One kernel with its constants, on one device.

    types: for each run-time argument a torch dtype where it is a pointer, else a number of its kind. Pointers must be
    aligned to 16 bytes, as torch allocates them.
    """

    def __init__(
        self, kernel: Any, types: tuple[Any, ...], constants: dict[str, Any], programs: int, warps: int, device: torch.device
    ):
        self.kernel, self.constants, self.programs, self.warps = kernel, constants, programs, warps
        self.device_index = device.index or 0
        # In this order they end a kernel's signature.
        self.last = tuple(constants.values())
        if not INTERPRETED:
            with torch.cuda.device(device):
                compiled = kernel.warmup(*types, grid=(1,), num_warps=warps, launch_pdl=bool(constants.get("PDL")), **constants)
                # Loads the module now: a first launch while another kernel waits for this one would never end.
                compiled._init_handles()
            self.compiled = compiled  # owns what the launcher names
            self.launch, self.first, self.packed = _launcher(compiled)

    def __call__(self, stream: int, *arguments: Any) -> None:
        """Launches. arguments: addresses (on the interpreter tensors) and numbers, in the signature's order."""
        if INTERPRETED:
            self.kernel[(self.programs,)](*arguments, **self.constants)
        elif self.packed:
            self.launch(self.programs, 1, 1, stream, *self.first, (*arguments, *self.last))
        else:
            self.launch(self.programs, 1, 1, stream, *self.first, *arguments, *self.last)


def _launcher(compiled: Any) -> tuple[Any, tuple[Any, ...], bool]:
    """(function, what it takes after grid and stream, whether it takes the arguments as one tuple).

    Triton's own launcher allocates scratch that our kernels have none of, then calls a function in C; whose order of arguments is
    another in each of the versions that we know. In others, and where there is scratch, it is Triton's launcher that is called.
    """
    run = compiled.run
    hooks = (None, None)
    known = hasattr(run, "launch") and not run.global_scratch_size and not run.profile_scratch_size
    start = (compiled.function, getattr(run, "launch_cooperative_grid", False), getattr(run, "launch_pdl", False))
    if known and triton.__version__.startswith("3.6."):
        return run.launch, (*start, None, None, compiled.packed_metadata, None, *hooks), False
    if known and triton.__version__.startswith("3.7."):
        rest = (compiled.packed_metadata, None, *hooks, None, None, run.arg_annotations, run.kernel_signature)
        return run.launch, (*start, *rest), True
    return run, (compiled.function, compiled.packed_metadata, None, *hooks), False


def power_of_2(n: int) -> int:
    """The least power of 2 that is not below n."""
    return triton.next_power_of_2(max(n, 1))


NOTHING = torch.zeros(16, dtype=torch.uint8, device="cpu")

if INTERPRETED:

    def address(tensor: torch.Tensor | None) -> Any:
        """What a launch takes for a pointer argument."""
        return NOTHING if tensor is None else tensor

else:

    def address(tensor: torch.Tensor | None) -> Any:
        """What a launch takes for a pointer argument."""
        return 0 if tensor is None else tensor.data_ptr()
