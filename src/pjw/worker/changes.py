"""Tells watchers of each change of a job's state, once and in order, from any number on that is kept.

The table numbers the changes (schema.py). A watcher that is behind reads them there, at its own pace. A
watcher that has caught up is given each as it comes, by one task for all of them. One that does not take its
changes is behind again; so no watcher has more than WAITING_MAX changes in memory.

A change is on the disk before a client hears of it: else a power cut would give its number to another one.
"""

import asyncio
import logging
from bisect import bisect_left
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import suppress
from typing import Final, NamedTuple

from pjw.errors import LauncherGoneError, PjwError
from pjw.model import Job, JobChange
from pjw.worker.pages import JobFilter
from pjw.worker.store import JobStore
from pjw.worker.tasks import Background, Flag, first_of

# So many at a time, each with a command cut short and up to ten kilobytes of labels: below the 4 MiB that
# gRPC's clients take.
BATCH: Final = 200
WAITING_MAX: Final = 2 * BATCH
# After this many changes, or this time, without one that fits, a watcher hears how far they have come: the
# number that it resumes behind stays young.
_PROGRESS_CHANGES: Final = 1000
_PROGRESS_SECONDS: Final = 60.0
_ID_MAX: Final = 2**63 - 1

log: Final = logging.getLogger(__name__)


class Batch(NamedTuple):
    """Some changes, and the number to resume behind once they are dealt with; None: not yet."""

    changes: Sequence[JobChange]
    sequence: int | None


class Watched(NamedTuple):
    """The changes that a watcher wants: those that fit `jobs`, of these `ids` if there are any."""

    jobs: JobFilter = JobFilter()
    ids: frozenset[int] = frozenset()

    def fits(self, change: JobChange) -> bool:
        """Return whether the watcher wants a change; a removal has no state."""
        job, states = change.job, self.jobs.states
        return (
            (not self.ids or job.id in self.ids)
            and (not states or (job.state in states and not change.removed))
            and self.jobs.fits(job)
        )


class _Watcher:
    """A watcher that has caught up."""

    def __init__(self, owner: str | None, position: int) -> None:
        self.owner: Final = owner
        # all up to this one was given; up to this one taken; and told of
        self.reached = self.taken = self.told = position
        self.is_behind = False
        self.woken: Final = Flag()
        self._waiting: list[JobChange] = []

    def give(self, changes: Iterable[JobChange], reached: int) -> None:
        """Add changes, which are all up to *reached*."""
        fresh = [change for change in changes if (change.sequence or 0) > self.reached]
        if len(self._waiting) + len(fresh) > WAITING_MAX:
            self.fall_behind()
            return
        self._waiting += fresh
        self.reached = max(self.reached, reached)
        if self._waiting or self.reached - self.told >= _PROGRESS_CHANGES:
            self.woken.set()

    def fall_behind(self) -> None:
        """Forget the changes that were given and not taken: they will be read from the table."""
        self.is_behind = True
        self._waiting = []
        self.woken.set()

    def take(self) -> Batch:
        """Take some of the changes that were given."""
        some, self._waiting = self._waiting[:BATCH], self._waiting[BATCH:]
        if self._waiting:
            self.taken = some[-1].sequence or 0
        else:
            self.taken = self.reached
            self.woken.clear()
        return Batch(some, self.taken)


class _Snapshot:
    """The changes that the jobs told at the beginning include.

    They are read a page at a time, and changes go on meanwhile: of each page the last one before it is kept.
    """

    def __init__(self) -> None:
        self.began = 0
        # the last id that each page may have had, and the last change before it
        self._ids: Final[list[int]] = []
        self._changes: Final[list[int]] = []

    async def read(
        self, store: JobStore, owner: str | None, watched: Watched
    ) -> AsyncGenerator[Sequence[Job], None]:
        """Yield the jobs that fit, page by page."""
        after: int | None = 0
        while after is not None:
            page = await store.snapshot(owner, after, BATCH, watched.jobs, watched.ids)
            await store.sync()
            after = page.next_after
            if not self._ids:
                self.began = page.last
            self._ids.append(_ID_MAX if after is None else after)
            self._changes.append(page.last)
            if page.jobs:
                yield page.jobs

    def has(self, change: JobChange) -> bool:
        """Return whether a job was reported as it was after this change, or later."""
        return (change.sequence or 0) <= self._changes[bisect_left(self._ids, change.job.id)]


class Changes:
    """The changes of one worker, and their watchers."""

    def __init__(
        self, store: JobStore, background: Background, gone: Flag, shown: Callable[[Job], Job]
    ) -> None:
        """Begin without watchers; *gone* ends all watches; *shown* adds why a job of the queue waits."""
        self._store: Final = store
        self._background: Final = background
        self._gone: Final = gone
        self._shown: Final = shown
        # the watchers that have caught up
        self._watchers: Final[set[_Watcher]] = set()
        self._something: Final = asyncio.Event()
        # up to which they were given the changes
        self._position = 0
        self._is_telling = False

    async def watch(
        self, owner: str | None, watched: Watched, since: int | None, *, snapshot: bool, follow: bool
    ) -> AsyncGenerator[Batch, None]:
        """Yield changes of one client's jobs, or of all, as `Worker.watch_jobs` says."""
        before: _Snapshot | None = None
        if since is not None:
            position = since
        elif snapshot:
            before = _Snapshot()
            async for jobs in before.read(self._store, owner, watched):
                yield Batch([JobChange(self._shown(job)) for job in jobs], None)
            position = before.began
        else:
            position = (await self._store.kept_changes(owner)).last
        told = since

        def fitting(changes: Iterable[JobChange]) -> list[JobChange]:
            fit = filter(watched.fits, changes)
            return [change for change in fit if before is None or not before.has(change)]

        while True:
            changes, reached = await self._store.changes({owner}, position, BATCH)
            await self._store.sync()
            found = fitting(changes)
            if found or reached != told:
                yield Batch(found, reached)
            told = position = reached
            if len(changes) == BATCH:
                continue
            if not follow:
                return
            if (watcher := self._joined(owner, position)) is None:
                continue
            try:
                async for batch in self._given(watcher):
                    found = fitting(batch.changes)
                    if found or batch.sequence != told:
                        yield Batch(found, batch.sequence)
                        told = batch.sequence
            finally:
                self._leave(watcher)
            position = watcher.taken

    async def _given(self, watcher: _Watcher) -> AsyncGenerator[Batch, None]:
        """Yield the changes given to a watcher that has caught up, until it is behind."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_PROGRESS_SECONDS):
                    await first_of(watcher.woken, self._gone)
            if self._gone.is_set():
                raise LauncherGoneError("the launcher has gone; the jobs go on")
            if watcher.is_behind:
                return
            batch = watcher.take()
            yield batch
            watcher.told = batch.sequence or 0

    def _joined(self, owner: str | None, position: int) -> _Watcher | None:
        """Add a watcher that has caught up; return None when there have been other changes meanwhile."""
        if self._is_telling and position < self._position:
            return None
        watcher = _Watcher(owner, position)
        self._watchers.add(watcher)
        if not self._is_telling:
            self._is_telling, self._position = True, position
            loop = asyncio.get_running_loop()

            def changed() -> None:
                # the loop has ended
                with suppress(RuntimeError):
                    loop.call_soon_threadsafe(self._something.set)

            self._store.changed = changed
            self._background.spawn(self._tell_all())
        # for changes that came before there was a watcher
        self._something.set()
        return watcher

    def _leave(self, watcher: _Watcher) -> None:
        self._watchers.discard(watcher)
        self._something.set()

    async def _tell_all(self) -> None:
        """Give changes as they come to all watchers that have caught up, as long as there is one."""
        try:
            while self._watchers:
                await self._something.wait()
                self._something.clear()
                while self._watchers and await self._tell():
                    pass
        except PjwError as error:
            # they find out by themselves
            log.error("cannot tell of changes of jobs: %s", error)
        finally:
            self._is_telling = False
            self._store.changed = None
            for watcher in self._watchers:
                watcher.fall_behind()

    async def _tell(self) -> bool:
        """Give the next changes to all; whether there may be more."""
        owners = {watcher.owner for watcher in self._watchers}
        changes, reached = await self._store.changes(owners, self._position, BATCH)
        if reached == self._position:
            return False
        await self._store.sync()
        self._position = reached
        for watcher in self._watchers:
            if watcher.owner in owners:
                owner = watcher.owner
                watcher.give([each for each in changes if owner in (None, each.job.client_name)], reached)
            elif watcher.reached < reached:
                # it has come meanwhile, and this read was not for its changes
                watcher.fall_behind()
        return len(changes) == BATCH
