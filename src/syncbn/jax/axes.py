"""The replicas of a JAX program: those along named axes that are mapped here, and what they can say to each other."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from syncbn import policy

# Above this many replicas gathering every replica's moments would cost more than two sums.
GATHERED_REPLICAS = 64


class Replicas(NamedTuple):
    """Those that meet, hashable: JAX keeps it as a static argument.

    names: the axes; () where this replica is alone.
    size: how many replicas are along them.
    table: the groups, a partition of their indices; None where all meet.
    checked: whether the axes are typed (`shard_map` with check_vma=True), so that a value has to say along which it varies.
    """

    names: tuple[str, ...] = ()
    size: int = 1
    table: tuple[tuple[int, ...], ...] | None = None
    checked: bool = False

    @property
    def alone(self) -> bool:
        """Whether there is nobody to talk to. A typed axis of size 1 takes its collective: only that types the result."""
        return self.size == 1 and not self.checked

    @property
    def gathered(self) -> bool:
        """Whether every replica's message is brought to every other."""
        return self.size <= GATHERED_REPLICAS

    def own_group(self) -> Any:
        """The number of this replica's group."""
        if self.table is None:
            return 0
        groups = np.zeros(self.size, np.int32)
        for number, members in enumerate(self.table):
            groups[list(members)] = number
        return jnp.asarray(groups)[lax.axis_index(self.names)]

    def gather(self, v: jax.Array) -> jax.Array:
        """[replicas, …], in their order; the same on all, and typed so. One collective."""
        if self.alone:
            return v[None]
        if self.checked:
            return lax.all_gather(v, self.names, to="invarying")
        if set(self.names) <= set(manual_axes()):
            return lax.all_gather(v, self.names)
        # vmap gathers along one axis at a time, and knows no types.
        rows = v
        for name in reversed(self.names):
            rows = lax.all_gather(rows, name)
        return rows.reshape(self.size, *v.shape)

    def by_group(self, rows: jax.Array) -> tuple[jax.Array, Any]:
        """[replicas, …] as ([groups, members, …], which of them are members: [groups, members], or True for all)."""
        if self.table is None:
            return rows[None], True
        most = max(map(len, self.table))
        padded = np.array([[*members, *[-1] * (most - len(members))] for members in self.table])
        return rows[padded], (padded >= 0)

    def sum_by_group(self, v: jax.Array) -> jax.Array:
        """[groups, …], for above 64 replicas: one sum over all, whose rows are the groups."""
        rows = v[None]
        if self.table is not None:
            # Selected, not multiplied by 0: NaN · 0 would reach the other groups.
            mine = jnp.arange(len(self.table)) == self.own_group()
            rows = jnp.where(mine.reshape([-1] + [1] * v.ndim), rows, jnp.zeros([], v.dtype))
        return rows if self.alone else lax.psum(rows, self.names)

    def sums(self, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(the sum over this replica's group, the sum over all): one collective, differentiable."""
        if self.table is None:
            total = v if self.alone else lax.psum(v, self.names)
            return total, total
        if not self.gathered:
            rows = self.sum_by_group(v)
            return rows[self.own_group()], rows.sum(0)
        # Not psum's own groups: they may not be typed, mapped by vmap, or uneven.
        rows = self.gather(v)
        groups, members = self.by_group(rows)
        own = self.own_group()
        mine = jnp.asarray(members)[own].reshape([-1] + [1] * v.ndim)
        return jnp.where(mine, groups[own], jnp.zeros([], v.dtype)).sum(0), rows.sum(0)


def replicas_of(group: policy.Group) -> Replicas:
    """Those that `group` names; raises where an axis is not mapped here."""
    if not isinstance(group, policy.Axes):
        return Replicas()
    mesh = manual_axes()
    for name in group.names:
        if not _bound(name):
            raise policy.unbound_axis(name, mesh)
    of_mesh = [name for name in group.names if name in mesh]
    if of_mesh and len(of_mesh) < len(group.names):
        raise policy.mixed_axes(group.names, of_mesh)
    size = lax.axis_size(group.names)
    checked = bool(varying(lax.axis_index(group.names)))
    return Replicas(group.names, size, _table(group.groups, size), checked)


def _table(groups: int | tuple[tuple[int, ...], ...] | None, size: int) -> tuple[tuple[int, ...], ...] | None:
    if isinstance(groups, tuple):
        table = policy.partition(groups, size)
    elif groups is None or size == 1:
        return None
    else:
        number = policy.groups(size, groups)
        table = tuple(tuple(range(i * groups, (i + 1) * groups)) for i in range(number))
    return None if len(table) == 1 else table


def manual_axes() -> tuple[str, ...]:
    """The mesh axes that are mapped here, by shard_map or pmap; vmap's are not among them."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def is_local(x: jax.Array) -> bool:
    """Whether one device holds all of x: mapped along a whole mesh, or in a program of one device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.axis_names:
        return mesh.size == 1 or set(mesh.manual_axes) == set(mesh.axis_names)
    return on_one_device(x)


def on_one_device(x: jax.Array) -> bool:
    """Whether a global array is known to be on one device; of a traced one nobody knows where there are several."""
    if isinstance(x, jax.core.Tracer):
        return jax.device_count() == 1
    return len(x.sharding.device_set) == 1


def _bound(name: str) -> bool:
    try:
        lax.axis_size(name)
    except NameError:
        return False
    return True


def varying(v: Any) -> frozenset[str]:
    """The typed axes along which a value differs between replicas."""
    kind = jax.typeof(v)
    return (
        getattr(kind, "manual_axis_type", kind).varying
        if hasattr(kind, "manual_axis_type")
        else getattr(kind, "vma", frozenset())
    )


def vary(v: jax.Array, axes: frozenset[str]) -> jax.Array:
    """v, typed as varying along these axes too: where v has a gradient, its transpose sums over them."""
    more = tuple(sorted(axes - varying(v)))
    return lax.pcast(v, more, to="varying") if more else v
