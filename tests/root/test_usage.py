"""What jobs use while they run: measured in real cgroups, kept over restarts, streamed to who watches."""

import asyncio
import itertools
import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Final

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from pjw.errors import JobNotFoundError, LauncherGoneError
from pjw.launcher import protocol
from pjw.model import JobState, UsageSample
from pjw.v1 import job_worker_pb2 as pb
from pjw.worker import Worker, usage_sampler
from pjw.worker.launcher_client import LauncherClient
from tests.support.service import CALL_SECONDS, Service, wait_for
from tests.support.worker_harness import ASK, MIB, Bench, WorkerProcess, launchers_of, run, start, start_said

BUSY: Final = "echo up; while :; do :; done"


async def history(worker: Worker, job_id: int, least: int) -> Sequence[UsageSample]:
    """The samples of a job, when there are so many."""
    async with asyncio.timeout(60):
        while len(samples := (await worker.usage_history(job_id))[1]) < least:
            await asyncio.sleep(0.05)
    return samples


async def measured(worker: Worker, job_id: int, condition: Callable[[UsageSample], bool]) -> UsageSample:
    """What a job uses, once that is as it should be."""
    async with asyncio.timeout(60):
        while True:
            for job, sample in await worker.usage_now(fresh_seconds=0):
                if job.id == job_id and sample is not None and condition(sample):
                    return sample
            await asyncio.sleep(0.02)


# --- measurements


async def test_what_a_running_job_uses(worker: Worker, bench: Bench) -> None:
    """Processor time grows, memory and processes are those of the moment: they come and they go."""
    busy = await start_said(worker, BUSY, b"up\n")
    before = await measured(worker, busy.id, lambda sample: sample.cpu_usage_usec > 0)
    after = await measured(
        worker, busy.id, lambda sample: sample.cpu_usage_usec > before.cpu_usage_usec + 50_000
    )
    assert after.time > before.time
    assert after.pids == 2

    script = f"python3 -c 'import os; x = bytearray({64 * MIB}); print(1, flush=True); os.read(3, 9)'; "
    job = await start_said(worker, ASK + script + "sleep 300 & sleep 300", b"1\n")
    full = await measured(worker, job.id, lambda sample: sample.memory_bytes > 64 * MIB)
    assert full.pids == 3
    bench.tell(job.id)
    empty = await measured(worker, job.id, lambda sample: sample.memory_bytes < 32 * MIB and sample.pids == 4)
    assert empty.cpu_usage_usec >= full.cpu_usage_usec


async def test_what_is_read_and_written_is_counted(worker: Worker) -> None:
    """As in the accounts of its end."""
    job = await start(worker, "dd if=/dev/zero of=f bs=1M count=8 oflag=direct 2>/dev/null; sleep 300")
    sample = await measured(worker, job.id, lambda sample: sample.io_write_bytes >= 8 * MIB)
    ended = await worker.stop(job.id, grace_seconds=0)
    assert ended.usage is not None
    assert ended.usage.io_write_bytes >= sample.io_write_bytes


async def test_jobs_that_have_ended_are_left_out(worker: Worker) -> None:
    """As are those that never were, and others' when they are asked for by their owner."""
    await run(worker, "true")
    alive = await start(worker, ["sleep", "300"], "alice")
    assert [job.id for job, _ in await worker.usage_now()] == [alive.id]
    assert [job.id for job, _ in await worker.usage_now("alice")] == [alive.id]
    assert await worker.usage_now("bob") == []
    for owner, job_id in (("bob", alive.id), (None, 10**6)):
        with pytest.raises(JobNotFoundError):
            await worker.usage_history(job_id, owner)


async def test_who_watches_at_once_shares_what_is_measured(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten at a time cost what one does; of many jobs only so many are measured in the time there is."""
    # for their histories they are measured as well
    monkeypatch.setattr(usage_sampler, "interval_seconds", lambda _: 3600)
    jobs = [await start(worker, ["sleep", "300"]) for _ in range(3)]
    asked: list[int] = []
    ask = LauncherClient.request_measure

    async def count(launcher: LauncherClient, job_ids: Sequence[int]) -> dict[int, UsageSample]:
        asked.extend(job_ids)
        return await ask(launcher, job_ids)

    monkeypatch.setattr(LauncherClient, "request_measure", count)
    everybody = await asyncio.gather(*(worker.usage_now(fresh_seconds=5) for _ in range(10)))
    assert all([job.id for job, _ in found] == [job.id for job in jobs] for found in everybody)
    assert sorted(asked) == [job.id for job in jobs]
    # ten measurements a second, in requests for one job each
    asked.clear()
    monkeypatch.setattr(usage_sampler, "MAX_MEASURED", 1)
    monkeypatch.setattr(usage_sampler, "WATCHED_PER_SECOND", 10)
    for turn in range(3):
        await asyncio.sleep(0.1)
        found = await worker.usage_now(fresh_seconds=0, within_seconds=0.05)
        assert len(found) == 3
        # the oldest goes first, so each has its turn
        assert len(set(asked)) == len(asked) == turn + 1


# --- history


async def test_who_asks_for_single_jobs_leaves_a_busy_launcher_alone(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One question that it does not answer in time is enough: more would hold up a start or a stop."""
    # for its history it is measured as well
    monkeypatch.setattr(usage_sampler, "interval_seconds", lambda _: 3600)
    job = await start(worker, "sleep 1000")
    asked: list[Sequence[int]] = []

    async def never(_: LauncherClient, job_ids: Sequence[int]) -> dict[int, UsageSample]:
        asked.append(job_ids)
        return await asyncio.Future()

    monkeypatch.setattr(LauncherClient, "request_measure", never)
    for _ in range(20):
        assert (await worker.get_with_usage(job.id)).id == job.id
    assert asked == [[job.id]]


async def test_a_history_grows_and_ends_with_the_accounts(worker: Worker, bench: Bench) -> None:
    """About a sample a second; no file before the first; the end is the last one; it goes with the job."""
    job = await start_said(worker, BUSY, b"up\n")
    path = bench.state / "jobs" / str(job.id) / "usage"
    samples = await history(worker, job.id, 3)
    assert (samples[0].time - job.start).total_seconds() > 0.8
    steps = [(b.time - a.time).total_seconds() for a, b in itertools.pairwise(samples)]
    # one that came late is followed by one in time
    assert all(0.3 < step < 30 for step in steps), steps
    assert all(a.cpu_usage_usec < b.cpu_usage_usec for a, b in itertools.pairwise(samples))
    ended = await worker.stop(job.id, grace_seconds=0)
    shown, after = await worker.usage_history(job.id)
    assert shown == ended
    assert list(after[: len(samples)]) == samples
    assert ended.usage is not None
    assert (after[-1].time, after[-1].cpu_usage_usec) == (ended.end, ended.usage.cpu_usage_usec)
    assert (after[-1].memory_bytes, after[-1].pids) == (0, 0)
    await worker.delete(job.id)
    assert not path.parent.exists()


async def test_the_history_of_a_silent_job_is_kept(worker: Worker, bench: Bench) -> None:
    """Nothing else is left of a job without output; of a short one nothing at all but its end."""
    job = await start(worker, ["sleep", "300"])
    await history(worker, job.id, 1)
    await worker.stop(job.id, grace_seconds=0)
    directory = bench.state / "jobs" / str(job.id)
    await asyncio.to_thread(wait_for, lambda: [path.name for path in directory.iterdir()] == ["usage"])
    assert len((await worker.usage_history(job.id))[1]) >= 2
    short, _ = await run(worker, "true")
    await asyncio.to_thread(wait_for, lambda: not (bench.state / "jobs" / str(short.id)).exists())
    assert [sample.time for sample in (await worker.usage_history(short.id))[1]] == [short.end]


async def test_a_job_that_has_ended_is_sampled_no_more(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it was just measured, and its row is on the way to a slow disk: else it would leave a file."""
    worker = await bench.open()
    measured, go, go_on = asyncio.Event(), asyncio.Event(), asyncio.Event()
    ask, sync, ids = LauncherClient.request_measure, worker.store.sync, list[int]()

    async def ask_and_wait(launcher: LauncherClient, job_ids: Sequence[int]) -> dict[int, UsageSample]:
        found = await ask(launcher, job_ids)
        ids.extend(found)
        measured.set()
        await go_on.wait()
        return found

    async def wait_and_sync() -> None:
        await go.wait()
        await sync()

    monkeypatch.setattr(LauncherClient, "request_measure", ask_and_wait)
    job = await start(worker, ASK + "read x <&3")
    monkeypatch.setattr(worker.store, "sync", wait_and_sync)
    async with asyncio.timeout(60):
        await measured.wait()
        bench.tell(job.id)
        # the end is known, and nobody has been told
        while JobState.RUNNING in (await worker.numbers()).live:
            await asyncio.sleep(0.001)
    assert ids == [job.id]
    go_on.set()
    go.set()
    await worker.wait(job.id)
    await asyncio.to_thread(wait_for, lambda: not (bench.state / "jobs" / str(job.id)).exists())


async def test_a_history_goes_on_after_kill_9(bench: Bench) -> None:
    """What was sampled before is there, and so is what comes after."""
    first = WorkerProcess(bench)
    job_id = first.start("sleep 300")
    path = bench.state / "jobs" / str(job_id) / "usage"
    wait_for(lambda: path.exists() and path.stat().st_size >= 2 * 48)
    first.kill(launcher_first=True)
    before = path.read_bytes()
    worker = await bench.open()
    samples = await history(worker, job_id, len(before) // 48 + 1)
    assert path.read_bytes().startswith(before)
    assert samples[-1].pids >= 2
    assert samples[-1].time > samples[0].time


async def test_a_disk_that_takes_no_samples_disturbs_nobody(
    worker: Worker, bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said, and tried again later; the job goes on, and the history has a gap."""
    monkeypatch.setattr(usage_sampler, "_RETRY_SECONDS", 0.1)
    job = await start(worker, ["sleep", "300"])
    obstacle = bench.state / "jobs" / str(job.id) / "usage"
    obstacle.unlink(missing_ok=True)
    obstacle.mkdir()
    async with asyncio.timeout(20):
        while f"cannot write the usage of job {job.id}: is a directory (EISDIR)" not in caplog.text:
            await asyncio.sleep(0.05)
    obstacle.rmdir()
    assert (await history(worker, job.id, 1))[-1].pids == 2
    caplog.clear()


async def test_many_jobs_are_sampled_in_turn_and_at_no_greater_cost(
    worker: Worker, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So many measurements a second and no more, each job when its turn comes."""
    monkeypatch.setattr(usage_sampler, "HISTORY_PER_SECOND", 8)
    asked: list[tuple[float, int]] = []
    ask = LauncherClient.request_measure

    async def count(launcher: LauncherClient, job_ids: Sequence[int]) -> dict[int, UsageSample]:
        asked.append((time.monotonic(), len(job_ids)))
        return await ask(launcher, job_ids)

    monkeypatch.setattr(LauncherClient, "request_measure", count)
    jobs = [await start(worker, ["sleep", "300"]) for _ in range(24)]
    for job in jobs:
        await history(worker, job.id, 1)
    took = asked[-1][0] - asked[0][0]
    # but for the last request, whose pause is still to come
    assert sum(number for _, number in asked[:-1]) <= 8 * took + 1
    assert max(number for _, number in asked) <= protocol.MAX_MEASURED


# --- over gRPC


def test_usage_over_grpc(service: Service) -> None:
    """History and snapshots of one's own jobs; another client's are not there."""
    job_id = service.start_job("echo up; while :; do :; done")
    with service.stub() as stub:
        request = pb.GetUsageHistoryRequest(id=job_id)
        wait_for(lambda: len(stub.GetUsageHistory(request, timeout=CALL_SECONDS).samples) >= 2)
        answer = stub.GetUsageHistory(request, timeout=CALL_SECONDS)
        assert answer.job.state == pb.JOB_STATE_RUNNING
        assert not answer.job.HasField("usage")
        assert 0 < answer.samples[0].cpu_usage_usec < answer.samples[1].cpu_usage_usec

        watch = stub.WatchUsage(pb.WatchUsageRequest(interval=Duration(seconds=1)))

        def of_job() -> list[pb.JobUsage]:
            # the service is other tests' too
            return [usage for usage in next(watch).jobs if usage.job.id == job_id]

        [one], [two] = of_job(), of_job()
        step = two.sample.time.ToNanoseconds() - one.sample.time.ToNanoseconds()
        assert 0.5 < step / 1e9 < 30
        assert two.sample.cpu_usage_usec > one.sample.cpu_usage_usec
        service.ok("stop", str(job_id))
        # those that came while pjw was starting still have it
        wait_for(lambda: not of_job())
        watch.cancel()
        last = stub.GetUsageHistory(request, timeout=CALL_SECONDS)
        assert last.samples[-1].cpu_usage_usec == last.job.usage.cpu_usage_usec
    with service.stub("bob") as stub:
        with pytest.raises(grpc.RpcError) as caught:
            stub.GetUsageHistory(request, timeout=CALL_SECONDS)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        watch = stub.WatchUsage(pb.WatchUsageRequest())
        assert list(next(watch).jobs) == []
        watch.cancel()


def test_who_watches_is_sent_away_by_a_drain(make_service: Callable[..., Service]) -> None:
    """UNAVAILABLE, at once."""
    service = make_service().start()
    with service.stub() as stub:
        watch = stub.WatchUsage(pb.WatchUsageRequest(interval=Duration(seconds=60)))
        next(watch)
        assert service.stop() == 0
        assert watch.code() is grpc.StatusCode.UNAVAILABLE


async def test_without_a_launcher_nothing_is_measured(worker: Worker) -> None:
    """LauncherGoneError, and no task is left that would try."""
    await start(worker, ["sleep", "300"])
    (launcher,) = launchers_of(os.getpid())
    os.kill(launcher, signal.SIGKILL)
    await worker.gone()
    with pytest.raises(LauncherGoneError):
        await worker.usage_now(fresh_seconds=0)
