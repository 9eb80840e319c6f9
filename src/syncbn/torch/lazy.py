"""The torch module before it knows its number of channels."""

from __future__ import annotations

from typing import Any

from syncbn.torch._private import _LazyNormBase
from syncbn.torch.module import RENORM_BUFFERS, SyncBatchNorm


class LazySyncBatchNorm(_LazyNormBase, SyncBatchNorm):
    """What `torch.nn.LazyBatchNorm1d/2d/3d` become; at the first batch it becomes `SyncBatchNorm`."""

    cls_to_become = SyncBatchNorm

    def initialize_parameters(self, input: Any, *others: Any, **named: Any) -> None:
        """Makes parameters and buffers for the channels of the first batch."""
        if self.renorm and self.has_uninitialized_params():
            for name in RENORM_BUFFERS:
                self._buffers[name].materialize((input.shape[1],))  # type: ignore[union-attr]
        super().initialize_parameters(input)
        # A checkpoint that was loaded made parameters and buffers, but set no number.
        self.num_features = input.shape[1]
