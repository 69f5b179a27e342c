"""Measure a gateway with 1,000 nodes and 100,000 jobs: its resources, its rate, its answers meanwhile.

The gateway is real, and so are the sessions, certificates and claims of its nodes. The nodes run nothing.
"""

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks import pjwd
from benchmarks.clients import TRUE, connected
from benchmarks.processes import own_cpu_seconds, pss_bytes
from benchmarks.report import Figure, Held, median, percentile
from benchmarks.simulated_nodes import name_of
from pjw.certs import authority
from pjw.v1 import job_worker_pb2 as pb
from tests.support.cluster import Gateway

if TYPE_CHECKING:
    # the stub of both when it runs
    from pjw.v1.job_worker_pb2_grpc import JobWorkerServiceAsyncStub

SUITE: Final = "simulation"
# the most that one call may have
_BATCH: Final = 500
_JOB_SECONDS: Final = 5.0
_IDLE_SECONDS: Final = 20.0
_CONNECT_SECONDS: Final = 300.0
CONFIG: Final = """
[clients]
starts_per_second = 0
calls_max = 0
calls_per_second = 0
connections_max = 0
running_max = 0
running_total_max = 0
queued_max = 0
queued_bytes_max = 0
queued_total_max = 0
queued_bytes_total_max = 0
[retention]
jobs_per_client = 0
[port]
connections_max = 4096
unproven_max = 4096
unproven_per_address_max = 4096
"""


def run(*, quick: bool) -> list[Figure]:
    """Measure all of it."""
    nodes, jobs = (50, 2_000) if quick else (1_000, 100_000)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(pjwd.directory()))
        gateway = stack.enter_context(_gateway(directory))
        before = pss_bytes(gateway.pid)
        began, used = time.perf_counter(), own_cpu_seconds(gateway.pid)
        stack.enter_context(_simulated(gateway, nodes))
        joined = time.perf_counter() - began
        join_cpu = own_cpu_seconds(gateway.pid) - used
        with_nodes = pss_bytes(gateway.pid)
        used = own_cpu_seconds(gateway.pid)
        time.sleep(_IDLE_SECONDS)
        idle = (own_cpu_seconds(gateway.pid) - used) / _IDLE_SECONDS
        found = asyncio.run(_jobs(gateway, jobs))
        return [
            _of("nodes that join a second", nodes / joined, "/s"),
            _of("CPU of a node that joins", 1e3 * join_cpu / nodes, "ms"),
            _of("memory of a node", (with_nodes - before) / nodes / 1024, "KiB"),
            _of(f"CPU with {nodes:,} idle nodes", 100 * idle, "% of one"),
            *found,
        ]


def _of(name: str, value: float, unit: str) -> Figure:
    return Figure(SUITE, name, value, unit, held=Held.NEVER)


@contextmanager
def _gateway(directory: Path) -> Iterator[Gateway]:
    gateway = Gateway(directory, clients=("alice", "gate"))
    certs = gateway.certs
    gateway.config = f'[gateway]\ncrt = "{certs / "gate.crt"}"\nkey = "{certs / "gate.key"}"\n{CONFIG}'
    gateway.pjwd = pjwd.program()
    gateway.start()
    try:
        yield gateway
        code = gateway.stop()
        if code or "Traceback" in gateway.log.read_text():
            raise RuntimeError(f"the gateway ended with {code}:\n{gateway.log.read_text()[-3000:]}")
    finally:
        if gateway.process is not None and gateway.process.poll() is None:
            gateway.stop(signal.SIGKILL)


@contextmanager
def _simulated(gateway: Gateway, nodes: int) -> Iterator[None]:
    for number in range(nodes):
        authority.write_node(str(gateway.certs), name_of(number))
    command = [
        sys.executable,
        "-m",
        "benchmarks.simulated_nodes",
        gateway.address.replace("127.0.0.1", "localhost"),
    ]
    with subprocess.Popen(
        [*command, str(gateway.certs), str(nodes), str(_JOB_SECONDS)], stdout=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline() != b"connected\n":
                raise RuntimeError("the nodes could not connect")
            yield
        finally:
            process.terminate()


async def _jobs(gateway: Gateway, count: int) -> list[Figure]:
    """Put *count* jobs into the queue, and ask for jobs until the last one has ended."""
    async with AsyncExitStack() as stack:
        submitting, watching, asking = [await stack.enter_async_context(connected(gateway)) for _ in range(3)]
        memory = pss_bytes(gateway.pid)
        began, used = time.perf_counter(), own_cpu_seconds(gateway.pid)
        ended = asyncio.ensure_future(_until_ended(watching, count))
        latencies = asyncio.ensure_future(_ask(asking, ended))
        await _submit(submitting, count)
        submitted = time.perf_counter() - began
        waiting = await submitting.List(pb.ListRequest(states=[pb.JOB_STATE_QUEUED], page_size=1))
        behind = count - (waiting.jobs[0].id if waiting.jobs else count)
        most = pss_bytes(gateway.pid)
        await ended
        seconds = time.perf_counter() - began
        cpu = own_cpu_seconds(gateway.pid) - used
        gets, lists = await latencies
    return [
        _of(f"jobs that are put there, {_BATCH} a call", count / submitted, "/s"),
        _of("jobs from the queue to their end", count / seconds, "/s"),
        _of("CPU of a job", 1e3 * cpu / count, "ms"),
        *(
            [_of("memory of a job that waits", (most - memory) / behind / 1024, "KiB")]
            if behind >= 1_000
            else []
        ),
        _of("Get meanwhile, median", 1e3 * median(gets), "ms"),
        _of("Get meanwhile, 99th percentile", 1e3 * percentile(gets, 0.99), "ms"),
        _of("List of 100 meanwhile, median", 1e3 * median(lists), "ms"),
        _of("List of 100 meanwhile, 99th percentile", 1e3 * percentile(lists, 0.99), "ms"),
    ]


async def _submit(stub: "JobWorkerServiceAsyncStub", count: int) -> None:
    limits = pb.Limits(cpu_max_millicores=1000, memory_max_bytes=1024**3)
    job = pb.QueuedJob(start=pb.StartRequest(argv=pb.Argv(arguments=[TRUE]), limits=limits))
    for done in range(0, count, _BATCH):
        await stub.Submit(pb.SubmitRequest(jobs=[job] * min(_BATCH, count - done)))


async def _until_ended(stub: "JobWorkerServiceAsyncStub", count: int) -> None:
    """Return when *count* jobs have ended."""
    left = count
    async for response in stub.WatchJobs(pb.WatchJobsRequest(no_snapshot=True)):
        for change in response.changes:
            left -= change.job.state in (pb.JOB_STATE_EXITED, pb.JOB_STATE_LOST)
            if change.job.state == pb.JOB_STATE_LOST:
                raise RuntimeError(f"a job was lost:\n{change.job}")
        if left <= 0:
            return


async def _ask(
    stub: "JobWorkerServiceAsyncStub", until: "asyncio.Future[None]"
) -> tuple[list[float], list[float]]:
    """Measure a Get and a List, each ten times a second."""
    gets: list[float] = []
    lists: list[float] = []
    await asyncio.sleep(1)
    while not until.done():
        began = time.perf_counter()
        await stub.Get(pb.GetRequest(id=1))
        gets.append(time.perf_counter() - began)
        began = time.perf_counter()
        await stub.List(pb.ListRequest(page_size=100, newest_first=True))
        lists.append(time.perf_counter() - began)
        await asyncio.sleep(0.1)
    return gets, lists
