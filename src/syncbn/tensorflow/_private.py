"""What TensorFlow keeps private and this engine needs, each with what happens without it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import tensorflow as tf

try:
    # XLA moves nothing across its barrier. Without it results are slower, and less exact at large means.
    from tensorflow.compiler.tf2xla.ops.gen_xla_ops import xla_optimization_barrier
except ImportError:
    xla_optimization_barrier = None

try:
    # Tells whether XLA compiles the function that is being traced. Without it, such a function takes the operators of the CPU.
    from tensorflow.python.ops import control_flow_util

    _in_xla_context = control_flow_util.GraphOrParentsInXlaContext
except (ImportError, AttributeError):
    _in_xla_context = None

try:
    # Tells whether a ForwardAccumulator watches a tensor. Without it, such an accumulator silently sees tangents of 0.
    from tensorflow.python.eager import forwardprop_util

    _pack_tangents = forwardprop_util.pack_tangents
except (ImportError, AttributeError):
    _pack_tangents = None


try:
    # Says whether TensorFlow numbers a collective at each call of a function. Without it, a compiled step copies such a number to
    # the GPU for each collective, although XLA does not use it.
    from tensorflow.python.distribute.cross_device_utils import CollectiveReplicaLauncher

    _launcher = CollectiveReplicaLauncher if hasattr(CollectiveReplicaLauncher, "_prefer_unique_instance_key") else None
except ImportError:
    _launcher = None


@contextmanager
def collectives_numbered_once() -> Iterator[None]:
    """Collectives that are traced inside get their number now, as a constant. For functions that XLA compiles."""
    if _launcher is None:
        yield
        return
    kept, _launcher._prefer_unique_instance_key = _launcher._prefer_unique_instance_key, False
    try:
        yield
    finally:
        _launcher._prefer_unique_instance_key = kept


def barrier(*values: tf.Tensor) -> list[tf.Tensor]:
    """The values as they are; XLA computes each of them once, and rounds it to its dtype."""
    if xla_optimization_barrier is None or not compiled_by_xla():
        return list(values)
    return xla_optimization_barrier(list(values))


def has_tangents(tensors: Sequence[tf.Tensor]) -> bool:
    """Whether a ForwardAccumulator watches one of these."""
    return _pack_tangents is not None and bool(_pack_tangents(list(tensors)).tangents)


def compiled_by_xla() -> bool:
    """Whether the function that is being traced is compiled by XLA as a whole."""
    return _in_xla_context is not None and not tf.executing_eagerly() and bool(_in_xla_context(tf.compat.v1.get_default_graph()))
