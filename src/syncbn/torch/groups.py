"""Which torch processes communicate."""

from __future__ import annotations

import warnings
import weakref
from typing import Any, NamedTuple

import torch.distributed as dist

from syncbn import settings
from syncbn.groups import Axes, Local, Sharded
from syncbn.torch._private import timeout_of
from syncbn.torch.failures import forget_messages, set_up_failed
from syncbn.validation import check_no_axis_name, number_of_groups


class Communicator(NamedTuple):
    """The replicas that a layer's messages reach, two at least: their number, and their process group's name and reference.

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
            raise RuntimeError(
                "The process group of a forward pass must live until its backward pass has ended. Received: a message for the "
                f"group {self.name!r}, which torch.distributed has destroyed. Run the forward pass again."
            )
        return found


class GroupMoments(NamedTuple):
    """`syncbn.contract.Moments` of a torch process, and what goes with them.

    mean: where there is no float64, rounded to the arithmetic's dtype; mean_lo is then what the rounding took from it.
    communicator: the resolved group, which `normalize` uses again: None for one replica; in compiled code the group's name.
    """

    count: Any
    mean: Any
    variance: Any
    replicas: int = 1
    average: None = None
    mean_lo: Any = None
    communicator: Any = None

    @property
    def mean_hi(self) -> Any:
        """The mean as one tensor."""
        return self.mean


# Communicators are made once, by all ranks in the same order, and forgotten when the default group is another one. By what a
# layer was given, a process group by a reference to it.
_communicators: dict[Any, Communicator | None] = {}
_made_in: Any = lambda: None  # noqa: E731 (a dead reference)
AVAILABLE = dist.is_available()
_looked_for_ranks = False


def communicator_of(group: Any) -> Communicator | None:
    """The communicator of a `groups.Group` or of a process group; None for one replica."""
    # Asked for once: `dist.is_initialized()` is the same question. This runs at every call of every layer.
    world = dist.group.WORLD if AVAILABLE else None
    if world is None:
        if not _looked_for_ranks:
            warn_if_not_joined(group)
        return None
    if isinstance(group, Local):
        return None
    global _made_in
    if _made_in() is not world:
        _communicators.clear()
        forget_messages()
        _made_in = weakref.ref(world)
    key = group if group is None or not isinstance(group, dist.ProcessGroup) else weakref.ref(group)
    if key not in _communicators:
        _communicators[key] = _make(group)
    return _communicators[key]


def warn_if_not_joined(group: Any) -> bool:
    """Warns, once, where a launcher has started several ranks and no process group joins them. Whether it looked."""
    global _looked_for_ranks
    if _looked_for_ranks or group == 1 or isinstance(group, Local):
        return False
    _looked_for_ranks = True
    ranks = settings.launched_ranks()
    if ranks > 1:
        warnings.warn(
            "Synchronised layers need a process group: without one each rank normalises with its own batch. Received: a training "
            f"step of one of {ranks} ranks (the environment variable WORLD_SIZE) before torch.distributed.init_process_group(). "
            "Call it before the first step. If each rank is to train alone, make the layers with group_size=1.",
            stacklevel=2,
        )
    return True


def is_single_process() -> bool:
    """Whether there is no other replica at all, in whatever group."""
    return not (AVAILABLE and dist.is_initialized() and dist.get_world_size() > 1)


def _make(group: Any) -> Communicator | None:
    if group is None or (isinstance(group, int) and group > 0):
        world = dist.get_world_size()
        size = world // number_of_groups(world, group)
        return None if size == 1 else communicator_over(_own_group(size, world))
    if isinstance(group, Axes | Sharded):
        check_no_axis_name(group, "PyTorch", dist.get_world_size())
        return None
    # What new_group returns on a rank that is not in the group is a negative number.
    if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
        raise ValueError(
            f"`process_group` must be a torch.distributed process group that this rank is in. Received: {group!r}. Give each "
            "rank its own group, or use `group_size`."
        )
    return None if group.size() == 1 else communicator_over(group)


def _own_group(size: int, world: int) -> Any:
    """A group of our own, of consecutive ranks.

    The trainer launches its gradients' messages on the default group at moments that depend on the rank: ours between them would
    be taken for theirs.
    """
    timeout = timeout_of(dist.group.WORLD)
    try:
        if size == world:
            return dist.new_group(list(range(world)), timeout=timeout, group_desc="syncbn")
        return dist.new_subgroups(size, timeout=timeout, group_desc="syncbn")[0]
    except RuntimeError as error:
        raise set_up_failed("make its process group", error) from error


def communicator_over(process_group: Any) -> Communicator:
    """The communicator of a process group that this rank is in."""
    return Communicator(process_group.size(), process_group.group_name, weakref.ref(process_group))


def check_one_group(process_group: Any, group_size: int | None) -> None:
    """Raises where two arguments say which replicas communicate."""
    if process_group is not None and group_size is not None:
        raise ValueError(
            f"Only one of `process_group` and `group_size` may be given: each says which replicas communicate. Received: both, "
            f"with group_size={group_size}. Drop one of them."
        )
