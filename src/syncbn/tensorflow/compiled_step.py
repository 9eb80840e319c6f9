"""A training step that XLA compiles as a whole on each replica."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from syncbn.tensorflow._private import collectives_numbered_once


def compiled_step(step: Callable[..., Any]) -> Callable[..., Any]:
    """A step that XLA compiles as a whole on each replica. Call it inside `strategy.run`.

    It is the fastest way to train on several GPUs. Keras's own `jit_compile=True` compiles one program for all replicas, which
    TensorFlow cannot do. XLA compiles the step once for each shape of its arguments, on each GPU.

    Args:
        step: a function of tensors that runs on one replica: forward pass and gradients. `optimizer.apply` stays outside: it
            updates a counter that all replicas share, which TensorFlow cannot do inside.

    Returns:
        A function with the step's arguments and results. In a loop that is not a `tf.function`, keep it, because it compiles
        once. It also runs on one replica, without a strategy.

    Raises:
        RuntimeError: when called, if several replicas train and one is on the CPU, or if the step applies gradients.

    Source: TensorFlow's `tf.function(jit_compile=True)`, a function for each replica.

    Example:
        >>> import syncbn, tensorflow as tf
        >>> double = syncbn.compiled_step(lambda x: x + x)
        >>> print(double(tf.constant([1.0, 2.0])).numpy())
        [2. 4.]
    """
    # XLA binds the variables of the replica that traces a function: each replica has its own.
    functions: dict[int, Any] = {}

    def traced(*arguments: Any, **named: Any) -> Any:
        with collectives_numbered_once():
            return step(*arguments, **named)

    @tf.autograph.experimental.do_not_convert
    def run(*arguments: Any, **named: Any) -> Any:
        _check_devices()
        compiled = tf.function(traced, jit_compile=True)
        if tf.executing_eagerly():
            context = tf.distribute.get_replica_context()
            number = 0 if context is None else int(context.replica_id_in_sync_group)
            compiled = functions.setdefault(number, compiled)
        try:
            return compiled(*arguments, **named)
        except RuntimeError as error:
            if "merge_call" not in str(error):
                raise
            raise RuntimeError(
                "A step that XLA compiles on several replicas must not update variables that they share. Received: a step that "
                "applies gradients, or assigns such a variable. Return the gradients, and call `optimizer.apply` outside."
            ) from error

    return run


def _check_devices() -> None:
    strategy = tf.distribute.get_strategy()
    devices = [d for d in strategy.extended.worker_devices if "GPU" not in d] if strategy.num_replicas_in_sync > 1 else []
    if devices:
        raise RuntimeError(
            "A step that XLA compiles on several replicas must run on GPUs: on CPUs TensorFlow cannot compile what replicas "
            f"send to each other. Received: {len(devices)} replicas on CPUs, {devices[0]} for one. Run the step without "
            "`compiled_step` there."
        )
