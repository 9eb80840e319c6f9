"""Real architectures for the tests of conversion, without weights from anywhere."""

from __future__ import annotations

import torch

# torchvision, and with it timm, does not import beside a build of torch for the CPU alone unless these two are known.
_schemas = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, _name):
        _schemas.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm  # noqa: E402
import torchvision  # noqa: E402

# Deep residual, inverted residual with squeeze and excite, grouped, ghost modules, dense, a segmentation head and its backbone;
# timm's have BatchNormAct2d.
ARCHITECTURES = {
    "torchvision resnet50": lambda: torchvision.models.resnet50(weights=None),
    "torchvision shufflenet": lambda: torchvision.models.shufflenet_v2_x0_5(weights=None),
    "torchvision lraspp": lambda: torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None),
    "torchvision densenet121": lambda: torchvision.models.densenet121(weights=None),
    "timm resnet10t": lambda: timm.create_model("resnet10t"),
    "timm mobilenetv3": lambda: timm.create_model("mobilenetv3_small_050"),
    "timm regnet": lambda: timm.create_model("regnetx_002"),
    "timm ghostnet": lambda: timm.create_model("ghostnet_050"),
    "timm semnasnet": lambda: timm.create_model("semnasnet_050"),
    "timm vovnet": lambda: timm.create_model("vovnet39a"),
}
