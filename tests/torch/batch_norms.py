"""The batch norms of a torch model, for the tests of conversion and export."""

from __future__ import annotations

import torch
from torch.nn.modules.batchnorm import _BatchNorm


def norms(model):
    return [m for m in model.modules() if isinstance(m, _BatchNorm)]


def randomised(model):
    """Statistics and parameters that are not the initial ones."""
    with torch.no_grad():
        for m in norms(model):
            for v in (m.weight, m.bias, m.running_mean, m.running_var):
                if v is not None:
                    v.copy_(torch.rand(v.shape) + 0.5)
    return model
