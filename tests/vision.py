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

__all__ = ["allow_detection", "torchvision"]


def allow_detection() -> None:
    """Gives torchvision the one compiled operator that a detector needs, where its own do not fit torch."""
    # After the operators are named above.
    from torchvision.extension import _has_ops

    if not _has_ops():
        torchvision.ops.boxes.nms = _nms


def _nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Non-maximum suppression: the numbers of the boxes that stay, best first."""
    order, kept = scores.argsort(descending=True), []
    while len(order):
        kept.append(order[0])
        apart = torchvision.ops.box_iou(boxes[order[:1]], boxes[order[1:]])[0] <= iou_threshold
        order = order[1:][apart]
    return torch.stack(kept) if kept else order
