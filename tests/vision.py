"""torchvision, also beside a build of torch that its compiled operators do not fit: models need none of them."""

from __future__ import annotations

import torch

try:
    import torchvision
except RuntimeError:
    # It asks for two operators by name.
    _schemas = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _schemas.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

__all__ = ["torchvision"]
