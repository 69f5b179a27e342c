"""What becomes of jobs that wait when something else changes: a certificate, the configuration, a restart."""

import asyncio
import json
import os
import signal
from collections.abc import Callable

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from pjw.errors import LimitReachedError
from pjw.model import EndReason, JobSpec, JobState, QueueSpec, Retry
from pjw.v1 import job_worker_pb2 as pb
from pjw.worker import QueueSlots
from pjw.worker.settings import Quotas
from tests.root.test_queue import running, said
from tests.root.test_reload import serial_line
from tests.support.service import CALL_SECONDS, Service, reloaded, wait_for
from tests.support.worker_harness import ASK, DEADLINE_SECONDS, Bench

ONE = "[queue]\nrunning_max = 1\n"


def submit(service: Service, *commands: str) -> list[int]:
    """Put jobs of alice's into the queue by raw calls; their ids."""
    jobs = [pb.QueuedJob(start=pb.StartRequest(command=command)) for command in commands]
    with service.stub() as stub:
        return [job.id for job in stub.Submit(pb.SubmitRequest(jobs=jobs), timeout=CALL_SECONDS).jobs]


def wrote(service: Service, job_id: int, text: bytes) -> Callable[[], bool]:
    """Whether a job has written this, read behind the service's back."""
    path = service.state / "jobs" / str(job_id) / "output"
    return lambda: path.exists() and path.read_bytes() == text


def test_a_certificate_is_revoked(make_service: Callable[..., Service]) -> None:
    """Its client is out at once, and its watch ends; its jobs go on, those that wait as those that run."""
    service = make_service()
    revoked = service.directory / "revoked"
    revoked.touch()
    config = f'revoked = "{revoked}"\n{ONE}'
    service.config = config
    service.start()
    runs, waits = submit(service, ASK + "read line <&3; echo a", "echo b")
    retried = pb.QueuedJob(
        start=pb.StartRequest(command="[ $PJW_ATTEMPT = 2 ] && echo c"),
        retry=pb.Retry(times=1, backoff=Duration(seconds=1)),
    )
    wait_for(lambda: service.job(runs).state == pb.JOB_STATE_RUNNING)
    with service.stub() as alice:
        alice.Submit(pb.SubmitRequest(jobs=[retried]), timeout=CALL_SECONDS)
        watch = alice.WatchJobs(pb.WatchJobsRequest(), timeout=CALL_SECONDS)
        next(watch)
        revoked.write_bytes(serial_line(service.certs / "alice.crt"))
        os.kill(service.pid, signal.SIGHUP)
        with pytest.raises(grpc.RpcError) as ended:
            list(watch)
        assert ended.value.code() is grpc.StatusCode.UNAUTHENTICATED
    with service.stub() as alice, pytest.raises(grpc.RpcError) as ended:
        alice.List(pb.ListRequest(), timeout=CALL_SECONDS)
    assert ended.value.code() is grpc.StatusCode.UNAUTHENTICATED
    service.tell(runs)
    wait_for(wrote(service, runs, b"a\n"))
    wait_for(wrote(service, waits, b"b\n"))
    # the second attempt of the job after these
    wait_for(wrote(service, waits + 2, b"c\n"))
    # or nobody could stop what is left
    revoked.write_text("")
    os.kill(service.pid, signal.SIGHUP)
    wait_for(lambda: service.pjw("list").returncode == 0)


def test_a_client_is_taken_out_of_the_configuration(make_service: Callable[..., Service]) -> None:
    """Its jobs go on, with the weight and the sums of all others; a table of its own is nothing it needs."""
    named = f"{ONE}[clients.by_name.alice]\nweight = 500\nmemory_max_bytes = 1000000000\n"
    service = make_service(config=named).start()
    runs, waits = submit(service, ASK + "read line <&3", "echo b")
    wait_for(lambda: service.job(runs).state == pb.JOB_STATE_RUNNING)
    reloaded(service, ONE)
    assert json.loads(service.ok("quota", "--format", "json"))["weight"] == 100
    service.tell(runs)
    assert service.ok("wait", str(waits)) == "0\n"


async def test_lower_limits_of_a_client(bench: Bench) -> None:
    """Nothing that waits is lost: it waits until the client has fewer jobs than the new limit."""
    worker = await bench.open(queue=QueueSlots(running_max=3, cpu_max_millicores=0))
    jobs = await worker.submit([JobSpec(ASK + "read line <&3", queue=QueueSpec())] * 3)
    for job in jobs:
        await running(worker, job)
    [waits] = await worker.submit([JobSpec(["true"], queue=QueueSpec())])
    worker.reconfigure(bench.changed(quotas=Quotas(running_max=1, queued_max=1)))
    for job in jobs[:2]:
        assert (await worker.get(waits.id)).state is JobState.QUEUED
        bench.tell(job.id)
        await worker.wait(job.id)
    await said(worker, waits, "waits: local has reached the maximum of running jobs, 1")
    bench.tell(jobs[2].id)
    assert (await worker.wait(waits.id)).succeeded


async def test_limits_hold_after_a_restart(bench: Bench) -> None:
    """A job whose client is at a limit waits on, and says why, until there is room."""
    slots = QueueSlots(cpu_max_millicores=0)
    worker = await bench.open(queue=slots, quotas=Quotas(running_max=1, queued_max=1))
    [runs] = await worker.submit([JobSpec(ASK + "read line <&3", queue=QueueSpec())])
    await running(worker, runs)
    [waits] = await worker.submit([JobSpec(["true"], queue=QueueSpec())])
    await said(worker, waits, "waits: local has reached the maximum of running jobs, 1")
    await bench.close(worker)
    worker = await bench.open()
    await said(worker, waits, "waits: local has reached the maximum of running jobs, 1")
    with pytest.raises(LimitReachedError, match="the queue takes at most 1 jobs of local"):
        await worker.submit([JobSpec(["true"], queue=QueueSpec())])
    bench.tell(runs.id)
    assert (await worker.wait(waits.id)).succeeded


async def test_a_pause_outlives_the_worker(bench: Bench) -> None:
    """The next attempt waits as long as it was to; a stop takes it out of the queue, also after a restart."""
    worker = await bench.open()
    retry = QueueSpec(retry=Retry(3, backoff_seconds=1000))
    first, other = await worker.submit([JobSpec("exit 1", queue=retry)] * 2)
    for job in (first, other):
        async with asyncio.timeout(DEADLINE_SECONDS):
            while (await worker.get(job.id)).retried_as is None:
                await asyncio.sleep(0.02)
    next_id = (await worker.get(first.id)).retried_as
    assert next_id is not None
    before = await worker.get(next_id)
    await bench.close(worker)
    worker = await bench.open()
    after = await worker.get(next_id)
    assert (after.state, after.not_before, after.attempt) == (JobState.QUEUED, before.not_before, 2)
    for job in (first, other):
        stopped = await worker.stop(job.id)
        assert (stopped.attempt, stopped.reason) == (2, EndReason.CANCELLED)
    assert len(await worker.list()) == 4
