"""Values that layers hand to engines: which replicas exchange statistics, and which activation follows."""

from __future__ import annotations

from typing import Any, NamedTuple


class Local:
    """The group of this replica only: nothing is sent."""


LOCAL = Local()


class Axes(NamedTuple):
    """The replicas along named axes of a JAX program, in the order of their indices.

    groups: None for one group, the size of groups of consecutive replicas, or a partition of the indices.
    """

    names: tuple[str, ...]
    groups: int | tuple[tuple[int, ...], ...] | None = None


class Sharded(NamedTuple):
    """The replicas among which a JAX mesh shards a global array.

    batch, channels: the mesh axes that shard the batch and the channels.
    size: how many consecutive replicas make a group; None for all.
    """

    mesh: Any
    batch: str
    channels: str | None = None
    size: int | None = None


# None: all replicas. An integer: groups of that many consecutive replicas.
Group = int | Local | Axes | Sharded | None


class Activation(NamedTuple):
    """An activation that engines apply themselves: its name, and leaky_relu's slope."""

    name: str
    slope: float = 0.0


def axis_names(axis_name: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The argument `axis_name` as a tuple."""
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ())


def group_of_arguments(axis_name: str | tuple[str, ...] | None, group_size: int | None) -> int | Axes | None:
    """The group that the arguments `axis_name` and `group_size` of a layer mean."""
    return group_size if axis_name is None else Axes(axis_names(axis_name), group_size)
