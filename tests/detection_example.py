"""Runs examples/torch_detection.py, also beside a build of torch that torchvision's compiled operators do not fit."""

from __future__ import annotations

import runpy
from pathlib import Path

import torch
from vision import torchvision  # isort: split

from torchvision.extension import _has_ops


def nms(boxes, scores, iou_threshold):
    """Non-maximum suppression, which torchvision has only compiled: the numbers of the boxes that stay, best first."""
    order, kept = scores.argsort(descending=True), []
    while len(order):
        kept.append(order[0])
        apart = torchvision.ops.box_iou(boxes[order[:1]], boxes[order[1:]])[0] <= iou_threshold
        order = order[1:][apart]
    return torch.stack(kept) if kept else order


if not _has_ops():
    torchvision.ops.boxes.nms = nms
runpy.run_path(str(Path(__file__).parent.parent / "examples" / "torch_detection.py"), run_name="__main__")
