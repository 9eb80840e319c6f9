"""A rank that dies must not leave the others waiting: `python tests/gpu/dead_peers.py [killed] [stopped] [--transport …]`.

One process a GPU, two over gloo where there are none, started from here: torchrun would end the survivors itself. One rank kills
or stops itself between two steps; the others must end with an error soon after the process group's timeout. One line a check; the exit
status is 1 where one fails. No process is left behind.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}
TRANSPORTS = ("backend", "peer memory")
# Seconds: how long ranks wait for each other; what may come on top; how long all may take to start and to compile.
TIMEOUT = 15
MARGINS = {"backend": 30, "peer memory": 20}
START = 150
# Steps before the death, each compared, and steps that a survivor would make if it noticed nothing.
SOUND, MORE = 3, 5

WRONG, ENDED = 4, 3


# ------------------------------------------------------------------------------------------------- one rank


def rank_main(rank: int, world: int, port: int, how: str) -> None:
    """Steps until something is raised; reports that as a line of JSON. Leaves at once: what is pending would not let it go."""
    on_gpu, patience = torch.cuda.is_available(), datetime.timedelta(seconds=TIMEOUT)
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=datetime.timedelta(seconds=START))
    if on_gpu:
        torch.cuda.set_device(device)
    arguments: dict[str, Any] = {"device_id": device} if on_gpu else {}
    dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=world, timeout=patience, **arguments)
    report: dict[str, Any] = {"rank": rank, "after": []}
    code = ENDED
    try:
        steps(device, store, how, report)
        code = 0
    except AssertionError as error:
        code, report["text"] = WRONG, str(error)
    except Exception as error:
        report |= {"error": type(error).__name__, "text": str(error)}
    print(json.dumps(report), flush=True)
    os._exit(code)


def steps(device: torch.device, store: Any, how: str, report: dict[str, Any]) -> None:
    """Three chained layers, forward and backward, without DDP: its messages would be waited for too."""
    import syncbn
    from syncbn.torch.groups import communicator_of
    from syncbn.torch.peer_memory import mailbox_of

    rank, world = dist.get_rank(), dist.get_world_size()
    layers = torch.nn.Sequential(*[syncbn.SyncBatchNorm(8) for _ in range(3)]).to(device)
    report["transport"] = TRANSPORTS[mailbox_of(communicator_of(None), device) is not None]
    for turn in range(SOUND + MORE):
        if turn == SOUND and rank == world - 1:
            store.set("died", str(time.time()))
            os.kill(os.getpid(), SIGNALS[how])
        generator = torch.Generator().manual_seed(turn)
        sizes = [2 + r for r in range(world)]
        xs, dys = (
            [torch.randn(n, 8, 5, 4, generator=generator, dtype=torch.float64) * (1 + r) + r for r, n in enumerate(sizes)]
            for _ in "xy"
        )
        x = xs[rank].to(device, torch.float32).requires_grad_()
        y = layers(x)
        y.backward(dys[rank].to(device, torch.float32))
        got = [v.detach().double().cpu() for v in (y, x.grad)]
        if turn >= SOUND:
            report["after"].append("nan" if all(v.isnan().all() for v in got) else "numbers")
            continue
        whole = torch.cat(xs).requires_grad_()
        right = whole
        for layer in layers:
            right = torch.nn.functional.batch_norm(right, None, None, None, None, True, 0.0, layer.eps)
        right.backward(torch.cat(dys))
        for name, mine, its_right in zip(("output", "input gradient"), got, (right, whole.grad), strict=True):
            error = float((mine - its_right.detach().split(sizes)[rank]).abs().max())
            assert error < 1e-4, f"{name} of step {turn} off by {error}"


# ------------------------------------------------------------------------------------------------- all of them


class End(NamedTuple):
    """How a survivor ended: its exit status (None: not at all), its report, how long after the death, what it wrote to stderr."""

    status: int | None
    report: dict[str, Any]
    seconds: float
    said: str


def ends(how: str, transport: str, world: int) -> tuple[list[End], int | None]:
    """Runs the ranks; how the survivors ended, and the exit status of the one that died (None: it is there, stopped)."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {**os.environ, "SYNCBN_PEER_MEMORY": str(TRANSPORTS.index(transport)), "OMP_NUM_THREADS": "1"}
    # NCCL's watchdog leaves four times this for its dump, a minute by default, before it ends the process.
    environment["TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC"] = "1000"
    with contextlib.ExitStack() as files:
        outs, errors = ([files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(world)] for _ in range(2))
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, how, "--rank", f"{r},{world},{store.port}"], env=environment, stdout=out, stderr=error
            )
            for r, (out, error) in enumerate(zip(outs, errors, strict=True))
        ]
        try:
            seconds = watch(ranks, store, transport)
            statuses = [rank.poll() for rank in ranks]
        finally:
            for rank in ranks:
                # A stopped process is killed as well, without being woken.
                rank.kill()
                rank.wait(60)
        said = [[read(file) for file in both] for both in zip(outs, errors, strict=True)]
    found = [
        End(status, json.loads(out.splitlines()[-1]) if out.strip().endswith("}") else {}, after, error)
        for status, (out, error), after in zip(statuses, said, seconds, strict=True)
    ]
    return found[:-1], statuses[-1]


def read(file: Any) -> str:
    file.seek(0)
    return file.read()


def watch(ranks: list[Any], store: Any, transport: str) -> list[float]:
    """Until all survivors have ended, or the time is up: when each ended, in seconds after the death."""
    started, died = time.time(), None
    ended: dict[int, float] = {}
    while len(ended) < len(ranks) - 1 and time.time() < (
        started + START if died is None else died + TIMEOUT + MARGINS[transport]
    ):
        if died is None and store.check(["died"]):
            died = float(store.get("died"))
        ended |= {i: time.time() for i, rank in enumerate(ranks[:-1]) if i not in ended and rank.poll() is not None}
        time.sleep(0.05)
    since = started if died is None else died
    return [ended.get(i, time.time()) - since for i in range(len(ranks))]


def verdict(end: End, transport: str, victim: int) -> tuple[bool, str]:
    """Whether a survivor ended as it should, and how it did."""
    after, text = end.report.get("after", []), " ".join(end.report.get("text", "").split())
    if end.status is None:
        return False, f"still there after {end.seconds:.0f} s"
    if end.report and end.report.get("transport", transport) != transport:
        return False, f"the ranks met by {end.report['transport']}"
    if end.status == -signal.SIGABRT and transport == "backend":
        return "nccl" in end.said.lower(), f"aborted by NCCL's watchdog after {end.seconds:.1f} s"
    ended = f"{end.report.get('error')} after {end.seconds:.1f} s, outputs {after or 'none'}: {text[:160]}"
    if end.status != ENDED or "transport" not in end.report:
        return False, f"status {end.status}, {ended}\n{end.said[-3000:]}"
    if transport == "backend":
        return after == [], ended
    # The wait ended at its bound, with NaN; the next call raised, in the same step where the host waited for the device meanwhile.
    return "numbers" not in after and len(after) <= 1 and f"rank {victim} did not come in time" in text, ended


def check(how: str, transport: str, world: int) -> bool:
    """One line a survivor."""
    found, victims = ends(how, transport, world)
    died = victims == (-signal.SIGKILL if how == "killed" else None)
    if not died:
        print(f"{how}, {transport}: WRONG: the rank that was to die ended with {victims}", flush=True)
    right = [verdict(end, transport, world - 1) for end in found]
    for rank, (ok, text) in enumerate(right):
        print(f"{how}, {transport}: {'ok' if ok else 'WRONG'}: rank {rank}: {text}", flush=True)
    return died and all(ok for ok, _ in right)


def main() -> None:
    gpus = torch.cuda.device_count()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checks", nargs="*", metavar="killed|stopped", default=list(SIGNALS))
    parser.add_argument("--transport", action="append", choices=TRANSPORTS, help="all that there are, if not given")
    parser.add_argument("--replicas", type=int, default=gpus if gpus > 1 else 2)
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if set(given.checks) - set(SIGNALS):
        parser.error(f"checks are {', '.join(SIGNALS)}")
    if given.rank:
        rank, world, port = map(int, given.rank.split(","))
        rank_main(rank, world, port, given.checks[0])
    transports = given.transport or TRANSPORTS[: 1 + (gpus > 1)]
    right = [check(how, transport, given.replicas) for transport in transports for how in given.checks]
    sys.exit(0 if all(right) else 1)


if __name__ == "__main__":
    main()
