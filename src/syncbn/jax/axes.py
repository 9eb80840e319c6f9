"""The replicas of a JAX program, which lie along named axes that are mapped here, and their collectives."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from syncbn import validation
from syncbn.groups import Axes, Group, Sharded
from syncbn.jax._private import gather_invariant, to_varying, varying_axes

# Above this many replicas gathering every replica's moments would cost more than two sums.
GATHERED_REPLICAS = 64
# The mapped axes of which a warning has told.
warned_of: set[tuple[str, ...]] = set()


class Replicas(NamedTuple):
    """The replicas that exchange statistics. Hashable: JAX keeps it as a static argument.

    names: the axes along which they lie; () for this replica only.
    size: how many they are.
    table: the groups, a partition of their indices; None for one group.
    checked: whether the axes are typed (`shard_map` with check_vma=True). A value's type then holds those along which it varies.
    vmapped: whether the axes are vmap's, not a mesh's.
    """

    names: tuple[str, ...] = ()
    size: int = 1
    table: tuple[tuple[int, ...], ...] | None = None
    checked: bool = False
    vmapped: bool = False

    @property
    def local(self) -> bool:
        """Whether nothing is sent. A typed axis of size 1 takes its collective: only that types the result."""
        return self.size == 1 and not self.checked

    @property
    def gathered(self) -> bool:
        """Whether every replica receives the message of every other, unreduced."""
        return self.size <= GATHERED_REPLICAS

    def own_group(self) -> Any:
        """The number of this replica's group."""
        if self.table is None:
            return 0
        groups = np.zeros(self.size, np.int32)
        for number, members in enumerate(self.table):
            groups[list(members)] = number
        return jnp.asarray(groups)[lax.axis_index(self.names)]

    def place(self) -> Any:
        """What a custom gradient must be given for `sums`: under vmap the number of this replica's group.

        JAX may run its forward and its backward pass where vmap's axes have no name any more. It finds them only for a `psum` of
        a value that is mapped along them.
        """
        return self.own_group() if self.vmapped and self.table is not None else None

    def gather(self, v: jax.Array) -> jax.Array:
        """[replicas, …], in their order; the same on all, and typed as such. One collective."""
        if self.local:
            return v[None]
        if self.checked:
            return gather_invariant(v, self.names)
        if not self.vmapped:
            return lax.all_gather(v, self.names)
        # vmap gathers along one axis at a time, and its axes are not typed.
        rows = v
        for name in reversed(self.names):
            rows = lax.all_gather(rows, name)
        return rows.reshape(self.size, *v.shape)

    def by_group(self, rows: jax.Array) -> tuple[jax.Array, Any]:
        """[replicas, …] as [groups, members, …], and which of these are members: [groups, members], or True for all."""
        if self.table is None:
            return rows[None], True
        most = max(map(len, self.table))
        padded = np.array([[*members, *[-1] * (most - len(members))] for members in self.table])
        return rows[padded], (padded >= 0)

    def sum_by_group(self, v: jax.Array, own: Any) -> jax.Array:
        """[groups, …]: one sum over all replicas, with a row per group. own: the number of this replica's group."""
        rows = v[None]
        if self.table is not None:
            # Selected, not multiplied by 0: NaN · 0 would reach the other groups.
            mine = jnp.arange(len(self.table)) == own
            rows = jnp.where(mine.reshape([-1] + [1] * v.ndim), rows, jnp.zeros([], v.dtype))
        return rows if self.local else lax.psum(rows, self.names)

    def sums(self, v: jax.Array, place: Any) -> tuple[jax.Array, jax.Array]:
        """The sum over this replica's group, and the sum over all: one collective, differentiable. place: see `place`."""
        if self.table is None:
            total = v if self.local else lax.psum(v, self.names)
            return total, total
        own = self.own_group() if place is None else place
        if self.vmapped or not self.gathered:
            rows = self.sum_by_group(v, own)
            return rows[own], rows.sum(0)
        # psum's own groups can be neither typed, nor uneven.
        rows = self.gather(v)
        groups, members = self.by_group(rows)
        mine = jnp.asarray(members)[own].reshape([-1] + [1] * v.ndim)
        return jnp.where(mine, groups[own], jnp.zeros([], v.dtype)).sum(0), rows.sum(0)


def replicas_of(group: Group) -> Replicas:
    """The replicas that `group` names. Raises where an axis is not mapped here."""
    if not isinstance(group, Axes):
        return Replicas()
    if not group.names:
        if group.groups is not None:
            raise ValueError(
                "`group_size` must not come with axis_name=(), which keeps the statistics local. Received: "
                f"group_size={group.groups}, axis_name=(). Name the axis, or leave `group_size` None."
            )
        return Replicas()
    mesh = manual_axes()
    for name in group.names:
        if not _bound(name):
            raise ValueError(
                f"`axis_name` must name an axis that is mapped where the layer trains. Received: {name!r}, where the mapped axes "
                f"of a mesh are {sorted(mesh)}. Call inside jax.shard_map, pmap or vmap(axis_name={name!r}). Give axis_name=() "
                "where no axis is mapped, as in the `init` of Flax and Haiku."
            )
    of_mesh = [name for name in group.names if name in mesh]
    if of_mesh and len(of_mesh) < len(group.names):
        raise ValueError(
            "`axis_name` must name axes of a mesh, or axes of vmap, not both: JAX cannot reduce over them together. Received: "
            f"{group.names}, of which {sorted(of_mesh)} are a mesh's. Name one kind, or reshape the batch."
        )
    size = lax.axis_size(group.names)
    checked = bool(varying_axes(lax.axis_index(group.names)))
    return Replicas(group.names, size, _table(group.groups, size), checked, vmapped=not of_mesh)


def _table(groups: int | tuple[tuple[int, ...], ...] | None, size: int) -> tuple[tuple[int, ...], ...] | None:
    if isinstance(groups, tuple):
        table = _partition(groups, size)
    elif groups is None or size == 1:
        return None
    else:
        number = validation.number_of_groups(size, groups)
        table = tuple(tuple(range(i * groups, (i + 1) * groups)) for i in range(number))
    return None if len(table) == 1 else table


def _partition(groups: tuple[tuple[int, ...], ...], replicas: int) -> tuple[tuple[int, ...], ...]:
    """`axis_index_groups`, checked: every replica in one group. Groups may differ in size."""
    found = tuple(tuple(int(i) for i in group) for group in groups)
    if sorted(i for group in found for i in group) != list(range(replicas)) or not all(found):
        raise ValueError(
            f"`axis_index_groups` must be a partition of the indices 0 to {replicas - 1}: each in one group, no group empty. "
            f"Received: {[list(group) for group in found]}. Add what is missing, drop what stands twice."
        )
    return found


def manual_axes() -> tuple[str, ...]:
    """The mesh axes that are mapped here by shard_map or pmap. Axes of vmap are not among them."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def unnamed_axes(x: jax.Array) -> tuple[str, ...]:
    """The mesh axes that are mapped here and along which x may differ. Axes of vmap, which may map anything, are not asked."""
    mesh = jax.sharding.get_abstract_mesh()
    mapped = [name for name in mesh.manual_axes if mesh.shape[name] > 1]
    checked = any(varying_axes(lax.axis_index(name)) for name in mapped)
    varying = varying_axes(x)
    return tuple(name for name in mapped if name in varying or not checked)


def warn_of_unnamed(names: tuple[str, ...], layer: str | None) -> None:
    """Warns, once a process, that the devices along these axes train without each other's statistics."""
    if names in warned_of:
        return
    warned_of.add(names)
    warnings.warn(
        f"{layer or 'sync_batch_norm'} trains inside a map over mesh axes, and none is named: each device's statistics are "
        f"local. Received: axis_name=None, where the mapped axes are {list(names)}. Give `axis_name` the axis along which the "
        "batch is divided; jax.pmap takes an `axis_name` too. Give axis_name=() where local statistics are meant.",
        stacklevel=3,
    )


def is_local(x: jax.Array) -> bool:
    """Whether one device holds all of x: mapped along all axes of a mesh, or in a program of one device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.axis_names:
        return mesh.size == 1 or set(mesh.manual_axes) == set(mesh.axis_names)
    return on_one_device(x)


def on_one_device(x: jax.Array) -> bool:
    """Whether a global array is known to be on one device. Of a traced array that is unknown where there are several."""
    if isinstance(x, jax.core.Tracer):
        return jax.device_count() == 1
    return len(x.sharding.device_set) == 1


def may_be_divided(x: jax.Array, sharded: Sharded) -> bool:
    """Whether axis 0 of a global array may be the batch that a mesh divides: unless its size or its layout tells otherwise.

    A traced array's layout is not known, nor one that is on one device or copied to all.
    """
    if x.shape[0] % sharded.mesh.shape[sharded.batch]:
        return False
    layout = None if isinstance(x, jax.core.Tracer) else x.sharding
    if not isinstance(layout, jax.sharding.NamedSharding):
        return True
    along = [names if isinstance(names, tuple) else (names,) for names in layout.spec]
    return not any(sharded.batch in names for names in along[1:])


def _bound(name: str) -> bool:
    try:
        lax.axis_size(name)
    except NameError:
        return False
    return True


def vary(v: jax.Array, axes: frozenset[str]) -> jax.Array:
    """v, typed as varying along these axes too. The transpose sums the gradient of v over them."""
    more = tuple(sorted(axes - varying_axes(v)))
    return to_varying(v, more) if more else v
