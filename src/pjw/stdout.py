"""Failures of stdout, for programs that print: each in words, and once."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from pjw.errors import ConfigError, describe_errno

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
