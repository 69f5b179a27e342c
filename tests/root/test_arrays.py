"""Arrays: each element once and in turn, the whole and one of it, and what is told of both."""

import asyncio
import os
import signal
import sqlite3
from collections import Counter
from collections.abc import Sequence
from contextlib import aclosing
from typing import Final

import pytest

from pjw.arrays import Element
from pjw.errors import JobNotFoundError, JobStateError, LimitReachedError
from pjw.model import After, Condition, EndReason, Job, JobChange, JobSpec, JobState, QueueSpec, Retry
from pjw.worker import Part, QueueSlots, Worker
from pjw.worker.array_rows import TAKEN_MAX
from pjw.worker.pages import JobFilter
from pjw.worker.settings import Quotas
from tests.support.worker_harness import ASK, DEADLINE_SECONDS, Bench

NAP: Final = ["sleep", "300"]
MANY: Final = QueueSlots(cpu_max_millicores=0)
_Q, _R, _E = JobState.QUEUED, JobState.RUNNING, JobState.EXITED


async def submit(worker: Worker, command: str | list[str], array: str, **queue: object) -> Job:
    """Put an array into the queue."""
    spec = JobSpec(command, queue=QueueSpec(array=array, **queue))  # type: ignore[arg-type]
    return (await worker.submit([spec]))[0]


async def elements(worker: Worker, array: Job) -> dict[int, Job]:
    """The elements of an array that have a row, by their indices; of each the newest attempt."""
    found: dict[int, Job] = {}
    after: int | None = 0
    while after is not None:
        page = await worker.page(None, after, 1000, JobFilter(array_id=array.id))
        found.update({job.array_index: job for job in page.jobs if job.array_index is not None})
        after = page.next_after
    return found


async def ids_of_elements(worker: Worker, array: Job) -> list[int]:
    """The ids of the elements that have a row."""
    return sorted(job.id for job in (await elements(worker, array)).values())


async def waiting(worker: Worker) -> int:
    """How many jobs wait for their turn, each element as one."""
    return sum(each.queued for each in (await worker.numbers()).clients.values())


async def output(worker: Worker, job: int | Element) -> bytes:
    """All output of a job."""
    return b"".join([chunk async for chunk in worker.logs(job)])


def counts(job: Job) -> tuple[int, int, int, int, int]:
    """How many elements wait, run, have succeeded, have failed, were cancelled."""
    array = job.array
    assert array is not None
    return array.waiting, array.running, array.succeeded, array.failed, array.cancelled


async def until_running(worker: Worker, *jobs: Element) -> list[Job]:
    """Elements, once they run."""
    async with asyncio.timeout(DEADLINE_SECONDS), aclosing(worker.watch_jobs(snapshot=True)) as watch:
        wanted = {(each.array_id, each.index) for each in jobs}
        while wanted:
            for change in (await anext(watch)).changes:
                if change.job.state is _R:
                    wanted.discard((change.job.array_id or 0, change.job.array_index or 0))
    return [await worker.get(each) for each in jobs]


async def told(worker: Worker, *, until_end_of: int) -> list[JobChange]:
    """All changes from the first on until a job has ended."""
    found: list[JobChange] = []
    async with asyncio.timeout(600), aclosing(worker.watch_jobs(since=0)) as watch:
        while not any(each.job.id == until_end_of and each.job.state.final for each in found):
            found += (await anext(watch)).changes
    return found


def most_at_once(changes: Sequence[JobChange], array_id: int) -> int:
    """How many elements of an array were between the begin of their start and their end at most."""
    begun: set[int] = set()
    most = 0
    for change in changes:
        if change.job.array_id != array_id:
            continue
        if change.job.state in (JobState.STARTING, JobState.RUNNING, JobState.STOPPING):
            begun.add(change.job.id)
        else:
            begun.discard(change.job.id)
        most = max(most, len(begun))
    return most


# --- each once, so many at once


@pytest.mark.parametrize("count", [150, pytest.param(10_000, marks=pytest.mark.long)])
@pytest.mark.timeout(3600)
async def test_no_more_at_once(bench: Bench, count: int) -> None:
    """Each element once, never more than eight begun; each knows its index; told in order, without a gap."""
    worker = await bench.open(queue=MANY)
    array = await submit(worker, "echo $PJW_ARRAY_ID $PJW_ARRAY_INDEX", f"1-{count}%8", priority=3)
    assert (array.state, counts(array)) == (_Q, (count, 0, 0, 0, 0))
    changes = await told(worker, until_end_of=array.id)
    assert most_at_once(changes, array.id) == 8
    assert [each.sequence for each in changes] == list(range(1, len(changes) + 1))
    states = Counter((each.job.array_index, str(each.job.state)) for each in changes if each.job.array_id)
    whole = ("queued", "starting", "running", "exited")
    assert states == {(index, state): 1 for index in range(1, count + 1) for state in whole}
    last_start = max(place for place, each in enumerate(changes) if each.job.state is JobState.STARTING)
    own = [(place, each) for place, each in enumerate(changes) if each.job.id == array.id]
    assert [str(each.job.state) for _, each in own] == ["queued", "running", "exited"]
    # the two are one transaction
    assert abs(own[1][0] - last_start) == 1
    assert own[2][0] == len(changes) - 1
    done = await worker.wait(array.id)
    assert (done.state, done.reason, done.succeeded, counts(done)) == (
        _E,
        EndReason.COMPLETED,
        True,
        (0, 0, count, 0, 0),
    )
    found = await elements(worker, array)
    assert sorted(found) == list(range(1, count + 1))
    # in the order of their indices
    assert [found[index].id for index in sorted(found)] == sorted(job.id for job in found.values())
    for index in (1, count // 2, count):
        assert await output(worker, Element(array.id, index)) == f"{array.id} {index}\n".encode()
        assert found[index].priority == 3
    assert (await worker.queued_now())[0] == 0


async def test_variables_and_the_worst_end(bench: Bench) -> None:
    """An element knows all of its array; the array ends with the highest code, though the last one is 0."""
    worker = await bench.open(queue=MANY)
    command = "env | grep ^PJW_ARRAY | sort; exit $((PJW_ARRAY_INDEX / 10))"
    array = await submit(worker, command, "70,30-50:10,7%1")
    done = await worker.wait(array.id)
    assert (done.exit_status and done.exit_status.code, done.reason) == (7, EndReason.COMPLETED)
    assert counts(done) == (0, 0, 1, 4, 0)
    assert (await output(worker, Element(array.id, 40))).decode().splitlines() == [
        "PJW_ARRAY_COUNT=5",
        f"PJW_ARRAY_ID={array.id}",
        "PJW_ARRAY_INDEX=40",
        "PJW_ARRAY_MAX=70",
        "PJW_ARRAY_MIN=7",
    ]
    ids = [(await worker.get(Element(array.id, index))).id for index in (70, 30, 40, 50, 7)]
    assert ids == sorted(ids)
    missing = await submit(worker, ["/no/such"], "1-2")
    done = await worker.wait(missing.id)
    assert (done.state, done.reason, done.exit_status) == (_E, EndReason.START_FAILED, None)
    assert done.detail == "none of its 2 elements was started"


# --- the whole, and one


async def test_one_element(bench: Bench) -> None:
    """It is got, followed, stopped and removed by its index, before its turn as after; others go on."""
    worker = await bench.open(queue=MANY)
    array = await submit(worker, ASK + "read line <&3; echo $PJW_ARRAY_INDEX", "1-5%2")
    first, second = await until_running(worker, Element(array.id, 1), Element(array.id, 2))
    assert (first.ref, first.id > array.id, first.command) == (f"{array.id}_1", True, array.command)
    waits = await worker.get(Element(array.id, 4))
    assert (waits.id, waits.state, waits.ref) == (0, _Q, f"{array.id}_4")
    assert await ids_of_elements(worker, array) == [first.id, second.id]
    followed = asyncio.ensure_future(output(worker, Element(array.id, 3)))
    ends = [asyncio.ensure_future(worker.wait(Element(array.id, index))) for index in (3, 4)]
    stopped = await worker.stop(Element(array.id, 4))
    assert (stopped.state, stopped.reason, stopped.was_started) == (_E, EndReason.CANCELLED, False)
    assert (await ends[1]).reason is EndReason.CANCELLED
    assert counts(await worker.get(array.id)) == (2, 2, 0, 0, 1)
    assert (await worker.stop(Element(array.id, 1))).reason is EndReason.STOPPED
    bench.tell(second.id)
    [third, last] = await until_running(worker, Element(array.id, 3), Element(array.id, 5))
    with pytest.raises(JobStateError, match=f"cannot remove job {array.id}_3: it has not ended"):
        await worker.delete(Element(array.id, 3))
    with pytest.raises(JobStateError, match=f"cannot remove job {array.id}: it has not ended"):
        await worker.delete(array.id)
    bench.tell(third.id)
    assert await followed == b"3\n"
    assert (await ends[0]).succeeded
    bench.tell(last.id)
    done = await worker.wait(array.id)
    assert (counts(done), done.exit_status and done.exit_status.code) == ((0, 0, 3, 1, 1), 128 + 15)
    with pytest.raises(JobStateError, match=f"job {array.id} is an array, and has no output of its own"):
        await worker.read_logs(array.id)
    assert await output(worker, Element(array.id, 4)) == b""
    for wrong in (Element(array.id, 0), Element(array.id, 6), Element(first.id, 1), Element(10**17, 1)):
        with pytest.raises(JobNotFoundError, match=f"no job {wrong}"):
            await worker.get(wrong)
    await worker.delete(Element(array.id, 3))
    with pytest.raises(JobNotFoundError):
        await worker.get(Element(array.id, 3))
    await worker.delete(array.id)
    assert await worker.list() == []
    assert await elements(worker, array) == {}


async def test_stop_the_whole(bench: Bench) -> None:
    """What runs is stopped, what waits never starts, and each who waits for one of them hears of it."""
    worker = await bench.open(queue=MANY)
    array = await submit(worker, NAP, "1-1000%3")
    await until_running(worker, *(Element(array.id, index) for index in (1, 2, 3)))
    waits = asyncio.ensure_future(worker.wait(Element(array.id, 900)))
    follows = asyncio.ensure_future(output(worker, Element(array.id, 901)))
    whole = asyncio.ensure_future(worker.wait(array.id))
    stopped = await worker.stop(array.id, 0)
    assert (stopped.state, stopped.reason, counts(stopped)) == (_E, EndReason.STOPPED, (0, 0, 0, 3, 997))
    assert await whole == stopped
    never = await waits
    assert (never.state, never.reason, never.end) == (_E, EndReason.CANCELLED, never.end)
    assert await follows == b""
    assert await worker.stop(array.id) == stopped
    assert (await worker.stop(Element(array.id, 900))).reason is EndReason.CANCELLED
    assert len(await elements(worker, array)) == 3
    assert await waiting(worker) == 0
    # one that has not begun
    other = await submit(worker, NAP, "1-7", held=True)
    stopped = await worker.stop(other.id)
    assert (stopped.reason, stopped.was_started, counts(stopped)) == (
        EndReason.CANCELLED,
        False,
        (0,) * 4 + (7,),
    )


async def test_hold_and_release(bench: Bench) -> None:
    """The whole, or one that had no turn: the others go on, and it goes when it is released."""
    worker = await bench.open(queue=MANY)
    array = await submit(worker, "echo $PJW_ARRAY_INDEX", "1-4", held=True)
    third = await worker.hold(Element(array.id, 3))
    assert (third.held, third.ref, third.detail) == (True, f"{array.id}_3", "waits until it is released")
    assert (await worker.hold(Element(array.id, 3))).held
    # held with the whole, and not by itself
    assert (await worker.release(Element(array.id, 2))).held
    assert await ids_of_elements(worker, array) == [third.id]
    assert (await worker.get(array.id)).detail == "waits until it is released"
    third = await worker.release(Element(array.id, 3))
    assert third.held is False
    assert third.state is _Q
    await worker.hold(Element(array.id, 3))
    await worker.hold(array.id)
    # also those that were held one by one
    await worker.release(array.id)
    assert counts(await worker.wait(array.id)) == (0, 0, 4, 0, 0)
    with pytest.raises(JobStateError, match="cannot hold job"):
        await worker.hold(Element(array.id, 3))


async def test_too_many_one_by_one(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elements that are held or stopped one by one cost a row each, so there is a bound."""
    assert TAKEN_MAX == 10_000
    monkeypatch.setattr("pjw.worker.array_rows.TAKEN_MAX", 3)
    worker = await bench.open(queue=MANY)
    array = await submit(worker, "true", "1-100", held=True)
    await worker.hold(Element(array.id, 50))
    await worker.stop(Element(array.id, 60))
    await worker.stop(Element(array.id, 1))
    with pytest.raises(LimitReachedError, match="at most 3 elements of an array can be held or stopped"):
        await worker.stop(Element(array.id, 70))
    await worker.release(array.id)
    assert counts(await worker.wait(array.id)) == (0, 0, 98, 0, 2)


# --- with what else the queue has


async def test_after_an_array_and_after_one(bench: Bench) -> None:
    """What waits for the whole waits for its last element; what waits for one for that alone."""
    worker = await bench.open(queue=MANY)
    array = await submit(worker, ASK + "read line <&3; exit $((PJW_ARRAY_INDEX == 2))", "1-100%2")

    async def after(condition: Condition, element: int | None = None) -> Job:
        spec = QueueSpec(after=[After(array.id, condition, element=element)])
        return (await worker.submit([JobSpec("true", queue=spec)]))[0]

    whole = {each: await after(each) for each in Condition}
    first, second = await until_running(worker, Element(array.id, 1), Element(array.id, 2))
    one = {each: await after(each, 1) for each in Condition}
    other = {each: await after(each, 2) for each in Condition}
    # one without a turn until now gets a row, and goes before those that nobody waits for
    early = await after(Condition.ANY, 50)
    fiftieth = await worker.get(Element(array.id, 50))
    assert early.after == (After(fiftieth.id, Condition.ANY),)
    assert early.detail == f"waits for the end of job {fiftieth.id}"
    for wrong in (0, 101):
        with pytest.raises(JobNotFoundError, match=f"no job {array.id}_{wrong}"):
            await after(Condition.OK, wrong)
    bench.tell(first.id)
    bench.tell(second.id)
    for condition, job in one.items():
        assert (await worker.wait(job.id)).succeeded == (condition is not Condition.FAILED), condition
    for condition, job in other.items():
        assert (await worker.wait(job.id)).succeeded == (condition is not Condition.OK), condition
    assert (await worker.wait(one[Condition.FAILED].id)).detail == (
        f"job {first.id}, which it waited for, ended with exit code 0"
    )
    await until_running(worker, Element(array.id, 50))
    assert {(await worker.get(job.id)).state for job in whole.values()} == {_Q}
    # with the whole ends what waits for one that never starts
    never = await after(Condition.OK, 99)
    await worker.stop(array.id, 0)
    for condition, job in whole.items():
        assert (await worker.wait(job.id)).succeeded == (condition is not Condition.OK), condition
    assert (await worker.wait(early.id)).succeeded
    assert (await worker.wait(never.id)).reason is EndReason.CANCELLED
    # and what asks then
    assert (await worker.wait((await after(Condition.ANY, 98)).id)).succeeded
    assert (await worker.wait((await after(Condition.OK, 98)).id)).reason is EndReason.CANCELLED


async def test_an_array_that_waits_in_vain(bench: Bench) -> None:
    """It is cancelled as a whole, and so is what waits for it."""
    worker = await bench.open(queue=MANY)
    fails = QueueSpec(held=True)
    array = QueueSpec(array="1-1000000", after=[After(earlier=0)])
    last = QueueSpec(after=[After(earlier=1)])
    first, whole, end = await worker.submit(
        [JobSpec("exit 1", queue=fails), JobSpec("true", queue=array), JobSpec("true", queue=last)]
    )
    await worker.release(first.id)
    assert (await worker.wait(end.id)).reason is EndReason.CANCELLED
    done = await worker.wait(whole.id)
    assert (done.reason, counts(done)) == (EndReason.CANCELLED, (0, 0, 0, 0, 1_000_000))
    assert done.detail == f"job {first.id}, which it waited for, ended with exit code 1"
    assert (await worker.wait(Element(whole.id, 500_000))).detail == done.detail


async def test_retries_of_elements(bench: Bench) -> None:
    """Each is tried again by itself, and keeps its index; the array ends with the last attempt."""
    worker = await bench.open(queue=MANY)
    command = "echo $PJW_ARRAY_INDEX.$PJW_ATTEMPT; [ $PJW_ATTEMPT = $PJW_ARRAY_INDEX ]"
    array = await submit(worker, command, "1-3%2", retry=Retry(1, backoff_seconds=0.0))
    done = await worker.wait(array.id)
    assert (counts(done), done.exit_status and done.exit_status.code) == ((0, 0, 2, 1, 0), 1)
    newest = await elements(worker, array)
    assert {index: job.attempt for index, job in newest.items()} == {1: 1, 2: 2, 3: 2}
    for index, said in ((1, b"1.1\n"), (2, b"2.2\n"), (3, b"3.2\n")):
        assert await output(worker, Element(array.id, index)) == said
        assert (await worker.get(Element(array.id, index))).ref == f"{array.id}_{index}"
    changes = await told(worker, until_end_of=array.id)
    assert most_at_once(changes, array.id) <= 2
    assert [each.job.array_index for each in changes if each.job.state is _E].count(3) == 2
    # stopped in the pause, the whole ends
    array = await submit(worker, "exit 1", "1-2", retry=Retry(3, backoff_seconds=1000))
    async with asyncio.timeout(DEADLINE_SECONDS):
        while {job.attempt for job in (await elements(worker, array)).values()} != {2}:
            await asyncio.sleep(0.02)
    assert counts(await worker.get(array.id)) == (2, 0, 0, 0, 0)
    assert (await worker.stop(array.id)).state is _E


async def test_bounds_and_what_a_million_costs(bench: Bench) -> None:
    """An array counts as one job of the queue; an element costs a row from its turn on, and none before."""
    worker = await bench.open(queue=MANY, quotas=Quotas(queued_max=2))
    before = worker.store.size_bytes()
    array = await submit(worker, NAP, "0-999999%4")
    await until_running(worker, *(Element(array.id, index) for index in range(4)))
    assert worker.store.size_bytes() - before < 64 * 1024
    # those that run are in the queue no more
    other = await submit(worker, NAP, "0-999999%4", held=True)
    with pytest.raises(LimitReachedError, match="the queue takes at most 2 jobs of local"):
        await submit(worker, NAP, "1-2")
    assert (await worker.quota()).queued == 2
    assert await waiting(worker) == 1_999_996
    for each in (array, other):
        await worker.stop(each.id, 0)
    await bench.close(worker)
    with sqlite3.connect(bench.state / "jobs.sqlite") as db:
        [rows] = db.execute("SELECT count(*) FROM jobs").fetchone()
        assert rows == 2 + 4
        for table in ("specs", "array_taken", "dependencies"):
            assert db.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,), table  # noqa: S608
    db.close()


async def test_a_worker_in_between(bench: Bench) -> None:
    """What runs is adopted as a part of its array, and no more of it is started than may be."""
    worker = await bench.open(queue=MANY)
    array = await submit(worker, ASK + "read line <&3", "1-6%2")
    jobs = await until_running(worker, Element(array.id, 1), Element(array.id, 2))
    await bench.close(worker)
    bench.tell(jobs[0].id)
    worker = await bench.open()
    for index in range(2, 7):
        [job] = await until_running(worker, Element(array.id, index))
        bench.tell(job.id)
    assert counts(await worker.wait(array.id)) == (0, 0, 6, 0, 0)
    assert most_at_once(await told(worker, until_end_of=array.id), array.id) == 2


async def test_elements_of_others_are_none(bench: Bench) -> None:
    """An array of another client, and each of its elements, is as if it were not there."""
    worker = await bench.open(queue=MANY)
    array = await submit(worker, NAP, "1-9%1")
    [first] = await until_running(worker, Element(array.id, 1))
    for job in (array.id, first.id, Element(array.id, 1), Element(array.id, 5)):
        for ask in (worker.get, worker.wait, worker.stop, worker.delete, worker.hold, worker.release):
            with pytest.raises(JobNotFoundError):
                await ask(job, owner="bob")
        with pytest.raises(JobNotFoundError):
            await worker.read_logs(job, Part(), "bob")
    for element in (None, 1, 5):
        spec = JobSpec("true", queue=QueueSpec(after=[After(array.id, element=element)]))
        with pytest.raises(JobNotFoundError):
            await worker.submit([spec], "bob")
    assert (await worker.page("bob", 0, 100, JobFilter(array_id=array.id))).jobs == []
    assert await ids_of_elements(worker, array) == [first.id]


async def test_an_element_is_lost(bench: Bench) -> None:
    """Its array has failed, and goes on."""
    worker = await bench.open(queue=MANY)
    array = await submit(worker, "[ $PJW_ARRAY_INDEX = 2 ] || exec sleep 300", "1-2%1")
    [first] = await until_running(worker, Element(array.id, 1))
    os.kill(bench.init_pid(first.id), signal.SIGKILL)
    done = await worker.wait(array.id)
    assert (counts(done), done.exit_status and done.exit_status.code) == ((0, 0, 1, 1, 0), 1)
