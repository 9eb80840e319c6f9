"""The error of a message between ranks that failed."""

from __future__ import annotations

import contextlib
import datetime

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
import torch.nn as nn
from worlds import TorchWorld

import syncbn
from syncbn import SyncBatchNorm
from syncbn.torch import desync, failures, groups, peer_memory, reference
from syncbn.torch.failures import sends
from syncbn.torch.groups import communicator_of, communicator_over

MENDS = ("model.eval()", "syncbn.local_statistics()", "syncbn.EmptySteps", "SYNCBN_DEBUG=1")


@pytest.fixture(scope="module")
def broken_world():
    """A world of their own: some of its groups are broken."""
    with contextlib.closing(TorchWorld(2)) as world:
        yield world


def impatient():
    """A group whose ranks wait for each other no longer than 2 seconds."""
    return dist.new_group(list(range(dist.get_world_size())), timeout=datetime.timedelta(seconds=2))


class Net(nn.Module):
    def __init__(self, group, **arguments):
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.block = nn.ModuleDict({"norm": SyncBatchNorm(4, process_group=group, **arguments)})

    def forward(self, x):
        return self.block["norm"](self.linear(x))


def left_alone(kind):
    """What rank 0 raises where rank 1 leaves a pass out, after a step that both run."""
    torch._dynamo.reset()
    arguments = {"renorm": True} if kind == "renorm" else {}
    net = Net(impatient(), **arguments)
    run = torch.compile(net, backend="aot_eager") if kind.startswith("compiled") else net
    x, dy = torch.randn(2, 3), torch.randn(2, 4)
    run(x).backward(dy)
    patch = pytest.MonkeyPatch()
    if kind == "without float64":
        patch.setattr(reference, "has_float64", lambda device: False)
    with patch.context():
        try:
            if kind in ("backward", "compiled backward"):
                y = run(x)
                if dist.get_rank() == 0:
                    y.backward(dy)
            elif kind == "double backward":
                x.requires_grad_()
                (dx,) = torch.autograd.grad(run(x), x, dy, create_graph=True)
                if dist.get_rank() == 0:
                    dx.backward(torch.randn(2, 3))
            elif dist.get_rank() == 0:
                run(x)
        except RuntimeError as error:
            return str(error), type(error.__cause__).__name__, str(error.__cause__)
        finally:
            patch.undo()
    return "no error", "", ""


@pytest.mark.parametrize(("kind", "which"), [
    ("forward", "forward of block.norm (input of shape (2, 4)), message 3 of"),
    ("renorm", "forward of block.norm (input of shape (2, 4)), message 3 of"),
    ("without float64", "forward of block.norm (input of shape (2, 4)), message 3 of"),
    ("backward", "backward of a batch norm (input of shape (2, 4)), message 4 of"),
    ("double backward", "derivative of the backward pass of a batch norm, message 7 of"),
    ("compiled forward", "forward of a compiled layer (input of shape (2, 4)), message 3 of"),
    ("compiled backward", "backward of a compiled layer (4 channels), message 4 of"),
])  # fmt: skip
def test_a_rank_that_is_left_alone_says_which_message_and_what_to_do(broken_world, kind, which):
    said, cause, original = broken_world.run(left_alone, common=(kind,))[0]
    assert said.startswith("All ranks must run the same synchronised layers in the same order. Received: ")
    assert which in said
    assert cause in ("RuntimeError", "DistBackendError")
    assert original.splitlines()[0][:40] in said
    for mend in MENDS:
        assert mend in said


@pytest.mark.parametrize(("given", "expected"), [
    (RuntimeError("x"), RuntimeError), (dist.DistBackendError("x"), dist.DistBackendError),
    (torch.OutOfMemoryError("x"), torch.OutOfMemoryError), (NotImplementedError("x"), RuntimeError),
], ids=lambda v: getattr(v, "__name__", type(v).__name__))  # fmt: skip
def test_types_that_programs_look_for_stay(given, expected):
    found = failures.set_up_failed("wait", given)
    assert type(found) is expected
    assert "failed with 'x'" in str(found)


def groups_that_cannot_be_made(_):
    def broken(*arguments, **named):
        raise RuntimeError("wait timeout after 2000ms")

    said = []
    groups._communicators.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "new_group", broken)
        patch.setattr(dist, "new_subgroups", broken)
        patch.setattr(dist, "all_gather_object", broken)
        for group_size in (None, 2):
            with pytest.raises(RuntimeError) as caught:
                SyncBatchNorm(3, group_size=group_size)(torch.randn(4, 3))
            said.append(str(caught.value))
        with pytest.raises(RuntimeError) as caught:
            peer_memory._said_by_all(communicator_over(dist.group.WORLD), "")
        said.append(str(caught.value))
    return said


def test_the_first_call_of_a_group(broken_world):
    for rank in broken_world.run(groups_that_cannot_be_made, [0, 0]):
        for said, what in zip(rank, ["make its process group"] * 2 + ["agree on its mailboxes"], strict=True):
            assert f"in which all ranks {what}, failed with 'wait timeout after 2000ms'." in said
            for mend in MENDS:
                assert mend in said


def test_peer_memory_says_which_call_comes_and_what_to_do():
    sends("forward", "a.norm", torch.Size([2, 3]), "a group")
    said = str(peer_memory.lost_replica("syncbn", 1, 3))
    assert "rank 3 did not come in time, before the forward of a.norm (input of shape (2, 3))" in said
    for mend in MENDS:
        assert mend in said


def debug_without_a_store(_):
    class Gone:
        def __init__(self, *arguments):
            pass

        def set(self, *arguments):
            raise RuntimeError("Broken pipe")

        check = set

    syncbn.debug()
    communicator_of(None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(desync.dist, "PrefixStore", Gone)
        try:
            with pytest.raises(RuntimeError) as caught:
                SyncBatchNorm(3)(torch.randn(4, 3))
        finally:
            syncbn.debug(enabled=False)
    return str(caught.value)


def test_debug_without_its_store(broken_world):
    for said in broken_world.run(debug_without_a_store, [0, 0]):
        assert (
            "Received: no answer from the ranks' store, while this one came to the forward of SyncBatchNorm(3) (message" in said
        )
        for mend in MENDS[:3]:
            assert mend in said
