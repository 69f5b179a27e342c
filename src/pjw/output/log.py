"""OutputLog: one job's output file, read by any number of followers."""

import asyncio
import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

from pjw.errors import KernelError, OutputLostError
from pjw.output.inotify import Inotify

# Makes the bytes that a reader wants in front of each chunk, from the chunk's length: no copy is needed.
FramePrefix = Callable[[int], bytes]
HEAD_BYTES_MAX: Final = 16
READ_BYTES_MAX: Final = 256 * 1024
# A line goes to all followers at once, and reading it takes as long as all other work for one of them. A
# larger piece is not worth its memory.
SHARED_BYTES_MAX: Final = 4096


class _Buffer(threading.local):
    """The buffer for the reads of a thread: nothing stays in it while another of its readers may run.

    A buffer for each read would cost as much as to read a line. One for all threads would not do: the kernel
    fills it without the interpreter's lock.
    """

    def __init__(self) -> None:
        self.view: Final = memoryview(bytearray(HEAD_BYTES_MAX + READ_BYTES_MAX))


_BUFFER: Final = _Buffer()


class Piece(NamedTuple):
    """A chunk that a follower has read: *length* bytes at *offset*, behind a head; *size* of the file."""

    offset: int
    head: FramePrefix
    length: int
    chunk: bytes
    size: int


class OutputLog:
    """The file that a job's init appends to: its bytes, its end, and news of changes.

    Memory holds only the last line, and only while there are followers: the page cache is the buffer, shared
    by all followers.
    """

    def __init__(self, path: str, inotify: Inotify, *, ended: bool, times_path: str | None = None) -> None:
        self._path: Final = path
        self._times_path: Final = times_path
        self._inotify: Final = inotify
        self._followers: Final[set[asyncio.Event]] = set()
        self._watch = -1
        self._shared: Piece | None = None
        self._ended = ended
        self._abandoned = False

    @property
    def ended(self) -> bool:
        """Whether the file is whole: nothing will be appended any more."""
        return self._ended

    def mark_ended(self) -> None:
        """Say that the file is whole, and wake all followers."""
        self._ended = True
        self._wake()

    @property
    def abandoned(self) -> bool:
        """Whether news of changes and of the end will never come any more."""
        return self._abandoned

    def abandon(self) -> None:
        """Say that the worker closes while the job goes on, and wake all followers."""
        self._abandoned = True
        self._wake()

    def _wake(self) -> None:
        # The output may have grown since, and a follower that waits after a look at this line would wait for
        # ever.
        self._shared = None
        for changed in self._followers:
            changed.set()

    @contextmanager
    def changes(self) -> Iterator[asyncio.Event]:
        """Give an event that is set after each change from now on. The first follower starts the watch."""
        changed = asyncio.Event()
        if not self._followers and not self._ended:
            self._watch = self._inotify.watch(self._path, self._wake)
        self._followers.add(changed)
        try:
            yield changed
        finally:
            self._followers.remove(changed)
            if not self._followers:
                self._shared = None
                if self._watch >= 0:
                    self._inotify.unwatch(self._watch)
                    self._watch = -1

    def shared(self, offset: int, count_max: int, head: FramePrefix) -> Piece | None:
        """Return the piece another follower read there since the last change: at most *count_max* bytes."""
        piece = self._shared
        if piece is None or piece.offset != offset or piece.length > count_max or piece.head is not head:
            return None
        return piece

    def share(self, piece: Piece) -> None:
        """Keep a piece that a follower has read for the others, which want it next, if it is a line."""
        if 0 < piece.length <= SHARED_BYTES_MAX and len(self._followers) > 1:
            self._shared = piece

    @contextmanager
    def open(self) -> Iterator[int]:
        """Give a descriptor to read from; a job that ended without output need not have a file.

        Raises KernelError.
        """
        try:
            descriptor = self._open()
        except OSError as error:
            raise KernelError("open", describe_job_file(self._path), error.errno or 0) from error
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    @contextmanager
    def open_times(self) -> Iterator[int | None]:
        """Give a descriptor of the records of the times of writing, or None. Raises KernelError."""
        try:
            descriptor = os.open(self._times_path, os.O_RDONLY | os.O_CLOEXEC) if self._times_path else None
        except FileNotFoundError:
            descriptor = None
        except OSError as error:
            raise KernelError("open the times of", describe_job_file(self._path), error.errno or 0) from error
        try:
            yield descriptor
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def _open(self) -> int:
        try:
            return os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            if not self._ended:
                raise
            return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)


def describe_job_file(path: str) -> str:
    """Describe a file of a job in words: its path begins with a descriptor of this process only."""
    directory, name = os.path.split(path)
    return f"the {name} of job {os.path.basename(directory)}"


def check_whole(descriptor: int, offset: int) -> None:
    """Raise OutputLostError if another process cut an open output short while its job ran.

    *offset* is how far the reader has come. The job's init appends to the file, and notes in its mode that
    bytes are gone: see `note_cut` in init/output.c.
    """
    status = os.fstat(descriptor)
    if status.st_mode & stat.S_IXUSR or (stat.S_ISREG(status.st_mode) and status.st_size < offset):
        raise OutputLostError(
            "a part of the output is lost: its file on the server was cut short;"
            f" {status.st_size} bytes are left"
        )


def is_cut_short(path: str) -> bool:
    """Return whether another process has cut an output short; see `check_whole`."""
    try:
        return bool(os.stat(path).st_mode & stat.S_IXUSR)
    except OSError:
        return False


def no_head(count: int) -> bytes:
    """Return nothing to go in front of a chunk."""
    return b""


async def read_at(descriptor: int, offset: int, count: int, head: FramePrefix = no_head) -> tuple[int, bytes]:
    """Read up to *length* bytes at *offset*: how many there are (0 at the end), and they behind a head.

    Bytes in the page cache are read at once, others in a thread: a slow disk must not hold
    the event loop up (preadv2(2), RWF_NOWAIT). They are copied once after that.
    """
    # The number of bytes is known only when they are there, so the room for their head is made first.
    buffer = _BUFFER.view
    end = HEAD_BYTES_MAX + min(count, READ_BYTES_MAX)
    try:
        got = os.preadv(descriptor, [buffer[HEAD_BYTES_MAX:end]], offset, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
            raise
        data = await asyncio.to_thread(os.pread, descriptor, count, offset)
        return len(data), head(len(data)) + data
    before = head(got)
    start = HEAD_BYTES_MAX - len(before)
    buffer[start:HEAD_BYTES_MAX] = before
    return got, bytes(buffer[start : HEAD_BYTES_MAX + got])
