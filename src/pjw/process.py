"""Needs of every process of pjw: inherited settings, closing of descriptors, failures of stdout."""

import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final, Self, overload

from pjw.errors import ConfigError, describe_errno

# Each of these limits of `resource` would end or hinder a service in the middle of its work.
_LIFTED: Final = ("RLIMIT_AS", "RLIMIT_CPU", "RLIMIT_DATA", "RLIMIT_FSIZE", "RLIMIT_NPROC", "RLIMIT_RTTIME")


def open_standard_descriptors() -> None:
    """Open those of descriptors 0 to 2 that are closed, so that no other file gets their numbers."""
    for _ in range(3):
        # open(2) gives the lowest free number
        if (descriptor := os.open(os.devnull, os.O_RDWR)) > 2:
            os.close(descriptor)
            break
    if sys.stderr is None:
        # otherwise print(file=sys.stderr) would write to stdout
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  for as long as the process lives


def close_all(descriptors: list[int]) -> None:
    """Close descriptors, and empty the list.

    Some file systems report in close(2) a write that failed before. That concerns the process which wrote.
    """
    while descriptors:
        with suppress(OSError):
            os.close(descriptors.pop())


class OwnedFds(Sequence[int]):
    """Descriptors with one owner, which closes them unless it has handed them over.

    A `with` statement closes the ones that are left at its end.
    """

    def __init__(self, descriptors: Iterable[int] = ()) -> None:
        """Become the owner of *descriptors*."""
        self._held: Final = list(descriptors)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        return self._held[index]

    def __len__(self) -> int:
        return len(self._held)

    def take(self, index: int = -1) -> int:
        """Hand one descriptor over to the caller."""
        return self._held.pop(index)

    def take_all(self) -> "OwnedFds":
        """Hand all descriptors over to a new owner."""
        taken = OwnedFds(self._held)
        self._held.clear()
        return taken

    def close(self) -> None:
        """Close the descriptors that were not handed over."""
        close_all(self._held)


def unblock_signals() -> None:
    """Unblock every signal: a blocked one, such as Ctrl-C, would wait for ever."""
    # Windows blocks none
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_SETMASK, ())


def set_for_service() -> None:
    """Set the inherited settings of server and launcher: signals, limits, umask, directory. Needs root."""
    unblock_signals()
    # if it were ignored, the kernel would collect our children before we know how they ended (wait(2))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # otherwise a log line stops pjwd in the background of a terminal with `stty tostop`
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    for limit in _LIFTED:
        _lift(limit)
    os.umask(0o077)
    # the root directory always exists, and keeps no other file system busy
    os.chdir("/")


def _lift(name: str) -> None:
    # not at the top: the client imports this module on systems that lack `resource`, too
    import resource

    limit = getattr(resource, name)
    hard = resource.getrlimit(limit)[1]
    for value in (resource.RLIM_INFINITY, hard):
        try:
            resource.setrlimit(limit, (value, value))
        except (PermissionError, ValueError):
            # raising a hard limit takes CAP_SYS_RESOURCE, which a container may lack
            continue
        return


# Failures of stdout, for programs that print: each in words, and once.

# 128 + SIGPIPE, as of a program that the signal ended: the reader has gone, and wants no more.
EXIT_CLOSED_PIPE: Final = 141


class ReaderGoneError(Exception):
    """The reader of stdout has closed it."""


def require_stdout() -> None:
    """Raise ConfigError when stdout is closed, before we do anything whose answer would be lost."""
    if sys.stdout is None:
        raise ConfigError("cannot write to stdout: it is closed")


@contextmanager
def checked_stdout() -> Iterator[None]:
    """Write all printed text, also when argparse ends the program.

    Raises ConfigError when stdout cannot be written, and ReaderGoneError when its reader has closed it; in
    either case nothing is written any more. All other system calls that fail must be worded where they are
    made.
    """
    try:
        try:
            yield
        except SystemExit:
            _flush()
            raise
        _flush()
    except BrokenPipeError as error:
        _abandon()
        raise ReaderGoneError from error
    except OSError as error:
        _abandon()
        worded = ConfigError(f"cannot write to stdout: {describe_errno(error.errno or 0)}")
        for note in getattr(error, "__notes__", ()):
            worded.add_note(note)
        raise worded from error


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _abandon() -> None:
    # The interpreter would complain about the same descriptor when it flushes at its end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
