"""Real architectures for the tests of conversion, without weights from anywhere."""

from __future__ import annotations

# torchvision first: timm imports it.
from vision import torchvision  # isort: split

import timm

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
