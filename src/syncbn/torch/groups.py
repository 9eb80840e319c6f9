"""Which torch processes meet, and the sums that they form together."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from syncbn import policy, policy_torch


class Link(NamedTuple):
    """The replicas that a layer's messages reach, two at least, by a process group and by its name.

    The group is torch's: a group that outlives destroy_process_group, held by a module's global, aborts the process at its end.
    """

    size: int
    name: str
    reference: Any

    @property
    def process_group(self) -> Any:
        """Raises once torch has destroyed it: what torch takes for no group is the group of all."""
        found = self.reference()
        if found is None:
            raise policy_torch.group_is_gone(self.name)
        return found


# Links are made once, by all ranks in the same order, and forgotten when the default group is another one. By what a layer was
# given, a process group by a reference to it.
_links: dict[Any, Link | None] = {}
_made_in: Any = lambda: None  # noqa: E731 (a dead reference)
AVAILABLE = dist.is_available()


def link_of(group: Any) -> Link | None:
    """The link of a `policy.Group` or of a process group; None where there is nobody to talk to."""
    # Asked for once: `dist.is_initialized()` is the same question. This runs at every call of every layer.
    world = dist.group.WORLD if AVAILABLE else None
    if world is None or isinstance(group, policy.Alone):
        return None
    global _made_in
    if _made_in() is not world:
        _links.clear()
        _made_in = weakref.ref(world)
    key = group if group is None or not isinstance(group, dist.ProcessGroup) else weakref.ref(group)
    if key not in _links:
        _links[key] = _make(group)
    return _links[key]


def _make(group: Any) -> Link | None:
    if group is None or (isinstance(group, int) and group > 0):
        world = dist.get_world_size()
        size = world // policy.groups(world, group)
        return None if size == 1 else link_over(_own_group(size, world))
    if isinstance(group, policy.Axes | policy.Sharded):
        if dist.get_world_size() > 1:
            raise policy.axis_name_elsewhere(group, "PyTorch", dist.get_world_size())
        return None
    # What new_group returns on a rank that is not in the group is a negative number.
    if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
        raise policy_torch.not_in_group(group)
    return None if group.size() == 1 else link_over(group)


def _own_group(size: int, world: int) -> Any:
    """A group of our own, of consecutive ranks.

    The trainer launches its gradients' messages on the default group at moments that depend on the rank: ours between them would
    be taken for theirs.
    """
    timeout = timeout_of(dist.group.WORLD)
    if size == world:
        return dist.new_group(list(range(world)), timeout=timeout, group_desc="syncbn")
    own, _ = dist.new_subgroups(size, timeout=timeout, group_desc="syncbn")
    return own


def timeout_of(process_group: Any) -> Any:
    """How long its members wait for each other, a timedelta."""
    return process_group._get_backend(process_group._device_types[0]).options._timeout


def link_over(process_group: Any) -> Link:
    """The link of a process group that this rank is in."""
    return Link(process_group.size(), process_group.group_name, weakref.ref(process_group))


def sum_in_place(v: Tensor, link: Link | None) -> Tensor:
    """v, now the sum of every replica's."""
    if link is not None:
        dist.all_reduce(v, group=link.process_group)
    return v


def gather(v: Tensor, link: Link) -> Tensor:
    """[size, …]: every replica's v in the order of ranks."""
    if torch.compiler.is_compiling():
        flat = torch.ops._c10d_functional.all_gather_into_tensor(v, link.size, link.name)
        return torch.ops._c10d_functional.wait_tensor(flat).view(link.size, -1)
    rows = [torch.empty_like(v) for _ in range(link.size)]
    dist.all_gather(rows, v, group=link.process_group)
    return torch.stack(rows)


class DifferentiableSum(Function):
    """The sum of every replica's v; its gradient is the sum of every replica's cotangent."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, link: Link | None) -> Tensor:
        """A new tensor."""
        ctx.link = link
        return sum_in_place(v.clone(), link)

    @staticmethod
    def backward(ctx: Any, dv: Tensor) -> Any:
        """The same again."""
        return DifferentiableSum.apply(dv, ctx.link), None
