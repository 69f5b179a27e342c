"""What each end of a job means for what waits for it, and for its next attempt: every reason there is.

On the job table alone, so that the ends are here that no test can bring about at will.
"""

import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import pytest

from pjw.errors import InvalidJobError, JobNotFoundError
from pjw.model import (
    BACKOFF_SECONDS_MAX,
    WITHOUT_START,
    After,
    Condition,
    EndReason,
    ExitStatus,
    Job,
    JobSpec,
    JobState,
    Limits,
    QueueSpec,
    Retry,
)
from pjw.worker.settings import Quotas
from pjw.worker.store import JobStore

LOST: Final = (
    EndReason.LOST,
    EndReason.HOST_RESTARTED,
    EndReason.LAUNCH_INTERRUPTED,
    EndReason.NODE_LOST,
)
SECOND_NS: Final = 10**9
HOUR_NS: Final = BACKOFF_SECONDS_MAX * SECOND_NS

# each end: its reason, and how the command ended, if that is known
End = tuple[EndReason, ExitStatus | None]
OK: Final[End] = (EndReason.COMPLETED, ExitStatus(0))
KILLED: Final = ExitStatus(signal=9)
ENDS: Final[tuple[End, ...]] = (
    OK,
    (EndReason.COMPLETED, ExitStatus(3)),
    (EndReason.COMPLETED, ExitStatus(75)),
    (EndReason.COMPLETED, KILLED),
    *((reason, None) for reason in (*LOST, *sorted(WITHOUT_START))),
    # the command may have ended by itself all the same
    *(
        (reason, status)
        for reason in EndReason
        if reason not in (EndReason.COMPLETED, *LOST, *WITHOUT_START)
        for status in (ExitStatus(0), KILLED)
    ),
)


def test_no_reason_is_left_out() -> None:
    """A new one has to be thought of here."""
    assert {reason for reason, _ in ENDS} == set(EndReason)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[JobStore]:
    """An open table with one client."""
    store = JobStore(str(tmp_path / "jobs.sqlite"))
    await store.client_number("alice")
    yield store
    store.close()


async def submit(store: JobStore, *after: After, retry: Retry | None = None, held: bool = False) -> Job:
    """Put a job into the queue."""
    spec = JobSpec("x", queue=QueueSpec(after=after, retry=retry, held=held))
    [job], _ = await store.enqueue("alice", [(spec, Limits())], Quotas())
    return job


async def end(store: JobStore, job: Job, how: End, *, was_stopped: bool = False) -> Job:
    """Let a job run and end, or end without a start; as it is then."""
    reason, status = how
    if reason is EndReason.CANCELLED:
        ended = await store.end_without_start(job.id, reason, "why")
    else:
        started = await store.admit(job.id, job.limits)
        if reason is EndReason.START_FAILED:
            ended = await store.end_without_start(job.id, reason, "why")
        else:
            await store.settled(job.id)
            state = JobState.LOST if reason in LOST else JobState.EXITED
            over = datetime.now(UTC)
            ended = replace(started, state=state, reason=reason, exit_status=status, end=over, output_bytes=0)
            if job.attempt:
                await store.finish_attempt(ended, was_stopped=was_stopped)
            else:
                await store.finish(ended)
    assert ended is not None
    return await known(store, job)


async def known(store: JobStore, job: Job) -> Job:
    """A job as the table has it."""
    found = await store.get(job.id)
    assert found is not None
    return found


async def take_effects(store: JobStore, job_id: int) -> None:
    """Have an end its effect, and the ends that it brings about."""
    more = [job_id]
    while more:
        effects = await store.take_effect(more[-1])
        if not effects.left:
            more.pop()
        more[:0] = [cancelled_id for cancelled_id, _ in effects.cancelled]


@pytest.mark.parametrize("how", ENDS, ids=str)
async def test_each_condition_with_each_end(store: JobStore, how: End) -> None:
    """Whether asked before the end or after it; and what waits for what was cancelled goes on, or not."""
    job = await submit(store)
    before = {each: await submit(store, After(job.id, each)) for each in Condition}
    chains = {each: await submit(store, After(before[Condition.OK].id, each)) for each in Condition}
    await end(store, job, how)
    await take_effects(store, job.id)
    after = {each: await submit(store, After(job.id, each)) for each in Condition}
    met = {Condition.ANY, Condition.OK if how == OK else Condition.FAILED}
    for each in Condition:
        for waiting in (before[each], after[each]):
            found = await known(store, waiting)
            if each in met:
                assert (found.state, found.unmet) == (JobState.QUEUED, 0)
            else:
                assert (found.state, found.reason) == (JobState.EXITED, EndReason.CANCELLED)
                assert found.detail.startswith(f"job {job.id}, which it waited for, ")
    for each, waiting in chains.items():
        found = await known(store, waiting)
        if how == OK:
            assert (found.state, found.unmet) == (JobState.QUEUED, 1)
        elif each is Condition.OK:
            assert (found.state, found.reason) == (JobState.EXITED, EndReason.CANCELLED)
        else:
            assert (found.state, found.unmet) == (JobState.QUEUED, 0)


async def test_what_was_removed_is_no_job_to_wait_for(store: JobStore) -> None:
    """Whatever its end was; another client's is none, either."""
    for how in (OK, ENDS[1], ENDS[-1]):
        job = await end(store, await submit(store), how)
        await store.remove(job.id)
        with pytest.raises(JobNotFoundError, match=f"no job {job.id}"):
            await submit(store, After(job.id, Condition.ANY))
    mine = await submit(store)
    await store.client_number("bob")
    asked = [(JobSpec("x", queue=QueueSpec(after=[After(mine.id)])), Limits())]
    with pytest.raises(JobNotFoundError, match=f"no job {mine.id}"):
        await store.enqueue("bob", asked, Quotas())


# --- attempts


RETRIES: Final = {
    "every failure": Retry(1),
    "code 75": Retry(1, frozenset({75})),
    "oom": Retry(1, oom=True),
    "timeout": Retry(1, timeout=True),
    "code 3 or timeout": Retry(1, frozenset({3}), timeout=True),
    "if lost": Retry(if_lost=True),
}
# of these ends each is tried again; of all that are not here none
TRIED_AGAIN: Final = {
    "every failure": {
        *(("completed", code) for code in (3, 75, 137)),
        *(
            (name, code)
            for name in (
                "timed_out",
                "output_limit",
                "oom_killed",
                "output_failed",
                "artifacts_missing",
                "revoked",
            )
            for code in (0, 137)
        ),
    },
    "code 75": {("completed", 75)},
    "oom": {("oom_killed", 0), ("oom_killed", 137)},
    "timeout": {("timed_out", 0), ("timed_out", 137)},
    "code 3 or timeout": {("completed", 3), ("timed_out", 0), ("timed_out", 137)},
    "if lost": {(reason.value, None) for reason in LOST},
}


@pytest.mark.parametrize("name", RETRIES)
@pytest.mark.parametrize("was_stopped", [False, True])
async def test_each_end_of_an_attempt(store: JobStore, name: str, was_stopped: bool) -> None:
    """Which ends are followed by another attempt; none where somebody has asked for the end."""
    tried_again = set()
    for how in ENDS:
        job = await submit(store, retry=RETRIES[name])
        ended = await end(store, job, how, was_stopped=was_stopped)
        if ended.retried_as is not None:
            tried_again.add((how[0].value, how[1] and how[1].code))
            await store.end_without_start(ended.retried_as, EndReason.CANCELLED, "why")
    assert tried_again == (set() if was_stopped else TRIED_AGAIN[name])
    # and nothing is left of what they were to execute
    assert await store.queued_of_clients() == {}


async def test_pauses(store: JobStore) -> None:
    """Each is twice as long as the one before, and none longer than an hour; the last attempt has no next."""
    job, pauses = await submit(store, retry=Retry(4, backoff_seconds=1000)), []
    for number in range(1, 6):
        assert job.attempt == number
        ended = await end(store, job, ENDS[1])
        if ended.retried_as is None:
            break
        following = await store.get(ended.retried_as)
        assert following is not None
        assert following.not_before is not None
        assert following.queued is not None
        pauses.append(round((following.not_before - following.queued).total_seconds()))
        # its time has come
        await store.let_due(time.time_ns() + 2 * HOUR_NS)
        job = await known(store, following)
    assert (number, pauses) == (5, [1000, 2000, BACKOFF_SECONDS_MAX, BACKOFF_SECONDS_MAX])


async def test_a_full_queue_takes_the_next_attempt(store: JobStore) -> None:
    """It has been let in once: a lower bound meanwhile, or others that came, do not end it."""
    job = await submit(store, retry=Retry(1, backoff_seconds=0))
    await store.admit(job.id, job.limits)
    await store.settled(job.id)
    asked = [(JobSpec("x"), Limits())]
    await store.enqueue("alice", asked, Quotas(queued_max=1))
    lost = replace(
        job, state=JobState.EXITED, reason=EndReason.COMPLETED, exit_status=ExitStatus(1), end=job.start
    )
    following = await store.finish_attempt(lost, was_stopped=False)
    assert following is not None
    assert following.state is JobState.QUEUED
    assert await store.queued_of_clients() == {"alice": 2}


async def test_what_is_asked_after_an_attempt_waits_for_the_newest(store: JobStore) -> None:
    """In the pause between two attempts, too; and for two attempts of one job nothing waits."""
    first = await submit(store, retry=Retry(3, backoff_seconds=0))
    second_id = (await end(store, first, ENDS[1])).retried_as
    assert second_id is not None
    waiting = {each: await submit(store, After(first.id, each)) for each in Condition}
    assert [(each.state, each.unmet) for each in waiting.values()] == [(JobState.QUEUED, 1)] * 3
    with pytest.raises(
        InvalidJobError, match=f"job {second_id} is named twice: job {second_id} is an attempt"
    ):
        await submit(store, After(first.id), After(second_id))
    second = await store.get(second_id)
    assert second is not None
    await end(store, second, OK)
    await take_effects(store, second_id)
    states = {each: (await known(store, job)).state for each, job in waiting.items()}
    assert states == {
        Condition.OK: JobState.QUEUED,
        Condition.FAILED: JobState.EXITED,
        Condition.ANY: JobState.QUEUED,
    }
    # where the newest was removed, the one before is what is known
    await store.remove(second_id)
    found = await submit(store, After(first.id, Condition.FAILED))
    assert (found.state, found.unmet) == (JobState.QUEUED, 0)


# --- cycles


@pytest.mark.parametrize("seed", range(8))
async def test_no_order_of_events_makes_a_cycle(store: JobStore, seed: int) -> None:
    """Jobs name any ids, wait, fail, are tried again and removed: in the end nothing is left that waits."""
    chance = random.Random(seed)
    alive: dict[int, Job] = {}

    async def somebody_submits() -> None:
        count = chance.randint(1, 4)
        asked = []
        for _ in range(count):
            names = {chance.randint(1, 40) for _ in range(chance.randint(0, 3))}
            after = [After(name, chance.choice(list(Condition))) for name in names]
            if chance.random() < 0.3:
                after.append(After(condition=chance.choice(list(Condition)), earlier=chance.randint(0, 3)))
            retry = Retry(2, backoff_seconds=0) if chance.random() < 0.4 else None
            asked.append((JobSpec("x", queue=QueueSpec(after=after, retry=retry)), Limits()))
        # what names others than older jobs of the client is refused, all of it
        try:
            jobs, _ = await store.enqueue("alice", asked, Quotas())
        except (JobNotFoundError, InvalidJobError):
            return
        alive.update((job.id, job) for job in jobs)

    async def one_ends(ready: Sequence[Job]) -> None:
        job = chance.choice(ready)
        ended = await end(store, job, chance.choice(ENDS))
        if ended.retried_as is not None:
            following = await store.get(ended.retried_as)
            assert following is not None
            alive[following.id] = following
        await take_effects(store, job.id)
        if chance.random() < 0.2 and ended.retried_as is None:
            await store.remove(job.id)
            del alive[job.id]

    steps = 60
    while steps > 0 or alive:
        steps -= 1
        if steps > 0 and chance.random() < 0.5:
            await somebody_submits()
        found = [await known(store, job) for job in alive.values()]
        alive = {job.id: job for job in found if not job.state.final}
        ready = [job for job in alive.values() if not job.unmet]
        # in a cycle there would be none
        assert ready or not alive
        if ready:
            await one_ends(ready)
    assert await store.awaited() == {}
    assert await store.queued_of_clients() == {}


# --- the clock


async def test_the_clock_is_set_in_a_pause(store: JobStore) -> None:
    """A pause is seconds that pass; a time that a client has named is by the clock, whoever sets it."""
    when = datetime.now(UTC) + timedelta(hours=5)
    spec = JobSpec("x", queue=QueueSpec(not_before=when, retry=Retry(1)))
    [later], _ = await store.enqueue("alice", [(spec, Limits())], Quotas())
    waiting = await next_attempt(store)
    clock = 0
    for hours in (1, -1, -1):
        before, shift = (await known(store, waiting)).not_before, timedelta(hours=hours)
        clock += hours
        due_ns = await store.shift_pauses(hours * HOUR_NS, time.time_ns() + clock * HOUR_NS)
        after = (await known(store, waiting)).not_before
        assert before is not None
        assert after == before + shift
        assert due_ns == pytest.approx(after.timestamp() * SECOND_NS, abs=1e6)
    assert (await known(store, later)).not_before == later.not_before
    # what was queued since then, by the new clock, is right
    newer = await next_attempt(store)
    await store.shift_pauses(HOUR_NS, time.time_ns())
    assert (await known(store, newer)).not_before == newer.not_before


async def test_the_clock_was_set_back_while_no_worker_ran(store: JobStore) -> None:
    """Nobody knows by how much: an attempt waits an hour at most."""
    waiting = await next_attempt(store)
    years_ago = time.time_ns() - 10**17
    assert await store.shift_pauses(0, years_ago) == years_ago + HOUR_NS
    assert (await known(store, waiting)).not_before is not None


async def next_attempt(store: JobStore) -> Job:
    """An attempt in the pause before it, of 100 s."""
    ended = await end(store, await submit(store, retry=Retry(1, backoff_seconds=100)), ENDS[1])
    assert ended.retried_as is not None
    found = await store.get(ended.retried_as)
    assert found is not None
    return found
