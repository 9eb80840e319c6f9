"""Runs a function on several replicas of a framework, in one process, and brings the results back as numpy arrays."""

from __future__ import annotations

import contextlib
import datetime
import os
import pickle
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any

import numpy as np


class TensorFlowWorld:
    """The one MirroredStrategy of this process, over logical CPU devices.

    A second strategy object would restart the keys of TensorFlow's collectives and break the process.
    """

    def __init__(self, replicas: int):
        import tensorflow as tf

        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * replicas)
        self.tf, self.replicas = tf, replicas
        self.strategy = tf.distribute.MirroredStrategy([f"/cpu:{i}" for i in range(replicas)])

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
    """Processes on gloo that live as long as the world and run what they are sent: start-up is paid once.

    What they run must be importable by its name: a function of a test module, which finds its rank by torch.distributed.
    """

    def __init__(self, replicas: int, timeout: float = 60, environment: dict[str, str] | None = None):
        self.replicas, self.timeout = replicas, timeout
        with contextlib.closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        threads = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
        self.workers, self.pipes = [], []
        for rank in range(replicas):
            key = os.urandom(16)
            listener = Listener(("127.0.0.1", 0), authkey=key)
            words = [rank, replicas, port, timeout, listener.address[1], key.hex()]
            worker = subprocess.Popen(
                [sys.executable, str(Path(__file__)), *map(str, words)], env={**os.environ, **threads, **(environment or {})}
            )
            self.workers.append(worker)
            self.pipes.append((listener, worker))
        self.pipes = [listener.accept() for listener, _ in self.pipes]
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
        self.pipes[rank].send_bytes(pickle.dumps((function.__module__, function.__qualname__, arguments)))

    def receive(self, rank: int) -> tuple[bool, Any]:
        """(True, what the function returned) or (False, the traceback); also of a process that died."""
        try:
            if not self.pipes[rank].poll(2 * self.timeout):
                return False, "no answer"
            return pickle.loads(self.pipes[rank].recv_bytes())
        except (EOFError, ConnectionResetError):
            return False, f"died with {self.workers[rank].wait(10)}"

    def close(self) -> None:
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.close()
        for worker in self.workers:
            try:
                worker.wait(5)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait(5)


def serve(rank: int, replicas: int, port: int, timeout: float, answer: int, key: str) -> None:
    """A process of a TorchWorld: runs what it is sent until its pipe closes."""
    import importlib

    pipe = Client(("127.0.0.1", answer), authkey=bytes.fromhex(key))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if replicas > 1:
        where = f"tcp://127.0.0.1:{port}"
        patience = datetime.timedelta(seconds=timeout)
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=replicas, timeout=patience)
    pipe.send_bytes(pickle.dumps((True, "ready")))
    with contextlib.suppress(EOFError):
        while True:
            module, name, arguments = pickle.loads(pipe.recv_bytes())
            try:
                answer_ = True, getattr(importlib.import_module(module), name)(*arguments)
            except BaseException:
                answer_ = False, traceback.format_exc()
            pipe.send_bytes(pickle.dumps(answer_))


if __name__ == "__main__":
    serve(*map(int, sys.argv[1:4]), float(sys.argv[4]), int(sys.argv[5]), sys.argv[6])
