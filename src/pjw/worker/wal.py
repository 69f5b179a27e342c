"""Makes commits durable: one fdatasync(2) of SQLite's log for all who wait at that moment."""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Final

from pjw.errors import KernelError

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
        self._thread: Final = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pjw-sync")
        self._running: asyncio.Task[None] | None = None
        self._next: asyncio.Task[None] | None = None

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
        self._thread.shutdown()
        os.close(self._fd)

    async def sync(self) -> None:
        """Return when all that was committed before this call is on the disk. Raises KernelError."""
        # One that runs began too early for us; the next one serves all who come while it runs.
        if self._next is None:
            self._next = asyncio.ensure_future(self._after(self._running))
        await asyncio.shield(self._next)

    async def _after(self, running: asyncio.Task[None] | None) -> None:
        if running is not None:
            await asyncio.wait({running})
        self._running, self._next = self._next, None
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, os.fdatasync, self._fd)
        except OSError as error:
            raise KernelError("sync the job table", self._path, error.errno or 0) from error
