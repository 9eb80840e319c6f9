"""What only the torch module says: its defaults, and the text of every error that its users can see."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

from syncbn.policy import Activation

ACTIVATIONS = {
    "relu": Activation("relu"),
    "silu": Activation("silu"),
    "leaky_relu": Activation("leaky_relu", 0.01),
}


def activation(value: Any) -> Activation | None:
    """What the engine applies itself; None for a callable, which runs after it."""
    if value is None or callable(value):
        return None
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise ValueError(
            f"`activation` must be None, a callable or one of {sorted(ACTIVATIONS)}. Received: activation={value!r}. Give "
            "another activation as a callable, for example torch.nn.GELU()."
        )
    return ACTIVATIONS[value]


def new_value_weight(name: str, value: Any) -> float:
    """A momentum in torch's convention."""
    if not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise ValueError(
            f"`{name}` must lie in [0, 1]: it is the weight of the new value. Received: {name}={value!r}. Give for example 0.01."
        )
    return float(value)


def one_way_to_group(process_group: Any, group_size: int | None) -> None:
    """Raises where two arguments say who meets."""
    if process_group is not None and group_size is not None:
        raise ValueError(
            f"Only one of `process_group` and `group_size` may be given: each says which replicas meet. Received: both, with "
            f"group_size={group_size}. Drop one of them."
        )


def not_in_group(group: Any) -> ValueError:
    """A process group of other ranks."""
    return ValueError(
        f"`process_group` must be a torch.distributed process group that this rank is in. Received: {group!r}. Give each rank "
        "its own group, or use `group_size`."
    )


def renorm_needs_statistics() -> ValueError:
    """Nothing to correct towards."""
    return ValueError(
        "renorm=True corrects towards the moving statistics, so they must be kept. Received: track_running_stats=False. Set it "
        "to True, or renorm=False."
    )


def input_shape(shape: Sequence[int], channels: int) -> None:
    """Raises where an input is not [N, channels, …]."""
    # The first two in the words of torch's own layer, which programs may look for.
    if len(shape) < 2:
        raise ValueError(f"expected at least 2D input (got {len(shape)}D input)")
    if shape[1] == 0:
        raise ValueError("SyncBatchNorm number of input channels should be non-zero")
    if shape[1] != channels:
        raise ValueError(
            f"The input must have the layer's number of channels on dim 1. Received: shape {tuple(shape)} for num_features="
            f"{channels}. Make a layer with num_features={shape[1]}."
        )


def residual_shape(residual: Sequence[int], shape: Sequence[int]) -> None:
    """Raises where a residual is not of the input's shape."""
    if tuple(residual) != tuple(shape):
        raise ValueError(
            f"`residual` must have the input's shape. Received: residual of shape {tuple(residual)} for an input of shape "
            f"{tuple(shape)}. Expand or reshape it."
        )


def one_value_per_channel(shape: Sequence[int]) -> ValueError:
    """Torch's own sentence: a variance needs two values."""
    return ValueError(f"Expected more than 1 value per channel when training, got input size {list(shape)}")


def replayed_too_often() -> RuntimeError:
    """A recomputation that is not the first pass over again."""
    return RuntimeError(
        "A checkpointed block must call the same layers in its recomputation as in its first pass. Received: more calls than "
        "were recorded. Make the block depend on its arguments alone."
    )


def _as_said(said: dict[str, Any]) -> str:
    return (
        f"{said['direction']} of {said['layer']} (message {said['call']}, {said['channels']} channels, "
        f"training={said['training']})"
    )


def ranks_differ(said_by_rank: dict[int, dict[str, Any]]) -> RuntimeError:
    """Ranks that are about to send different messages."""
    heard = "; ".join(f"rank {rank}: {_as_said(said)}" for rank, said in said_by_rank.items())
    return RuntimeError(
        f"All ranks must run the same synchronised layers in the same order. Received: {heard}. Let every rank take the same "
        "path (an empty batch is fine), or run what one rank does alone in syncbn.local_statistics()."
    )


def absent_ranks(said: dict[str, Any], absent: Sequence[int], seconds: float) -> RuntimeError:
    """Ranks that did not come to the meeting."""
    return RuntimeError(
        f"All ranks must run the same synchronised layers in the same order. Received: nothing from ranks {list(absent)} within "
        f"{seconds:g} s, while this one came to the {_as_said(said)}. Look for what those ranks do instead, or raise the timeout "
        "of the process group."
    )


KERNELS = ("auto", "eager", "triton")


def kernels(value: str) -> str:
    """`SYNCBN_KERNELS`."""
    if value not in KERNELS:
        raise ValueError(
            f"SYNCBN_KERNELS must be one of {list(KERNELS)}: it chooses which kernels run on CUDA, for debugging. Received: "
            f"{value!r}. Unset it for the fastest that are there."
        )
    return value


def no_triton() -> RuntimeError:
    """SYNCBN_KERNELS asks for what is not installed."""
    return RuntimeError(
        "SYNCBN_KERNELS=triton needs Triton. Received: an environment in which it cannot be imported. Install triton, or unset "
        "SYNCBN_KERNELS."
    )


def lost_replica(group: str, code: int, rank: int) -> RuntimeError:
    """A wait inside a kernel ended at its bound, or with a message of another call."""
    what = "did not come in time" if code == 1 else "sent the message of another call"
    return RuntimeError(
        f"All replicas of a group must make the same synchronised calls in the same order. Received: in group {group!r} rank "
        f"{rank} {what}; what depended on it is NaN. Look for that rank's own error, or for a branch that only some ranks take; "
        "raise the process group's timeout if it is merely slow; then start again: the group's buffers are not used any more."
    )


def group_is_gone(group: str) -> RuntimeError:
    """destroy_process_group between a forward pass and its backward pass."""
    return RuntimeError(
        "The process group of a forward pass must live until its backward pass has ended. "
        f"Received: a message for the group {group!r}, which torch.distributed has destroyed. Run the forward pass again."
    )


def no_peer_memory(reason: str) -> str:
    """A warning: slower, and right."""
    return (
        "The replicas of this host cannot map each other's memory; their messages go by the process group instead. "
        f"Received: {reason}. SYNCBN_PEER_MEMORY=0, on every rank, does not try."
    )


def first_call_in_capture() -> RuntimeError:
    """Setting up a group waits for the other ranks, which a capture may not."""
    return RuntimeError(
        "The first synchronised call of a group must not be captured: it sets up the memory in which the replicas meet. "
        "Received: a call while a CUDA graph is captured. Run one step before the capture, on every rank."
    )
