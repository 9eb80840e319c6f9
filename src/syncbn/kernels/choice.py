"""Which kernels serve a torch input: the one place that a faster implementation is plugged into."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from syncbn.kernels import eager, native


def kernels_for(x: Tensor, mask: Tensor | None) -> Any:
    """The module whose functions take this input ([N, C, …], on this device) and mask.

    Any of them sends and expects the same messages, so that replicas need not agree on it.
    """
    if torch.compiler.is_compiling():
        # The compiler fuses what it can see.
        return eager
    return native if native.serves(x, mask) else eager
