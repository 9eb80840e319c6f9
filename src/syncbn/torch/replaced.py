"""A warning where another library's converter replaces our layers by its own."""

from __future__ import annotations

import sys
import warnings
from types import NoneType
from typing import Any

from torch import nn


def warn_if_replaced(layer: Any) -> None:
    """Of a layer that is asked for its children: warns where a converter asks, which is about to drop the layer.

    torch, timm and apex convert a model by such a function: it makes a layer of its own class, and moves the children there.
    """
    level, frame = 3, sys._getframe(2)
    converter = frame.f_code.co_name
    if not converter.startswith("convert_sync"):
        return
    where = f"{frame.f_globals.get('__name__')}.{converter}"
    while frame.f_back is not None and frame.f_code.co_name == converter:
        level, frame = level + 1, frame.f_back
    lost = _lost(layer)
    warnings.warn(
        f"A converter of another library must not run on synchronised layers: it replaces them by its own. Received: {where} on "
        f"a {type(layer).__name__}{', which loses ' * bool(lost)}{', '.join(lost)}. Leave that converter out, in Lightning with "
        "sync_batchnorm=False. syncbn.convert converts the batch norms that are left.",
        stacklevel=level,
    )


def _lost(layer: Any) -> list[str]:
    """What a batch norm of torch cannot do."""
    lost = [f"{name}={value!r}" for name in ("renorm", "group_size") if (value := getattr(layer, name))]
    activation = layer.activation
    if activation is not None:
        lost.append(f"activation={type(activation).__name__ if callable(activation) else repr(activation)}")
    # timm's, of a layer that was converted.
    return lost + [name for name in ("drop", "act") if not isinstance(layer._modules.get(name), (nn.Identity, NoneType))]
