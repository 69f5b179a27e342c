"""Arrays, as a part of the suite `queue`: how fast one drains, and the cost of a million waiting elements."""

import asyncio
import time
from contextlib import AsyncExitStack
from typing import Final

from benchmarks import memory, pjwd
from benchmarks.clients import TRUE, connected
from benchmarks.report import Figure, Held, median
from pjw.v1 import job_worker_pb2 as pb
from tests.support.service import CALL_SECONDS, Service

SUITE: Final = "queue"
ELEMENTS: Final = 1_000_000
KIB: Final = 1024
# The bounds of one job, which hold for its whole array too: pages of the table, objects of Python.
TABLE_BOUND: Final = 64 * KIB
MEMORY_BOUND: Final = 2 * KIB * KIB
# as a ratio to a start with an empty queue
START_BOUND: Final = 1.25


def drained(service: Service, count: int, slots: int) -> float:
    """Return the elements that begin and end in a second: *count* in the array, *slots* at once."""

    async def drain() -> float:
        async with AsyncExitStack() as stack:
            stub = await stack.enter_async_context(connected(service))
            began = time.perf_counter()
            array = pb.QueuedJob(start=pb.StartRequest(argv=pb.Argv(arguments=[TRUE])))
            array.array = f"1-{count}%{slots}"
            [job] = (await stub.Submit(pb.SubmitRequest(jobs=[array]), timeout=CALL_SECONDS)).jobs
            ended = (await stub.Wait(pb.WaitRequest(id=job.id))).job
            seconds = time.perf_counter() - began
        if ended.array.succeeded != count:
            raise RuntimeError(f"the array ended so:\n{ended}")
        return count / seconds

    return asyncio.run(drain())


def waiting(config: str, *, rounds: int) -> list[Figure]:
    """Return the costs of an array of a million that waits: memory, bytes in the table, a start of pjwd."""
    with pjwd.running(("alice",), config) as service:
        empty, no_table = _restarts(service, rounds)
        fresh = memory.settled(service.pid)
        with service.stub() as stub:
            array = pb.QueuedJob(start=pb.StartRequest(argv=pb.Argv(arguments=[TRUE])), held=True)
            array.array = f"0-{ELEMENTS - 1}%8"
            [job] = stub.Submit(pb.SubmitRequest(jobs=[array]), timeout=CALL_SECONDS).jobs
            stub.List(pb.ListRequest(), timeout=CALL_SECONDS)
        grown = memory.settled(service.pid) - fresh
        full, table = _restarts(service, rounds)
        with service.stub() as stub:
            stub.Stop(pb.StopRequest(id=job.id), timeout=CALL_SECONDS)
    named = f"{ELEMENTS:,} elements that wait"
    return [
        _bounded(f"{named}: memory", grown, MEMORY_BOUND),
        _bounded(f"{named}: table", table - no_table, TABLE_BOUND),
        Figure(SUITE, f"{named}: start of pjwd", full * 1000, "ms", "empty queue", empty * 1000, START_BOUND),
    ]


def _bounded(name: str, value: int, bound: int) -> Figure:
    return Figure(SUITE, name, max(0, value) / KIB, "KiB", "bound", bound / KIB, 1.0, held=Held.NEVER)


def _restarts(service: Service, rounds: int) -> tuple[float, int]:
    """Return the seconds until pjwd answers, and the bytes of its table."""
    seconds, size = [], 0
    for _ in range(rounds):
        service.stop()
        size = (service.state / "jobs.sqlite").stat().st_size
        began = time.perf_counter()
        service.start()
        seconds.append(time.perf_counter() - began)
    return median(seconds), size
