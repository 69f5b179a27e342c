"""Who watches while others do: what comes in the midst of a look at the table; and notes beside ends."""

import asyncio
from collections.abc import AsyncIterator, Collection
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pjw.model import EndReason, ExitStatus, Job, JobChange, JobSpec, JobState, Limits
from pjw.worker.changes import Batch, Changes, Watched
from pjw.worker.settings import Quotas
from pjw.worker.store import JobStore
from pjw.worker.tasks import Background, Flag

SECONDS = 30


class Held(JobStore):
    """A table whose next look for all watchers of these clients waits for a word."""

    owners: Collection[str | None] = ()

    def hold(self, *owners: str) -> None:
        """Hold the next such look."""
        self.owners = set(owners)
        self.held, self.let_go = asyncio.Event(), asyncio.Event()

    async def changes(
        self, owners: Collection[str | None], since: int, count: int
    ) -> tuple[list[JobChange], int]:
        """As of any table."""
        if self.owners == set(owners):
            self.owners = ()
            self.held.set()
            await self.let_go.wait()
        return await super().changes(owners, since, count)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Held]:
    """An open table."""
    store = Held(str(tmp_path / "jobs.sqlite"))
    yield store
    store.close()


async def queued(store: JobStore, client: str) -> Job:
    """A change: a job of a client is put into the queue."""
    await store.client_number(client)
    [job], _ = await store.enqueue(client, [(JobSpec("x"), Limits())], Quotas())
    return job


def watch(changes: Changes, owner: str, since: int) -> "asyncio.Queue[Batch]":
    """What one who watches is told."""
    told: asyncio.Queue[Batch] = asyncio.Queue()

    async def run() -> None:
        async for batch in changes.watch(owner, Watched(), since, snapshot=False, follow=True):
            told.put_nowait(batch)

    changes._background.spawn(run())
    return told


async def next_of(told: "asyncio.Queue[Batch]") -> list[int | None]:
    """The numbers of the next changes that are told."""
    async with asyncio.timeout(SECONDS):
        while not (batch := await told.get()).changes:
            pass
    return [change.sequence for change in batch.changes]


async def test_one_who_comes_during_a_look_for_others(store: Held) -> None:
    """That look has nothing of this client: it is told all the same, and what it has it is not told again."""
    background = Background()
    changes = Changes(store, background, Flag(), lambda job: job)
    first = watch(changes, "alice", 0)
    await queued(store, "alice")
    assert await next_of(first) == [1]
    store.hold("alice")
    await queued(store, "alice")
    await store.held.wait()
    other, same = watch(changes, "bob", 0), watch(changes, "alice", 1)
    assert await next_of(same) == [2]
    async with asyncio.timeout(SECONDS):
        while len(changes._watchers) < 3:
            await asyncio.sleep(0.01)
    await queued(store, "bob")
    store.let_go.set()
    assert await next_of(first) == [2]
    assert await next_of(other) == [3]
    await queued(store, "alice")
    assert await next_of(first) == await next_of(same) == [4]
    await background.close()


async def test_a_note_that_is_overtaken_by_the_end(store: JobStore) -> None:
    """The end is asked for, then all notes are written: that the job ran is told before its end."""
    job = await store.add("alice", JobSpec("x"), Limits())
    store.note(replace(job, state=JobState.RUNNING))
    ended = replace(
        job,
        state=JobState.EXITED,
        end=datetime.now(UTC),
        exit_status=ExitStatus(0),
        reason=EndReason.COMPLETED,
    )
    finishing = asyncio.ensure_future(store.finish(ended))
    await asyncio.sleep(0)
    found, _ = await store.changes({"alice"}, 0, 10)
    await finishing
    assert [str(each.job.state) for each in found] == ["running", "exited"]
