"""Makes commits durable: one fdatasync(2) of SQLite's log for all callers that wait at that moment."""

import asyncio
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Final

from pjw.errors import KernelError

# SQLite begins the log anew at 1000 pages (wal_autocheckpoint); a transaction of ours is some more.
_RESERVED_BYTES: Final = 1000 * 4096 + 512 * 1024
# so many zeros are written at a time
_ZEROS_BYTES: Final = 256 * 1024


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
            frames = os.fstat(self._fd).st_size
            self.reserve()
            if self._reserved:
                self._write_zeros(frames)
            # the names of both files: SQLite has no reason to do it before it wants to depend on them
            directory = os.open(os.path.dirname(database_path) or ".", os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            raise KernelError("open the log of the job table", self._path, error.errno or 0) from error
        # the callers that wait for the next sync; None ends the thread
        self._asked: Final[SimpleQueue[asyncio.Future[None] | None]] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def reserve(self) -> None:
        """Have space that is ours when the disk is full, unless it is full now.

        Ends can be written down then, and jobs removed, which makes room.
        """
        if not self._reserved:
            # Zeros behind the last frame are no frame to SQLite.
            with suppress(OSError):
                os.posix_fallocate(self._fd, 0, _RESERVED_BYTES)
                self._reserved = True

    def _write_zeros(self, start: int) -> None:
        # Space that is only reserved is marked as never written, and the first sync of each part of it takes
        # that mark away. On ext4 such a sync took 4.0 ms, and one of space that was written before 0.2 ms.
        # SQLite is in no transaction yet, so nothing else writes behind its last frame.
        for offset in range(start, _RESERVED_BYTES, _ZEROS_BYTES):
            os.pwrite(self._fd, bytes(min(_ZEROS_BYTES, _RESERVED_BYTES - offset)), offset)
        # has the kernel begin to write them, and waits for nothing
        os.posix_fadvise(self._fd, start, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the log; leave unsynced bytes to the kernel."""
        if self._thread is not None:
            self._asked.put(None)
            self._thread.join()
        os.close(self._fd)

    def sync(self) -> asyncio.Future[None]:
        """Sync; done when all commits before this call are on the disk. Fails with KernelError."""
        waiting = self.prepare()
        self.begin(waiting)
        return waiting

    def prepare(self) -> asyncio.Future[None]:
        """Return the argument of `begin`; call it from the event loop that waits."""
        if self._thread is None:
            # a daemon: without a call of `close` it keeps no process from ending
            self._thread = threading.Thread(target=self._run, name="pjw-sync", daemon=True)
            self._thread.start()
        return asyncio.get_running_loop().create_future()

    def begin(self, waiting: asyncio.Future[None]) -> None:
        """Have it be done as that of a `sync` that is called now, from any thread."""
        self._asked.put(waiting)

    def _run(self) -> None:
        while (first := self._asked.get()) is not None:
            self._serve(first)
            # not held until the next caller asks
            del first

    def _serve(self, first: asyncio.Future[None]) -> None:
        # all requests until now: the rows that they want synced were committed before
        served = [first]
        with suppress(Empty):
            while (another := self._asked.get_nowait()) is not None:
                served.append(another)
            # the end, for the next turn
            self._asked.put(None)
        error = None
        try:
            os.fdatasync(self._fd)
        except OSError as raised:
            error = raised
        for loop in {waiting.get_loop() for waiting in served}:
            # RuntimeError: the loop has ended, and no caller waits
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(self._over, loop, served, error)

    def _over(
        self, loop: asyncio.AbstractEventLoop, served: Sequence[asyncio.Future[None]], error: OSError | None
    ) -> None:
        for waiting in served:
            if waiting.get_loop() is not loop or waiting.done():
                continue
            if error is None:
                waiting.set_result(None)
            else:
                waiting.set_exception(KernelError("sync the job table", self._path, error.errno or 0))
                # the caller that began it may have gone
                waiting.exception()
