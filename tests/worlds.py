"""Runs a function on several replicas of a framework, in one process, and brings the results back as numpy arrays."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, outside of the range that the system itself hands out: nobody takes them meanwhile."""
    found: list[int] = []
    port = 10_000 + os.getpid() % 10_000
    while len(found) < count:
        port += 1
        with contextlib.closing(socket.socket()) as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            found.append(port)
    return found


class TensorFlowWorld:
    """The one MirroredStrategy of this process, over logical CPU devices; with SYNCBN_TEST_DEVICE=gpu over GPUs.

    A second strategy object would restart the keys of TensorFlow's collectives and break the process.
    """

    def __init__(self, replicas: int):
        import tensorflow as tf

        self.tf, self.replicas = tf, replicas
        gpus = tf.config.list_physical_devices("GPU") if os.environ.get("SYNCBN_TEST_DEVICE") == "gpu" else []
        physical = gpus or tf.config.list_physical_devices("CPU")
        used = min(replicas, len(physical))
        limit = {"memory_limit": 8192} if gpus else {}
        for i, device in enumerate(physical[:used]):
            logical = [tf.config.LogicalDeviceConfiguration(**limit)] * len(range(i, replicas, used))
            tf.config.set_logical_device_configuration(device, logical)
        # NCCL, the default on GPUs, refuses two replicas on one GPU.
        shared = {"cross_device_ops": tf.distribute.ReductionToOneDevice()} if gpus and used < replicas else {}
        kind = "gpu" if gpus else "cpu"
        tf.config.experimental.enable_tensor_float_32_execution(False)
        self.strategy = tf.distribute.MirroredStrategy([f"/{kind}:{i}" for i in range(replicas)], **shared)

    @property
    def copies(self) -> bool:
        """Whether replicas copy their messages to each other, in place of an all-reduce."""
        from syncbn.tensorflow import replicas

        return replicas.copies_messages(self.strategy)

    def run(self, function: Callable[..., Any], *per_replica: list[Any] | None, graph: bool = False) -> list[Any]:
        """function(*arguments) on every replica, each with its own arguments; one nest of arrays a replica.

        An argument that is None stays None. With `graph` all of it is one tf.function.
        """
        tf = self.tf
        given = [i for i, values in enumerate(per_replica) if values is not None]
        tensors = [[tf.convert_to_tensor(per_replica[i][r]) for i in given] for r in range(self.replicas)]
        values = self.strategy.experimental_distribute_values_from_function(
            lambda context: tensors[context.replica_id_in_sync_group]
        )

        def replica(arguments: list[Any]) -> Any:
            full = [None] * len(per_replica)
            for i, argument in zip(given, arguments, strict=True):
                full[i] = argument
            return function(*full)

        def everywhere(values: Any) -> Any:
            return self.strategy.run(replica, args=(values,))

        if graph:
            everywhere = tf.function(everywhere, reduce_retracing=True)
        return self.results(everywhere(values))

    def results(self, nest: Any) -> list[Any]:
        """A nest of per-replica values as one nest of arrays a replica."""
        tf = self.tf
        flat = [self.strategy.experimental_local_results(v) for v in tf.nest.flatten(nest)]
        return [
            tf.nest.pack_sequence_as(
                nest, [np.asarray(tf.cast(v[r], tf.float32) if v[r].dtype == tf.bfloat16 else v[r]) for v in flat]
            )
            for r in range(self.replicas)
        ]


class TorchWorld:
    """Processes that live as long as the world and run what they are sent: start-up is paid once.

    They meet by gloo on the CPU; with SYNCBN_TEST_DEVICE=cuda on GPUs, one each by NCCL, or by gloo where those are too few; with
    "interpreter" on the CPU through the kernels for CUDA (through_kernels.py).

    What they run must be importable by its name: a function of a test module, which finds its rank by torch.distributed.
    """

    def __init__(self, replicas: int, timeout: float = 60):
        from torch.distributed import TCPStore

        self.replicas, self.timeout = replicas, timeout
        device = os.environ.get("SYNCBN_TEST_DEVICE", "cpu")
        # Here, so that the port is taken from the moment when it is chosen, and outlives a rank that a test kills.
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = self.store.port
        os.environ["OMP_NUM_THREADS"] = "1"
        # Torch is imported once, and the processes are forked from where it is.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "numpy"])
        self.workers, self.pipes, self.requests = [], [], [0] * replicas
        for rank in range(replicas):
            mine, theirs = context.Pipe()
            worker = context.Process(target=serve, args=(theirs, rank, replicas, port, timeout, device), daemon=True)
            worker.start()
            theirs.close()
            self.workers.append(worker)
            self.pipes.append(mine)
        assert all(self.receive(rank)[0] for rank in range(replicas))

    def run(self, function: Callable[..., Any], *per_replica: list[Any] | None, common: tuple[Any, ...] = ()) -> list[Any]:
        """function(*common, *arguments) on every replica, each with its own arguments; one result a replica.

        An argument that is None stays None. What one of them raises is raised here, with what all of them say.
        """
        for rank in range(self.replicas):
            arguments = [None if values is None else values[rank] for values in per_replica]
            self.send(rank, function, *common, *arguments)
        answers = [self.receive(rank) for rank in range(self.replicas)]
        failures = [f"rank {rank}: {text}" for rank, (ok, text) in enumerate(answers) if not ok]
        if failures:
            raise RuntimeError("\n".join(failures))
        return [value for _, value in answers]

    def send(self, rank: int, function: Callable[..., Any], *arguments: Any) -> None:
        """Asks a process to run function(*arguments); `receive` waits for the answer to the latest request."""
        self.requests[rank] += 1
        self.pipes[rank].send_bytes(pickle.dumps((self.requests[rank], function.__module__, function.__qualname__, arguments)))

    def receive(self, rank: int) -> tuple[bool, Any]:
        """(True, what the function returned) or (False, the traceback); also of a process that died."""
        end = time.monotonic() + 2 * self.timeout
        try:
            while self.pipes[rank].poll(max(0, end - time.monotonic())):
                request, ok, value = pickle.loads(self.pipes[rank].recv_bytes())
                # An answer to an earlier request, which came too late for it, is dropped.
                if request == self.requests[rank]:
                    return ok, value
            return False, "no answer"
        except (EOFError, ConnectionResetError):
            self.workers[rank].join(10)
            return False, f"died with {self.workers[rank].exitcode}"

    def close(self) -> None:
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.close()
        for worker in self.workers:
            worker.join(5)
            worker.kill()


def serve(pipe: Any, rank: int, replicas: int, port: int, timeout: float, device: str) -> None:
    """A process of a TorchWorld: runs what it is sent until its pipe closes."""
    import importlib

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if device == "interpreter":
        import through_kernels  # noqa: F401
    backend = "gloo"
    if device == "cuda":
        gpus = torch.cuda.device_count()
        torch.cuda.set_device(rank % gpus)
        torch.set_default_device("cuda")
        # NCCL refuses two ranks on one GPU.
        backend = "nccl" if gpus >= replicas else "gloo"
    if replicas > 1:
        patience = datetime.timedelta(seconds=timeout)
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=patience)
        dist.init_process_group(backend, store=store, rank=rank, world_size=replicas, timeout=patience)
    pipe.send_bytes(pickle.dumps((0, True, "ready")))
    with contextlib.suppress(EOFError):
        while True:
            request, module, name, arguments = pickle.loads(pipe.recv_bytes())
            try:
                answer = request, True, getattr(importlib.import_module(module), name)(*arguments)
            except BaseException:
                answer = request, False, traceback.format_exc()
            pipe.send_bytes(pickle.dumps(answer))


class JaxWorld:
    """Replicas of a JAX program: the first devices of the host under `shard_map` or `pmap`, or the lanes of a `vmap`.

    how: "checked" and "unchecked" are shard_map with and without check_vma, "pmap", "vmap".
    """

    axis = "replica"

    def __init__(self, replicas: int, how: str = "checked"):
        import jax

        self.jax, self.replicas, self.how = jax, replicas, how

    def run(self, function: Callable[..., Any], *per_replica: list[Any] | None) -> list[Any]:
        """function(*arguments) on every replica, each with its own arguments; one nest of arrays a replica."""
        tree = self.jax.tree_util
        stacked = [None if values is None else np.stack(values) for values in per_replica]
        out = self.mapped(function)(*stacked)
        return [tree.tree_map(lambda v, r=r: _numpy(v[r]), out) for r in range(self.replicas)]

    def mapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The program of all replicas, on arrays with a leading axis of replicas."""
        jax, tree = self.jax, self.jax.tree_util
        if self.how == "vmap":
            return jax.jit(jax.vmap(function, axis_name=self.axis))
        if self.how == "pmap":
            return jax.pmap(function, axis_name=self.axis, devices=jax.devices()[: self.replicas])

        def shard(*arguments: Any) -> Any:
            return tree.tree_map(lambda v: v[None], function(*tree.tree_map(lambda v: v[0], arguments)))

        spec = jax.sharding.PartitionSpec(self.axis)
        checked = self.how == "checked"
        return jax.jit(jax.shard_map(shard, mesh=self.mesh(), in_specs=spec, out_specs=spec, check_vma=checked))

    def mesh(self) -> Any:
        """The first devices, one a replica."""
        jax = self.jax
        return jax.sharding.Mesh(np.array(jax.devices()[: self.replicas]), (self.axis,))


def _numpy(v: Any) -> np.ndarray:
    return np.asarray(v.astype("float32") if v.dtype == "bfloat16" else v)


def padded(arrays: list[np.ndarray] | None, size: int, value: float = 0) -> list[np.ndarray] | None:
    """Every replica's array with the same batch size: JAX cuts a global array into equal shards."""
    if arrays is None:
        return None
    return [np.concatenate([a, np.full((size - len(a), *a.shape[1:]), value, a.dtype)]) for a in arrays]
