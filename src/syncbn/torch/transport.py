"""What carries a message between replicas: their group's all-reduce, or peer memory, where a mailbox is to be had."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from syncbn.torch import dispatch
from syncbn.torch.failures import message_failed, sends
from syncbn.torch.groups import Communicator
from syncbn.torch.peer_memory import Mailbox, mailbox_for


def global_moments(x: Tensor, mask: Tensor | None, communicator: Communicator | None) -> tuple[Tensor, Tensor, Tensor]:
    """(count, mean, variance) of the global batch, float64, by one message: (n, Σx, Σx²), or the moments in a mailbox."""
    kernels = dispatch.kernels_for(x, mask)
    mailbox = mailbox_for(communicator, x.device, x.shape[1])
    if mailbox is not None:
        return _exchange_moments(mailbox, *kernels.moments_of_sums(kernels.local_sums(x, mask)))
    return kernels.moments_of_sums(sum_in_place(kernels.local_sums(x, mask), communicator))


def _exchange_moments(mailbox: Mailbox, count: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from syncbn.torch.triton.ops import exchange_values

    channels = mean.numel()
    values = torch.cat([mean, variance, count[None]])
    stats = exchange_values("moments", values, mailbox.exchange(channels, False), mailbox.replicas)
    return stats[2 * channels], stats[:channels], stats[channels : 2 * channels]


def global_sums(message: Tensor, communicator: Communicator | None) -> Tensor:
    """The backward message [2C] of all replicas, by a mailbox or, in place, the group's all-reduce."""
    channels = message.numel() // 2
    mailbox = mailbox_for(communicator, message.device, channels)
    if mailbox is None:
        return sum_in_place(message, communicator)
    from syncbn.torch.triton.ops import exchange_values

    return exchange_values("sums", message, mailbox.exchange(channels, True), mailbox.replicas)


def sum_in_place(v: Tensor, communicator: Communicator | None) -> Tensor:
    """v, now the sum of every replica's."""
    if communicator is not None:
        group = communicator.process_group
        try:
            dist.all_reduce(v, group=group)
        except RuntimeError as error:
            if "Batching rule" in str(error):
                raise RuntimeError(
                    "The backward pass of a synchronised batch norm takes one gradient at a time. Received: a batch of them, by "
                    "`is_grads_batched` or a vectorised Jacobian. Call torch.autograd.grad once for each."
                ) from error
            raise message_failed(communicator, error) from error
    return v


def gather(v: Tensor, communicator: Communicator) -> Tensor:
    """[size, n]: every replica's v [n] in the order of ranks."""
    rows = [torch.empty_like(v) for _ in range(communicator.size)]
    group = communicator.process_group
    try:
        dist.all_gather(rows, v, group=group)
    except RuntimeError as error:
        raise message_failed(communicator, error) from error
    return torch.stack(rows)


class DifferentiableSum(Function):
    """The sum of every replica's v; its gradient is the sum of every replica's cotangent."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, communicator: Communicator | None) -> Tensor:
        """A new tensor."""
        ctx.communicator = communicator
        return sum_in_place(v.clone(), communicator)

    @staticmethod
    def backward(ctx: Any, dv: Tensor) -> Any:
        """The same again."""
        if ctx.communicator is not None:
            sends("derivative of the backward pass", None, None, ctx.communicator.name)
        return DifferentiableSum.apply(dv, ctx.communicator), None
