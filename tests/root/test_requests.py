"""Starts with a name or a request id, and waiting for an end: on real workers and a real pjwd."""

import asyncio
import os
import signal
from collections.abc import Callable
from typing import Any, Final

import grpc
import pytest

from pjw.errors import LaunchError, LimitReachedError, NameTakenError
from pjw.model import KNOWN_STATES, EndReason, JobSpec, JobState, QueueSpec
from pjw.v1 import job_worker_pb2 as pb
from pjw.worker import Worker
from pjw.worker.launcher_client import LauncherClient
from pjw.worker.pages import JobFilter
from pjw.worker.settings import Quotas
from tests.support.service import CALL_SECONDS, Service, wait_for
from tests.support.worker_harness import ASK, Bench, WorkerProcess, launchers_of, run, start, start_said

NAP: Final = ["sleep", "300"]


def held(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Have launches wait, once their row is there, for this to be set."""
    go, ask = asyncio.Event(), LauncherClient.request_launch

    async def wait_and_ask(*arguments: Any) -> Any:
        await go.wait()
        return await ask(*arguments)

    monkeypatch.setattr(LauncherClient, "request_launch", wait_and_ask)
    return go


# --- names


async def test_a_name_is_free_again_when_its_job_has_ended(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused while it is borne, by a job that is being launched too; a refused start leaves nothing."""
    go = held(monkeypatch)
    first = asyncio.ensure_future(worker.start(JobSpec(NAP, name="web"), "alice"))
    await asyncio.sleep(0)
    with pytest.raises(NameTakenError, match="cannot start a job called web: job 1 already has that name"):
        await worker.start(JobSpec(NAP, name="web"), "alice")
    go.set()
    job = await first
    assert job.name == "web"
    await worker.stop(job.id)
    again = await worker.start(JobSpec(NAP, name="web"), "alice")
    assert [job.id for job in await worker.list()] == [job.id, again.id]


async def test_a_launch_that_failed_gives_its_name_back(worker: Worker) -> None:
    """And its request id: nothing came of it."""
    spec = JobSpec(["/nosuch"], name="web", request_id="r")
    for _ in range(2):
        with pytest.raises(LaunchError):
            await worker.start(spec)
    assert await worker.list() == []


# --- request ids


async def test_a_request_starts_one_job_however_often_it_is_made(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, while it is launched, while it runs, and when it has ended: always the first one's job."""
    spec = JobSpec(NAP, request_id="r")
    go = held(monkeypatch)
    calls = [asyncio.ensure_future(worker.start(spec, "alice")) for _ in range(10)]
    # another client's request, and none at all, are others
    others = [worker.start(spec, "bob"), worker.start(JobSpec(NAP), "alice")]
    go.set()
    jobs = await asyncio.gather(*calls)
    bob, unnamed = await asyncio.gather(*others)
    assert len({job.id for job in jobs}) == 1
    assert len({jobs[0].id, bob.id, unnamed.id}) == 3
    assert (await worker.start(spec, "alice")).state is JobState.RUNNING
    await worker.stop(jobs[0].id)
    last = await worker.start(JobSpec("echo another command", request_id="r"), "alice")
    assert (last.id, last.reason) == (jobs[0].id, EndReason.STOPPED)
    assert worker.live_count == 2


async def test_the_error_of_a_launch_is_that_of_all_who_ask(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One launch, one error; nothing is left, and the next request begins anew."""
    go = held(monkeypatch)
    calls = [asyncio.ensure_future(worker.start(JobSpec(["/nosuch"], request_id="r"))) for _ in range(3)]
    await asyncio.sleep(0)
    go.set()
    errors = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(error) for error in errors] == [LaunchError] * 3
    assert await worker.list() == []
    # no id of the three was used but the first
    assert (await run(worker, "true"))[0].id == 2


async def test_a_repeated_request_needs_no_quota(bench: Bench) -> None:
    """It starts nothing, so it is not refused where no more may run; a refused start keeps nothing."""
    worker = await bench.open(quotas=Quotas(running_max=1))
    spec = JobSpec(NAP, request_id="r")
    job = await worker.start(spec)
    assert (await worker.start(spec)).id == job.id
    with pytest.raises(LimitReachedError):
        await worker.start(JobSpec(NAP, request_id="s"))
    await worker.stop(job.id)
    assert (await worker.start(JobSpec(NAP, request_id="s"))).id != job.id


async def test_who_asked_may_go(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its job stays, for whoever asks again with that id; without an id nothing stays."""
    go = held(monkeypatch)
    calls = [asyncio.ensure_future(worker.start(JobSpec(NAP, request_id=request))) for request in ("r", "")]
    await asyncio.sleep(0)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    go.set()
    job = await worker.start(JobSpec(NAP, request_id="r"))
    assert job.state is JobState.RUNNING
    async with asyncio.timeout(20):
        while [job.id for job in await worker.list()] != [job.id]:
            await asyncio.sleep(0.01)
    # by now one whose end had been asked for as well would have ended
    await run(worker, "sleep 0.2")
    assert (await worker.get(job.id)).state is JobState.RUNNING


async def test_a_request_is_remembered_after_kill_9(bench: Bench) -> None:
    """Of a job that runs, of one that ended meanwhile, and of one that was killed in mid-launch."""
    first = WorkerProcess(bench)
    running = first.start("sleep 300", request_id="running")
    ended = first.start(ASK + "read x <&3", request_id="ended")
    # the launcher stands still: the row is written, and the launch cannot be
    [launcher] = launchers_of(first.process.pid)
    os.kill(launcher, signal.SIGSTOP)
    first.write(do="start", command="sleep 300", limits={}, request_id="launching")
    wait_for((bench.state / "jobs" / str(ended + 1) / "status").exists)
    first.kill(launcher_first=True)
    bench.tell(ended)

    worker = await bench.open()
    assert (await worker.start(JobSpec(NAP, request_id="running"))).id == running
    assert (await worker.start(JobSpec(NAP, request_id="ended"))).id == ended
    assert (await worker.wait(ended)).reason is EndReason.COMPLETED
    lost = await worker.start(JobSpec(NAP, request_id="launching"))
    assert (lost.id, lost.state, lost.reason) == (ended + 1, JobState.LOST, EndReason.LAUNCH_INTERRUPTED)
    assert worker.live_count == 1


def test_a_service_that_is_killed_starts_nothing_twice(make_service: Callable[..., Service]) -> None:
    """kill -9 of pjwd between two calls with one id: the second gets the job of the first."""
    service = make_service().start()
    request = pb.StartRequest(command="sleep 300", request_id="r", name="web", labels={"k": "v"})
    with service.stub() as stub:
        job = stub.Start(request, timeout=CALL_SECONDS).job
    service.stop(signal.SIGKILL)
    service.start()
    with service.stub() as stub:
        again = stub.Start(request, timeout=CALL_SECONDS).job
        assert again.id == job.id
        assert (again.state, again.name, dict(again.labels)) == (pb.JOB_STATE_RUNNING, "web", {"k": "v"})
        with pytest.raises(grpc.RpcError) as caught:
            stub.Start(pb.StartRequest(command="true", name="web"), timeout=CALL_SECONDS)
        assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
        listed = stub.List(pb.ListRequest(labels={"k": "v"}, newest_first=True, page_size=1))
        assert [each.id for each in listed.jobs] == [job.id]
        stub.Stop(pb.StopRequest(id=job.id), timeout=CALL_SECONDS)


# --- lists by state


async def test_states_are_those_of_the_moment(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table knows ends alone; which jobs start, run or are being stopped, those say who run them."""
    go = held(monkeypatch)
    go.set()
    ended, _ = await run(worker, "true")
    running = await start(worker, NAP)
    stopping = await start_said(worker, "trap '' TERM; echo; while :; do sleep 300; done", b"\n")
    stop = asyncio.ensure_future(worker.stop(stopping.id, grace_seconds=300))
    go.clear()
    starting = asyncio.ensure_future(start(worker, NAP))
    waiting = await worker.start(JobSpec(NAP, queue=QueueSpec(held=True)))
    async with asyncio.timeout(20):
        while (await worker.get(stopping.id)).state is not JobState.STOPPING or worker.live_count != 3:
            await asyncio.sleep(0.01)
    found = {
        state: [job.id for job in (await worker.page(wanted=JobFilter(frozenset({state})))).jobs]
        for state in KNOWN_STATES
    }
    go.set()
    await starting
    await worker.stop(stopping.id, grace_seconds=0)
    await stop
    assert found == {
        JobState.STARTING: [(await starting).id],
        JobState.RUNNING: [running.id],
        JobState.STOPPING: [stopping.id],
        JobState.EXITED: [ended.id],
        JobState.LOST: [],
        JobState.QUEUED: [waiting.id],
    }


# --- wait


def test_wait_answers_at_the_end(service: Service) -> None:
    """With the final snapshot; at once for a job that has ended; NOT_FOUND for another client's."""
    job_id = service.start_job(ASK + "read x <&3; exit 7")
    with service.stub() as stub:
        call = stub.Wait.future(pb.WaitRequest(id=job_id))
        with pytest.raises(grpc.FutureTimeoutError):
            call.result(timeout=0.3)
        fifo = service.state / "scratch" / str(job_id) / "ask"
        wait_for(fifo.exists)
        fifo.write_bytes(b"go\n")
        job = call.result(timeout=CALL_SECONDS).job
        assert (job.state, job.exit_code) == (pb.JOB_STATE_EXITED, 7)
        assert stub.Wait(pb.WaitRequest(id=job_id), timeout=CALL_SECONDS).job == job
    with service.stub("bob") as stub, pytest.raises(grpc.RpcError) as caught:
        stub.Wait(pb.WaitRequest(id=job_id), timeout=CALL_SECONDS)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_who_waits_may_go_and_is_sent_away_by_a_drain(make_service: Callable[..., Service]) -> None:
    """A deadline ends the waiting alone; SIGTERM of pjwd is UNAVAILABLE, and the job goes on."""
    service = make_service().start()
    job_id = service.start_job("sleep 300")
    with service.stub() as stub:
        with pytest.raises(grpc.RpcError) as caught:
            stub.Wait(pb.WaitRequest(id=job_id), timeout=0.3)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert service.job(job_id).state == pb.JOB_STATE_RUNNING
        call = stub.Wait.future(pb.WaitRequest(id=job_id))
        with pytest.raises(grpc.FutureTimeoutError):
            call.result(timeout=0.3)
        assert service.stop() == 0
        assert call.code() is grpc.StatusCode.UNAVAILABLE
    service.start()
    assert service.job(job_id).state == pb.JOB_STATE_RUNNING
    service.ok("stop", str(job_id))


def test_calls_that_wait_take_nobody_s_place(make_service: Callable[..., Service]) -> None:
    """They are counted by themselves: a client that waits for many jobs can still ask for one."""
    service = make_service(config="[clients]\ncalls_max = 1\nfollowers_max = 3\n").start()
    job_id = service.start_job("sleep 300")
    with service.stub() as stub:
        calls = [stub.Wait.future(pb.WaitRequest(id=job_id)) for _ in range(3)]
        with pytest.raises(grpc.FutureTimeoutError):
            calls[-1].result(timeout=0.3)
        assert service.job(job_id).state == pb.JOB_STATE_RUNNING
        with pytest.raises(grpc.RpcError) as caught:
            stub.Wait(pb.WaitRequest(id=job_id), timeout=CALL_SECONDS)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        service.ok("stop", str(job_id))
        assert {call.result(timeout=CALL_SECONDS).job.reason for call in calls} == {pb.END_REASON_STOPPED}
