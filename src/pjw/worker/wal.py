"""Makes commits durable: one fdatasync(2) of SQLite's log for all who wait at that moment."""

import asyncio
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Final

from pjw.errors import KernelError
from pjw.worker.one_thread import OneThread

# SQLite begins the log anew at 1000 pages (wal_autocheckpoint); a transaction of ours is some more.
_RESERVED_BYTES: Final = 1000 * 4096 + 512 * 1024


class WalSync:
    """The write-ahead log of the job table, held open: its path may be out of reach after a drop.

    SQLite itself syncs it only before a checkpoint (synchronous = NORMAL). A commit is written
    to the log at once, so it survives the death of every process; it survives a power cut once
    a `sync` that began after it has ended.
    """

    def __init__(self, database_path: str) -> None:
        """Open the log, which is there as long as SQLite has the table open. Raises KernelError."""
        self._path: Final = f"{database_path}-wal"
        try:
            self._fd: Final = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
            self._reserved = False
            self.reserve()
            # the names of both files: SQLite has no reason to do it before it wants to depend on them
            directory = os.open(os.path.dirname(database_path) or ".", os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            raise KernelError("open the log of the job table", self._path, error.errno or 0) from error
        self._thread: Final = OneThread("pjw-sync")
        self._is_running = False
        # who waits for the next one
        self._next: list[asyncio.Future[None]] = []

    def reserve(self) -> None:
        """Have space that is ours when the disk is full, unless it is full now.

        Ends can be written down then, and jobs removed, which makes room.
        """
        if not self._reserved:
            # Zeros behind the last frame are no frame to SQLite.
            with suppress(OSError):
                os.posix_fallocate(self._fd, 0, _RESERVED_BYTES)
                self._reserved = True

    def close(self) -> None:
        """Close the log; what was not synced is left to the kernel."""
        self._thread.close()
        os.close(self._fd)

    def sync(self) -> asyncio.Future[None]:
        """Done when all that was committed before this call is on the disk. Fails with KernelError."""
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # One that runs began too early for us; the next one serves all who come while it runs.
        self._next.append(waiting)
        if not self._is_running:
            self._begin()
        return waiting

    def _begin(self) -> None:
        served, self._next = self._next, []
        self._is_running = True
        self._thread.call(partial(os.fdatasync, self._fd), partial(self._over, served))

    def _over(self, served: Sequence[asyncio.Future[None]], _: object, error: BaseException | None) -> None:
        self._is_running = False
        if self._next:
            self._begin()
        for waiting in served:
            if waiting.done():
                continue
            if error is None:
                waiting.set_result(None)
            else:
                number = error.errno or 0 if isinstance(error, OSError) else 0
                waiting.set_exception(KernelError("sync the job table", self._path, number))
                # whoever began it may have gone
                waiting.exception()
