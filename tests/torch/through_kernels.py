"""SYNCBN_TEST_DEVICE=interpreter: CPU tensors take the path of CUDA tensors, its Triton kernels under Triton's interpreter."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from syncbn.torch import dispatch as choice
from syncbn.torch import reference as eager
from syncbn.torch.triton import backend as cuda


def _kernels_for(x, mask):
    return eager if torch.compiler.is_compiling() or not cuda.serves(x, mask) else cuda


# Before the engine takes it from there.
choice.kernels_for = _kernels_for

from syncbn import SyncBatchNorm  # noqa: E402

_by_operators = SyncBatchNorm.forward


def _forward(self, input, mask=None, residual=None):
    # As the layer's own first lines, which ask whether the input is on CUDA.
    if self.training and not torch.compiler.is_compiling() and not torch.jit.is_tracing():
        y = self._in_whole(input, mask, residual)
        if y is not None:
            return self._activated(y)
    return _by_operators(self, input, mask, residual)


SyncBatchNorm.forward = _forward
