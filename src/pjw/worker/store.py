"""The job table, in SQLite. A job's row exists before its process does; ids are never reused."""

import asyncio
import json
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Final, ParamSpec, TypeVar

from pjw.errors import ConfigError, KernelError, LimitReachedError
from pjw.model import EndReason, ExitStatus, Job, JobState, Limits, Usage

SCHEMA_VERSION: Final = 1
# `state` is NULL until the job has ended: where a living job is, only its own processes know,
# and after a restart they are asked, not the table.
_SCHEMA: Final = """
CREATE TABLE clients (
    name TEXT PRIMARY KEY,
    number INTEGER NOT NULL UNIQUE
) WITHOUT ROWID;
CREATE TABLE jobs (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    client_name TEXT NOT NULL,
    command TEXT NOT NULL,
    limits TEXT NOT NULL,
    start_ns INTEGER NOT NULL,
    state TEXT,
    end_ns INTEGER,
    exit_code INTEGER,
    signal INTEGER,
    reason TEXT,
    usage TEXT
);
CREATE INDEX jobs_of_client ON jobs (client_name, id);
CREATE INDEX jobs_alive ON jobs (id) WHERE state IS NULL;
"""
# A page of long commands ends early, so that it fits into the 4 MiB that gRPC's clients take, and
# that nobody's list fills the memory: a command may have half a megabyte.
PAGE_CHARACTERS: Final = 256 * 1024
_COLUMNS: Final = (
    "id, client_name, command, limits, start_ns, state, end_ns, exit_code, signal, reason, usage"
)
_Row = tuple[int, str, str, str, int, str | None, int | None, int | None, int | None, str | None, str | None]


_P = ParamSpec("_P")
_R = TypeVar("_R")


class JobStore:
    """The table, used from one thread of its own, so that a slow disk holds no event loop up.

    Every method may raise LimitReachedError (the disk is full) or KernelError (it fails).
    """

    def __init__(self, path: str) -> None:
        """Open or create the table. Raises ConfigError when it is in use, or a newer pjw wrote it."""
        self._path: Final = path
        self._thread: Final = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pjw-store")
        self._db: Final = self._guarded(self._open)

    def _open(self) -> sqlite3.Connection:
        # check_same_thread: opened here, then used only by the one thread of the executor
        db = sqlite3.connect(self._path, check_same_thread=False)
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
        # NORMAL: a commit survives the death of any process, and a power cut may cost the last
        # ones. FULL would put an fsync before the answer of every start.
        db.execute("PRAGMA synchronous = NORMAL")
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise ConfigError(
                f"the job table {self._path} has version {version}, and this pjw knows only {SCHEMA_VERSION}",
                hint="a newer pjw has written it; run that one",
            )
        if version == 0:
            db.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")

    def close(self) -> None:
        """Write what is pending and close."""
        self._thread.shutdown()
        self._db.close()

    async def client_number(self, name: str) -> int:
        """The number of a client, from 0 on, given at its first job and never to another."""
        return await self._run(self._client_number, name)

    def _client_number(self, name: str) -> int:
        with self._db:
            self._db.execute(
                "INSERT OR IGNORE INTO clients SELECT ?, coalesce(max(number) + 1, 0) FROM clients", (name,)
            )
        row: tuple[int] = self._db.execute("SELECT number FROM clients WHERE name = ?", (name,)).fetchone()
        return row[0]

    async def add(self, client_name: str, command: str, limits: Limits) -> Job:
        """Insert a job that is about to start."""
        return await self._run(self._add, client_name, command, limits)

    def _add(self, client_name: str, command: str, limits: Limits) -> Job:
        now = datetime.now(UTC)
        with self._db:
            cursor = self._db.execute(
                "INSERT INTO jobs (client_name, command, limits, start_ns) VALUES (?, ?, ?, ?)",
                (client_name, command, json.dumps(asdict(limits)), to_ns(now)),
            )
        assert cursor.lastrowid is not None
        return Job(cursor.lastrowid, client_name, command, JobState.STARTING, limits, now)

    async def discard(self, job_id: int) -> None:
        """Delete a job that never came to be; its id stays used."""
        await self._run(self._discard, job_id)

    def _discard(self, job_id: int) -> None:
        with self._db:
            self._db.execute("DELETE FROM jobs WHERE id = ?", (job_id,))

    async def finish(self, job: Job) -> None:
        """Write down how a job ended."""
        await self._run(self._finish, job)

    def _finish(self, job: Job) -> None:
        status = job.exit_status
        with self._db:
            self._db.execute(
                "UPDATE jobs SET start_ns = ?, state = ?, end_ns = ?, exit_code = ?, signal = ?, reason = ?,"
                " usage = ? WHERE id = ?",
                (
                    to_ns(job.start),
                    job.state,
                    to_ns(job.end) if job.end else None,
                    status.code if status else None,
                    status.signal if status else None,
                    job.reason,
                    json.dumps(asdict(job.usage)) if job.usage else None,
                    job.id,
                ),
            )

    async def get(self, job_id: int) -> Job | None:
        """One job, or None."""
        return await self._run(self._get, job_id)

    def _get(self, job_id: int) -> Job | None:
        row = self._db.execute(f"SELECT {_COLUMNS} FROM jobs WHERE id = ?", (job_id,)).fetchone()
        return _job(row) if row else None

    async def page(self, client_name: str | None, after: int, count: int) -> list[Job]:
        """The next jobs behind id *after*, of one client or of all: *count*, or fewer when they are long."""
        return await self._run(self._page, client_name, after, count)

    def _page(self, client_name: str | None, after: int, count: int) -> list[Job]:
        whose, arguments = ("client_name = ? AND", (client_name,)) if client_name is not None else ("", ())
        query = f"SELECT {_COLUMNS} FROM jobs WHERE {whose} id > ? ORDER BY id LIMIT ?"
        jobs: list[Job] = []
        characters = 0
        with closing(self._db.execute(query, (*arguments, after, count))) as rows:
            for row in rows:
                jobs.append(_job(row))
                characters += len(jobs[-1].command)
                if characters >= PAGE_CHARACTERS:
                    break
        return jobs

    async def alive(self) -> list[Job]:
        """The jobs whose end has not been written down."""
        return await self._run(self._alive)

    def _alive(self) -> list[Job]:
        return [
            _job(row)
            for row in self._db.execute(f"SELECT {_COLUMNS} FROM jobs WHERE state IS NULL ORDER BY id")
        ]

    async def _run(self, function: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, lambda: self._guarded(function, *args, **kwargs)
        )

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


def page_is_full(jobs: list[Job], count: int) -> bool:
    """Whether a page ended because it was long enough, so that more may come."""
    return len(jobs) == count or sum(len(job.command) for job in jobs) >= PAGE_CHARACTERS


def to_ns(time: datetime) -> int:
    """Nanoseconds since 1970, exact to the microsecond that a datetime holds."""
    return int(time.timestamp()) * 1_000_000_000 + time.microsecond * 1000


def from_ns(ns: int) -> datetime:
    """The time in UTC, cut to microseconds."""
    seconds, rest = divmod(ns, 1_000_000_000)
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest // 1000)


def _job(row: _Row) -> Job:
    job_id, client_name, command, limits, start_ns, state, end_ns, exit_code, signal, reason, usage = row
    ended = exit_code is not None or signal is not None
    return Job(
        id=job_id,
        client_name=client_name,
        command=command,
        state=JobState(state) if state else JobState.STARTING,
        limits=Limits(**json.loads(limits)),
        start=from_ns(start_ns),
        end=from_ns(end_ns) if end_ns is not None else None,
        exit_status=ExitStatus(exit_code, signal) if ended else None,
        reason=EndReason(reason) if reason else None,
        usage=Usage(**json.loads(usage)) if usage else None,
    )
