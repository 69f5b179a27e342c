"""The queue: who waits, whose turn it is, and what becomes of a job that waits; on real workers."""

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import Final

import pytest

from pjw.errors import (
    InvalidJobError,
    JobNotFoundError,
    JobStateError,
    LimitReachedError,
    NameTakenError,
)
from pjw.model import EndReason, Job, JobSpec, JobState, Limits, QueueSpec, Share
from pjw.worker import Part, QueueSlots, Worker
from pjw.worker.pages import JobFilter
from pjw.worker.settings import NO_CEILING, Quotas, Shares
from tests.support.worker_harness import ASK, DEADLINE_SECONDS, Bench, read_all

NAP: Final = ["sleep", "300"]
ONE: Final = QueueSlots(running_max=1)
HELD: Final = QueueSpec(held=True)


def slots(running_max: int) -> QueueSlots:
    """So many jobs at once, whatever their limits promise."""
    return QueueSlots(running_max=running_max, cpu_max_millicores=0)


def queued(command: str | list[str], **queue: object) -> JobSpec:
    """A job for the queue."""
    return JobSpec(command, queue=QueueSpec(**queue))  # type: ignore[arg-type]


async def submit(worker: Worker, command: str | list[str], client: str = "local", **queue: object) -> Job:
    """Put a job into the queue."""
    [job] = await worker.submit([queued(command, **queue)], client)
    return job


async def ended(worker: Worker, *jobs: Job) -> list[Job]:
    """The jobs, when all have ended."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        return [await worker.wait(job.id) for job in jobs]


async def running(worker: Worker, job: Job) -> Job:
    """A job of the queue, once it runs."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while (found := await worker.get(job.id)).state in (JobState.QUEUED, JobState.STARTING):
            await asyncio.sleep(0.01)
    assert found.state is JobState.RUNNING, found
    return found


async def said(worker: Worker, job: Job, words: str) -> None:
    """Wait until a job that waits says why."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while words not in (await worker.get(job.id)).detail:
            await asyncio.sleep(0.02)


async def order(worker: Worker, *jobs: Job) -> list[int]:
    """The ids of jobs in the order of their starts, when all have ended."""
    return [job.id for job in sorted(await ended(worker, *jobs), key=lambda job: job.start)]


# --- a job that waits


async def test_a_job_waits_and_is_started_when_its_turn_comes(bench: Bench) -> None:
    """Its id is told at once; in the queue it has no start, when it runs it has one."""
    worker = await bench.open(queue=ONE)
    first = await submit(worker, ASK + "read line <&3")
    second = await submit(worker, ["echo", "hello"], priority=7)
    assert (first.state, second.state) == (JobState.QUEUED, JobState.QUEUED)
    await running(worker, first)
    waiting = await worker.get(second.id)
    assert (waiting.state, waiting.was_started, waiting.priority) == (JobState.QUEUED, False, 7)
    assert waiting.start == waiting.queued
    await said(worker, second, "is next: waits for a free slot")
    assert [job.state for job in await worker.list()] == [JobState.RUNNING, JobState.QUEUED]
    bench.tell(first.id)
    assert await read_all(worker, second.id) == b"hello\n"
    [done] = await ended(worker, second)
    assert (done.state, done.reason, done.was_started) == (JobState.EXITED, EndReason.COMPLETED, True)
    assert done.queued == waiting.queued
    assert done.start > waiting.start
    assert done.detail == ""


async def test_what_waits_for_a_job_waits_for_its_turn(bench: Bench) -> None:
    """Wait, logs and input go on when it starts; logs without following end at once."""
    worker = await bench.open(queue=ONE)
    blocker = await submit(worker, NAP)
    [job] = await worker.submit([JobSpec("cat; exit 3", input=True, queue=QueueSpec())])
    output = asyncio.ensure_future(read_all(worker, job.id))
    end = asyncio.ensure_future(worker.wait(job.id))

    async def write() -> None:
        async with worker.write_input(job.id) as writer:
            await writer.write(0, b"abc", end=True)

    written = asyncio.ensure_future(write())
    assert [data async for data in worker.logs(job.id, Part(follow=False))] == []
    assert [data async for data in worker.logs(job.id, Part(tail_lines=3, follow=False))] == []
    assert not (output.done() or end.done() or written.done())
    await worker.stop(blocker.id)
    async with asyncio.timeout(DEADLINE_SECONDS):
        await written
        assert await output == b"abc"
        done = await end
    assert (done.id, done.exit_status and done.exit_status.code) == (job.id, 3)


async def test_stop_in_the_queue(bench: Bench) -> None:
    """It ends without a start and without an exit code; who waits or follows hears of it; rm forgets it."""
    worker = await bench.open()
    job = await submit(worker, ["true"], held=True)
    end = asyncio.ensure_future(worker.wait(job.id))
    output = asyncio.ensure_future(read_all(worker, job.id))
    with pytest.raises(JobStateError, match="cannot remove job 1: it has not ended"):
        await worker.delete(job.id)
    stopped = await worker.stop(job.id)
    assert (stopped.state, stopped.reason) == (JobState.EXITED, EndReason.CANCELLED)
    assert (stopped.exit_status, stopped.usage, stopped.was_started) == (None, None, False)
    assert stopped.end is not None
    assert stopped.end >= stopped.start == stopped.queued
    assert (stopped.detail, stopped.held) == ("it was stopped before its turn came", False)
    async with asyncio.timeout(DEADLINE_SECONDS):
        assert await end == stopped
        assert await output == b""
    assert await worker.stop(job.id) == stopped
    await worker.delete(job.id)
    with pytest.raises(JobNotFoundError):
        await worker.get(job.id)
    assert (await worker.queued_now())[0] == 0


async def test_another_clients_job_is_none(bench: Bench) -> None:
    """Whatever is asked of it."""
    worker = await bench.open()
    job = await submit(worker, ["true"], "alice", held=True)
    for asked in (worker.hold, worker.release, worker.stop, worker.get, worker.wait, worker.delete):
        with pytest.raises(JobNotFoundError, match=f"no job {job.id}"):
            await asked(job.id, owner="bob")
    assert (await worker.get(job.id, "alice")).held


async def test_hold_and_release(bench: Bench) -> None:
    """A held job is passed over; a job that runs, or has ended, cannot be held."""
    worker = await bench.open(queue=ONE)
    blocker = await submit(worker, NAP)
    first, second = await submit(worker, ["true"]), await submit(worker, ["true"])
    await running(worker, blocker)
    assert (await worker.hold(first.id)).detail == "waits until it is released"
    await worker.stop(blocker.id)
    await ended(worker, second)
    assert (await worker.get(first.id)).state is JobState.QUEUED
    for job in (blocker, second):
        with pytest.raises(JobStateError, match="it does not wait in the queue"):
            await worker.hold(job.id)
        with pytest.raises(JobStateError, match="it does not wait in the queue"):
            await worker.release(job.id)
    assert not (await worker.release(first.id)).held
    await ended(worker, first)


async def test_not_before(bench: Bench) -> None:
    """It is started when the time has come, not before; a time that is over is none."""
    worker = await bench.open()
    when = datetime.now(UTC) + timedelta(seconds=1.5)
    later = await submit(worker, ["true"], not_before=when)
    assert later.not_before == when.replace(microsecond=when.microsecond)
    assert later.detail.startswith("waits until 20")
    now = await submit(worker, ["true"], not_before=datetime.now(UTC) - timedelta(hours=1))
    assert now.not_before is None
    await ended(worker, now)
    [done] = await ended(worker, later)
    assert done.start >= when
    assert done.not_before is None


async def test_lists_by_state(bench: Bench) -> None:
    """Queued ones alone, running ones alone, and both, in both directions and in small pages."""
    worker = await bench.open(queue=ONE)
    ids = [(await submit(worker, NAP)).id for _ in range(3)]
    direct = await worker.start(JobSpec(NAP))
    ids.append((await submit(worker, ["true"], "bob")).id)
    await running(worker, await worker.get(ids[0]))

    async def listed(*states: JobState, owner: str | None = None, newest_first: bool = False) -> list[int]:
        found: list[int] = []
        after: int | None = 0
        while after is not None:
            page = await worker.page(owner, after, 2, JobFilter(frozenset(states)), newest_first=newest_first)
            found += [job.id for job in page.jobs]
            after = page.next_after
        return found

    alive = JobState.STARTING, JobState.RUNNING, JobState.STOPPING
    assert await listed(JobState.QUEUED) == [ids[1], ids[2], ids[3]]
    assert await listed(JobState.QUEUED, owner="bob") == [ids[3]]
    assert await listed(*alive) == [ids[0], direct.id]
    assert await listed(JobState.QUEUED, *alive) == [ids[0], ids[1], ids[2], direct.id, ids[3]]
    assert await listed(JobState.QUEUED, *alive, newest_first=True) == [
        ids[3],
        direct.id,
        ids[2],
        ids[1],
        ids[0],
    ]
    assert await listed(*JobState.__members__.values(), newest_first=True) == sorted([*ids, direct.id])[::-1]


# --- what cannot be started


async def test_a_command_that_cannot_be_executed(bench: Bench) -> None:
    """Its turn comes, and it ends as start_failed, with the words of a refused start; the next one runs."""
    worker = await bench.open(queue=ONE)
    missing = await submit(worker, ["/no/such"])
    [elsewhere] = await worker.submit([JobSpec("true", workdir="/no/such", queue=QueueSpec())])
    fine = await submit(worker, ["true"])
    first, second, third = await ended(worker, missing, elsewhere, fine)
    assert (first.state, first.reason) == (JobState.EXITED, EndReason.START_FAILED)
    assert (first.exit_status, first.was_started) == (None, False)
    assert first.detail == "cannot execute /no/such: no such file or directory (ENOENT)"
    assert second.detail == "cannot enter the working directory /no/such: no such file or directory (ENOENT)"
    assert third.reason is EndReason.COMPLETED
    assert not (bench.state / "jobs" / str(first.id)).exists()


async def test_what_can_never_be_started_is_refused_at_once(bench: Bench) -> None:
    """As a start is; of several jobs none is taken then."""
    worker = await bench.open(ceiling=Limits(**{**dict(NO_CEILING.items()), "pids_max": 1000}))
    with pytest.raises(InvalidJobError, match="limit pids_max must be at most 1000"):
        await worker.submit([queued(["true"]), JobSpec("true", {"pids_max": 2000})])
    with pytest.raises(NameTakenError, match="job 1 is called that"):
        await worker.submit([JobSpec("true", name="a", queue=HELD), JobSpec("true", name="a", queue=HELD)])
    assert await worker.list() == []
    assert (await worker.queued_now())[0] == 0


async def test_bounds_of_the_queue(bench: Bench) -> None:
    """Jobs and bytes, of a client and of all; a refused submission leaves nothing, an end makes room."""
    worker = await bench.open(quotas=Quotas(queued_max=2, queued_total_max=3, queued_bytes_max=2000))
    held = [JobSpec("true", queue=HELD)]
    first, _ = await worker.submit(held * 2, "alice")
    with pytest.raises(LimitReachedError, match="the queue takes at most 2 jobs of alice") as refused:
        await worker.submit(held, "alice")
    assert (refused.value.limit, refused.value.most) == ("queued_max", 2)
    await worker.submit(held, "bob")
    with pytest.raises(LimitReachedError, match="the queue of this server is full"):
        await worker.submit(held, "bob")
    await worker.stop(first.id)
    with pytest.raises(LimitReachedError, match=r"may have at most 2\.0K \(2000 bytes\)"):
        await worker.submit([JobSpec("true", env={"A": "x" * 2000}, queue=HELD)], "alice")
    await worker.submit(held, "alice")
    assert [(await worker.quota(name)).queued for name in ("alice", "bob")] == [2, 1]
    assert (await worker.queued_now())[0] == 3


async def test_a_request_id_makes_one_job(bench: Bench) -> None:
    """Also when it comes again after a part of the jobs has run, and in one submission."""
    worker = await bench.open()
    asked = [JobSpec("true", request_id=name, queue=HELD) for name in "ab"]
    jobs = await worker.submit([*asked, asked[0]])
    assert [job.id for job in jobs] == [jobs[0].id, jobs[1].id, jobs[0].id]
    await worker.release(jobs[0].id)
    await ended(worker, jobs[0])
    again = await worker.submit(asked)
    assert [(job.id, job.state) for job in again] == [
        (jobs[0].id, JobState.EXITED),
        (jobs[1].id, JobState.QUEUED),
    ]


# --- whose turn it is


async def test_the_order_within_a_client(bench: Bench) -> None:
    """Priority first, then age; the one that runs is not disturbed."""
    worker = await bench.open(queue=ONE)
    blocker = await submit(worker, NAP)
    await running(worker, blocker)
    jobs = [await submit(worker, ["true"], priority=priority) for priority in (0, 5, 0, -5, 5)]
    await worker.stop(blocker.id)
    assert await order(worker, *jobs) == [jobs[place].id for place in (1, 4, 0, 2, 3)]


async def test_clients_in_turn(bench: Bench) -> None:
    """One job of bob beside many of alice, older and with higher priority, goes at the next free slot."""
    worker = await bench.open(queue=slots(2))
    blockers = [await submit(worker, NAP, "alice") for _ in range(2)]
    for blocker in blockers:
        await running(worker, blocker)
    alices = [await submit(worker, NAP, "alice", priority=1000) for _ in range(5)]
    bobs = await submit(worker, ["true"], "bob")
    await worker.stop(blockers[0].id)
    await ended(worker, bobs)
    states = [(await worker.get(job.id)).state for job in alices]
    assert states.count(JobState.QUEUED) >= 4


async def test_clients_share_by_weight(bench: Bench) -> None:
    """Of eight slots a client with weight 300 has six beside one with 100."""
    shares = Shares(by_name={"alice": Share(weight=300), "bob": Share(weight=100)})
    worker = await bench.open(queue=slots(8), shares=shares)
    blockers = [await submit(worker, NAP, "carol") for _ in range(8)]
    for blocker in blockers:
        await running(worker, blocker)
    jobs = {name: [await submit(worker, NAP, name) for _ in range(8)] for name in ("bob", "alice")}
    for blocker in blockers:
        await worker.stop(blocker.id, 0)
    states = [JobState.RUNNING, JobState.STARTING]

    async def runs(name: str) -> int:
        return sum([(await worker.get(job.id)).state in states for job in jobs[name]])

    async with asyncio.timeout(DEADLINE_SECONDS):
        while await runs("alice") + await runs("bob") < 8:
            await asyncio.sleep(0.05)
    assert (await runs("alice"), await runs("bob")) == (6, 2)


async def test_slots_of_a_client(bench: Bench) -> None:
    """Its own bound holds up its jobs, and nobody else's."""
    worker = await bench.open(queue=QueueSlots(cpu_max_millicores=0, client_running_max=1))
    first, second = await submit(worker, NAP, "alice"), await submit(worker, NAP, "alice")
    await running(worker, first)
    await running(worker, await submit(worker, NAP, "bob"))
    await said(worker, second, "waits: jobs of alice have all of its slots")


async def test_slots_of_what_limits_promise(bench: Bench) -> None:
    """A job with more than there is, or without a limit, runs alone; smaller ones do not pass it by."""
    worker = await bench.open(
        queue=QueueSlots(cpu_max_millicores=2000, memory_max_bytes=100 * 1024**2),
        default_limits=Limits(memory_max_bytes=10 * 1024**2),
    )

    async def job(millicores: int, mib: int = 10) -> Job:
        limits = {"cpu_max_millicores": millicores, "memory_max_bytes": mib * 1024**2}
        return (await worker.submit([JobSpec(NAP, limits)]))[0]

    first, second = await job(1000), await job(500)
    await running(worker, first)
    await running(worker, second)
    large, small = await job(0), await job(100)
    # a start at once needs no slot
    await worker.start(JobSpec(["true"]))
    await said(worker, large, "is next: waits for a free slot")
    assert (await worker.get(small.id)).state is JobState.QUEUED
    await worker.stop(first.id, 0)
    assert (await worker.get(large.id)).state is JobState.QUEUED
    await worker.stop(second.id, 0)
    await running(worker, large)
    assert (await worker.get(small.id)).state is JobState.QUEUED
    await worker.stop(large.id, 0)
    await running(worker, small)
    wide = await job(100, 95)
    assert (await worker.get(wide.id)).state is JobState.QUEUED
    await worker.stop(small.id, 0)
    await running(worker, wide)


async def test_a_client_at_another_limit_waits(bench: Bench) -> None:
    """Of running jobs, for one: the queue goes on for others, and for this client when a job of it ends."""
    worker = await bench.open(quotas=Quotas(running_max=1))
    direct = await worker.start(JobSpec(NAP), "alice")
    waits = await submit(worker, ["true"], "alice")
    await ended(worker, await submit(worker, ["true"], "bob"))
    await said(worker, waits, "waits: 1 jobs of alice are running, and no more may")
    await worker.stop(direct.id, 0)
    await ended(worker, waits)


async def test_stored_bytes_hold_a_client_up_until_it_removes_something(bench: Bench) -> None:
    """The quota of stored bytes is one of those limits."""
    worker = await bench.open(quotas=Quotas(stored_bytes_max=1000))
    loud = await worker.start(JobSpec("head -c 2000 /dev/zero"), "alice")
    await worker.wait(loud.id)
    waits = await submit(worker, ["true"], "alice")
    await ended(worker, await submit(worker, ["true"], "bob"))
    await said(worker, waits, "may be stored")
    await worker.delete(loud.id)
    await ended(worker, waits)


async def test_a_reload_changes_who_waits(bench: Bench) -> None:
    """Lower slots end nothing that runs, higher ones let more run; a lower ceiling is what a start finds."""
    worker = await bench.open(queue=slots(2))
    jobs = [await submit(worker, NAP) for _ in range(4)]
    for job in jobs[:2]:
        await running(worker, job)
    [large] = await worker.submit([JobSpec("true", {"pids_max": 2000}, queue=QueueSpec(priority=9))])
    worker.reconfigure(
        bench.changed(queue=ONE, ceiling=Limits(**{**dict(NO_CEILING.items()), "pids_max": 1000}))
    )
    await worker.stop(jobs[0].id, 0)
    assert [(await worker.get(job.id)).state for job in jobs[1:]] == [
        JobState.RUNNING,
        JobState.QUEUED,
        JobState.QUEUED,
    ]
    worker.reconfigure(bench.changed(queue=slots(3)))
    for job in jobs[2:]:
        await running(worker, job)
    [refused] = await ended(worker, large)
    assert (refused.reason, refused.detail) == (
        EndReason.START_FAILED,
        "limit pids_max must be at most 1000 on this server, not 2000",
    )


async def test_many_wait_without_a_look_at_the_table(bench: Bench) -> None:
    """While nothing happens the queue does nothing: a worker with jobs that wait uses no processor time."""
    worker = await bench.open(queue=ONE)
    await submit(worker, NAP)
    await worker.submit([queued(["true"])] * 500)
    await asyncio.sleep(1)
    before = time.process_time()
    await asyncio.sleep(2)
    assert time.process_time() - before < 0.2


# --- across a restart


async def test_the_queue_outlives_its_worker(bench: Bench) -> None:
    """Order, priorities, holds and times are those of before; what runs takes its slot again."""
    worker = await bench.open(queue=ONE)
    when = datetime.now(UTC) + timedelta(hours=1)
    blocker = await submit(worker, NAP)
    await running(worker, blocker)
    jobs = [await submit(worker, ["true"], priority=priority) for priority in (0, 5)]
    held = await submit(worker, ["true"], held=True)
    later = await submit(worker, ["true"], not_before=when)
    await bench.close(worker)
    worker = await bench.open()
    assert [job.state for job in await worker.list()] == [JobState.RUNNING, *[JobState.QUEUED] * 4]
    await worker.stop(blocker.id, 0)
    assert await order(worker, *jobs) == [jobs[1].id, jobs[0].id]
    assert (await worker.get(held.id)).held
    assert (await worker.get(later.id)).not_before == when.replace(microsecond=when.microsecond)


async def test_what_is_to_be_executed_is_kept_whole(bench: Bench) -> None:
    """Command, variables, directory, limits, name and labels, across a restart; and forgotten afterwards."""
    worker = await bench.open()
    [job] = await worker.submit(
        [
            JobSpec(
                ["/bin/sh", "-c", 'echo "$0 $A"; pwd; ulimit -v; echo e >&2', "ü 'x'"],
                {"pids_max": 77},
                name="whole",
                labels={"k": "v"},
                env={"A": "b\nc"},
                workdir="/usr",
                split_stderr=True,
                queue=HELD,
            )
        ]
    )
    await bench.close(worker)
    worker = await bench.open()
    await worker.release(job.id)
    [done] = await ended(worker, job)
    assert await read_all(worker, job.id) == "ü 'x' b\nc\n/usr\nunlimited\n".encode()
    assert b"".join([data async for data in worker.logs(job.id, Part(stderr=True))]) == b"e\n"
    assert (done.name, done.labels, done.limits.pids_max, done.workdir) == ("whole", {"k": "v"}, 77, "/usr")
    # written behind the start
    async with asyncio.timeout(DEADLINE_SECONDS):
        while (await worker.queued_now())[0]:
            await asyncio.sleep(0.01)
