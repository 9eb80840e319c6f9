"""Which kernels serve a torch input: the one place that a faster implementation is plugged into."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from syncbn import policy_torch
from syncbn.torch import cpu as native
from syncbn.torch import reference as eager


def kernels_for(x: Tensor, mask: Tensor | None) -> Any:
    """The module whose functions take this input ([N, C, …], on this device) and mask.

    Any of them sends and expects the same messages, so that replicas need not agree on it.
    """
    if torch.compiler.is_compiling():
        # The compiler fuses what it can see.
        return eager
    if x.is_cuda:
        cuda = cuda_kernels()
        return cuda if cuda is not None and cuda.serves(x, mask) else eager
    return native if native.serves(x, mask) and asked_for() != "eager" else eager


@cache
def asked_for() -> str:
    """`SYNCBN_KERNELS`: auto, eager (the reference everywhere) or triton (an error where Triton is missing)."""
    return policy_torch.kernels(os.environ.get("SYNCBN_KERNELS", "auto"))


@cache
def cuda_kernels() -> Any:
    """The Triton kernels, or None where they are not asked for or Triton cannot be imported."""
    if asked_for() == "eager":
        return None
    try:
        import triton  # noqa: F401
    except ImportError as error:
        if asked_for() == "triton":
            raise policy_torch.no_triton() from error
        return None
    from syncbn.torch.triton import backend as cuda

    return cuda
