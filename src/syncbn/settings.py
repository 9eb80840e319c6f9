"""The environment variables of this library. Each is read when its function is called."""

from __future__ import annotations

import os

KERNELS = ("auto", "eager", "triton")


def kernels() -> str:
    """`SYNCBN_KERNELS`: "auto", "eager" (plain torch operators) or "triton" (an error where Triton is missing)."""
    value = os.environ.get("SYNCBN_KERNELS", "auto")
    if value not in KERNELS:
        raise ValueError(
            f"SYNCBN_KERNELS must be one of {list(KERNELS)}: it chooses which kernels run on CUDA, for debugging. Received: "
            f"{value!r}. Unset it to get the fastest kernels that are available."
        )
    return value


def debug() -> bool:
    """`SYNCBN_DEBUG`: whether ranks compare their messages before they send them. Off by default."""
    return os.environ.get("SYNCBN_DEBUG", "0") not in ("", "0")


def peer_memory() -> bool:
    """`SYNCBN_PEER_MEMORY`: whether GPUs of one host may exchange statistics through peer memory. On by default."""
    return os.environ.get("SYNCBN_PEER_MEMORY", "1") != "0"


def launched_ranks() -> int:
    """`WORLD_SIZE`, a variable of torchrun's: how many ranks it started. 1 where it says nothing."""
    value = os.environ.get("WORLD_SIZE", "1")
    return int(value) if value.isdecimal() else 1


def triton_interpreter() -> bool:
    """`TRITON_INTERPRET`, a variable of Triton's: whether kernels run on the CPU, in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def legacy_keras() -> bool:
    """TensorFlow's TF_USE_LEGACY_KERAS: whether `tf.keras` is the package tf_keras, which is Keras 2."""
    return os.environ.get("TF_USE_LEGACY_KERAS", "0") in ("1", "true", "True")
