"""A file of SQLite that one thread uses: opened alone, called in turn, synced apart from that.

The thread keeps a slow disk from holding up the event loop. `JobStore` has the jobs in it.
"""

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

from pjw.errors import ConfigError, JobTableError, LimitReachedError
from pjw.worker.one_thread import OneThread
from pjw.worker.schema import migrate
from pjw.worker.wal import WalSync

# A pjwd that is ending releases the table in less time.
BUSY_SECONDS: Final = 5.0
# A copy of the table holds it for this many pages at a time, about a millisecond. In between others use it.
_COPY_PAGES: Final = 256
# seconds that a copy waits between these, and for the end of a transaction
_COPY_WAIT_SECONDS: Final = 0.005

_P = ParamSpec("_P")
_R = TypeVar("_R")
_T = TypeVar("_T", bound="Table")

log: Final = logging.getLogger(__name__)


def in_its_thread(
    method: Callable[Concatenate[_T, _P], _R],
) -> Callable[Concatenate[_T, _P], Coroutine[Any, Any, _R]]:
    """Have the body of a method, which reads or changes the table, run in the table's thread; await it."""

    @wraps(method)
    async def awaited(self: _T, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        return await self._run(method, self, *args, **kwargs)

    return awaited


class Table:
    """The connection, and the one thread that uses it.

    Every method may raise LimitReachedError (the disk is full) or KernelError (it fails).
    """

    def __init__(self, path: str) -> None:
        """Open or create the table. Raises ConfigError when it is in use, or a newer pjw wrote it."""
        self._path: Final = path
        self._thread: Final = OneThread("pjw-store")
        # called in the table's thread when something has changed; None: there are no watchers
        self.changed: Callable[[], object] | None = None
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
        # synced by us (wal.py), during other work; FULL would have each wait in turn.
        db.execute("PRAGMA synchronous = NORMAL")
        migrate(db, self._path)

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

    async def transact(
        self, function: Callable[Concatenate[sqlite3.Connection, _P], _R], *args: _P.args, **kwargs: _P.kwargs
    ) -> _R:
        """Call a function with the table, in its thread; its changes are one transaction."""
        return await self._run(self._in_transaction, partial(function, self._db, *args, **kwargs))

    def _in_transaction(self, function: Callable[[], _R]) -> _R:
        with self._transaction():
            return function()

    async def in_turn(self, function: Callable[[], _R]) -> _R:
        """Call a function that touches files in the table's thread, as `add` does."""
        return await self._run(function)

    def close(self) -> None:
        """End the thread, and close the files."""
        self._thread.close()
        self._wal.close()
        self._db.close()

    def _after_change(self) -> None:
        """Do more in the table's thread after a call that has changed something."""

    async def _run(self, function: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
        return await self._thread.run(lambda: self._call(function, *args, **kwargs))

    def _call(self, function: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
        before = self._db.total_changes
        try:
            result = self._guarded(function, *args, **kwargs)
            if self._db.total_changes != before:
                self._guarded(self._after_change)
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
