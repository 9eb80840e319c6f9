"""Launching a kernel by its arguments' names, with as little host work as Triton allows.

`kernel[grid](…)` binds and inspects every argument at each call, 13 to 17 µs. Here a kernel is compiled once for its constants
and dtypes. Each launch hands addresses and numbers to the compiled kernel's own launcher, in the order of the kernel's signature:
that order, the types and the call are all taken from the signature, by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton

from syncbn import settings
from syncbn.torch.triton._private import launcher_of

INTERPRETED = settings.triton_interpreter()

NOTHING = torch.zeros(16, dtype=torch.uint8, device="cpu")


class Launch:
    """One kernel with its constants, on one device. `start(stream, …)` launches it.

    types: by the name of a run-time argument, a torch dtype where it is a pointer, else a number of its kind. Pointers must be
    aligned to 16 bytes, as torch allocates them.
    numbers: by name, run-time arguments that are the same at each launch. absent: those that the kernel does not look at.
    addresses: pointers that `start` takes as `address` returns them; all other pointers it takes as tensors.
    `start` takes what is in neither `numbers` nor `absent`; it accepts, and drops, what is absent.
    """

    def __init__(
        self,
        kernel: Any,
        types: Mapping[str, Any],
        constants: Mapping[str, Any],
        *,
        programs: int,
        warps: int,
        device: torch.device,
        numbers: Mapping[str, Any] | None = None,
        absent: frozenset[str] = frozenset(),
        addresses: frozenset[str] = frozenset(),
    ):
        self.kernel, self.programs, self.warps, self.numbers = kernel, programs, warps, dict(numbers or {})
        self.constants = {name: constants[name] for name in kernel.arg_names if name in constants}
        self.names = [name for name in kernel.arg_names if name not in constants]
        self.absent, self.addresses = absent.intersection(self.names), addresses
        if INTERPRETED:
            self.start = self._interpret
            return
        # Constants end a signature.
        assert kernel.arg_names == [*self.names, *self.constants]
        with torch.cuda.device(device):
            compiled = kernel.warmup(
                *(types[name] for name in self.names),
                grid=(1,),
                num_warps=warps,
                launch_pdl=bool(self.constants.get("PDL")),
                **self.constants,
            )
            # Loads the module now: a first launch while another kernel waits for this one would never end.
            compiled._init_handles()
        self.compiled = compiled  # owns what the launcher names
        self.start = self._compile()

    def _compile(self) -> Any:
        """A function of its own that launches: keywords become positions, numbers and constants stand in its code."""
        launcher = launcher_of(self.compiled)
        scope = {"start": launcher.start, **{f"first_{i}": value for i, value in enumerate(launcher.first)}}
        values = [self._value(name) for name in self.names] + [repr(value) for value in self.constants.values()]
        arguments = f"({', '.join(values)})" if launcher.is_packed else ", ".join(values)
        first = "".join(f"first_{i}, " for i in range(len(launcher.first)))
        taken = ", ".join(f"{name}=None" if name in self.absent else name for name in self.names if name not in self.numbers)
        source = f"def launch(stream, *, {taken}):\n    start({self.programs}, 1, 1, stream, {first}{arguments})\n"
        exec(compile(source, f"<launch of {self.kernel.__name__}>", "exec"), scope)
        return scope["launch"]

    def _value(self, name: str) -> str:
        if name in self.numbers:
            return repr(self.numbers[name])
        if name in self.absent:
            return "0"
        return f"{name}.data_ptr()" if name.endswith("_ptr") and name not in self.addresses else name

    def _interpret(self, stream: int, **given: Any) -> None:
        nothing = {name: NOTHING if name.endswith("_ptr") else 0 for name in self.absent}
        self.kernel[(self.programs,)](**{**given, **nothing}, **self.numbers, **self.constants)


def power_of_2(n: int) -> int:
    """The least power of 2 that is not below n."""
    return triton.next_power_of_2(max(n, 1))


if INTERPRETED:

    def address(tensor: torch.Tensor | None) -> Any:
        """What a launch takes for a pointer that is given by its address."""
        return NOTHING if tensor is None else tensor

else:

    def address(tensor: torch.Tensor | None) -> Any:
        """What a launch takes for a pointer that is given by its address."""
        return 0 if tensor is None else tensor.data_ptr()
