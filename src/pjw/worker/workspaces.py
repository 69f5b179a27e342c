"""Workspaces: the jobs that use them, their sizes, and their removal.

A job counts as a user from before its start to after its end. That is known here alone, so a start and a
removal never meet. The table knows a client's workspaces (workspace_rows.py), the launcher makes the
directories.
"""

import asyncio
import logging
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from pjw.errors import (
    JobStateError,
    LauncherGoneError,
    PjwError,
    WorkspaceBusyError,
    WorkspaceNotFoundError,
)
from pjw.model import Job, JobSpec, Workspace
from pjw.worker import workspace_rows
from pjw.worker.disk import COUNT_SECONDS, TreeUse, read_all
from pjw.worker.launcher_client import LauncherClient
from pjw.worker.settings import WorkerSettings
from pjw.worker.store import JobStore, Users
from pjw.worker.tasks import Background, log_bug

# a process of the launcher's counts for 20 s
_ANSWER_SECONDS: Final = 60
# Nothing tells when a failing disk works again.
_RETRY_SECONDS: Final = 60
# One count is for all jobs that end within so long; and so many times as long as it took, nothing is counted.
_PAUSE_SECONDS: Final = 0.5
_REST: Final = 4
# A full disk waits so long for counts at most: a client may have millions of files in many workspaces.
_GROWING_SECONDS: Final = 5
# so many unused ones are looked for at once
_BATCH: Final = 100

# a client's name, and that of a workspace
_Key = tuple[str, str]

log: Final = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class JobInWorkspace:
    """A job in a workspace; `job_id` is None until it has one."""

    key: _Key
    exclusive: bool
    job_id: int | None = None


class Workspaces:
    """Those of all clients of one worker."""

    def __init__(
        self,
        store: JobStore,
        launcher: LauncherClient,
        users: Users,
        settings: WorkerSettings,
        background: Background,
    ) -> None:
        self._store: Final = store
        self._launcher: Final = launcher
        self._users: Final = users
        self._settings = settings
        self._background: Final = background
        self._uses: Final[dict[_Key, list[JobInWorkspace]]] = {}
        self._of_job: Final[dict[int, JobInWorkspace]] = {}
        self._removing: Final[dict[_Key, asyncio.Future[None]]] = {}
        # the workspaces to count, in this order
        self._to_count: Final[dict[_Key, None]] = {}
        # the last regular count of each that is in use: growing() measures from there on
        self._had: Final[dict[_Key, TreeUse]] = {}
        self._due: Final = asyncio.Event()
        # called with the client's name when a job has left a workspace, or one is gone
        self.freed: Final[list[Callable[[str], None]]] = []
        # of which the table knows, and of which there was no directory when we began
        self.missing: Final[list[_Key]] = []
        # called with the id of a job that has ended, or was not started
        self.left: Final[list[Callable[[int], None]]] = []
        # called when a workspace was counted, or is gone: its client may have less than before
        self.counted: Final[list[Callable[[], None]]] = []

    def reconfigure(self, settings: WorkerSettings) -> None:
        """Apply these quotas and this retention from now on."""
        self._settings = settings
        self._due.set()

    # --- use by jobs

    async def take(self, client_name: str, spec: JobSpec) -> JobInWorkspace | None:
        """Count a job to be started as a user of its workspace, which is made; return None without one.

        Raises WorkspaceBusyError, and LimitReachedError for too many workspaces, or too much in them.
        """
        if not spec.workspace:
            return None
        key = (client_name, spec.workspace)
        self._require_free(key, exclusive=spec.exclusive)
        use = JobInWorkspace(key, spec.exclusive)
        # before the first await: of a start and a removal that come at once one sees the other
        if not self._uses:
            # the workspaces in use are counted from time to time
            self._due.set()
        self._uses.setdefault(key, []).append(use)
        try:
            quotas = self._settings.quotas
            await self._store.transact(workspace_rows.name, *key, time.time_ns(), quotas)
        except BaseException:
            self.give_back(use)
            raise
        return use

    def _require_free(self, key: _Key, *, exclusive: bool) -> None:
        name = key[1]
        if key in self._removing:
            raise workspace_rows.being_removed(name)
        there = self._uses.get(key)
        if not there or not (exclusive or any(use.exclusive for use in there)):
            return
        holder = there[0].job_id
        by = f"job {holder}" if holder is not None else "a job that is being started"
        how = "alone" if there[0].exclusive else "already"
        raise WorkspaceBusyError(
            f"cannot start the job in the workspace {name}: {by} uses it {how}",
            hint="wait for its end, or put the job into the queue: --queue",
            workspace=name,
            holder=holder,
        )

    def begun(self, use: JobInWorkspace | None, job_id: int) -> None:
        """Note the id of the job of a use, which it has from now on."""
        if use is not None:
            use.job_id = job_id
            self._of_job[job_id] = use

    def adopt(self, job: Job) -> None:
        """Count a job that runs already."""
        if job.workspace:
            use = JobInWorkspace((job.client_name, job.workspace), job.exclusive)
            self._uses.setdefault(use.key, []).append(use)
            self.begun(use, job.id)

    def give_back(self, use: JobInWorkspace | None) -> None:
        """End the use of a job that was not started."""
        if use is None:
            return
        there = self._uses[use.key]
        there.remove(use)
        if not there:
            del self._uses[use.key]
        if use.job_id is not None:
            del self._of_job[use.job_id]
        self._tell_freed(use.key[0])

    def _tell_freed(self, client_name: str) -> None:
        for each in self.freed:
            each(client_name)

    def _tell_counted(self) -> None:
        for each in self.counted:
            each()

    def give_back_of(self, job_id: int) -> None:
        """End the use of a job with an id that has ended, or was not started."""
        for each in self.left:
            each(job_id)
        use = self._of_job.get(job_id)
        if use is None:
            return
        self.give_back(use)
        self._to_count[use.key] = None
        self._due.set()

    def busy(self, client_name: str) -> Mapping[str, bool]:
        """Return the workspaces of a client that jobs use, each with whether a job has it alone.

        One that is being removed may have no other user, either.
        """
        used = {
            name: any(use.exclusive for use in there)
            for (owner, name), there in self._uses.items()
            if owner == client_name
        }
        return {**used, **{name: True for owner, name in self._removing if owner == client_name}}

    def holder(self, client_name: str, name: str) -> int | None:
        """Return a job that uses a workspace."""
        return next((use.job_id for use in self._uses.get((client_name, name), ()) if use.job_id), None)

    async def listed(self, owner: str | None, after: _Key, count: int) -> Sequence[Workspace]:
        """Return the workspaces as workspace_rows.listed does."""
        return await self._store.transact(workspace_rows.listed, owner, after, count)

    # --- removal

    async def remove(self, client_name: str, name: str) -> None:
        """Remove a workspace of a client; return when it is gone, however long that takes.

        Raises WorkspaceNotFoundError, WorkspaceBusyError while a job uses it, and KernelError.
        """
        key = (client_name, name)
        task = self._removing.get(key)
        if task is None:
            if there := self._uses.get(key):
                raise workspace_rows.in_use(name, there[0].job_id)
            task = self._begin_removal(key)
        # it goes on when the caller does not wait
        await asyncio.shield(task)

    def _begin_removal(self, key: _Key) -> asyncio.Future[None]:
        # before the first await, see take()
        task = self._removing[key] = asyncio.ensure_future(self._remove(*key))
        task.add_done_callback(lambda done: self._removal_over(key, done))
        return task

    def _removal_over(self, key: _Key, task: asyncio.Future[None]) -> None:
        del self._removing[key]
        # the caller may have gone, and does not look at the result then
        log_bug(task)
        self._tell_freed(key[0])
        self._tell_counted()

    async def _remove(self, client_name: str, name: str) -> None:
        await self._store.transact(workspace_rows.begin_removal, client_name, name)
        # before the first file: a power cut must not bring a workspace back of which a part is gone
        await self._store.sync()
        await self._launcher.request_remove_workspace(await self._users.of(client_name), name)
        await self._store.transact(workspace_rows.gone, client_name, name)

    async def over(self) -> None:
        """Wait until no removal is under way; those of a launcher that has gone are the next worker's."""
        await asyncio.gather(*self._removing.values(), return_exceptions=True)

    async def begin(self, uid_first: int) -> None:
        """Go on with the removals of the worker before us; remove directories that no table knows.

        The table may be gone, or an older one may have come back. The files of such a directory must never
        become another client's, so its removal has begun when this returns, and the launcher lets no job in.
        """
        known = await self._store.transact(workspace_rows.known)
        for client_name, _, name, is_removing in known:
            if is_removing:
                self._background.spawn(self._remove_or_log(client_name, name))
        rows = {(uid_first + number, name): client_name for client_name, number, name, _ in known}
        there = await self._launcher.request_workspaces()
        self.missing.extend((rows[lost], lost[1]) for lost in rows.keys() - set(there))
        for uid, name in there:
            if (uid, name) not in rows:
                log.warning("removing the workspace %s of user id %d, of which no table knows", name, uid)
                self._background.spawn(self._remove_stray(uid, name))
        # by its answer the launcher has these requests
        await self._launcher.request_nothing()

    async def _remove_or_log(self, client_name: str, name: str) -> None:
        try:
            await self.remove(client_name, name)
        except LauncherGoneError:
            raise
        except PjwError as error:
            log.error("cannot remove the workspace %s of %s: %s", name, client_name, error)

    async def _remove_stray(self, uid: int, name: str) -> None:
        try:
            await self._launcher.request_remove_workspace(uid, name)
        except LauncherGoneError:
            raise
        except PjwError as error:
            log.error("cannot remove the workspace %s, of which no table knows: %s", name, error)

    # --- sizes and retention

    async def run(self) -> None:
        """Count workspaces in use and those just left; remove the unused; for ever."""
        while True:
            self._due.clear()
            began = asyncio.get_running_loop().time()
            try:
                for key in list(self._to_count):
                    del self._to_count[key]
                    await self._count_regularly(key)
                seconds = await self._remove_unused()
            except LauncherGoneError:
                raise
            except PjwError as error:
                log.error("cannot look after workspaces: %s", error)
                seconds = _RETRY_SECONDS
            took = asyncio.get_running_loop().time() - began
            if self._uses or self._to_count:
                seconds = min(COUNT_SECONDS, seconds or COUNT_SECONDS)
            try:
                async with asyncio.timeout(seconds):
                    await self._due.wait()
            except TimeoutError:
                self._to_count.update(dict.fromkeys(self._uses))
                continue
            await asyncio.sleep(max(_PAUSE_SECONDS, _REST * took))

    async def _count_regularly(self, key: _Key) -> None:
        has = await self._count(key)
        if key not in self._uses:
            self._had.pop(key, None)
        elif has is not None:
            self._had[key] = has
        if has is None:
            # next time
            self._to_count[key] = None

    async def _count(self, key: _Key) -> TreeUse | None:
        """Count a workspace, and tell the table. None when it cannot be counted."""
        if key in self._removing:
            return None
        if key not in self._uses:
            await self._store.transact(workspace_rows.used, *key, time.time_ns())
        try:
            words = await self._launcher.request_workspace_use(await self._users.of(key[0]), key[1])
        except JobStateError:
            # too many are being counted
            return None
        try:
            os.set_blocking(words, False)
            async with asyncio.timeout(_ANSWER_SECONDS):
                size, inodes = map(int, (await read_all(words)).split())
        except (TimeoutError, ValueError):
            # the process that counts was killed
            return None
        finally:
            os.close(words)
        had = await self._store.transact(workspace_rows.counted, *key, size, inodes)
        if key in self._uses:
            self._had.setdefault(key, TreeUse(*had))
        self._tell_counted()
        return TreeUse(size, inodes)

    async def growing(self, what: str, least: int, beyond: int, jobs: Container[int]) -> int | None:
        """Return the newest of these jobs in the workspace that fills a file system (bytes or inodes).

        It is in the one that has grown most since its last regular count, of the client that has most of all
        whose workspaces have grown by *least*. None when there is no such client, or it has no more than
        *beyond*.
        """
        now: dict[_Key, TreeUse] = {}
        with suppress(TimeoutError):
            async with asyncio.timeout(_GROWING_SECONDS):
                # in any order: those that take long keep no other from being counted at the next look
                for key in random.sample(list(self._uses), len(self._uses)):
                    has = await self._count(key)
                    if has is not None:
                        now[key] = has
        grown: dict[_Key, int] = {}
        there: Counter[str] = Counter()
        growth: Counter[str] = Counter()
        for key, has in now.items():
            had = self._had.get(key)
            if had is None or key not in self._uses:
                # its last job has ended meanwhile
                continue
            grown[key] = max(getattr(has, what) - getattr(had, what), 0)
            there[key[0]] += getattr(has, what)
            growth[key[0]] += grown[key]
        client = max((each for each in growth if growth[each] >= least), key=there.__getitem__, default=None)
        if client is None or there[client] <= beyond:
            return None
        key = max((key for key in grown if key[0] == client), key=grown.__getitem__)
        # so that the next job that is ended for it is one that makes it grow further
        self._had[key] = now[key]
        users = (use.job_id for use in self._uses.get(key, ()) if use.job_id is not None)
        return max((job_id for job_id in users if job_id in jobs), default=None)

    async def _remove_unused(self) -> float | None:
        """Remove workspaces unused for too long; return the seconds until there are more, None: unknown."""
        age = self._settings.retention.workspace_age_seconds
        if not age:
            return None
        before_ns = time.time_ns() - age * 1_000_000_000
        for client_name, name in await self._store.transact(workspace_rows.unused, before_ns, _BATCH):
            log.info(
                "removing the workspace %s of %s: it is unused for longer than is kept", name, client_name
            )
            # since we looked, a job has named it, or its client has removed it
            with suppress(WorkspaceBusyError, WorkspaceNotFoundError):
                await self.remove(client_name, name)
        first_ns = await self._store.transact(workspace_rows.first_unused_ns)
        if first_ns is None:
            return None
        # A second late rather than an instant early; and a clock that was set is noticed in a day.
        return min(max(first_ns / 1e9 + age - time.time() + 1, 1.0), 86_400.0)
