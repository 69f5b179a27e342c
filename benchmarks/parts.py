"""Measure the parts of a start: those of the call, the worker, the launcher and the kernel.

These run in turns: a call that does nothing (to a bare grpc.aio server with pjwd's options), Get and Start of
pjwd, the same start by the library, which makes no call, the launcher's part of that start, and the kernel's
floor. The goals of suite `start` are ratios to the floor. A call and a floor together are the least that a
service of this kind would take if it did nothing else.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, ParamSpec, TypeVar
from unittest import mock

from benchmarks import grpc_source, pjwd
from benchmarks.clients import TRUE, run_once
from benchmarks.floor import NAMESPACES, Floor, build
from benchmarks.report import Figure, Held, median
from pjw.model import JobSpec
from pjw.v1 import job_worker_pb2 as pb
from pjw.v1.job_worker_pb2_grpc import JobWorkerServiceStub
from pjw.worker import Worker, WorkerSettings
from pjw.worker.launcher_client import LauncherClient
from tests.support.service import Service
from tests.support.worker_harness import UIDS, uid_range

ROUNDS: Final = 300
QUICK_ROUNDS: Final = 60
FLOOR: Final = "kernel's floor"
NOTHING: Final = "a call that does nothing"
LEAST: Final = f"{NOTHING} and a floor"

_P = ParamSpec("_P")
_R = TypeVar("_R")


def run(*, quick: bool) -> list[Figure]:
    """Measure all parts in turns."""
    with ExitStack() as stack:
        directory = stack.enter_context(pjwd.directory())
        # before this process has threads of gRPC, since the library starts a process
        library = stack.enter_context(_library(directory / "state"))
        floor = stack.enter_context(Floor(build(directory), NAMESPACES, [TRUE]))
        service = stack.enter_context(pjwd.running())
        stub = stack.enter_context(service.stub())
        job_id = pjwd.start(service, [TRUE])
        idle = stack.enter_context(nothing(service))
        parts: dict[str, Callable[[], float]] = {
            FLOOR: lambda: floor.run().start,
            NOTHING: lambda: timed(idle, job_id),
            "Get": lambda: timed(stub, job_id),
            "Start": lambda: run_once(stub).start,
            "the library's start": library.start,
        }
        found: dict[str, list[float]] = {name: [] for name in parts}
        for number in range(-2, QUICK_ROUNDS if quick else ROUNDS):
            for name, part in parts.items():
                seconds = part()
                # the first two are for caches and connections
                if number >= 0:
                    found[name].append(seconds)
        found["of that, the launcher's"] = library.launches[2:]
    times = {name: median(seconds) * 1e3 for name, seconds in found.items()}
    reference = times.pop(FLOOR)
    times[LEAST] = times[NOTHING] + reference
    # they show the parts; suite `start` has a bound for the whole
    return [
        Figure("parts", name, value, "ms", FLOOR, reference, held=Held.NEVER) for name, value in times.items()
    ]


def timed(stub: JobWorkerServiceStub, job_id: int) -> float:
    """Return the seconds that a Get takes."""
    began = time.perf_counter()
    assert stub.Get(pb.GetRequest(id=job_id)).job.id == job_id
    return time.perf_counter() - began


@contextmanager
def nothing(service: Service) -> Iterator[JobWorkerServiceStub]:
    """Give a connection to a bare grpc.aio server, whose Get does nothing."""
    with (
        grpc_source.running(service.certs, 0) as (address, _),
        service.channel(address=address) as channel,
    ):
        yield JobWorkerServiceStub(channel)


class _Library:
    """A worker in this process, and the seconds of its launches."""

    def __init__(self, runner: asyncio.Runner, worker: Worker) -> None:
        self._runner: Final = runner
        self._worker: Final = worker
        self.launches: Final[list[float]] = []

    def start(self) -> float:
        """Run a whole life; return the seconds until the command was executed."""
        began = time.perf_counter()
        job = self._runner.run(self._worker.start(JobSpec([TRUE])))
        seconds = time.perf_counter() - began
        job = self._runner.run(self._worker.wait(job.id))
        if job.exit_status is None or job.exit_status.code != 0:
            raise RuntimeError(f"{TRUE} ended so: {job}")
        return seconds


@contextmanager
def _library(state: Path) -> Iterator[_Library]:
    settings = WorkerSettings(uid_first=uid_range(), uid_count=UIDS)
    with asyncio.Runner() as runner:
        worker = runner.run(Worker.open(str(state), settings))
        library = _Library(runner, worker)
        ask = _timing(LauncherClient.request_launch, library.launches)
        try:
            with mock.patch.object(LauncherClient, "request_launch", ask):
                yield library
        finally:
            runner.run(worker.close())


def _timing(call: Callable[_P, Awaitable[_R]], seconds: list[float]) -> Callable[_P, Awaitable[_R]]:
    async def timed(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        began = time.perf_counter()
        try:
            return await call(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - began)

    return timed
