"""The job table: ids, versions, what was written, and a disk that is full."""

import asyncio
import errno
import os
import sqlite3
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pjw.errors import ConfigError, JobTableError, KernelError, LimitReachedError, NameTakenError
from pjw.model import (
    After,
    ArrayCounts,
    EndReason,
    ExitStatus,
    Job,
    JobSpec,
    JobState,
    Limits,
    QueueSpec,
    Retry,
    Usage,
)
from pjw.node import cluster_rows as node_rows
from pjw.worker import job_rows, schema
from pjw.worker.job_rows import AlreadyStartedError, from_ns, to_ns
from pjw.worker.pages import JobFilter, Page
from pjw.worker.queue_rows import Head
from pjw.worker.schema import SCHEMA_VERSION
from pjw.worker.secret_files import SecretFiles
from pjw.worker.settings import Quotas, Retention
from pjw.worker.store import JobStore, NotQueuedError

DATA = Path(__file__).parents[1] / "data"
END = datetime(2026, 5, 17, 12, 0, 0, 123_456, UTC)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the table is."""
    return tmp_path / "jobs.sqlite"


@pytest.fixture
async def store(path: Path) -> AsyncIterator[JobStore]:
    """An open table."""
    store = JobStore(str(path))
    yield store
    store.close()


def ended(job: Job) -> Job:
    """A job as it is written down at its end."""
    status, usage = ExitStatus(code=3), Usage(1, 2, 3, 4, 5)
    return replace(
        job, state=JobState.EXITED, end=END, exit_status=status, reason=EndReason.COMPLETED, usage=usage
    )


async def filled(store: JobStore, *sizes: int, client: str = "alice") -> list[int]:
    """Ended jobs with so much output each, which ended one second after another; their ids."""
    await store.client_number(client)
    made = []
    for number, size in enumerate(sizes):
        job = await store.add(client, JobSpec("x"), Limits())
        await store.finish(replace(ended(job), end=END + timedelta(seconds=number), output_bytes=size))
        made.append(job.id)
    return made


async def test_what_is_written_is_read(store: JobStore) -> None:
    """A job comes back as it was, with limits, times to the microsecond, status, reason and usage."""
    job = await store.add("alice", JobSpec("echo ü 'x'"), Limits(pids_max=7))
    assert await store.get(job.id) == job
    final = ended(job)
    await store.finish(final)
    assert await store.get(job.id) == final
    lost = await store.add("alice", JobSpec("x"), Limits())
    lost = replace(lost, state=JobState.LOST, end=END, reason=EndReason.LOST)
    await store.finish(lost)
    assert await store.get(lost.id) == lost
    killed = await store.add("alice", JobSpec("x"), Limits())
    killed = replace(ended(killed), exit_status=ExitStatus(signal=9), reason=EndReason.STOPPED, usage=None)
    await store.finish(killed)
    assert await store.get(killed.id) == killed


async def test_a_killed_job_is_written_as_before(path: Path) -> None:
    """A version before this one refuses a row with both a code and a signal."""
    store = JobStore(str(path))
    job = await store.add("alice", JobSpec("x"), Limits())
    await store.finish(replace(ended(job), exit_status=ExitStatus(signal=9)))
    store.close()
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT exit_code, signal FROM jobs").fetchall() == [(None, 9)]
    db.close()


async def test_it_outlives_the_process(path: Path) -> None:
    """What was written is there when the table is opened again."""
    store = JobStore(str(path))
    job = await store.add("alice", JobSpec("x"), Limits())
    store.close()
    store = JobStore(str(path))
    assert await store.get(job.id) == job
    assert await store.alive() == [job]
    store.close()


async def test_ids_are_never_reused(path: Path) -> None:
    """Not after the last job was discarded, and not after a restart."""
    store = JobStore(str(path))
    first = await store.add("alice", JobSpec("x"), Limits())
    second = await store.add("alice", JobSpec("x"), Limits())
    await store.discard(second.id)
    third = await store.add("alice", JobSpec("x"), Limits())
    await store.discard(third.id)
    store.close()
    store = JobStore(str(path))
    fourth = await store.add("alice", JobSpec("x"), Limits())
    assert [first.id, second.id, third.id, fourth.id] == [1, 2, 3, 4]
    assert await store.get(third.id) is None
    store.close()


async def test_client_numbers(path: Path) -> None:
    """From 0 on, one for each name, the same for ever, never another's; names are compared to the letter."""
    store = JobStore(str(path))
    names = ["alice", "Alice", "bob", "alice ", "'; DROP TABLE clients; --", ""]
    assert [await store.client_number(name) for name in names] == list(range(6))
    store.close()
    store = JobStore(str(path))
    assert [await store.client_number(name) for name in reversed(names)] == list(reversed(range(6)))
    assert await store.client_number("new") == 6
    store.close()


async def test_numbers_asked_for_at_once(store: JobStore) -> None:
    """100 at the same time: as many numbers as names."""
    names = [f"client {number % 50}" for number in range(100)]
    numbers = await asyncio.gather(*(store.client_number(name) for name in names))
    assert len(dict(zip(names, numbers, strict=True))) == len(set(numbers)) == 50


async def test_pages_and_the_living(store: JobStore) -> None:
    """By owner, behind an id, so many; the living are those that were not finished."""
    jobs = [await store.add("ab"[number % 2], JobSpec(str(number)), Limits()) for number in range(6)]
    for job in jobs[:3]:
        await store.finish(ended(job))
    assert [job.id for job in (await store.page(None, 0, 1000)).jobs] == [1, 2, 3, 4, 5, 6]
    assert [job.id for job in (await store.page("a", 1, 2)).jobs] == [3, 5]
    assert [job.id for job in (await store.page("c", 0, 2)).jobs] == []
    assert [job.id for job in await store.alive()] == [4, 5, 6]


def test_a_table_from_the_future_is_refused(path: Path) -> None:
    """An older pjw does not touch what it cannot understand, and says what to do."""
    JobStore(str(path)).close()
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    db.close()
    before = path.read_bytes()
    with pytest.raises(
        ConfigError, match=f"has version {SCHEMA_VERSION + 1}, and this pjw knows only"
    ) as caught:
        JobStore(str(path))
    assert caught.value.hint == "a newer pjw has written it; run that one"
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content", [b"not a database at all, but long enough to be looked at" * 100, b"SQLite format 3\0"]
)
def test_a_file_that_is_no_table(path: Path, content: bytes) -> None:
    """Refused, and left as it is."""
    path.write_bytes(content)
    with pytest.raises(JobTableError, match=r"^cannot use the job table"):
        JobStore(str(path))
    assert path.read_bytes() == content


def test_a_table_in_use(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A second process is refused, and told that."""
    # it waits for a predecessor that is ending, and need not here
    monkeypatch.setattr("pjw.worker.table.BUSY_SECONDS", 0.1)
    first = JobStore(str(path))
    with pytest.raises(ConfigError, match="is in use by another pjwd"):
        JobStore(str(path))
    assert [record.getMessage() for record in caplog.records] == [
        f"{path} is in use by another pjwd; waiting 0 s for its end"
    ]
    first.close()
    JobStore(str(path)).close()


async def test_a_full_disk(store: JobStore) -> None:
    """Every write says LimitReachedError, reads go on, and when there is space so do writes."""
    job = await store.add("alice", JobSpec("x"), Limits())
    # SQLite's own bound: the table may not grow, as on a full disk
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(LimitReachedError, match="no space is left for the job table"):
        await asyncio.gather(*(store.add("alice", JobSpec("x" * 10_000), Limits()) for _ in range(100)))
    assert await store.get(job.id) == job
    store._db.execute("PRAGMA max_page_count = 1000000")
    assert (await store.add("alice", JobSpec("x" * 10_000), Limits())).id > job.id


async def test_a_table_of_version_1(path: Path) -> None:
    """One that an older pjw wrote is brought up to date, with all that is in it."""
    with sqlite3.connect(path) as db:
        db.executescript((DATA / "jobs_v1.sql").read_text())
    db.close()
    store = JobStore(str(path))
    first, second, third, alive = (await store.page(None, 0, 10)).jobs
    assert (first.command, first.limits.pids_max, first.end) == ("echo ü 'x'", 7, END)
    assert (first.exit_status, first.usage) == (ExitStatus(code=3), Usage(1, 2, 3, 4, 5))
    assert (second.client_name, second.exit_status) == ("bob", ExitStatus(signal=9))
    assert (third.state, third.reason) == (JobState.LOST, EndReason.LOST)
    assert {job.output_bytes for job in (first, second, third)} == {None}
    assert await store.alive() == [alive]
    assert (await store.add("alice", JobSpec("x"), Limits())).id == 6
    # what is counted from now on was counted then as well
    assert await store.prune(Retention(jobs_per_client=1), 0, 10) == [1]
    store.close()


async def test_a_table_of_version_2(path: Path) -> None:
    """What it has keeps its bytes, its end and its removals; from now on its jobs may have names."""
    with sqlite3.connect(path) as db:
        db.executescript((DATA / "jobs_v2.sql").read_text())
    db.close()
    store = JobStore(str(path))
    first, second, alive = (await store.page(None, 0, 10)).jobs
    assert (first.command, first.output_bytes, first.end) == ("echo ü 'x'", 12, END)
    assert (second.client_name, second.exit_status) == ("bob", ExitStatus(signal=9))
    assert await store.alive() == [alive]
    assert {(job.name, *job.labels, job.split_stderr, job.input) for job in (first, second, alive)} == {
        ("", False, False)
    }
    assert await store.removals() == [4]
    assert await store.ended_bytes("alice") == (12, 12)
    named = await store.add("alice", JobSpec("x", name="n", labels={"k": "v"}, request_id="r"), Limits())
    assert named.id == 5
    assert await store.of_request("alice", "r") == 5
    store.close()


async def test_a_table_of_version_3(path: Path) -> None:
    """Its jobs keep names, labels and request ids; where they began, nobody knows."""
    with sqlite3.connect(path) as db:
        db.executescript((DATA / "jobs_v3.sql").read_text())
    db.close()
    store = JobStore(str(path))
    first, second, alive = (await store.page(None, 0, 10)).jobs
    assert (first.name, first.labels, first.split_stderr, first.input) == (
        "web",
        {"team": "blue"},
        True,
        False,
    )
    assert (second.name, second.labels, second.split_stderr, second.input) == ("", {}, False, True)
    assert await store.alive() == [alive]
    assert await store.of_request("alice", "r-1") == 1
    assert {job.workdir for job in (first, second, alive)} == {""}
    new = [await store.add("alice", JobSpec("x", workdir=workdir), Limits()) for workdir in ("", "/usr")]
    assert [job.workdir for job in new] == ["/run/job", "/usr"]
    assert [await store.get(job.id) for job in new] == new
    store.close()


async def test_a_table_of_version_4(path: Path) -> None:
    """Its jobs were all started at once; from now on jobs may wait in it, beside one that runs."""
    with sqlite3.connect(path) as db:
        db.executescript((DATA / "jobs_v4.sql").read_text())
    db.close()
    store = JobStore(str(path))
    jobs = (await store.page(None, 0, 10)).jobs
    assert [job.workdir for job in jobs] == ["/run/job", "", "/usr"]
    assert {(job.queued, job.priority, job.held, job.detail, job.was_started) for job in jobs} == {
        (None, 0, False, "", True)
    }
    assert await store.alive() == [jobs[2]]
    assert (await store.queued_of_clients(), await store.admitted()) == ({}, set())
    [waiting], _ = await store.enqueue("alice", [(JobSpec("x"), Limits())], Quotas())
    assert waiting.state is JobState.QUEUED
    assert await store.alive() == [jobs[2]]
    assert await store.queued_of_clients() == {"alice": 1}
    store.close()


async def test_a_table_of_version_6(path: Path) -> None:
    """What waits in its queue waits on, for the same jobs."""
    with sqlite3.connect(path) as db:
        for number, script in enumerate(schema.MIGRATIONS[:6], 1):
            db.executescript(f"{script} PRAGMA user_version = {number};")
        db.executescript(
            "INSERT INTO clients (name, number) VALUES ('alice', 0);"
            "INSERT INTO jobs (client_name, command, limits, start_ns, queued_ns, unmet, waits_for) VALUES"
            " ('alice', 'x', '{}', 1000, NULL, 0, ''), ('alice', 'x', '{}', 0, 1000, 1, '1:ok');"
            "INSERT INTO specs VALUES (2, 'alice', 7, '{}');"
            "INSERT INTO dependencies VALUES (1, 2, 'ok');"
        )
    db.close()
    store = JobStore(str(path))
    running, waiting = (await store.page(None, 0, 10)).jobs
    assert (waiting.state, waiting.unmet, waiting.attempt) == (JobState.QUEUED, 1, 0)
    assert await store.awaited() == {1: False}
    assert await store.queued_of_clients() == {"alice": 1}
    await store.finish(replace(ended(running), exit_status=ExitStatus(0)))
    assert (await store.take_effect(1)).clients == ["alice"]
    assert (await store.first_ready("alice") or (0,))[0] == 2
    store.close()


async def test_a_table_from_before_arrays(path: Path) -> None:
    """Its jobs and its changes are as they were, also what was removed; then it takes arrays."""
    arrays = next(
        number for number, script in enumerate(schema.MIGRATIONS) if "CREATE TABLE arrays" in script
    )
    with sqlite3.connect(path) as db:
        for number, script in enumerate(schema.MIGRATIONS[:arrays], 1):
            db.executescript(f"{script} PRAGMA user_version = {number};")
        db.executescript(
            "INSERT INTO clients (name, number) VALUES ('alice', 0);"
            "INSERT INTO jobs (client_name, command, limits, start_ns, queued_ns, told) VALUES"
            " ('alice', 'runs', '{}', 1000, NULL, 'running'), ('alice', 'waits', '{}', 0, 1000, ''),"
            " ('alice', 'went', '{}', 0, 1000, '');"
            "INSERT INTO specs VALUES (2, 'alice', 7, '{\"command\": \"waits\"}', 0, 'secret');"
            "DELETE FROM jobs WHERE id = 3;"
        )
    db.close()
    store = JobStore(str(path))
    store.secrets = SecretFiles(str(path.parent))
    runs, waits = (await store.page(None, 0, 10)).jobs
    assert [(job.state, job.array, job.array_id, job.ref) for job in (runs, waits)] == [
        (JobState.STARTING, None, None, "1"),
        (JobState.QUEUED, None, None, "2"),
    ]
    assert await store.queued_of_clients() == await store.waiting_of_clients() == {"alice": 1}
    assert (await store.first_ready("alice") or (0,))[0] == 2
    changes, last = await store.changes({"alice"}, 0, 10)
    assert [(each.job.command, str(each.job.state), each.removed) for each in changes] == [
        ("waits", "queued", False),
        ("went", "queued", False),
        ("went", "queued", True),
    ]
    spec = JobSpec("x", queue=QueueSpec(array="1-3"))
    [array], _ = await store.enqueue("alice", [(spec, Limits())], Quotas())
    assert await store.waiting_of_clients() == {"alice": 4}
    drawn = await store.draw(array.id, ())
    assert drawn == (array.id + 1, 1)
    found = await store.waiting(drawn[0])
    assert (found.spec().command, found.spec().env["PJW_ARRAY_INDEX"]) == ("x", "1")
    await store.admit(drawn[0], Limits())
    changes, _ = await store.changes({"alice"}, last, 10)
    assert [(each.job.ref, str(each.job.state)) for each in changes] == [
        (f"{array.id}", "queued"),
        (f"{array.id}_1", "queued"),
        (f"{array.id}_1", "starting"),
    ]
    assert await store.cancel_array(array.id, "stopped") == []
    await store.finish(replace(ended(found.job), exit_status=ExitStatus(0)))
    await store.remove(array.id)
    changes, _ = await store.changes({"alice"}, last + 3, 10)
    assert [(each.job.ref, str(each.job.state), each.removed) for each in changes] == [
        (f"{array.id}", "running", False),
        (f"{array.id}_1", "exited", False),
        (f"{array.id}", "exited", False),
        (f"{array.id}", "exited", True),
    ]
    # what is told of a removed array still has its counts
    assert changes[-1].job.array == ArrayCounts("1-3", 3, 0, 1, 0, 2)
    store.close()


async def test_a_job_that_is_tried_again(store: JobStore) -> None:
    """Its next attempt takes its place with its end: the name, the command, and what waits for it."""
    await store.client_number("alice")
    spec = JobSpec(("false",), name="n", queue=QueueSpec(3, retry=Retry(1, backoff_seconds=100)))
    (first, waiting), awaited = await store.enqueue(
        "alice",
        [(spec, Limits()), (JobSpec("x", queue=QueueSpec(after=[After(earlier=0)])), Limits())],
        Quotas(),
    )
    assert awaited == {first.id}
    running = await store.admit(first.id, Limits())
    await store.settled(first.id)
    # it runs, and waits no more; what it executes is kept
    assert (await store.queued_of_clients(), await store.admitted()) == ({"alice": 1}, set())
    following = await store.finish_attempt(ended(running), was_stopped=False)
    assert following is not None
    assert (following.state, following.attempt, following.name, following.priority) == (
        JobState.QUEUED,
        2,
        "n",
        3,
    )
    assert following.not_before is not None
    before = await store.get(first.id)
    assert before is not None
    assert (before.state, before.retried_as) == (JobState.EXITED, following.id)
    assert await store.queued_of_clients() == {"alice": 2}
    assert await store.awaited() == {following.id: False}
    await store.let_due(to_ns(following.not_before) + 1000)
    found = await store.waiting(following.id)
    assert (found.spec().command, found.spec().env) == (("false",), {"PJW_ATTEMPT": "2"})
    last = await store.admit(following.id, Limits())
    await store.settled(following.id)
    assert await store.finish_attempt(ended(last), was_stopped=False) is None
    assert await store.queued_of_clients() == {"alice": 1}
    assert (await store.take_effect(following.id)).cancelled == [(waiting.id, "alice")]
    assert await store.queued_of_clients() == {}


async def test_a_job_in_the_queue(store: JobStore) -> None:
    """It is there until it is admitted; what it is to execute until that has happened, or it has ended."""
    await store.client_number("alice")
    spec = JobSpec(
        ("echo", "ü 'x'"), {"pids_max": 7}, env={"A": "\n"}, workdir="/usr", name="n", queue=QueueSpec(3)
    )
    [waiting], _ = await store.enqueue("alice", [(spec, Limits(pids_max=7))], Quotas())
    assert (waiting.state, waiting.priority, waiting.start) == (JobState.QUEUED, 3, waiting.queued)
    assert await store.get(waiting.id, "alice") == waiting
    head = await store.first_ready("alice")
    assert head == Head(waiting.id, "alice", Limits(pids_max=7), 3)
    found = await store.waiting(waiting.id)
    assert (found.job, found.spec()) == (waiting, replace(spec, queue=None))
    assert await store.first_ready("alice", [waiting.id]) is None
    assert await store.first_ready("bob") is None
    with pytest.raises(NameTakenError):
        await store.add("alice", JobSpec("x", name="n"), Limits())
    admitted = await store.admit(waiting.id, Limits(pids_max=5))
    assert (admitted.state, admitted.limits.pids_max) == (JobState.STARTING, 5)
    assert (await store.alive(), await store.admitted()) == ([admitted], {waiting.id})
    with pytest.raises(NotQueuedError):
        await store.admit(waiting.id, Limits())
    with pytest.raises(NotQueuedError):
        await store.waiting(waiting.id)
    assert await store.end_without_start(waiting.id, EndReason.CANCELLED, "") is None
    await store.put_back(waiting.id)
    assert await store.first_ready("alice") is not None
    await store.admit(waiting.id, Limits())
    await store.settled(waiting.id)
    assert (await store.admitted(), await store.queued_of_clients()) == (set(), {})
    assert await store.end_without_start(waiting.id, EndReason.START_FAILED, "") is None


async def test_ends_without_a_start(store: JobStore) -> None:
    """They count among the ended jobs, and are pruned as these are; the client's queue is shorter by them."""
    await store.client_number("alice")
    specs = [(JobSpec("x", queue=QueueSpec(held=True)), Limits())] * 2
    (first, second), _ = await store.enqueue("alice", specs, Quotas())
    cancelled = await store.end_without_start(first.id, EndReason.CANCELLED, "why")
    assert cancelled is not None
    assert (cancelled.state, cancelled.reason, cancelled.detail) == (
        JobState.EXITED,
        EndReason.CANCELLED,
        "why",
    )
    assert (cancelled.was_started, cancelled.held, cancelled.output_bytes) == (False, False, 0)
    failed = await store.end_without_start(second.id, EndReason.START_FAILED, "why")
    assert failed is not None
    assert failed.reason is EndReason.START_FAILED
    assert await store.totals() == [("alice", 2, 0)]
    assert await store.queued_of_clients() == {}
    assert await store.prune(Retention(jobs_per_client=1), 0, 10) == [first.id]


async def test_the_queue_s_order(store: JobStore) -> None:
    """By priority, then age, without those that are held or whose time has not come."""
    await store.client_number("alice")
    now = datetime.now(UTC)
    hour = timedelta(hours=1)
    asked = [
        QueueSpec(),
        QueueSpec(priority=1, held=True),
        QueueSpec(priority=2, not_before=now + hour),
        QueueSpec(priority=2),
        QueueSpec(not_before=now - hour),
    ]
    jobs, _ = await store.enqueue("alice", [(JobSpec("x", queue=each), Limits()) for each in asked], Quotas())

    async def drained() -> list[int]:
        found = []
        while (head := await store.first_ready("alice")) is not None:
            found.append(head.id)
            await store.admit(head.id, Limits())
        return found

    first_due = int((now + hour).timestamp() * 1e9)
    assert await store.let_due(time.time_ns()) == ([], to_ns(now + hour))
    assert await drained() == [jobs[3].id, jobs[0].id, jobs[4].id]
    assert await store.let_due(first_due + 1000) == (["alice"], None)
    assert await store.set_held(jobs[1].id, held=False)
    assert await drained() == [jobs[2].id, jobs[1].id]
    assert await store.set_held(jobs[1].id, held=True) is None


async def test_all_of_a_submission_or_nothing(store: JobStore) -> None:
    """A job that is refused, or a bound, takes the others back; ids that were given are not used again."""
    await store.client_number("alice")
    quotas = Quotas(queued_max=2)
    asked = [(JobSpec("x", name="a"), Limits()), (JobSpec("x", name="a"), Limits())]
    with pytest.raises(NameTakenError):
        await store.enqueue("alice", asked, quotas)
    with pytest.raises(LimitReachedError):
        await store.enqueue("alice", [(JobSpec("x"), Limits())] * 3, quotas)
    assert (await store.page(None, 0, 10)).jobs == []
    assert await store.queued_of_clients() == {}
    jobs, _ = await store.enqueue("alice", [(JobSpec("x"), Limits())] * 2, quotas)
    await store.unqueue([job.id for job in jobs])
    assert (await store.page(None, 0, 10)).jobs == []
    assert await store.queued_of_clients() == {}


async def test_a_name_is_its_job_s_until_that_has_ended(store: JobStore) -> None:
    """Another of the same client is refused, and told of whom; another client, and no name, are free."""
    first = await store.add("alice", JobSpec("x", name="web"), Limits())
    with pytest.raises(NameTakenError) as caught:
        await store.add("alice", JobSpec("x", name="web"), Limits())
    assert str(caught.value) == "cannot start a job called web: job 1 is called that, and has not ended"
    assert caught.value.hint == "pjw stop 1; or choose another name"
    await store.add("bob", JobSpec("x", name="web"), Limits())
    await store.add("alice", JobSpec("x"), Limits())
    await store.add("alice", JobSpec("x"), Limits())
    await store.finish(ended(first))
    again = await store.add("alice", JobSpec("x", name="web"), Limits())
    assert await store.get(again.id) == again
    await store.discard(again.id)
    await store.add("alice", JobSpec("x", name="web"), Limits())


async def test_a_request_id_is_its_client_s_for_as_long_as_the_job_is_kept(store: JobStore) -> None:
    """It finds the job, ended or not; a job that is gone is forgotten."""
    job = await store.add("alice", JobSpec("x", request_id="r"), Limits())
    assert [await store.of_request(*key) for key in (("alice", "r"), ("bob", "r"), ("alice", "s"))] == [
        job.id,
        None,
        None,
    ]
    await store.finish(ended(job))
    assert await store.of_request("alice", "r") == job.id
    await store.remove(job.id)
    assert await store.of_request("alice", "r") is None


async def test_a_request_that_has_started_a_job_starts_no_other(store: JobStore) -> None:
    """By the index alone, without a look before each start; that uses no id up, and no name is the reason."""
    job = await store.add("alice", JobSpec("x", request_id="r", name="n"), Limits())
    for _ in range(2):
        with pytest.raises(AlreadyStartedError) as caught:
            await store.add("alice", JobSpec("x", request_id="r", name="n"), Limits())
        assert caught.value.job_id == job.id
    assert (await store.add("bob", JobSpec("x", request_id="r"), Limits())).id == job.id + 1


async def test_a_row_whose_job_cannot_be_made_is_deleted_again(store: JobStore) -> None:
    """Its row is there while the files are made, in the table's thread; its id stays used."""
    threads: list[str] = []

    def made(job: Job) -> None:
        threads.append(threading.current_thread().name)
        assert job_rows.find(store._db, job.id, None) == job
        raise LimitReachedError("no space")

    with pytest.raises(LimitReachedError, match="no space"):
        await store.add("alice", JobSpec("x"), Limits(), made)
    assert threads == ["pjw-store"]
    assert await store.alive() == []
    assert (await store.add("alice", JobSpec("x"), Limits())).id == 2


def test_each_version_is_whole_or_not_at_all(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that fails, as on a full disk, leaves the version before it; the next start goes on there."""
    monkeypatch.setattr(
        schema, "MIGRATIONS", (*schema.MIGRATIONS[:1], "CREATE TABLE x (a); CREATE TABLE x (a);")
    )
    with pytest.raises(KernelError, match="table x already exists"):
        JobStore(str(path))
    with sqlite3.connect(path) as db:
        names = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        assert (db.execute("PRAGMA user_version").fetchone(), "x" in names, "jobs" in names) == (
            (1,),
            False,
            True,
        )
    db.close()
    monkeypatch.undo()
    JobStore(str(path)).close()


async def test_the_owner_is_part_of_the_question(store: JobStore) -> None:
    """Another's job is none; without an owner it is anybody's."""
    job = await store.add("alice", JobSpec("x"), Limits())
    assert [await store.get(job.id, owner) for owner in ("alice", "bob", None)] == [job, None, job]


async def test_removals_are_remembered_until_they_are_done(store: JobStore) -> None:
    """The row goes first; a job that has not ended, or is gone already, is not touched."""
    first, second = await filled(store, 5, 7)
    alive = await store.add("alice", JobSpec("x"), Limits())
    for job_id in (first, first, alive.id, 99):
        await store.remove(job_id)
    assert await store.get(first) is None
    assert await store.get(alive.id) == alive
    assert await store.removals() == [first]
    assert await store.ended_bytes("alice") == (7, 7)
    await store.removed([first])
    assert await store.removals() == []
    assert await store.first_end_ns() == to_ns(END + timedelta(seconds=1))
    await store.remove(second)
    assert (await store.first_end_ns(), await store.ended_bytes("alice")) == (None, (0, 0))


@pytest.mark.parametrize(
    ("retention", "pruned"),
    [
        (Retention(), []),
        (Retention(age_seconds=9), []),
        (Retention(age_seconds=8), [1, 5]),
        (Retention(age_seconds=6), [1, 2, 3, 5, 6]),
        (Retention(jobs_per_client=3), [1]),
        (Retention(jobs_per_client=1), [1, 2, 3, 5]),
        (Retention(bytes_per_client=11), [1, 2, 5]),
        (Retention(bytes_per_client=1), [1, 2, 4, 5, 6]),
        (Retention(jobs_total=4), [1, 2]),
        (Retention(jobs_total=2), [1, 2, 5, 3]),
        (Retention(bytes_total=30), [1, 2]),
        (Retention(jobs_per_client=3, bytes_total=30), [1, 2]),
    ],
)
async def test_what_is_pruned(store: JobStore, retention: Retention, pruned: list[int]) -> None:
    """Who goes and who goes first, by each of the bounds."""
    await filled(store, 10, 10, 0, 10, client="a")
    await filled(store, 8, 8, client="b")
    now = to_ns(END + timedelta(seconds=8, milliseconds=1))
    # ties between clients are broken by chance, so ids that ended at the same moment are compared as a set
    assert sorted(await store.prune(retention, now, 100)) == sorted(pruned)
    assert sorted(await store.removals()) == sorted(pruned)
    assert await store.prune(retention, now, 100) == []


async def test_pruning_is_in_batches_and_oldest_first(store: JobStore) -> None:
    """So many at a time, so that others have their turn at the table."""
    await filled(store, *[1] * 10)
    assert await store.prune(Retention(jobs_per_client=2), 0, 3) == [1, 2, 3]
    assert await store.prune(Retention(jobs_per_client=2), 0, 100) == [4, 5, 6, 7, 8]


async def test_a_node_keeps_what_its_gateway_has_not_heard(store: JobStore) -> None:
    """Whatever the bound; others go in its place, of that client and of others."""
    for client in ("a", "b"):
        await store.client_number(client)
    for number, (client, uuid) in enumerate((("a", "1"), ("a", "2"), ("a", ""), ("b", "3"), ("b", ""))):
        job = await store.add(client, JobSpec("x", request_id=f"cluster:{uuid}" if uuid else ""), Limits())
        await store.finish(replace(ended(job), end=END + timedelta(seconds=number), output_bytes=5))
    now = to_ns(END + timedelta(days=1))
    for most in ("age_seconds", "jobs_per_client", "bytes_per_client", "jobs_total", "bytes_total"):
        await store.prune(Retention(**{most: 1}, keeps_untold=True), now, 100)
    assert await store.removals() == [3, 5]
    assert await store.first_end_ns(told=True) is None
    # the gateway has written the first one down
    await store.transact(node_rows.told, "1")
    assert await store.first_end_ns(told=True) == to_ns(END)
    assert await store.prune(Retention(jobs_total=1, keeps_untold=True), now, 100) == [1]
    # a pjwd that is a node no more tells nobody
    assert await store.prune(Retention(jobs_total=1), now, 100) == [2]


async def test_the_boot_is_written_down(path: Path) -> None:
    """None at first, then the last one that was set, over restarts."""
    store = JobStore(str(path))
    assert await store.boot_id() is None
    await store.set_boot_id("one")
    await store.set_boot_id("two")
    store.close()
    store = JobStore(str(path))
    assert await store.boot_id() == "two"
    store.close()


async def test_a_sync_serves_all_who_wait_and_none_too_early(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who comes while one runs waits for the next, all of them for the same: 2 instead of 101."""
    real, count, release = os.fdatasync, 0, threading.Event()

    def fdatasync(descriptor: int) -> None:
        nonlocal count
        count += 1
        release.wait(10)
        real(descriptor)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    first = asyncio.ensure_future(store.sync())
    async with asyncio.timeout(10):
        while not count:
            await asyncio.sleep(0.001)
    others = [asyncio.ensure_future(store.sync()) for _ in range(100)]
    others[0].cancel()
    await asyncio.sleep(0)
    release.set()
    await first
    assert not any(other.done() for other in others[1:])
    await asyncio.gather(*others[1:])
    assert count == 2
    await store.sync()
    assert count == 3


async def test_the_log_s_space_was_written_before(store: JobStore, path: Path) -> None:
    """Space that is only reserved counts as a hole, and the first sync of each part of it takes 4 ms."""
    descriptor = os.open(f"{path}-wal", os.O_RDONLY)
    try:
        assert os.lseek(descriptor, 0, os.SEEK_HOLE) == os.fstat(descriptor).st_size > 1000 * 4096
    finally:
        os.close(descriptor)


async def test_zeros_are_written_behind_what_a_killed_server_has_left(path: Path) -> None:
    """And not upon it: a log that is found there has rows that are nowhere else."""
    killed = JobStore(str(path))
    job = await killed.add("alice", JobSpec("true"), Limits())
    copy = path.with_name("copy.sqlite")
    log = Path(f"{path}-wal").read_bytes()
    # a head of 32 bytes; and of each frame 24, and a page
    frames = 32 - (32 - len(log.rstrip(b"\0"))) // 4120 * 4120
    copy.write_bytes(path.read_bytes())
    Path(f"{copy}-wal").write_bytes(log[:frames])
    killed.close()
    store = JobStore(str(copy))
    assert await store.get(job.id) == job
    store.close()


async def test_an_end_and_its_sync_in_one(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sync begins when the row is written. Its error is given, and that of the row is raised."""
    jobs = [await store.add("alice", JobSpec("true"), Limits()) for _ in range(3)]
    assert await store.finish_and_sync(ended(jobs[0])) is None
    seen: list[int] = []

    def fails(descriptor: int) -> None:
        seen.append(store._db.execute("SELECT count(*) FROM jobs WHERE state IS NOT NULL").fetchone()[0])
        raise OSError(errno.EIO, "x")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fdatasync", fails)
        assert isinstance(await store.finish_and_sync(ended(jobs[1])), KernelError)
    assert seen == [2]
    store._db.execute("PRAGMA query_only = ON")
    with pytest.raises(KernelError, match="readonly"):
        await store.finish_and_sync(ended(jobs[2]))
    assert await store.get(jobs[2].id) == jobs[2]


async def test_jobs_that_ended_last_are_in_memory(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are as their rows are, their owner's alone, so many at most, and gone when their rows are."""
    monkeypatch.setattr("pjw.worker.store._RECENT_MAX", 3)
    await store.client_number("alice")
    jobs = [ended(await store.add("alice", JobSpec("true"), Limits())) for _ in range(5)]
    long = ended(await store.add("alice", JobSpec("x" * 2000), Limits()))
    for job in (*jobs, long):
        await store.finish_and_sync(job)
    rows = {job.id: await store.transact(job_rows.find, job.id, None) for job in jobs}
    assert store._recent == {job.id: rows[job.id] for job in jobs[2:]}
    assert await store.get(jobs[4].id, "alice") is jobs[4]
    assert await store.get(jobs[4].id, "mallory") is None
    await store.remove(jobs[4].id)
    await store.discard(jobs[3].id)
    pruned = await store.prune(Retention(age_seconds=1), to_ns(END) + 2 * 10**9, 100)
    assert sorted(pruned) == [*(job.id for job in jobs[:3]), long.id]
    assert store._recent == {}
    assert [await store.get(job.id) for job in jobs] == [None] * 5


async def test_a_disk_that_fails_to_sync(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each who waits is told, and the next may succeed."""

    def fails(descriptor: int) -> None:
        raise OSError(errno.EIO, "x")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fdatasync", fails)
        results = await asyncio.gather(store.sync(), store.sync(), return_exceptions=True)
    assert [str(result).partition("/")[0] for result in results] == ["cannot sync the job table "] * 2
    await store.sync()


@pytest.mark.parametrize("ns", [0, 1, 999, 1_700_000_000_000_000_000, 1_700_000_000_123_456_789, 2**62])
def test_times(ns: int) -> None:
    """Nanoseconds are cut to microseconds, never rounded up, and come back exactly."""
    time = from_ns(ns)
    assert time.tzinfo is UTC
    assert to_ns(time) == ns - ns % 1000
    assert from_ns(to_ns(time)) == time


async def test_many_lists_with_filters_hold_up_who_wants_one_job_no_longer_than_one(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of one client wait for each other, and not all of them before everybody else."""
    made: list[int] = []

    def page(*_: object) -> Page:
        made.append(1)
        return Page([], None)

    monkeypatch.setattr("pjw.worker.store.read_page", page)
    wanted = JobFilter(labels={"team": "x"})
    lists = [asyncio.ensure_future(store.page("alice", 0, 10, wanted)) for _ in range(50)]
    await asyncio.sleep(0)
    await store.get(1, "bob")
    assert len(made) <= 2
    await asyncio.gather(*lists)
    assert len(made) == 50


async def test_lists_with_filters_take_turns_by_client(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many of one client hold up no other's: it waits for one of each client, whoever came first."""
    made: list[str | None] = []

    def page(_: object, client_name: str | None, *__: object) -> Page:
        made.append(client_name)
        return Page([], None)

    monkeypatch.setattr("pjw.worker.store.read_page", page)
    wanted = JobFilter(labels={"team": "x"})
    asked = [*["alice"] * 20, *["bob"] * 3, None]
    lists = [asyncio.ensure_future(store.page(name, 0, 10, wanted)) for name in asked]
    # who does not wait takes nobody's turn
    given_up = [asyncio.ensure_future(store.page("carol", 0, 10, wanted)) for _ in range(3)]
    await asyncio.sleep(0)
    for each in given_up:
        each.cancel()
    await asyncio.gather(*lists, *given_up, return_exceptions=True)
    assert made == ["alice", "bob", None, "alice", "bob", "alice", "bob", *["alice"] * 17]
    # nothing is kept of who has been here, but by the traceback of who gave up
    assert set(store._filtering_of) <= {"carol"}
