"""Jobs of the queue that are tried again: after which ends, how often, and what a stop makes of it."""

import asyncio
import os
import signal
from itertools import pairwise
from typing import Final

import pytest

from pjw.errors import InvalidJobError
from pjw.model import After, Condition, EndReason, Job, JobSpec, JobState, QueueSpec, Retry
from pjw.worker import QueueSlots, Worker
from tests.root.test_queue import running
from tests.support.worker_harness import DEADLINE_SECONDS, Bench, read_all

MIB: Final = 1024**2
MANY: Final = QueueSlots(cpu_max_millicores=0)
NOW: Final = 0.0


async def submit(worker: Worker, command: str, retry: Retry, name: str = "", **limits: int) -> Job:
    """Put a job into the queue that may be tried again."""
    spec = JobSpec(command, limits, name=name, labels={"k": "v"}, queue=QueueSpec(3, retry=retry))
    return (await worker.submit([spec]))[0]


async def attempts(worker: Worker, job: Job) -> list[Job]:
    """All attempts of a job, when the last one has ended."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        last = await worker.wait(job.id)
    found = [await worker.get(job.id)]
    while (following := found[-1].retried_as) is not None:
        found.append(await worker.get(following))
    assert found[-1] == last
    assert [each.attempt for each in found] == list(range(1, len(found) + 1))
    return found


async def test_attempts(bench: Bench) -> None:
    """Each is a job with its own output and end, until one succeeds; names and labels go along."""
    worker = await bench.open(queue=MANY)
    command = "echo attempt $PJW_ATTEMPT; [ $PJW_ATTEMPT = 3 ]"
    job = await submit(worker, command, Retry(5, backoff_seconds=NOW), name="again", pids_max=77)
    found = await attempts(worker, job)
    assert [each.exit_status and each.exit_status.code for each in found] == [1, 1, 0]
    assert {(each.name, each.labels["k"], each.priority, each.limits.pids_max) for each in found} == {
        ("again", "v", 3, 77)
    }
    for number, each in enumerate(found, 1):
        assert await read_all(worker, each.id) == f"attempt {number}\n".encode()
    assert (await worker.queued_now())[0] == 0
    # the last of one that never succeeds is its end; each gives its slot back before the next one
    worker.reconfigure(bench.changed(queue=QueueSlots(running_max=1)))
    found = await attempts(worker, await submit(worker, "exit 7", Retry(2, backoff_seconds=NOW)))
    assert [each.exit_status and each.exit_status.code for each in found] == [7, 7, 7]


@pytest.mark.parametrize(
    ("command", "limits", "retry", "count"),
    [
        ("true", {}, Retry(1, backoff_seconds=NOW), 1),
        ("exit 75", {}, Retry(1, frozenset({75}), backoff_seconds=NOW), 2),
        ("exit 76", {}, Retry(1, frozenset({75}), backoff_seconds=NOW), 1),
        ("kill -9 $$", {}, Retry(1, backoff_seconds=NOW), 2),
        ("sleep 300", {"time_max_seconds": 1}, Retry(1, timeout=True, backoff_seconds=NOW), 2),
        ("sleep 300", {"time_max_seconds": 1}, Retry(1, oom=True, backoff_seconds=NOW), 1),
        (
            "head -c 100m /dev/zero | tail | wc -c; exit 1",
            {"memory_max_bytes": 32 * MIB},
            Retry(1, oom=True, backoff_seconds=NOW),
            2,
        ),
        ("/no/such", {}, Retry(1, frozenset({1}), backoff_seconds=NOW), 1),
    ],
)
async def test_each_end(bench: Bench, command: str, limits: dict[str, int], retry: Retry, count: int) -> None:
    """Only an end that fits is followed by another attempt."""
    worker = await bench.open(queue=MANY)
    job = await submit(worker, command, retry, "", **limits)
    assert len(await attempts(worker, job)) == count


async def test_a_stopped_job_is_not_tried_again(bench: Bench) -> None:
    """Neither while it runs, though it fails by itself then, nor in the pause before the next attempt."""
    worker = await bench.open(queue=MANY)
    job = await submit(worker, "trap 'exit 1' TERM; while :; do sleep 0.1; done", Retry(3))
    await running(worker, job)
    stopped = await worker.stop(job.id)
    assert (stopped.retried_as, len(await attempts(worker, job))) == (None, 1)
    job = await submit(worker, "exit 1", Retry(3, backoff_seconds=1000))
    async with asyncio.timeout(DEADLINE_SECONDS):
        while (await worker.get(job.id)).retried_as is None:
            await asyncio.sleep(0.05)
    # by the id of the first attempt
    stopped = await worker.stop(job.id)
    assert (stopped.attempt, stopped.reason) == (2, EndReason.CANCELLED)
    assert len(await attempts(worker, job)) == 2


async def test_pauses_grow(bench: Bench) -> None:
    """The first is as long as asked, the next one twice as long."""
    worker = await bench.open(queue=MANY)
    found = await attempts(worker, await submit(worker, "exit 1", Retry(2, backoff_seconds=0.5)))
    for (before, after), seconds in zip(pairwise(found), (0.5, 1.0), strict=True):
        assert before.end is not None
        assert seconds <= (after.start - before.end).total_seconds() < seconds + 10


async def test_what_waits_for_a_job_waits_for_its_last_attempt(bench: Bench) -> None:
    """However many there are; a name is free when that has ended."""
    worker = await bench.open(queue=MANY)
    job = await submit(worker, "[ $PJW_ATTEMPT = 3 ]", Retry(5, backoff_seconds=0.3))
    [waiting] = await worker.submit([JobSpec("true", queue=QueueSpec(after=[After(job.id)]))])
    async with asyncio.timeout(DEADLINE_SECONDS):
        done = await worker.wait(waiting.id)
    last = (await attempts(worker, job))[-1]
    assert done.succeeded
    assert last.end is not None
    assert done.start >= last.end


async def test_what_waits_in_a_pause_says_for_what(bench: Bench) -> None:
    """Whether it was asked before the first attempt or after it; a stop in the pause is an end for both."""
    worker = await bench.open(queue=MANY)
    job = await submit(worker, "exit 1", Retry(3, backoff_seconds=1000))
    waiting = [*await worker.submit([JobSpec("true", queue=QueueSpec(after=[After(job.id)]))])]
    async with asyncio.timeout(DEADLINE_SECONDS):
        while (await worker.get(job.id)).retried_as is None:
            await asyncio.sleep(0.05)
    for condition in (Condition.OK, Condition.FAILED):
        after = [After(job.id, condition)]
        waiting += await worker.submit([JobSpec("true", queue=QueueSpec(after=after))])
    for each in waiting:
        found = await worker.get(each.id)
        assert (found.state, found.unmet) == (JobState.QUEUED, 1)
        assert found.detail == f"waits for the end of job {job.id}"
    await worker.stop(job.id)
    async with asyncio.timeout(DEADLINE_SECONDS):
        ends = [await worker.wait(each.id) for each in waiting]
    assert [each.reason for each in ends] == [EndReason.CANCELLED, EndReason.CANCELLED, EndReason.COMPLETED]


async def test_a_stop_of_an_earlier_attempt_stops_the_one_that_runs(bench: Bench) -> None:
    """By the id that its client knows; and that is the end of it."""
    worker = await bench.open(queue=MANY)
    job = await submit(worker, "[ $PJW_ATTEMPT = 1 ] || sleep 300; exit 1", Retry(3, backoff_seconds=NOW))
    async with asyncio.timeout(DEADLINE_SECONDS):
        while (second_id := (await worker.get(job.id)).retried_as) is None:
            await asyncio.sleep(0.05)
    await running(worker, await worker.get(second_id))
    stopped = await worker.stop(job.id)
    assert (stopped.id, stopped.reason, stopped.retried_as) == (second_id, EndReason.STOPPED, None)
    assert len(await attempts(worker, job)) == 2


async def test_a_lost_job_is_run_again_only_if_asked(bench: Bench) -> None:
    """Since it may have done anything; and across the end of the worker an attempt is made once."""
    worker = await bench.open(queue=MANY)
    for retry, count in ((Retry(3, backoff_seconds=NOW), 1), (Retry(if_lost=True), 2)):
        job = await submit(worker, "[ $PJW_ATTEMPT = 2 ] || sleep 300", retry)
        await running(worker, job)
        os.kill(bench.init_pid(job.id), signal.SIGKILL)
        found = await attempts(worker, job)
        assert (found[0].state, len(found)) == (JobState.LOST, count)
    job = await submit(
        worker, "[ $PJW_ATTEMPT = 2 ] || sleep 1; [ $PJW_ATTEMPT = 2 ]", Retry(1, backoff_seconds=0)
    )
    await running(worker, job)
    await bench.close(worker)
    await asyncio.sleep(1.5)
    worker = await bench.open()
    found = await attempts(worker, job)
    assert [each.exit_status and each.exit_status.code for each in found] == [1, 0]


def test_what_is_no_retry() -> None:
    """Numbers out of their ranges, and input, which an attempt would have used up."""
    for wrong in (
        {"times": 101},
        {"times": 0},
        {"times": 1, "codes": {0}},
        {"times": 1, "backoff_seconds": 3601},
    ):
        with pytest.raises(InvalidJobError):
            Retry(**wrong)
    with pytest.raises(InvalidJobError, match="has no input"):
        JobSpec("cat", input=True, queue=QueueSpec(retry=Retry(1)))
