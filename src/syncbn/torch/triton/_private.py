"""Names of Triton that are not public: why each is needed, and what stands for one that has vanished.

A name that nothing replaces raises ImportError here, at import: `dispatch.cuda_kernels` then takes torch's operators.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
from triton.compiler import CompiledKernel

# Versions whose launchers' order of arguments is known.
KNOWN_VERSIONS = ("3.6.", "3.7.")

# Loads a compiled kernel onto the GPU before it is first launched, which no public function does.
if not hasattr(CompiledKernel, "_init_handles"):
    raise ImportError(f"CompiledKernel._init_handles is not in Triton {triton.__version__}: kernels cannot be loaded in advance")


def has_known_launcher() -> bool:
    """Whether kernels are launched past Triton's own launcher, which costs the host 13 to 17 µs a launch."""
    return triton.__version__.startswith(KNOWN_VERSIONS)


class Launcher(NamedTuple):
    """How a compiled kernel is launched: start(programs, 1, 1, stream, *first, *arguments), or with one tuple of arguments."""

    start: Any
    first: tuple[Any, ...]
    is_packed: bool


def launcher_of(compiled: Any) -> Launcher:
    """The function in C under Triton's launcher, or in a version that we do not know, and where there is scratch, that launcher.

    Triton's own launcher allocates scratch that our kernels have none of. The order of arguments in C changes with the version.
    """
    run = compiled.run
    hooks = (None, None)
    plain = hasattr(run, "launch") and not run.global_scratch_size and not run.profile_scratch_size
    start = (compiled.function, getattr(run, "launch_cooperative_grid", False), getattr(run, "launch_pdl", False))
    if plain and triton.__version__.startswith("3.6."):
        return Launcher(run.launch, (*start, None, None, compiled.packed_metadata, None, *hooks), False)
    if plain and triton.__version__.startswith("3.7."):
        rest = (compiled.packed_metadata, None, *hooks, None, None, run.arg_annotations, run.kernel_signature)
        return Launcher(run.launch, (*start, *rest), True)
    return Launcher(run, (compiled.function, compiled.packed_metadata, None, *hooks), False)
