"""SYNCBN_TEST_DEVICE=interpreter: CPU tensors take the path of CUDA tensors, its Triton kernels under Triton's interpreter."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from syncbn.torch import dispatch, reference
from syncbn.torch.triton import backend


def _fused_kernels(x, mask):
    return backend if backend.serves(x, mask) else None


def _kernels_for(x, mask):
    return reference if torch.compiler.is_compiling() else _fused_kernels(x, mask) or reference


dispatch.fused_kernels, dispatch.kernels_for = _fused_kernels, _kernels_for
