"""Which kernels serve a torch input: the one place that a faster implementation is plugged into."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from syncbn import settings
from syncbn.torch import cpu, reference

# The environment is read once: this is asked at every call.
asked_for = cache(settings.kernels)


def kernels_for(x: Tensor, mask: Tensor | None) -> Any:
    """The module whose functions take this input ([N, C, …], on this device) and mask; their description is in reference.py.

    Any of them sends and expects the same messages, so that replicas need not agree on it.
    """
    if torch.compiler.is_compiling():
        # The compiler fuses what it can see.
        return reference
    if x.is_cuda:
        return fused_kernels(x, mask) or reference
    return cpu if cpu.serves(x, mask) and asked_for() != "eager" else reference


def fused_kernels(x: Tensor, mask: Tensor | None) -> Any:
    """The Triton kernels where they take this input, else None."""
    kernels = cuda_kernels() if x.is_cuda else None
    return kernels if kernels is not None and kernels.serves(x, mask) else None


@cache
def cuda_kernels() -> Any:
    """The Triton kernels, or None where they are not asked for, or cannot be imported."""
    if asked_for() == "eager":
        return None
    try:
        import triton
    except ImportError as error:
        if asked_for() == "triton":
            raise RuntimeError(
                "SYNCBN_KERNELS=triton needs Triton. Received: an environment in which it cannot be imported. Install triton, or "
                "unset SYNCBN_KERNELS."
            ) from error
        return None
    try:
        from syncbn.torch.triton import backend
    except Exception as error:
        # A version of Triton that has renamed what the kernels use. With SYNCBN_KERNELS=triton its own error is what helps.
        if asked_for() == "triton":
            raise
        warnings.warn(
            "The Triton kernels need names that this version of Triton does not have; torch's operators run instead, slower. "
            f"Received: Triton {triton.__version__}, {type(error).__name__}: {error}. Install triton 3.6 or "
            "later, or set SYNCBN_KERNELS=eager.",
            stacklevel=2,
        )
        return None
    return backend
