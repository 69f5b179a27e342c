"""The job table, in SQLite. A job's row exists before its process does; ids are never reused."""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, TypeVar
from weakref import WeakValueDictionary

from pjw.arrays import Element
from pjw.errors import (
    KernelError,
    LimitReachedError,
    PjwError,
    describe_errno,
)
from pjw.model import Artifacts, EndReason, Job, JobChange, JobSpec, JobState, Limits
from pjw.worker import array_rows, change_rows, job_rows, queue_rows, retention_rows, workspace_rows
from pjw.worker.job_rows import to_ns
from pjw.worker.one_thread import TOLD_LATER
from pjw.worker.pages import ALL_JOBS, JobFilter, Page, read_page
from pjw.worker.secret_files import SecretFiles
from pjw.worker.settings import Quotas, Retention
from pjw.worker.table import Table, in_its_thread
from pjw.worker.workspace_rows import NOTHING_BUSY

# A pjwd that is ending releases the table in less time.
BUSY_SECONDS: Final = 5.0
# So long a change that nothing needs may wait until it is written down with others.
_NOTE_SECONDS: Final = 0.05
# A copy of the table holds it for this many pages at a time, about a millisecond. In between others use it.
_COPY_PAGES: Final = 256
# The number of recently ended jobs kept in memory, each of so few characters of command and labels: a client
# that has followed a job asks for it then, and needs no turn of the table's thread.
_RECENT_MAX: Final = 64
_RECENT_CHARACTERS_MAX: Final = 1024
# seconds that a copy waits between these, and for the end of a transaction
_COPY_WAIT_SECONDS: Final = 0.005

log: Final = logging.getLogger(__name__)


_R = TypeVar("_R")


_NO_SECRETS: Final[Mapping[int, str]] = {}


class _NotWrittenError(Exception):
    """The rows to be synced could not be written."""

    def __init__(self, why: BaseException) -> None:
        super().__init__(str(why))
        self.why: Final = why


class NotQueuedError(Exception):
    """A job is not in the queue any more, or is held, when its turn has come."""


class JobStore(Table):
    """The jobs of the table, and of each client its number."""

    def __init__(self, path: str) -> None:
        """Open or create the table. Raises ConfigError when it is in use, or a newer pjw wrote it."""
        # beside the table until the state directory says where
        self.secrets = SecretFiles(os.path.dirname(path))
        # whether there may be some
        self._has_secrets = False
        # jobs that have begun to run or to stop, until that is written down
        self._notes: dict[int, list[change_rows.Note]] = {}
        self._is_timed = False
        # Rows of ended jobs as they are about to be, or are; belongs to the event loop.
        self._recent: Final[dict[int, Job]] = {}
        self._filtering: Final = asyncio.Lock()
        # those of the clients that wait for it, by name; None is for calls about the jobs of all
        self._filtering_of: Final[WeakValueDictionary[str | None, asyncio.Lock]] = WeakValueDictionary()
        super().__init__(path)

    def close(self) -> None:
        """Write the pending notes and close."""
        self._thread.close()
        with suppress(PjwError):
            self._guarded(self._note_all, self._notes)
        super().close()

    @in_its_thread
    def client_number(self, name: str) -> int:
        """Return the number of a client, from 0 on, given at its first job and never to another."""
        self._db.execute(
            "INSERT OR IGNORE INTO clients (name, number)"
            " SELECT ?, coalesce(max(number) + 1, 0) FROM clients",
            (name,),
        )
        row: tuple[int] = self._db.execute("SELECT number FROM clients WHERE name = ?", (name,)).fetchone()
        return row[0]

    async def add(
        self,
        client_name: str,
        spec: JobSpec,
        limits: Limits,
        made: Callable[[Job], None] = lambda _: None,
        gpu_names: Sequence[str] = (),
    ) -> Job:
        """Insert a job that is about to start, then call *made* with it, in the table's thread.

        When that raises, the row is deleted again. Raises NameTakenError while another job has its name,
        and AlreadyStartedError when the same request has started a job before.
        """
        return await self._run(self._add_and_make, client_name, spec, limits, made, gpu_names)

    def _add_and_make(
        self,
        client_name: str,
        spec: JobSpec,
        limits: Limits,
        made: Callable[[Job], None],
        gpu_names: Sequence[str],
    ) -> Job:
        job = self._add(client_name, spec, limits, gpu_names)
        try:
            made(job)
        except BaseException:
            self._discard(job.id)
            raise
        return job

    def _add(self, client_name: str, spec: JobSpec, limits: Limits, gpu_names: Sequence[str]) -> Job:
        now = datetime.now(UTC)
        own: Mapping[str, int | str] = (
            workspace_rows.columns_of(spec) if spec.workspace or spec.image else job_rows.NO_COLUMNS
        )
        if gpu_names:
            own = {**own, "gpu_names": job_rows.listed(gpu_names)}
        job_id = job_rows.insert(self._db, client_name, spec, limits, to_ns(now), own)
        return Job(
            job_id,
            client_name,
            spec.display,
            JobState.STARTING,
            limits,
            now,
            name=spec.name,
            labels=spec.labels,
            split_stderr=spec.split_stderr,
            input=spec.input,
            workdir=spec.directory,
            workspace=spec.workspace,
            exclusive=spec.exclusive,
            image=spec.image,
            read_only=spec.read_only,
            artifacts=Artifacts(required=spec.output_required) if spec.outputs else None,
            mounts=spec.mounts,
            allow=spec.allow,
            link=spec.link,
            gpus=spec.gpus,
        )

    async def of_request(self, client_name: str, request_id: str) -> int | None:
        """Return the job that a client's request with this id has started; None when it has started none."""
        return await self._run(job_rows.of_request, self._db, client_name, request_id)

    async def discard(self, job_id: int) -> None:
        """Delete a job that was never started; its id stays used."""
        self._recent.pop(job_id, None)
        await self._run(self._discard, job_id)

    def _discard(self, job_id: int) -> None:
        self._db.execute("DELETE FROM jobs WHERE id = ?", (job_id,))

    async def finish(self, job: Job) -> None:
        """Write down how a job ended."""
        await self._with_notes(job, self._finish_last, job)

    async def finish_and_sync(self, job: Job) -> KernelError | None:
        """Do `finish`, then `sync`: one's thread wakes the other's. Return the error of the sync."""
        synced = self._wal.prepare()
        notes = self._notes.pop(job.id, [])
        # Now, and not when that is done: a removal may come before. Until then the job is among the living,
        # where every call looks first.
        self._keep(job)

        def finish() -> object:
            self._call(self._finish_last, notes, job)
            self._wal.begin(synced)
            return TOLD_LATER

        def failed(_: object, error: BaseException | None) -> None:
            if error is not None and not synced.done():
                synced.set_exception(_NotWrittenError(error))

        self._thread.call(finish, failed)
        try:
            await synced
        except _NotWrittenError as error:
            self._recent.pop(job.id, None)
            # to be tried again
            self._notes[job.id] = notes
            raise error.why from None
        except KernelError as error:
            return error
        return None

    def _keep(self, job: Job) -> None:
        labels = sum(len(key) + len(value) for key, value in job.labels.items())
        if len(job.command) + labels > _RECENT_CHARACTERS_MAX:
            return
        if len(self._recent) >= _RECENT_MAX:
            del self._recent[next(iter(self._recent))]
        self._recent[job.id] = job

    def _finish_last(self, notes: list[change_rows.Note], job: Job) -> None:
        """Write down the end of a job that is not tried again."""
        if job.array_id is None:
            # one statement, which is a transaction by itself
            change_rows.finish(self._db, notes, job)
            return
        with self._transaction():
            change_rows.finish(self._db, notes, job)
            self._count_element(job)

    def _count_element(self, job: Job) -> None:
        if job.array_id is not None:
            code = job.exit_status.code if job.exit_status else None
            array_rows.element_ended(self._db, job.array_id, job.reason, code, time.time_ns())

    async def finish_attempt(self, job: Job, *, was_stopped: bool) -> Job | None:
        """Write down how an attempt ended, and put the next one, if there is one, into the queue."""
        return await self._with_notes(job, self._finish_attempt, job, was_stopped)

    async def _with_notes(
        self,
        job: Job,
        function: Callable[..., _R],
        *arguments: Any,  # noqa: ANN401  as the function has them
    ) -> _R:
        """Write down an end, with the notes of the job that are not on their way to the table yet."""
        notes = self._notes.pop(job.id, [])
        try:
            return await self._run(function, notes, *arguments)
        except PjwError:
            # to be tried again
            self._notes[job.id] = notes
            raise

    def _finish_attempt(
        self,
        notes: list[change_rows.Note],
        job: Job,
        was_stopped: bool,  # noqa: FBT001  by position
    ) -> Job | None:
        with self._transaction():
            change_rows.finish(self._db, notes, job)
            following = queue_rows.retry(self._db, job, time.time_ns(), was_stopped=was_stopped)
            if following is None:
                self._count_element(job)
            return following

    # --- the queue

    async def enqueue(
        self,
        client_name: str,
        asked: Sequence[tuple[JobSpec, Limits]],
        quotas: Quotas,
        tokens: Mapping[int, str] = _NO_SECRETS,
    ) -> tuple[list[Job], set[int]]:
        """Put jobs of a client with a number into the queue, all or none.

        Gives jobs, in the same order, and the ids of those whose ends they wait for. A request id that has
        made a job before gives that job. *tokens* has the files with secrets of the jobs at these places; one
        that no job has after this is removed. A job that waits for one that has ended in another way is
        cancelled. Raises NameTakenError as `add`; JobNotFoundError for an id to wait for that is no job of
        the client; and LimitReachedError when the client, or all of them, would have more in the queue than
        *quotas* allow.
        """
        return await self._run(self._enqueue_with_secrets, client_name, asked, quotas, tokens)

    def _enqueue_with_secrets(
        self,
        client_name: str,
        asked: Sequence[tuple[JobSpec, Limits]],
        quotas: Quotas,
        tokens: Mapping[int, str],
    ) -> tuple[list[Job], set[int]]:
        try:
            return self._enqueue(client_name, asked, quotas, tokens)
        finally:
            for token in set(tokens.values()):
                self._has_secrets = True
                if not queue_rows.has_secrets(self._db, token):
                    self._remove_secrets(token)

    def _enqueue(
        self,
        client_name: str,
        asked: Sequence[tuple[JobSpec, Limits]],
        quotas: Quotas,
        tokens: Mapping[int, str],
    ) -> tuple[list[Job], set[int]]:
        now, awaited, before = time.time_ns(), set[int](), self._db.total_changes
        with self._transaction():
            job_ids: list[int] = []
            for place, (spec, limits) in enumerate(asked):
                placed = queue_rows.placed(self._db, client_name, spec, job_ids)
                token = tokens.get(place)
                job_ids.append(self._enqueue_one(client_name, placed, limits, quotas, token, now, awaited))
            if self._db.total_changes > before:
                queue_rows.check_quotas(self._db, client_name, quotas)
            jobs = [job_rows.find(self._db, job_id, client_name) for job_id in job_ids]
        return [job for job in jobs if job is not None], awaited

    def _enqueue_one(
        self,
        client_name: str,
        spec: JobSpec,
        limits: Limits,
        quotas: Quotas,
        token: str | None,
        now_ns: int,
        awaited: set[int],
    ) -> int:
        columns = {**queue_rows.columns_of(spec, now_ns), **workspace_rows.columns_of(spec)}
        try:
            job_id = job_rows.insert(self._db, client_name, spec, limits, 0, columns)
        except job_rows.AlreadyStartedError as before:
            return before.job_id
        if spec.workspace:
            workspace_rows.name(self._db, client_name, spec.workspace, now_ns, quotas)
        queue_rows.keep_spec(self._db, job_id, client_name, spec, token)
        if spec.queue is not None and spec.queue.array:
            array_rows.make(self._db, job_id, client_name, spec.queue.array)
        if spec.queue is not None and spec.queue.after:
            more, in_vain = queue_rows.depend(self._db, job_id, client_name, spec.queue.after)
            awaited |= more
            if in_vain:
                queue_rows.end_without_start(self._db, job_id, EndReason.CANCELLED, in_vain, now_ns)
        return job_id

    @in_its_thread
    def unqueue(self, job_ids: Sequence[int]) -> None:
        """Take back jobs that were just put into the queue, and that no caller knows of."""
        with self._transaction():
            for job_id in job_ids:
                queue_rows.delete(self._db, job_id)

    async def first_ready(
        self,
        client_name: str,
        without: Sequence[int] = (),
        busy: Mapping[str, bool] = NOTHING_BUSY,
        *,
        without_gpus: bool = False,
    ) -> queue_rows.Head | None:
        """Return the job of a client that goes first of those that wait for nothing but their turn.

        No job that waits for a workspace: for those that are *busy* see workspace_rows.is_free.
        """
        return await self._run(
            queue_rows.first_ready, self._db, client_name, without, busy, without_gpus=without_gpus
        )

    async def waiting(self, job_id: int) -> queue_rows.WaitingJob:
        """Return a job that waits for nothing but its turn, with its spec.

        Raises NotQueuedError, and InvalidJobError when its secrets are gone.
        """
        found = await self._run(self._waiting, job_id)
        if found is None:
            raise NotQueuedError
        return found

    def _waiting(self, job_id: int) -> queue_rows.WaitingJob | None:
        found = queue_rows.waiting(self._db, job_id)
        if found is None or found.token is None:
            return found
        return replace(found, secrets=self.secrets.read(found.token))

    async def uploads(self) -> set[tuple[str, str]]:
        """Return the uploads that jobs of the queue need: their clients and names."""
        return await self._run(queue_rows.uploads, self._db)

    @in_its_thread
    def forget_secrets(self) -> None:
        """Remove secrets that a crash has left, and that no job has."""
        found = self.secrets.found()
        self._has_secrets = bool(found)
        for token in found:
            if not queue_rows.has_secrets(self._db, token):
                self._remove_secrets(token)

    def _after_change(self) -> None:
        if not self._has_secrets:
            return
        for token in queue_rows.spent_secrets(self._db):
            self._remove_secrets(token)
            self._db.execute("DELETE FROM spent_secrets WHERE name = ?", (token,))

    def _remove_secrets(self, token: str) -> None:
        try:
            self.secrets.remove(token)
        except OSError as error:
            log.error("cannot remove secrets that no job has any more: %s", describe_errno(error.errno or 0))

    async def queued_of_clients(self) -> dict[str, int]:
        """Return the number of each client's jobs in the queue, an array as one, those being started too."""
        return {name: jobs for name, jobs, _ in await self._run(queue_rows.of_clients, self._db)}

    async def waiting_of_clients(self) -> dict[str, int]:
        """Return the same, where each element of an array counts as one."""
        return {name: jobs for name, _, jobs in await self._run(queue_rows.of_clients, self._db)}

    async def oldest_ready_ns(self) -> int | None:
        """Return when the job that has waited longest for its turn was queued; None when none waits."""
        return await self._run(queue_rows.oldest_ready_ns, self._db)

    @in_its_thread
    def let_due(self, now_ns: int) -> tuple[list[str], int | None]:
        """Let jobs be started whose time has come; their clients, and when the next one's will have."""
        with self._transaction():
            return queue_rows.let_due(self._db, now_ns)

    async def shift_pauses(self, shift_ns: int, now_ns: int) -> int | None:
        """Let attempts wait as long as they were to, though the clock was set; when the next job is due."""
        return await self._run(queue_rows.shift_pauses, self._db, shift_ns, now_ns)

    @in_its_thread
    def set_held(self, job_id: int, *, held: bool) -> Job | None:
        """Hold a job of the queue, or release it; return None when it does not wait there any more."""
        with self._transaction():
            return queue_rows.set_held(self._db, job_id, held)

    # --- arrays

    @in_its_thread
    def draw(self, array_id: int, without: Sequence[int]) -> tuple[int, int] | None:
        """Return the id and index of the array's element whose turn it is; None when none can start."""
        with self._transaction():
            return array_rows.draw(self._db, array_id, without)

    async def element(self, element: Element, client_name: str | None) -> Job | None:
        """Return an element of a client's array, or any's; no id until its turn. None: no such element."""
        return await self._run(array_rows.find, self._db, element, client_name)

    @in_its_thread
    def hold_element(self, element: Element, quotas: Quotas) -> Job | None:
        """Hold an element that had no turn yet; return None when it waits without a row no more.

        Raises LimitReachedError when too many of them are.
        """
        with self._transaction():
            job = queue_rows.hold_element(self._db, element)
            if job is not None:
                queue_rows.check_quotas(self._db, job.client_name, quotas)
            return job

    @in_its_thread
    def cancel_element(self, element: Element, detail: str) -> Job | None:
        """End an element that had no turn yet; return None when it waits without a row no more.

        Raises LimitReachedError when too many of them were ended so.
        """
        with self._transaction():
            return queue_rows.cancel_element(self._db, element, detail, time.time_ns())

    @in_its_thread
    def cancel_array(self, array_id: int, detail: str) -> list[int]:
        """Cancel the elements of an array that wait: all without a row, and some of the others.

        Gives the ids of these, and none when none is left.
        """
        with self._transaction():
            return queue_rows.cancel_array(self._db, array_id, detail, time.time_ns())

    async def being_stopped(self) -> list[int]:
        """Return arrays that were stopped, and still have a waiting element."""
        return await self._run(array_rows.being_stopped, self._db)

    async def elements(self, array_id: int, most: int) -> list[int]:
        """Return the ids of elements of an array that have a row: *most* of them, or all."""
        return await self._run(array_rows.rows_of, self._db, array_id, most)

    # --- from the queue to its start

    async def admit(self, job_id: int, limits: Limits, gpu_names: Sequence[str] = ()) -> Job:
        """Take a job out of the queue, to start it with *limits* and these GPUs. Raises NotQueuedError.

        Its spec stays stored until `settled`: a crash before that may have left it undone.
        """
        names = job_rows.listed(gpu_names) if gpu_names else ""
        job = await self._run(queue_rows.admit, self._db, job_id, limits, time.time_ns(), names)
        if job is None:
            raise NotQueuedError
        return job

    @in_its_thread
    def put_back(self, job_id: int) -> None:
        """Put a job back into the queue that was admitted, and whose command was not executed."""
        with self._transaction():
            queue_rows.put_back(self._db, job_id, time.time_ns())

    async def settled(self, job_id: int) -> None:
        """Forget the spec of an admitted job, as it was executed, unless it may be tried again."""
        await self._run(queue_rows.settle, self._db, job_id)

    @in_its_thread
    def end_without_start(self, job_id: int, reason: EndReason, detail: str) -> Job | None:
        """End a job that was not executed; return None when it is not where such an end may come.

        CANCELLED comes in the queue, START_FAILED there or when the job was admitted.
        """
        with self._transaction():
            return queue_rows.end_without_start(self._db, job_id, reason, detail, time.time_ns())

    @in_its_thread
    def take_effect(self, job_id: int) -> queue_rows.Effects:
        """Have the end of a job its effect on some of those that wait for it."""
        with self._transaction():
            return queue_rows.take_effect(self._db, job_id, time.time_ns())

    async def awaited(self) -> dict[int, bool]:
        """Return the jobs whose ends others wait for, each with whether it has ended."""
        return dict(await self._run(queue_rows.awaited, self._db))

    async def admitted(self) -> set[int]:
        """Return the jobs that were admitted, and whose execution is not written down."""
        return set(await self._run(queue_rows.admitted, self._db))

    def have_image(self, job_id: int, key: str) -> None:
        """Write down which image a job is about to have; in the table's thread, as `add` calls it."""
        self._db.execute("UPDATE jobs SET image_key = ? WHERE id = ?", (key, job_id))

    # --- changes of state

    def note(self, job: Job) -> None:
        """Have it written down soon that a job runs, or is being stopped.

        With other notes of that moment, or with the job's end: so a start pays for no transaction more. The
        next worker notes again the part that a crash loses.
        """
        if not self._is_timed:
            self._is_timed = True
            asyncio.get_running_loop().call_later(_NOTE_SECONDS, self._write_notes_in_time)
        self._notes.setdefault(job.id, []).append(change_rows.Note(job.state, to_ns(job.start), job.id))

    def _write_notes_in_time(self) -> None:
        self._is_timed = False
        self._write_notes()

    def _write_notes(self) -> None:
        if self._notes:
            notes, self._notes = self._notes, {}
            self._thread.call(partial(self._call, self._note_all, notes), partial(self._noted, notes))

    def _note_all(self, notes: dict[int, list[change_rows.Note]]) -> None:
        with self._transaction():
            change_rows.note(self._db, [each for of_job in notes.values() for each in of_job])

    def _noted(
        self, notes: dict[int, list[change_rows.Note]], _: object, error: BaseException | None
    ) -> None:
        if error is not None:
            # a full disk: with the next ones, or with the ends of their jobs
            self._notes = {**notes, **self._notes}

    async def kept_changes(self, owner: str | None) -> change_rows.KeptChanges:
        """Return the range of the kept changes of one client's jobs, or of all."""
        self._write_notes()
        return await self._run(change_rows.kept, self._db, owner)

    async def changes(
        self, owners: Collection[str | None], since: int, count: int
    ) -> tuple[list[JobChange], int]:
        """Return changes behind *since*, and the number they are complete to. Raises SequenceError."""
        self._write_notes()
        return await self._run(change_rows.read_changes, self._db, owners, since, count)

    async def snapshot(
        self, owner: str | None, after: int, count: int, wanted: JobFilter, ids: Collection[int]
    ) -> change_rows.SnapshotPage:
        """Return jobs as the changes until now have them: see change_rows."""
        # in turn, as `page`
        async with self._filtering_of.setdefault(owner, asyncio.Lock()), self._filtering:
            self._write_notes()
            return await self._run(change_rows.read_snapshot, self._db, owner, after, count, wanted, ids)

    # --- reading the table

    async def get(self, job_id: int, client_name: str | None = None) -> Job | None:
        """Return one job, of one client or of any; None when there is none."""
        recent = self._recent.get(job_id)
        # another's is looked for in the table, like one that never was
        if recent is not None and client_name in (None, recent.client_name):
            return recent
        return await self._run(job_rows.find, self._db, job_id, client_name)

    async def page(
        self,
        client_name: str | None,
        after: int,
        count: int,
        wanted: JobFilter = ALL_JOBS,
        *,
        newest_first: bool = False,
    ) -> Page:
        """Return the next jobs behind id *after*, of one client or of all: *count*, or fewer."""
        if wanted == ALL_JOBS:
            return await self._run(read_page, self._db, client_name, after, count, wanted, newest_first)
        # One after the other, or a caller that wants a single row would wait for all that one client asks at
        # once; and of each client one waits for its turn, or another's would wait for all of them.
        async with self._filtering_of.setdefault(client_name, asyncio.Lock()), self._filtering:
            return await self._run(read_page, self._db, client_name, after, count, wanted, newest_first)

    async def gpus_of_jobs(self) -> dict[int, tuple[str, ...]]:
        """Return the GPUs of the jobs that were begun, and whose end has not been written down."""
        return await self._run(job_rows.gpus_of_jobs, self._db)

    async def alive(self) -> list[Job]:
        """Return the jobs that were begun, and whose end has not been written down."""
        return await self._run(job_rows.alive, self._db)

    async def remove(self, job_id: int) -> None:
        """Delete the row of an ended job. Its files are next: it is among the `removals` until `removed`."""
        self._recent.pop(job_id, None)
        await self._run(self._remove, job_id)

    def _remove(self, job_id: int) -> None:
        with self._transaction():
            retention_rows.remove(self._db, job_id)

    async def prune(self, retention: Retention, now_ns: int, count: int) -> list[int]:
        """Remove, as `remove` does, at most *count* ended jobs that are more than may be kept; their ids."""
        pruned = await self._run(self._prune, retention, now_ns, count)
        for job_id in pruned:
            self._recent.pop(job_id, None)
        return pruned

    def _prune(self, retention: Retention, now_ns: int, count: int) -> list[int]:
        with self._transaction():
            return retention_rows.prune(self._db, retention, now_ns, count)

    async def removals(self) -> list[int]:
        """Return the jobs whose rows are gone, and whose files may still be there."""
        return await self._run(retention_rows.removals, self._db)

    @in_its_thread
    def removed(self, job_ids: Sequence[int]) -> None:
        """Note that the files of these are gone as well: nothing is left of them."""
        with self._transaction():
            retention_rows.removed(self._db, job_ids)

    async def first_end_ns(self, *, told: bool = False) -> int | None:
        """Return when the first job ended, *told*: of those that may be removed; None when none has."""
        return await self._run(retention_rows.first_end_ns, self._db, told=told)

    @in_its_thread
    def ended_bytes(self, client_name: str) -> tuple[int, int]:
        """Return the bytes of a client's, and all clients', ended jobs' output and of workspaces."""
        own, all_clients = retention_rows.ended_bytes(self._db, client_name)
        in_workspaces, all_workspaces = workspace_rows.total_bytes(self._db, client_name)
        return own + in_workspaces, all_clients + all_workspaces

    async def totals(self) -> list[tuple[str, int, int]]:
        """Return for each client the number of its ended jobs, and the bytes of their output."""
        return await self._run(retention_rows.totals, self._db)

    @in_its_thread
    def boot_id(self) -> str | None:
        """Return the boot of the host in which the table was last in use; None for a new table."""
        row = self._db.execute("SELECT boot_id FROM host").fetchone()
        return row[0] if row else None

    @in_its_thread
    def set_boot_id(self, boot_id: str) -> None:
        """Write down in which boot the table is in use from now on."""
        with self._transaction():
            self._db.execute("DELETE FROM host")
            self._db.execute("INSERT INTO host VALUES (?)", (boot_id,))


# The user that each client's jobs run as: its own, for ever.


class Users:
    """User ids out of the operator's range, by the numbers that the table gives to clients."""

    def __init__(self, store: JobStore, first: int, count: int) -> None:
        self._store: Final = store
        self._first: Final = first
        self._count: Final = count
        self._known: Final[dict[str, int]] = {}

    async def of(self, client_name: str) -> int:
        """Return the user id of a client. Raises LimitReachedError when all are taken."""
        if client_name not in self._known:
            number = await self._store.client_number(client_name)
            if number >= self._count:
                raise LimitReachedError(
                    f"all {self._count} user ids for clients are taken",
                    hint="the operator can configure a larger range",
                )
            self._known[client_name] = self._first + number
        return self._known[client_name]
