"""The file of `--stdin`, sent to the job that reads it."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING

from pjw.cli.terminal import Progress
from pjw.cli.units import size_in_words
from pjw.client.input import PIECE_BYTES
from pjw.errors import ConfigError, JobStateError, describe_errno

if TYPE_CHECKING:
    from pjw.client.sync import Client


@contextmanager
def opened(path: str | None) -> Iterator[int | None]:
    """Give the descriptor of a file, `-` for our own stdin; None for none. Raises ConfigError."""
    if path is None:
        yield None
        return
    if path == "-":
        if sys.stdin is None:
            raise ConfigError("cannot read --stdin -: it is closed")
        yield sys.stdin.fileno()
        return
    try:
        # O_BINARY, which only Windows has: the bytes as they are
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise ConfigError(f"cannot read --stdin {path}: {describe_errno(error.errno or 0)}") from error
    try:
        # open(2) accepts a directory, and read(2) would refuse it only once the job runs
        if os.path.isdir(descriptor):
            raise ConfigError(f"cannot read --stdin {path}: {describe_errno(errno.EISDIR)}")
        yield descriptor
    finally:
        os.close(descriptor)


def is_left() -> bool:
    """Return whether the user at a terminal has piped data into pjw that pjw did not read."""
    if sys.stdin is None or sys.stderr is None or not sys.stderr.isatty():
        return False
    # only for this question
    import stat

    try:
        import fcntl
        import termios
    except ImportError:
        # Windows cannot tell
        return False
    with suppress(OSError):
        descriptor = sys.stdin.fileno()
        if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            # the number of bytes that wait in the pipe (ioctl_tty(2))
            return any(fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)))
    return False


def send(client: "Client", job_id: int, descriptor: int, *, quietly: bool = False) -> None:
    """Send all bytes of a descriptor; stop without an error when the job reads no more."""
    sent = 0

    def seen(count: int) -> None:
        nonlocal sent
        sent = count

    def words(seconds: float) -> str:
        rate = size_in_words(int(sent / seconds)) if seconds else "0B"
        return f"input of job {job_id}: {size_in_words(sent)} sent, {rate}/s"

    # a line of progress would disturb a user who types the input or looks at the output
    shown = not quietly and not os.isatty(descriptor)
    with Progress(words) if shown else nullcontext(), suppress(JobStateError):
        client.write_input(job_id, pieces(descriptor), seen)


def pieces(descriptor: int) -> Iterator[bytes]:
    """Yield the bytes of a descriptor as they come. Raises ConfigError."""
    while True:
        try:
            data = os.read(descriptor, PIECE_BYTES)
        except OSError as error:
            raise ConfigError(f"cannot read --stdin: {describe_errno(error.errno or 0)}") from error
        if not data:
            return
        yield data
