"""A layer that is given a DTensor: each rank runs it on its part of the batch."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_dtensor(x: Tensor) -> bool:
    """Whether x is a DTensor. The class is known by its name, because importing it is slow. Compiled code is not asked."""
    return not torch.compiler.is_compiling() and any(
        c.__name__ == "DTensor" and c.__module__.startswith("torch.distributed") for c in type(x).__mro__
    )


def forward(layer: Any, x: Any, mask: Any, residual: Any) -> Any:
    """What the layer computes, as a DTensor with the placements of x.

    The ranks that share the batch are those of the mesh dimension that shards x. The gradient of a parameter is a partial sum
    there, as that of a linear layer is.
    """
    sharded = _check(layer, x, mask, residual)
    mesh, placements = x.device_mesh, x.placements
    local = _local_copy(layer, x, sharded)
    activation = layer.activation
    if callable(activation):
        # It is given the DTensor: its own parameters may be such.
        local.activation = None
    arguments = [None if v is None else v.to_local() for v in (mask, residual)]
    y = type(layer).forward(local, x.to_local(), *arguments)
    y = type(x).from_local(y, mesh, placements, run_check=False, shape=x.shape, stride=x.stride())
    return activation(y) if callable(activation) else y


def _check(layer: Any, x: Any, mask: Any, residual: Any) -> list[int]:
    """The mesh dimension, if any, that shards the batch; raises where the result would not be that of the whole batch."""
    placements = x.placements
    sharded = [i for i, placement in enumerate(placements) if placement.is_shard(0)]
    others = [v for v in (*layer.parameters(recurse=False), *layer.buffers(recurse=False), mask, residual) if v is not None]
    given = [v for v in (mask, residual) if v is not None]
    kinds_fit = all(p.is_replicate() or p.is_shard(0) for p in placements) and len(sharded) < 2
    if not kinds_fit or not all(is_dtensor(v) for v in others) or any(v.placements != placements for v in given):
        raise ValueError(
            "A DTensor must be replicated, or sharded along the batch by one mesh dimension. Parameters and buffers must be "
            "DTensors too, and mask and residual placed like the input. "
            f"Received: an input with placements {placements}, and others of {sorted({type(v).__name__ for v in others})}. "
            "Use torch.distributed.tensor.distribute_module, or call the layer on input.to_local()."
        )
    own = [v for v in others if not any(v is g for g in given)]
    if not all(p.is_replicate() for v in own for p in v.placements):
        raise ValueError(
            "The parameters and buffers of a layer that takes a DTensor must be replicated. Received: "
            f"{sorted({str(tuple(v.placements)) for v in own})}. Use torch.distributed.tensor.distribute_module without a "
            "partition of this layer."
        )
    restricted = layer.process_group is not None or layer.group_size is not None
    if layer.training and (restricted or x.device_mesh.size() != dist.get_world_size()):
        raise ValueError(
            "The mesh of a DTensor says which ranks share their statistics, so it must span all ranks. Received: a mesh of "
            f"{x.device_mesh.size()} ranks, group_size={layer.group_size}, process_group={layer.process_group!r}. Drop the "
            "group, or call the layer on input.to_local()."
        )
    return sharded


def _local_copy(layer: Any, x: Any, sharded: list[int]) -> Any:
    """The layer over this rank's tensors; its buffers are those of the layer, to be updated in place."""
    from torch.distributed.tensor import Partial, Replicate

    placements = [Partial() if i in sharded else Replicate() for i in range(len(x.placements))]
    local = copy.copy(layer)
    attributes = vars(local)
    attributes["_modules"] = dict(layer._modules)
    attributes["_parameters"] = {
        name: None if v is None else v.to_local(grad_placements=placements) for name, v in layer._parameters.items()
    }
    with torch.no_grad():
        attributes["_buffers"] = {name: None if v is None else v.to_local() for name, v in layer._buffers.items()}
    # Replicated, every rank holds the whole batch.
    attributes["process_group"] = x.device_mesh.get_group(sharded[0]) if sharded else None
    attributes["group_size"] = None if sharded else 1
    return local
