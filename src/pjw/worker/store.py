"""The job table, in SQLite. A job's row exists before its process does; ids are never reused."""

import asyncio
import json
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial, wraps
from typing import Any, Concatenate, Final, ParamSpec, TypeVar
from weakref import WeakValueDictionary

from pjw.arrays import Element
from pjw.errors import (
    ConfigError,
    JobTableError,
    KernelError,
    LimitReachedError,
    NameTakenError,
    PjwError,
    describe_errno,
)
from pjw.model import Artifacts, ArtifactsState, EndReason, Job, JobChange, JobSpec, JobState, Limits
from pjw.worker import array_rows, change_rows, queue_rows, workspace_rows
from pjw.worker.job_rows import COLUMNS, job_of, limits_text, to_ns
from pjw.worker.one_thread import TOLD_LATER, OneThread
from pjw.worker.pages import ALL_JOBS, JobFilter, Page, read_page
from pjw.worker.schema import migrate
from pjw.worker.secret_files import SecretFiles
from pjw.worker.settings import Quotas, Retention
from pjw.worker.wal import WalSync
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


# The job that goes first when more is kept than allowed, by the member of Retention that bounds it; `:most`
# is its value. A total is brought down at the cost of the client that has most: no client can push the jobs
# of others out. Its bound is inside the question for that client: outside, SQLite would ask it again for each
# of the client's jobs.
def _to_prune(which: str = "", who: str = "") -> dict[str, str]:
    return {
        "age_seconds": "SELECT id FROM jobs WHERE state IS NOT NULL AND end_ns < :now - :most * 1000000000"
        f"{which} ORDER BY end_ns LIMIT 1",
        "jobs_per_client": "SELECT id FROM jobs WHERE state IS NOT NULL AND client_name ="
        f" (SELECT name FROM clients WHERE ended_jobs > :most{who} LIMIT 1){which} ORDER BY end_ns LIMIT 1",
        "bytes_per_client": "SELECT id FROM jobs WHERE output_bytes + artifact_bytes > 0 AND client_name ="
        f" (SELECT name FROM clients WHERE ended_bytes > :most{who} LIMIT 1){which} ORDER BY end_ns LIMIT 1",
        "jobs_total": "SELECT id FROM jobs WHERE state IS NOT NULL AND client_name ="
        " (SELECT name FROM clients WHERE (SELECT sum(ended_jobs) FROM clients) > :most"
        f"{who} ORDER BY ended_jobs DESC LIMIT 1){which} ORDER BY end_ns LIMIT 1",
        "bytes_total": "SELECT id FROM jobs WHERE output_bytes + artifact_bytes > 0 AND client_name ="
        " (SELECT name FROM clients WHERE (SELECT sum(ended_bytes) FROM clients) > :most"
        f"{who} ORDER BY ended_bytes DESC LIMIT 1){which} ORDER BY end_ns LIMIT 1",
    }


_TO_PRUNE: Final = _to_prune()
# A node keeps an ended job until the gateway has written its end down. A client whose ended jobs are all of
# that kind is not asked for: others may have more than may be kept.
_TOLD: Final = "(reported OR coalesce(request_id, '') < 'cluster:' OR request_id >= 'cluster;')"
_TOLD_TO_PRUNE: Final = _to_prune(
    f" AND {_TOLD}",
    f" AND EXISTS (SELECT 1 FROM jobs WHERE state IS NOT NULL AND client_name = clients.name AND {_TOLD})",
)


_P = ParamSpec("_P")
_R = TypeVar("_R")


_NO_SECRETS: Final[Mapping[int, str]] = {}
# columns of a new job that a plain start leaves as they are
_NO_COLUMNS: Final[Mapping[str, int | str]] = {}


class AlreadyStartedError(Exception):
    """A client has asked with this request id before, and got a job then."""

    def __init__(self, job_id: int) -> None:
        """Make the error; *job_id* is the job that the request has started."""
        super().__init__(f"the request has started job {job_id}")
        self.job_id: Final = job_id


class _NotWrittenError(Exception):
    """The rows to be synced could not be written."""

    def __init__(self, why: BaseException) -> None:
        super().__init__(str(why))
        self.why: Final = why


class NotQueuedError(Exception):
    """A job is not in the queue any more, or is held, when its turn has come."""


def _listed(texts: Sequence[str]) -> str:
    """Format a list of texts as a row has it."""
    return json.dumps(list(texts), ensure_ascii=False)


def in_its_thread(
    method: Callable[Concatenate["JobStore", _P], _R],
) -> Callable[Concatenate["JobStore", _P], Coroutine[Any, Any, _R]]:
    """Have the body of a method, which reads or changes the table, run in the table's thread; await it."""

    @wraps(method)
    async def awaited(self: "JobStore", /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        return await self._run(method, self, *args, **kwargs)

    return awaited


class JobStore:
    """The table, used from one thread of its own, so that a slow disk holds no event loop up.

    Every method may raise LimitReachedError (the disk is full) or KernelError (it fails).
    """

    def __init__(self, path: str) -> None:
        """Open or create the table. Raises ConfigError when it is in use, or a newer pjw wrote it."""
        self._path: Final = path
        # beside the table until the state directory says where
        self.secrets = SecretFiles(os.path.dirname(path))
        # whether there may be some
        self._has_secrets = False
        self._thread: Final = OneThread("pjw-store")
        # jobs that have begun to run or to stop, until that is written down
        self._notes: dict[int, list[change_rows.Note]] = {}
        self._is_timed = False
        # called in the table's thread when something has changed; None: there are no watchers
        self.changed: Callable[[], object] | None = None
        # Rows of ended jobs as they are about to be, or are; belongs to the event loop.
        self._recent: Final[dict[int, Job]] = {}
        self._filtering: Final = asyncio.Lock()
        # those of the clients that wait for it, by name; None is for calls about the jobs of all
        self._filtering_of: Final[WeakValueDictionary[str | None, asyncio.Lock]] = WeakValueDictionary()
        self._db: Final = self._guarded(self._open)
        try:
            self._wal: Final = WalSync(path)
        except BaseException:
            self._db.close()
            raise

    def _open(self) -> sqlite3.Connection:
        try:
            return self._open_within(0)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                raise
        # tell the operator, at a terminal or in the log, why the start takes so long
        log.warning("%s is in use by another pjwd; waiting %d s for its end", self._path, BUSY_SECONDS)
        return self._open_within(BUSY_SECONDS)

    def _open_within(self, seconds: float) -> sqlite3.Connection:
        # check_same_thread: opened here, then used only by the one thread. isolation_level: a statement is a
        # transaction by itself. With a BEGIN and a COMMIT around each, the thread would wait four times more
        # for the interpreter's lock.
        db = sqlite3.connect(self._path, timeout=seconds, check_same_thread=False, isolation_level=None)
        try:
            self._prepare(db)
        except BaseException:
            db.close()
            raise
        return db

    def _prepare(self, db: sqlite3.Connection) -> None:
        # One process uses the table, and it may have lost the right to reach it by its path
        # (pjwd drops root after this): hold every file open, need no shared-memory file.
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute("PRAGMA temp_store = MEMORY")
        db.execute("PRAGMA journal_mode = WAL")
        # NORMAL: a commit survives the death of any process. Commits that must survive a power cut too are
        # synced by us (wal.py), beside other work; FULL would have each wait in turn.
        db.execute("PRAGMA synchronous = NORMAL")
        migrate(db, self._path)

    def close(self) -> None:
        """Write the pending notes and close."""
        self._thread.close()
        with suppress(PjwError):
            self._guarded(self._note_all, self._notes)
        self._wal.close()
        self._db.close()

    def reserve(self) -> None:
        """Have space for the necessary writes on a full disk, if it was full when this was opened."""
        self._wal.reserve()

    def sync(self) -> asyncio.Future[None]:
        """Sync; done when all rows written before this call will survive a power cut. Raises KernelError."""
        return self._wal.sync()

    def copy_to(self, target: sqlite3.Connection) -> None:
        """Copy the table as it is at one moment; call it from any thread, while others use the table.

        The copy also gets the writes of others meanwhile: SQLite sees to that, as they use the same
        connection.
        """
        self._guarded(self._db.backup, target, pages=_COPY_PAGES, sleep=_COPY_WAIT_SECONDS)

    def size_bytes(self) -> int:
        """Return the size of a copy of the table; call it from any thread."""
        return self._guarded(self._size_bytes)

    def _size_bytes(self) -> int:
        ((pages,),) = self._db.execute("PRAGMA page_count")
        ((page_bytes,),) = self._db.execute("PRAGMA page_size")
        return int(pages * page_bytes)

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
            workspace_rows.columns_of(spec) if spec.workspace or spec.image else _NO_COLUMNS
        )
        if gpu_names:
            own = {**own, "gpu_names": _listed(gpu_names)}
        job_id = self._insert(client_name, spec, limits, to_ns(now), own)
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

    def _insert(
        self,
        client_name: str,
        spec: JobSpec,
        limits: Limits,
        start_ns: int,
        more: Mapping[str, int | str] = _NO_COLUMNS,
    ) -> int:
        """Insert a job; its id. Raises NameTakenError and AlreadyStartedError."""
        if spec.outputs:
            required = int(spec.output_required)
            more = {**more, "artifacts": ArtifactsState.PENDING, "artifacts_required": required}
        if spec.mounts:
            more = {**more, "mounts": _listed(spec.mounts)}
        if spec.gpus:
            more = {**more, "gpus": spec.gpus}
        if spec.node:
            more = {**more, "chosen_node": spec.node}
        if spec.partition or spec.constraint:
            more = {**more, "slurm_partition": spec.partition, "slurm_constraint": spec.constraint}
        if spec.allow or spec.link:
            more = {**more, "allow": " ".join(spec.allow), "link": spec.link}
        try:
            cursor = self._db.execute(
                "INSERT INTO jobs (client_name, command, limits, start_ns, name, labels, split_stderr,"
                f" input, request_id, workdir{''.join(f', {name}' for name in more)})"
                f" VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?{', ?' * len(more)})",
                (
                    client_name,
                    spec.display,
                    limits_text(limits),
                    start_ns,
                    spec.name,
                    json.dumps(dict(spec.labels)) if spec.labels else "{}",
                    spec.split_stderr,
                    spec.input,
                    spec.request_id or None,
                    spec.directory,
                    *more.values(),
                ),
            )
        except sqlite3.IntegrityError:
            if spec.request_id and (started := self._of_request(client_name, spec.request_id)) is not None:
                raise AlreadyStartedError(started) from None
            bearer = self._bearer(client_name, spec.name)
            if bearer is None:
                raise
            raise NameTakenError(
                f"cannot start a job called {spec.name}: job {bearer} is called that, and has not ended",
                hint=f"pjw stop {bearer}; or choose another name",
                holder=bearer,
            ) from None
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def _bearer(self, client_name: str, name: str) -> int | None:
        query = "SELECT id FROM jobs WHERE client_name = ? AND name = ? AND name <> '' AND state IS NULL"
        row = self._db.execute(query, (client_name, name)).fetchone()
        return row[0] if row else None

    async def of_request(self, client_name: str, request_id: str) -> int | None:
        """Return the job that a client's request with this id has started; None when it has started none."""
        return await self._run(self._of_request, client_name, request_id)

    def _of_request(self, client_name: str, request_id: str) -> int | None:
        query = "SELECT id FROM jobs WHERE client_name = ? AND request_id = ?"
        row = self._db.execute(query, (client_name, request_id)).fetchone()
        return row[0] if row else None

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
            self._finish(notes, job)
            return
        with self._transaction():
            self._finish(notes, job)
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
            self._finish(notes, job)
            following = queue_rows.retry(self._db, job, time.time_ns(), was_stopped=was_stopped)
            if following is None:
                self._count_element(job)
            return following

    def _finish(self, notes: list[change_rows.Note], job: Job) -> None:
        status = job.exit_status
        if len(notes) > 1:
            change_rows.note(self._db, notes)
        self._db.execute(
            "UPDATE jobs SET told = coalesce(?, told), start_ns = ?, state = ?, end_ns = ?, exit_code = ?,"
            " signal = ?, reason = ?, usage = ?, output_bytes = ?, artifacts = ?, artifact_bytes = ?,"
            " artifacts_detail = ? WHERE id = ?",
            (
                notes[-1].state if notes else None,
                to_ns(job.start),
                job.state,
                to_ns(job.end) if job.end else None,
                # older versions read a code or a signal, never both
                status.code if status and status.signal is None else None,
                status.signal if status else None,
                job.reason,
                json.dumps(asdict(job.usage)) if job.usage else None,
                job.output_bytes,
                job.artifacts.state if job.artifacts else "",
                job.artifacts.bytes if job.artifacts else 0,
                job.artifacts.detail if job.artifacts else "",
                job.id,
            ),
        )

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
            jobs = [self._get(job_id, client_name) for job_id in job_ids]
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
            job_id = self._insert(client_name, spec, limits, 0, columns)
        except AlreadyStartedError as before:
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

    def _remove_spent_secrets(self) -> None:
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
        names = _listed(gpu_names) if gpu_names else ""
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

    async def of_workspaces(
        self, function: Callable[Concatenate[sqlite3.Connection, _P], _R], *args: _P.args, **kwargs: _P.kwargs
    ) -> _R:
        """Call a function of workspace_rows; its changes are one transaction."""
        return await self._run(self._in_transaction, partial(function, self._db, *args, **kwargs))

    async def transact(
        self, function: Callable[Concatenate[sqlite3.Connection, _P], _R], *args: _P.args, **kwargs: _P.kwargs
    ) -> _R:
        """Call a function with the table, in its thread; its changes are one transaction."""
        return await self._run(self._in_transaction, partial(function, self._db, *args, **kwargs))

    def _in_transaction(self, function: Callable[[], _R]) -> _R:
        with self._transaction():
            return function()

    def have_image(self, job_id: int, key: str) -> None:
        """Write down which image a job is about to have; in the table's thread, as `add` calls it."""
        self._db.execute("UPDATE jobs SET image_key = ? WHERE id = ?", (key, job_id))

    async def in_turn(self, function: Callable[[], _R]) -> _R:
        """Call a function that touches files in the table's thread, as `add` does."""
        return await self._run(function)

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

    async def kept_changes(self, owner: str | None) -> change_rows.Kept:
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
        return await self._run(self._get, job_id, client_name)

    def _get(self, job_id: int, client_name: str | None) -> Job | None:
        # Looked for among the client's own, so that another's job takes the time that none takes.
        whose, arguments = (
            ("INDEXED BY jobs_of_client WHERE client_name = ? AND", (client_name,))
            if client_name is not None
            else ("WHERE", ())
        )
        query = f"SELECT {COLUMNS} FROM jobs {whose} id = ?"
        row = self._db.execute(query, (*arguments, job_id)).fetchone()
        return job_of(row) if row else None

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

    @in_its_thread
    def gpus_of_jobs(self) -> dict[int, tuple[str, ...]]:
        """Return the GPUs of the jobs that were begun, and whose end has not been written down."""
        query = (
            "SELECT id, gpu_names FROM jobs INDEXED BY jobs_alive"
            " WHERE state IS NULL AND start_ns > 0 AND gpu_names <> ''"
        )
        return {job_id: tuple(json.loads(names)) for job_id, names in self._db.execute(query)}

    @in_its_thread
    def alive(self) -> list[Job]:
        """Return the jobs that were begun, and whose end has not been written down."""
        return [
            job_of(row)
            for row in self._db.execute(
                f"SELECT {COLUMNS} FROM jobs INDEXED BY jobs_alive WHERE state IS NULL AND start_ns > 0"
                " AND id NOT IN (SELECT id FROM arrays) ORDER BY id"
            )
        ]

    async def remove(self, job_id: int) -> None:
        """Delete the row of an ended job. Its files are next: it is among the `removals` until `removed`."""
        self._recent.pop(job_id, None)
        await self._run(self._remove, job_id)

    def _remove(self, job_id: int) -> None:
        with self._transaction():
            self._move_to_removals(job_id)

    def _move_to_removals(self, job_id: int) -> bool:
        """Return whether it was there, and could go: one whose end has had no effect on others yet stays."""
        query = (
            "DELETE FROM jobs WHERE id = ? AND state IS NOT NULL"
            " AND NOT EXISTS (SELECT 1 FROM dependencies WHERE after_id = jobs.id)"
        )
        if not self._db.execute(query, (job_id,)).rowcount:
            return False
        self._db.execute("INSERT INTO removals VALUES (?)", (job_id,))
        return True

    async def prune(self, retention: Retention, now_ns: int, count: int) -> list[int]:
        """Remove, as `remove` does, at most *count* ended jobs that are more than may be kept; their ids."""
        pruned = await self._run(self._prune, retention, now_ns, count)
        for job_id in pruned:
            self._recent.pop(job_id, None)
        return pruned

    def _prune(self, retention: Retention, now_ns: int, count: int) -> list[int]:
        pruned: list[int] = []
        with self._transaction():
            while len(pruned) < count:
                job_id = self._first_to_prune(retention, now_ns)
                if job_id is None or not self._move_to_removals(job_id):
                    break
                pruned.append(job_id)
        return pruned

    def _first_to_prune(self, retention: Retention, now_ns: int) -> int | None:
        for name, query in (_TOLD_TO_PRUNE if retention.keeps_untold else _TO_PRUNE).items():
            most = getattr(retention, name)
            row = self._db.execute(query, {"most": most, "now": now_ns}).fetchone() if most else None
            if row is not None:
                return int(row[0])
        return None

    @in_its_thread
    def removals(self) -> list[int]:
        """Return the jobs whose rows are gone, and whose files may still be there."""
        return [job_id for (job_id,) in self._db.execute("SELECT id FROM removals")]

    @in_its_thread
    def removed(self, job_ids: Sequence[int]) -> None:
        """Note that the files of these are gone as well: nothing is left of them."""
        with self._transaction():
            self._db.executemany("DELETE FROM removals WHERE id = ?", [(job_id,) for job_id in job_ids])

    @in_its_thread
    def first_end_ns(self, *, told: bool = False) -> int | None:
        """Return when the first job ended, *told*: of those that may be removed; None when none has."""
        which = f" AND {_TOLD}" if told else ""
        query = f"SELECT end_ns FROM jobs WHERE state IS NOT NULL{which} ORDER BY end_ns LIMIT 1"
        row = self._db.execute(query).fetchone()
        return row[0] if row else None

    @in_its_thread
    def ended_bytes(self, client_name: str) -> tuple[int, int]:
        """Return the bytes of a client's, and all clients', ended jobs' output and of workspaces."""
        query = "SELECT total(ended_bytes * (name = ?)), total(ended_bytes) FROM clients"
        own, everybodys = self._db.execute(query, (client_name,)).fetchone()
        in_workspaces, all_workspaces = workspace_rows.total_bytes(self._db, client_name)
        return int(own) + in_workspaces, int(everybodys) + all_workspaces

    @in_its_thread
    def totals(self) -> list[tuple[str, int, int]]:
        """Return for each client the number of its ended jobs, and the bytes of their output."""
        return self._db.execute("SELECT name, ended_jobs, ended_bytes FROM clients").fetchall()

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

    async def _run(self, function: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
        return await self._thread.run(lambda: self._call(function, *args, **kwargs))

    def _call(self, function: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
        before = self._db.total_changes
        try:
            result = self._guarded(function, *args, **kwargs)
            if self._has_secrets and self._db.total_changes != before:
                self._guarded(self._remove_spent_secrets)
            return result
        finally:
            if self.changed is not None and self._db.total_changes != before:
                self.changed()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Make several changes, all of them or none."""
        self._db.execute("BEGIN")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            # SQLite itself has rolled back after some errors, such as a full disk
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def _guarded(self, function: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return function(*args, **kwargs)
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0)
            if code == sqlite3.SQLITE_BUSY:
                # only when it is opened: it is locked from then on (locking_mode)
                raise ConfigError(
                    f"the job table {self._path} is in use by another pjwd",
                    hint="stop that one, or give this one another --state-dir",
                ) from error
            if code == sqlite3.SQLITE_FULL:
                raise LimitReachedError(f"no space is left for the job table {self._path}") from error
            raise JobTableError("use the job table", self._path, error) from error


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
