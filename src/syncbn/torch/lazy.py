"""The torch module before it knows its number of channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, is_lazy

from syncbn.torch._private import _LazyNormBase
from syncbn.torch.arguments import refuse_epsilon
from syncbn.torch.module import RENORM_BUFFERS, SyncBatchNorm


class LazySyncBatchNorm(_LazyNormBase, SyncBatchNorm):
    """A `SyncBatchNorm` whose first batch tells its number of channels. From then on its class is `SyncBatchNorm`.

    `syncbn.convert` makes it of `torch.nn.LazyBatchNorm1d/2d/3d`. The arguments are those of `SyncBatchNorm` without
    `num_features`, in the order of torch's lazy classes. It raises what `SyncBatchNorm` raises.

    Example:
        >>> import torch, syncbn.torch
        >>> layer = syncbn.torch.LazySyncBatchNorm(activation="relu")
        >>> y = layer(torch.randn(4, 3))
        >>> layer.num_features
        3
    """

    cls_to_become = SyncBatchNorm

    @refuse_epsilon
    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        process_group: Any = None,
        renorm: bool = False,
        renorm_clipping: dict[str, Any] | None = None,
        renorm_momentum: float = 0.01,
        activation: str | Callable[[Tensor], Tensor] | None = None,
        group_size: int | None = None,
    ):
        # Past the constructor of torch's base, which takes none of our arguments. With no channels nothing is allocated.
        super(_LazyNormBase, self).__init__(
            0,
            eps=eps,
            momentum=momentum,
            affine=affine,
            track_running_stats=track_running_stats,
            process_group=process_group,
            device=device,
            dtype=dtype,
            bias=bias,
            renorm=renorm,
            renorm_clipping=renorm_clipping,
            renorm_momentum=renorm_momentum,
            activation=activation,
            group_size=group_size,
        )
        given: dict[str, Any] = {"device": device, "dtype": dtype}
        kinds: list[tuple[dict[str, Any], type]] = [
            (self._parameters, UninitializedParameter),
            (self._buffers, UninitializedBuffer),
        ]
        for held, kind in kinds:
            held.update({k: kind(**given) for k, v in held.items() if v is not None and k != "num_batches_tracked"})

    @torch.no_grad()
    def initialize_parameters(self, input: Any, *others: Any, **named: Any) -> None:
        """Makes parameters and buffers for the channels of the first batch. What a checkpoint has brought stays."""
        held: dict[str, Any] = {**self._parameters, **self._buffers}
        made = {name: v for name, v in held.items() if is_lazy(v)}
        # A checkpoint that was loaded made parameters and buffers, but set no number.
        self.num_features = input.shape[1]
        for name, v in made.items():
            v.materialize((self.num_features,))
            v.fill_(1.0 if name in ("weight", "running_var") else 0.0)
        if self.renorm:
            stddev = torch.sqrt(self.running_var + self.eps)
            for name, start in zip(RENORM_BUFFERS, (stddev, self.running_mean, stddev), strict=True):
                if name in made:
                    made[name].copy_(start)
