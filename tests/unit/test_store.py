"""The job table: ids, versions, what was written, and a disk that is full."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest

from pjw.errors import ConfigError, KernelError, LimitReachedError
from pjw.model import EndReason, ExitStatus, Job, JobState, Limits, Usage
from pjw.worker.store import SCHEMA_VERSION, JobStore, from_ns, to_ns

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


async def test_what_is_written_is_read(store: JobStore) -> None:
    """A job comes back as it was, with limits, times to the microsecond, status, reason and usage."""
    job = await store.add("alice", "echo ü 'x'", Limits(pids_max=7))
    assert await store.get(job.id) == job
    final = ended(job)
    await store.finish(final)
    assert await store.get(job.id) == final
    lost = await store.add("alice", "x", Limits())
    lost = replace(lost, state=JobState.LOST, end=END, reason=EndReason.LOST)
    await store.finish(lost)
    assert await store.get(lost.id) == lost
    killed = await store.add("alice", "x", Limits())
    killed = replace(ended(killed), exit_status=ExitStatus(signal=9), reason=EndReason.STOPPED, usage=None)
    await store.finish(killed)
    assert await store.get(killed.id) == killed


async def test_it_outlives_the_process(path: Path) -> None:
    """What was written is there when the table is opened again."""
    store = JobStore(str(path))
    job = await store.add("alice", "x", Limits())
    store.close()
    store = JobStore(str(path))
    assert await store.get(job.id) == job
    assert await store.alive() == [job]
    store.close()


async def test_ids_are_never_reused(path: Path) -> None:
    """Not after the last job was discarded, and not after a restart."""
    store = JobStore(str(path))
    first = await store.add("alice", "x", Limits())
    second = await store.add("alice", "x", Limits())
    await store.discard(second.id)
    third = await store.add("alice", "x", Limits())
    await store.discard(third.id)
    store.close()
    store = JobStore(str(path))
    fourth = await store.add("alice", "x", Limits())
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
    jobs = [await store.add("ab"[number % 2], str(number), Limits()) for number in range(6)]
    for job in jobs[:3]:
        await store.finish(ended(job))
    assert [job.id for job in await store.page(None, 0, 1000)] == [1, 2, 3, 4, 5, 6]
    assert [job.id for job in await store.page("a", 1, 2)] == [3, 5]
    assert [job.id for job in await store.page("c", 0, 2)] == []
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
    with pytest.raises(KernelError, match="cannot use the job table"):
        JobStore(str(path))
    assert path.read_bytes() == content


def test_a_table_in_use(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second process is refused, and told that."""
    # it waits for a predecessor that is ending, and need not here
    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, timeout=0.1))
    first = JobStore(str(path))
    with pytest.raises(ConfigError, match="is in use by another pjwd"):
        JobStore(str(path))
    first.close()
    JobStore(str(path)).close()


async def test_a_full_disk(store: JobStore) -> None:
    """Every write says LimitReachedError, reads go on, and when there is space so do writes."""
    job = await store.add("alice", "x", Limits())
    # SQLite's own bound: the table may not grow, as on a full disk
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(LimitReachedError, match="no space is left for the job table"):
        await asyncio.gather(*(store.add("alice", "x" * 10_000, Limits()) for _ in range(100)))
    assert await store.get(job.id) == job
    store._db.execute("PRAGMA max_page_count = 1000000")
    assert (await store.add("alice", "x" * 10_000, Limits())).id > job.id


@pytest.mark.parametrize("ns", [0, 1, 999, 1_700_000_000_000_000_000, 1_700_000_000_123_456_789, 2**62])
def test_times(ns: int) -> None:
    """Nanoseconds are cut to microseconds, never rounded up, and come back exactly."""
    time = from_ns(ns)
    assert time.tzinfo is UTC
    assert to_ns(time) == ns - ns % 1000
    assert from_ns(to_ns(time)) == time
