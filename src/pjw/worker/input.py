"""The input of a job: appended to a file, which its init feeds to the command.

A file, so that no crash and no lost connection changes a byte of it. Its size is the length of the input so
far; a mode that forbids writing marks its end, which init sees too. Nothing of it is held in memory.
"""

import asyncio
import fcntl
import os
import stat
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Final

from pjw.errors import (
    InvalidJobError,
    JobStateError,
    LauncherGoneError,
    LimitReachedError,
    OffsetError,
    PjwError,
)
from pjw.model import Job
from pjw.worker.quota import StoredBytes
from pjw.worker.settings import WorkerSettings
from pjw.worker.state_dir import WHOLE_MODE, disk_error
from pjw.worker.tasks import log_bug, log_failure


class Inputs:
    """The inputs of all jobs of a worker, each with at most one writer at a time."""

    def __init__(self, stored: StoredBytes, bytes_max: int) -> None:
        """Take no more than *bytes_max* for a job; 0 is "no limit"."""
        self._stored: Final = stored
        self._bytes_max = bytes_max
        # by the name of the job, session or upload that reads it
        self._turns: Final[dict[str, _Turn]] = {}

    def reconfigure(self, settings: WorkerSettings) -> None:
        """Apply the quota of other settings from now on; a writer that has begun goes on as before."""
        self._bytes_max = settings.quotas.input_bytes_max

    @asynccontextmanager
    async def writer_of(
        self, subject: str, path: str, client_name: str, ended: Callable[[], Awaitable[None]]
    ) -> AsyncGenerator["InputWriter", None]:
        """Write to an input until its reader has ended; the writer before gets a JobStateError.

        The newest wins because it may be the same client, whose old connection has ended unnoticed.
        """
        turn = self._turns.setdefault(subject, _Turn())
        turn.writers += 1
        if turn.latest is not None:
            turn.latest.end(JobStateError(f"another WriteInput call for {subject} took over"))
        timeout = asyncio.timeout(None)
        writer = turn.latest = InputWriter(
            subject, timeout, self._bytes_max, partial(self._stored.taken, client_name)
        )
        ending = asyncio.ensure_future(_end_with(ended, writer, subject))
        ending.add_done_callback(log_failure)
        try:
            async with timeout, turn.lock:
                try:
                    writer.open(path)
                    yield writer
                finally:
                    await writer.close()
        except TimeoutError:
            if writer.ended_by is None:
                raise
            raise writer.ended_by from None
        finally:
            ending.cancel()
            if turn.latest is writer:
                turn.latest = None
            turn.writers -= 1
            # not with the latest one: the one before it may still be about to let go
            if not turn.writers:
                del self._turns[subject]


class _Turn:
    """The turn to write to one input: `latest` has it, as soon as the one before has released `lock`."""

    def __init__(self) -> None:
        self.lock: Final = asyncio.Lock()
        self.latest: InputWriter | None = None
        # the number of writers that have come and not gone
        self.writers = 0


class InputWriter:
    """Appends to one input. `offset` is how many bytes there are, `ended` whether that is all."""

    def __init__(
        self,
        subject: str,
        timeout: asyncio.Timeout,
        bytes_max: int,
        taken: Callable[[int], AbstractAsyncContextManager[None]],
    ) -> None:
        self.offset = 0
        self.ended = False
        self.ended_by: PjwError | None = None
        self._subject: Final = subject
        self._timeout: Final = timeout
        self._bytes_max: Final = bytes_max
        self._taken: Final = taken
        self._descriptor = -1
        self._writing: asyncio.Future[None] | None = None

    def open(self, path: str) -> None:
        """Find the bytes that are there already. Raises JobStateError when the job has ended."""
        try:
            self.ended = stat.S_IMODE(os.stat(path).st_mode) == WHOLE_MODE
            flags = os.O_RDONLY if self.ended else os.O_WRONLY | os.O_APPEND
            self._descriptor = os.open(path, flags | os.O_CLOEXEC)
        except FileNotFoundError:
            raise ended_error(self._subject) from None
        except OSError as error:
            raise self._failed(error) from error
        self.offset = os.fstat(self._descriptor).st_size

    async def close(self) -> None:
        """Close the file, when the write under way is done."""
        cancelled: asyncio.CancelledError | None = None
        while self._writing is not None and not self._writing.done():
            try:
                await asyncio.wait({self._writing})
            except asyncio.CancelledError as error:
                # once more: but the number of the descriptor may not become another file's under a thread
                cancelled = error
        if self._writing is not None:
            log_bug(self._writing)  # a cancelled caller is not told; the file shows how far it came
        if self._descriptor >= 0:
            os.close(self._descriptor)
        if cancelled is not None:
            raise cancelled

    def end(self, error: PjwError) -> None:
        """Have the writer get *error*, wherever it waits."""
        if not self._timeout.expired():
            self.ended_by = self.ended_by or error
            # before it was entered it cannot be set: the lock, which it waits for, comes after
            self._timeout.reschedule(asyncio.get_running_loop().time())

    async def write(self, offset: int, data: bytes, *, end: bool = False) -> None:
        """Write *data* at its place, and with *end* nothing ever after it.

        Bytes that are there already are skipped. Written bytes count, also when this fails or is cancelled.
        Raises OffsetError for a gap; InvalidJobError for an end before the last byte; JobStateError when the
        input has ended, or the command does not read it any more; LimitReachedError when it would be too
        long, its client has stored as much as it may, or the disk is full.
        """
        behind = offset + len(data)
        if offset < 0:
            raise InvalidJobError(f"the input of {self._subject} has no byte {offset}")
        if end and behind < self.offset:
            raise InvalidJobError(
                f"the input of {self._subject} cannot end at byte {behind}: {self.offset} are there"
            )
        if offset > self.offset:
            raise OffsetError(
                f"cannot write input of {self._subject} from byte {offset}: it has {self.offset} bytes",
                size=self.offset,
            )
        if self.ended:
            if behind > self.offset:
                raise JobStateError(f"the input of {self._subject} has ended at byte {self.offset}")
            return
        if self._bytes_max and behind > self._bytes_max:
            raise LimitReachedError(
                f"the input of {self._subject} is longer than {self._bytes_max} bytes,"
                " and no more is taken on this server",
                hint="the operator sets clients.input_bytes_max",
                limit="input_bytes_max",
                most=self._bytes_max,
            )
        # It goes on when we are cancelled, and `close` waits for it.
        rest = memoryview(data)[self.offset - offset :]
        self._writing = asyncio.ensure_future(self._take_and_append(rest, end=end))
        await asyncio.shield(self._writing)

    async def _take_and_append(self, data: memoryview, *, end: bool) -> None:
        async with self._taken(len(data)):
            # in a thread: a disk may take its time
            await asyncio.to_thread(self._append, data, end=end)

    def _append(self, data: memoryview, *, end: bool) -> None:
        try:
            if self._reader_has_gone():
                raise JobStateError(f"the command of {self._subject} does not read its input any more")
            while data:
                written = os.write(self._descriptor, data)
                self.offset += written
                data = data[written:]
            # Data before the end, which init looks for before it reads.
            if end:
                os.fchmod(self._descriptor, WHOLE_MODE)
                self.ended = True
        except OSError as error:
            raise self._failed(error) from error

    def _reader_has_gone(self) -> bool:
        # The reader's descriptor was locked before it was handed on, and init closes it when the command
        # reads no more.
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _failed(self, error: OSError) -> PjwError:
        return disk_error("write the input of", self._subject, error)


async def _end_with(ended: Callable[[], Awaitable[None]], writer: InputWriter, subject: str) -> None:
    try:
        await ended()
    except LauncherGoneError as error:
        writer.end(error)
    else:
        # a writer that has just brought all of it is to hear that, not that it is no longer wanted
        if not writer.ended:
            writer.end(ended_error(subject))


def require_input(job: Job) -> None:
    """Check that a job takes input. Raises JobStateError."""
    if not job.input:
        raise JobStateError(
            f"job {job.id} takes no input", hint="it has to be started with input, as by pjw start --stdin"
        )


def ended_error(subject: str) -> JobStateError:
    """Return the error for input that comes too late."""
    return JobStateError(f"{subject} has ended, and reads no input any more")
