"""Clients of a pjwd that start `true` again and again, each over its own connection, and wait for its end.

They learn of the end by a Logs stream from byte 0, which ends with the job: Get would have to be called again
and again, and Stop would end the job itself.
"""

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Final

from benchmarks.connect import secure_channel
from benchmarks.floor import Run
from benchmarks.pjwd import jobs
from pjw.v1 import job_worker_pb2 as pb
from pjw.v1.job_worker_pb2_grpc import JobWorkerServiceStub
from tests.support.service import Service

if TYPE_CHECKING:
    # the stub of both when it runs
    from pjw.v1.job_worker_pb2_grpc import JobWorkerServiceAsyncStub

TRUE: Final = shutil.which("true") or "/bin/true"
_REQUEST: Final = pb.StartRequest(argv=pb.Argv(arguments=[TRUE]))


def run_once(stub: JobWorkerServiceStub) -> Run:
    """Run one whole life, by the synchronous stub: its calls cost less than those of grpc.aio."""
    began = time.perf_counter()
    job_id = stub.Start(_REQUEST).job.id
    started = time.perf_counter()
    _require_silence(stub.Logs(pb.LogsRequest(id=job_id)))
    ended = time.perf_counter()
    job = stub.Get(pb.GetRequest(id=job_id)).job
    _require_success([job])
    return Run(started - began, ended - began)


async def run_many(service: Service, clients: int, count: int) -> float:
    """Run *count* whole lives by several clients at once; return the seconds until the last one ended.

    By grpc.aio: 64 threads cost us more than 64 tasks, and we share the processors with the server.
    """
    left = iter(range(count))
    job_ids: list[int] = []

    async def work(stub: "JobWorkerServiceAsyncStub") -> None:
        for _ in left:
            job_id = (await stub.Start(_REQUEST)).job.id
            async for _ in stub.Logs(pb.LogsRequest(id=job_id)):
                raise RuntimeError(f"job {job_id} wrote something")
            job_ids.append(job_id)

    async with AsyncExitStack() as stack:
        stubs = [await stack.enter_async_context(connected(service)) for _ in range(clients)]
        began = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for stub in stubs:
                tasks.create_task(work(stub))
        seconds = time.perf_counter() - began
        if len(set(job_ids)) != count:
            raise RuntimeError(f"{len(set(job_ids))} jobs instead of {count}")
    with service.stub() as sync_stub:
        _require_success(jobs(sync_stub, after=min(job_ids) - 1))
    return seconds


@asynccontextmanager
async def connected(service: Service, client: str = "alice") -> AsyncIterator["JobWorkerServiceAsyncStub"]:
    """Give a separate connection to a service, as one of its clients."""
    async with secure_channel(service.address, service.certs, client) as channel:
        await channel.channel_ready()
        yield JobWorkerServiceStub(channel)


def _require_silence(chunks: Iterator[pb.LogsResponse]) -> None:
    for _ in chunks:
        raise RuntimeError("true wrote something")


def _require_success(jobs: Iterable[pb.Job]) -> None:
    for job in jobs:
        if job.state != pb.JOB_STATE_EXITED or not job.HasField("exit_code") or job.exit_code != 0:
            raise RuntimeError(f"true did not end as it should: {job}")
