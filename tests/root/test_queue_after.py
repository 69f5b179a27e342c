"""Jobs of the queue that wait for the ends of others: each condition with each end, and chains."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Final

import pytest

from pjw.errors import InvalidJobError, JobNotFoundError
from pjw.model import After, Condition, EndReason, Job, JobSpec, JobState, QueueSpec
from pjw.worker import QueueSlots, Worker
from tests.support.worker_harness import DEADLINE_SECONDS, Bench, start

MIB: Final = 1024**2
MANY: Final = QueueSlots(cpu_max_millicores=0)


async def submit(
    worker: Worker, command: str | list[str], *after: After, client: str = "local", held: bool = False
) -> Job:
    """Put a job into the queue."""
    [job] = await worker.submit([JobSpec(command, queue=QueueSpec(after=after, held=held))], client)
    return job


async def ended(worker: Worker, job: Job) -> Job:
    """The job, when it has ended."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        return await worker.wait(job.id)


async def stopped(bench: Bench, worker: Worker) -> Job:
    """A job that somebody has stopped, though it then exits with 0."""
    job = await start(worker, "trap 'exit 0' TERM; while :; do sleep 0.1; done")
    await worker.stop(job.id)
    return job


async def cancelled(bench: Bench, worker: Worker) -> Job:
    """A job that was stopped in the queue."""
    job = await submit(worker, "true", held=True)
    await worker.stop(job.id)
    return job


async def lost(bench: Bench, worker: Worker) -> Job:
    """A job whose init was killed."""
    job = await start(worker, ["sleep", "300"])
    os.kill(bench.init_pid(job.id), signal.SIGKILL)
    return job


def command(text: str, **limits: int) -> Callable[[Bench, Worker], Awaitable[Job]]:
    """A job that ends by itself."""

    async def run(bench: Bench, worker: Worker) -> Job:
        return await start(worker, text, "local", **limits)

    return run


async def start_failed(bench: Bench, worker: Worker) -> Job:
    """A job of the queue whose command is not there."""
    return await submit(worker, ["/no/such"])


# an end, whether it is one that is "ok", and the words of a job that waited for another one
ENDS: Final = {
    "completed": (command("true"), True, "ended with exit code 0"),
    "failed": (command("exit 3"), False, "ended with exit code 3"),
    "killed by a signal": (command("kill -9 $$"), False, "ended with exit code 137"),
    "stopped": (stopped, False, "ended as stopped"),
    "timed_out": (command("sleep 300", time_max_seconds=1), False, "ended as timed_out"),
    "output_limit": (command("yes", output_max_bytes=10_000), False, "ended as output_limit"),
    "oom_killed": (
        command("head -c 100m /dev/zero | tail | wc -c; exit 1", memory_max_bytes=32 * MIB),
        False,
        "ended as oom_killed",
    ),
    "lost": (lost, False, "is lost"),
    "cancelled": (cancelled, False, "ended as cancelled"),
    "start_failed": (start_failed, False, "ended as start_failed"),
}


@pytest.mark.parametrize("end", ENDS)
async def test_each_condition_with_each_end(bench: Bench, end: str) -> None:
    """Waiting before the end and asking after it come to the same; what waits in vain is cancelled."""
    worker = await bench.open(queue=MANY)
    make, is_ok, how = ENDS[end]
    job = await make(bench, worker)
    waiting = {each: await submit(worker, "true", After(job.id, each)) for each in Condition}
    await ended(worker, job)
    later = {each: await submit(worker, "true", After(job.id, each)) for each in Condition}
    met = {Condition.ANY, Condition.OK if is_ok else Condition.FAILED}
    for each in Condition:
        for asked in (waiting, later):
            done = await ended(worker, asked[each])
            if each in met:
                assert done.succeeded, (each, done)
            else:
                assert (done.state, done.reason, done.exit_status) == (
                    JobState.EXITED,
                    EndReason.CANCELLED,
                    None,
                )
                assert done.detail == f"job {job.id}, which it waited for, {how}"


async def test_what_waits_says_for_what(bench: Bench) -> None:
    """And for how many; all of them have to end, in any order; a hold holds on."""
    worker = await bench.open(queue=MANY)
    naps = [await start(worker, ["sleep", "300"]) for _ in range(7)]
    after = [After(job.id, Condition.ANY) for job in naps]
    job = await submit(worker, ["true"], *after)
    assert (job.after, job.unmet) == (tuple(after), 7)
    named = ", ".join(str(nap.id) for nap in naps[:5])
    assert job.detail == f"waits for the end of job {named} and 2 more"
    held = await submit(worker, ["true"], after[0], held=True)
    for nap in naps[1:]:
        await worker.stop(nap.id, 0)
    assert (await worker.get(job.id)).unmet == 1
    assert (await worker.get(job.id)).detail == f"waits for the end of job {naps[0].id}"
    await worker.stop(naps[0].id, 0)
    done = await ended(worker, job)
    assert (done.succeeded, done.after, done.unmet) == (True, tuple(after), 0)
    assert (await worker.get(held.id)).detail == "waits until it is released"
    await worker.release(held.id)
    assert (await ended(worker, held)).succeeded


async def test_a_chain_is_cancelled_to_its_end_at_once(bench: Bench) -> None:
    """However long, and however many wait for one; those that wait for a failure go on."""
    worker = await bench.open(queue=MANY)
    first = await submit(worker, "exit 1", held=True)
    chain = [first]
    for _ in range(500):
        chain.append(await submit(worker, "true", After(chain[-1].id)))
    many = await worker.submit([JobSpec("true", queue=QueueSpec(after=[After(chain[250].id)]))] * 500)
    rescue = await submit(worker, "true", After(chain[-1].id, Condition.FAILED))
    await worker.release(first.id)
    assert (await ended(worker, rescue)).succeeded
    for job in (*chain[1:], *many):
        assert (await ended(worker, job)).reason is EndReason.CANCELLED
    last = await worker.get(chain[-1].id)
    assert last.detail == f"job {chain[-2].id}, which it waited for, ended as cancelled"


async def test_there_are_no_cycles(bench: Bench) -> None:
    """A job waits for older ones alone: not for itself, and not for what comes."""
    worker = await bench.open(queue=MANY)
    first = await submit(worker, "true", held=True)
    for job_id in (first.id + 1, first.id + 2):
        # the first of them is its own
        with pytest.raises(JobNotFoundError, match=f"no job {job_id}"):
            await submit(worker, "true", After(job_id))
    assert [job.id for job in await worker.list()] == [first.id]
    # in a submission, too
    for earlier in (1, 2):
        asked = [JobSpec("true"), JobSpec("true", queue=QueueSpec(after=[After(earlier=earlier)]))]
        with pytest.raises(InvalidJobError, match=f"job 1 of a submission cannot wait for job {earlier}"):
            await worker.submit(asked)
    assert [job.id for job in await worker.list()] == [first.id]
    with pytest.raises(InvalidJobError, match="one condition"):
        QueueSpec(after=[After(1), After(1, Condition.ANY)])


async def test_jobs_of_one_submission(bench: Bench) -> None:
    """They wait for earlier ones among them by their places; a repeated submission is the same."""
    worker = await bench.open(queue=MANY)
    asked = [
        JobSpec("exit 1", request_id="a", queue=QueueSpec(held=True)),
        JobSpec("true", request_id="b", queue=QueueSpec(after=[After(earlier=0)])),
        JobSpec(
            "true", request_id="c", queue=QueueSpec(after=[After(condition=Condition.FAILED, earlier=1)])
        ),
    ]
    first, second, third = await worker.submit(asked)
    assert (second.after, third.after) == ((After(first.id),), (After(second.id, Condition.FAILED),))
    assert [job.id for job in await worker.submit(asked)] == [first.id, second.id, third.id]
    await worker.release(first.id)
    assert (await ended(worker, third)).succeeded
    assert (await ended(worker, second)).reason is EndReason.CANCELLED


async def test_jobs_of_others_are_none(bench: Bench) -> None:
    """Whether there is such a job is not told, and it is not waited for; nor is one that was removed."""
    worker = await bench.open(queue=MANY)
    alices = await start(worker, "true", "alice")
    for after in (After(alices.id), After(2**62)):
        with pytest.raises(JobNotFoundError, match=f"no job {after.job_id}"):
            await submit(worker, "true", after, client="bob")
    await worker.wait(alices.id)
    await worker.delete(alices.id)
    with pytest.raises(JobNotFoundError, match=f"no job {alices.id}"):
        await submit(worker, "true", After(alices.id), client="alice")
    assert await worker.list("bob") == []


async def test_an_end_and_its_effects_outlive_the_worker(bench: Bench) -> None:
    """What ended while no worker ran has its effect when the next one has begun."""
    worker = await bench.open(queue=MANY)
    good, bad = await start(worker, "sleep 1"), await start(worker, "sleep 1; exit 1")
    waiting = [await submit(worker, "true", After(job.id)) for job in (good, bad)]
    last = await submit(worker, "true", After(waiting[1].id, Condition.FAILED))
    await bench.close(worker)
    await asyncio.sleep(1.5)
    worker = await bench.open()
    assert (await ended(worker, waiting[0])).succeeded
    assert (await ended(worker, waiting[1])).reason is EndReason.CANCELLED
    assert (await ended(worker, last)).succeeded


async def test_an_end_has_its_effect_before_it_is_forgotten(bench: Bench) -> None:
    """rm right after the end: what waited for it goes on, or is cancelled."""
    worker = await bench.open(queue=MANY)
    for text, succeeds in (("true", True), ("exit 1", False)):
        job = await submit(worker, text, held=True)
        waiting = await submit(worker, "true", After(job.id))
        await worker.release(job.id)
        await ended(worker, job)
        await worker.delete(job.id)
        assert (await ended(worker, waiting)).succeeded is succeeds
