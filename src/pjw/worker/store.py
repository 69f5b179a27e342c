"""The job table, in SQLite. A job's row exists before its process does; ids are never reused."""

import asyncio
import json
import logging
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Final, ParamSpec, TypeVar
from weakref import WeakValueDictionary

from pjw.errors import ConfigError, KernelError, LimitReachedError, NameTakenError
from pjw.model import JOB_DIRECTORY, Job, JobSpec, JobState, Limits
from pjw.worker.one_thread import OneThread
from pjw.worker.pages import ALL_JOBS, JobFilter, Page, read_page
from pjw.worker.rows import COLUMNS, job_of, limits_text, to_ns
from pjw.worker.schema import migrate
from pjw.worker.settings import Retention
from pjw.worker.wal import WalSync

# A pjwd that is ending releases the table in less time.
BUSY_SECONDS: Final = 5.0
# A copy of the table holds it for this many pages at a time, about a millisecond. In between others use it.
_COPY_PAGES: Final = 256
# how long a copy waits between these, and for the end of a transaction
_COPY_WAIT_SECONDS: Final = 0.005

log: Final = logging.getLogger(__name__)

# Which job goes first when more is kept than may be, by the member of Retention that says so;
# `:most` is its value. A total is brought down at the cost of the client who has most: nobody
# can push the jobs of others out. Its bound is inside the question for that client: outside, SQLite
# would ask it again for each of the client's jobs.
_TO_PRUNE: Final = {
    "age_seconds": "SELECT id FROM jobs WHERE state IS NOT NULL AND end_ns < :now - :most * 1000000000"
    " ORDER BY end_ns LIMIT 1",
    "jobs_per_client": "SELECT id FROM jobs WHERE state IS NOT NULL AND client_name ="
    " (SELECT name FROM clients WHERE ended_jobs > :most LIMIT 1) ORDER BY end_ns LIMIT 1",
    "bytes_per_client": "SELECT id FROM jobs WHERE output_bytes > 0 AND client_name ="
    " (SELECT name FROM clients WHERE ended_bytes > :most LIMIT 1) ORDER BY end_ns LIMIT 1",
    "jobs_total": "SELECT id FROM jobs WHERE state IS NOT NULL AND client_name ="
    " (SELECT name FROM clients WHERE (SELECT sum(ended_jobs) FROM clients) > :most"
    " ORDER BY ended_jobs DESC LIMIT 1) ORDER BY end_ns LIMIT 1",
    "bytes_total": "SELECT id FROM jobs WHERE output_bytes > 0 AND client_name ="
    " (SELECT name FROM clients WHERE (SELECT sum(ended_bytes) FROM clients) > :most"
    " ORDER BY ended_bytes DESC LIMIT 1) ORDER BY end_ns LIMIT 1",
}


_P = ParamSpec("_P")
_R = TypeVar("_R")


class AlreadyStartedError(Exception):
    """A client has asked with this request id before, and got a job then."""

    def __init__(self, job_id: int) -> None:
        """*job_id* is that job."""
        super().__init__(f"the request has started job {job_id}")
        self.job_id: Final = job_id


class JobStore:
    """The table, used from one thread of its own, so that a slow disk holds no event loop up.

    Every method may raise LimitReachedError (the disk is full) or KernelError (it fails).
    """

    def __init__(self, path: str) -> None:
        """Open or create the table. Raises ConfigError when it is in use, or a newer pjw wrote it."""
        self._path: Final = path
        self._thread: Final = OneThread("pjw-store")
        self._filtering: Final = asyncio.Lock()
        # those of the clients that wait for it, by name; None is who asks for the jobs of all
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
        # NORMAL: a commit survives the death of any process. What must survive a power cut too is
        # synced by us (wal.py), beside what else has to be done; FULL would have each wait in turn.
        db.execute("PRAGMA synchronous = NORMAL")
        migrate(db, self._path)

    def close(self) -> None:
        """Write what is pending and close."""
        self._thread.close()
        self._wal.close()
        self._db.close()

    def reserve(self) -> None:
        """Have space for what must be written on a full disk, if it was full when this was opened."""
        self._wal.reserve()

    def sync(self) -> asyncio.Future[None]:
        """Done when all that was written before this call will survive a power cut. Raises KernelError."""
        return self._wal.sync()

    def copy_to(self, target: sqlite3.Connection) -> None:
        """Copy the table as it is at one moment; call it from any thread, while others use the table.

        The copy also gets what others write meanwhile: SQLite sees to that, as they use the same connection.
        """
        self._guarded(self._db.backup, target, pages=_COPY_PAGES, sleep=_COPY_WAIT_SECONDS)

    def size_bytes(self) -> int:
        """How large a copy of the table is; call it from any thread."""
        return self._guarded(self._size_bytes)

    def _size_bytes(self) -> int:
        ((pages,),) = self._db.execute("PRAGMA page_count")
        ((page_bytes,),) = self._db.execute("PRAGMA page_size")
        return int(pages * page_bytes)

    async def client_number(self, name: str) -> int:
        """The number of a client, from 0 on, given at its first job and never to another."""
        return await self._run(self._client_number, name)

    def _client_number(self, name: str) -> int:
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
    ) -> Job:
        """Insert a job that is about to start, then call *made* with it, in the table's thread.

        When that raises, the row is deleted again. Raises NameTakenError while another job bears its name,
        and AlreadyStartedError when the same request has started a job before.
        """
        return await self._run(self._add_and_make, client_name, spec, limits, made)

    def _add_and_make(
        self, client_name: str, spec: JobSpec, limits: Limits, made: Callable[[Job], None]
    ) -> Job:
        job = self._add(client_name, spec, limits)
        try:
            made(job)
        except BaseException:
            self._discard(job.id)
            raise
        return job

    def _add(self, client_name: str, spec: JobSpec, limits: Limits) -> Job:
        now = datetime.now(UTC)
        workdir = spec.workdir or JOB_DIRECTORY
        try:
            cursor = self._db.execute(
                "INSERT INTO jobs (client_name, command, limits, start_ns, name, labels, split_stderr,"
                " input, request_id, workdir) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    client_name,
                    spec.display,
                    limits_text(limits),
                    to_ns(now),
                    spec.name,
                    json.dumps(dict(spec.labels)) if spec.labels else "{}",
                    spec.split_stderr,
                    spec.input,
                    spec.request_id or None,
                    workdir,
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
        return Job(
            cursor.lastrowid,
            client_name,
            spec.display,
            JobState.STARTING,
            limits,
            now,
            name=spec.name,
            labels=spec.labels,
            split_stderr=spec.split_stderr,
            input=spec.input,
            workdir=workdir,
        )

    def _bearer(self, client_name: str, name: str) -> int | None:
        query = "SELECT id FROM jobs WHERE client_name = ? AND name = ? AND name <> '' AND state IS NULL"
        row = self._db.execute(query, (client_name, name)).fetchone()
        return row[0] if row else None

    async def of_request(self, client_name: str, request_id: str) -> int | None:
        """The job that a client's request with this id has started; None when it has started none."""
        return await self._run(self._of_request, client_name, request_id)

    def _of_request(self, client_name: str, request_id: str) -> int | None:
        query = "SELECT id FROM jobs WHERE client_name = ? AND request_id = ?"
        row = self._db.execute(query, (client_name, request_id)).fetchone()
        return row[0] if row else None

    async def discard(self, job_id: int) -> None:
        """Delete a job that never came to be; its id stays used."""
        await self._run(self._discard, job_id)

    def _discard(self, job_id: int) -> None:
        self._db.execute("DELETE FROM jobs WHERE id = ?", (job_id,))

    async def finish(self, job: Job) -> None:
        """Write down how a job ended."""
        await self._run(self._finish, job)

    def _finish(self, job: Job) -> None:
        status = job.exit_status
        self._db.execute(
            "UPDATE jobs SET start_ns = ?, state = ?, end_ns = ?, exit_code = ?, signal = ?, reason = ?,"
            " usage = ?, output_bytes = ? WHERE id = ?",
            (
                to_ns(job.start),
                job.state,
                to_ns(job.end) if job.end else None,
                # older versions read a code or a signal, never both
                status.code if status and status.signal is None else None,
                status.signal if status else None,
                job.reason,
                json.dumps(asdict(job.usage)) if job.usage else None,
                job.output_bytes,
                job.id,
            ),
        )

    async def get(self, job_id: int, client_name: str | None = None) -> Job | None:
        """One job, of one client or of any; None when there is none."""
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
        """The next jobs behind id *after*, of one client or of all: *count*, or fewer."""
        if wanted == ALL_JOBS:
            return await self._run(read_page, self._db, client_name, after, count, wanted, newest_first)
        # One after the other, or whoever wants a single row would wait for all that one client asks at once;
        # and of each client one waits for its turn, or another's would wait for all of them.
        async with self._filtering_of.setdefault(client_name, asyncio.Lock()), self._filtering:
            return await self._run(read_page, self._db, client_name, after, count, wanted, newest_first)

    async def alive(self) -> list[Job]:
        """The jobs whose end has not been written down."""
        return await self._run(self._alive)

    def _alive(self) -> list[Job]:
        return [
            job_of(row)
            for row in self._db.execute(f"SELECT {COLUMNS} FROM jobs WHERE state IS NULL ORDER BY id")
        ]

    async def remove(self, job_id: int) -> None:
        """Delete the row of an ended job. Its files are next: it is among the `removals` until `removed`."""
        await self._run(self._remove, job_id)

    def _remove(self, job_id: int) -> None:
        with self._transaction():
            self._move_to_removals(job_id)

    def _move_to_removals(self, job_id: int) -> None:
        if self._db.execute("DELETE FROM jobs WHERE id = ? AND state IS NOT NULL", (job_id,)).rowcount:
            self._db.execute("INSERT INTO removals VALUES (?)", (job_id,))

    async def prune(self, retention: Retention, now_ns: int, count: int) -> list[int]:
        """Remove, as `remove` does, at most *count* ended jobs that are more than may be kept; their ids."""
        return await self._run(self._prune, retention, now_ns, count)

    def _prune(self, retention: Retention, now_ns: int, count: int) -> list[int]:
        pruned: list[int] = []
        with self._transaction():
            while len(pruned) < count:
                job_id = self._first_to_prune(retention, now_ns)
                if job_id is None:
                    break
                self._move_to_removals(job_id)
                pruned.append(job_id)
        return pruned

    def _first_to_prune(self, retention: Retention, now_ns: int) -> int | None:
        for name, query in _TO_PRUNE.items():
            most = getattr(retention, name)
            row = self._db.execute(query, {"most": most, "now": now_ns}).fetchone() if most else None
            if row is not None:
                return int(row[0])
        return None

    async def removals(self) -> list[int]:
        """The jobs whose rows are gone, and whose files may still be there."""
        return await self._run(self._removals)

    def _removals(self) -> list[int]:
        return [job_id for (job_id,) in self._db.execute("SELECT id FROM removals")]

    async def removed(self, job_ids: Sequence[int]) -> None:
        """The files of these are gone as well: nothing is left of them."""
        await self._run(self._removed, job_ids)

    def _removed(self, job_ids: Sequence[int]) -> None:
        with self._transaction():
            self._db.executemany("DELETE FROM removals WHERE id = ?", [(job_id,) for job_id in job_ids])

    async def first_end_ns(self) -> int | None:
        """When the job that ended first did so; None when none has."""
        return await self._run(self._first_end_ns)

    def _first_end_ns(self) -> int | None:
        row = self._db.execute("SELECT min(end_ns) FROM jobs WHERE state IS NOT NULL").fetchone()
        return row[0] if row else None

    async def ended_bytes(self, client_name: str) -> tuple[int, int]:
        """The output that the ended jobs of a client, and of all clients, have: bytes."""
        return await self._run(self._ended_bytes, client_name)

    def _ended_bytes(self, client_name: str) -> tuple[int, int]:
        query = "SELECT total(ended_bytes * (name = ?)), total(ended_bytes) FROM clients"
        own, everybodys = self._db.execute(query, (client_name,)).fetchone()
        return int(own), int(everybodys)

    async def totals(self) -> list[tuple[str, int, int]]:
        """Of each client its ended jobs, and the bytes of output that they have."""
        return await self._run(self._totals)

    def _totals(self) -> list[tuple[str, int, int]]:
        return self._db.execute("SELECT name, ended_jobs, ended_bytes FROM clients").fetchall()

    async def boot_id(self) -> str | None:
        """The boot of the host in which the table was last in use; None for a new table."""
        return await self._run(self._boot_id)

    def _boot_id(self) -> str | None:
        row = self._db.execute("SELECT boot_id FROM host").fetchone()
        return row[0] if row else None

    async def set_boot_id(self, boot_id: str) -> None:
        """Write down in which boot the table is in use from now on."""
        await self._run(self._set_boot_id, boot_id)

    def _set_boot_id(self, boot_id: str) -> None:
        with self._transaction():
            self._db.execute("DELETE FROM host")
            self._db.execute("INSERT INTO host VALUES (?)", (boot_id,))

    async def _run(self, function: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
        return await self._thread.run(lambda: self._guarded(function, *args, **kwargs))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Several changes, all of them or none."""
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
            raise KernelError("use the job table", f"{self._path} ({error})", 0) from error
