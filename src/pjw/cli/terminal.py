"""Stdout and stderr at a terminal: width, colours, and a line of progress while one waits."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Final, Self

DEFAULT_COLUMNS: Final = 80


def columns() -> int:
    """Return the width of COLUMNS, else of the terminal on stdout, else 80."""
    given = os.environ.get("COLUMNS", "")
    if given.isascii() and given.isdecimal() and int(given) > 0:
        return int(given)
    try:
        return os.get_terminal_size(sys.__stdout__.fileno()).columns or DEFAULT_COLUMNS  # type: ignore[union-attr]
    except (AttributeError, ValueError, OSError):
        # closed, replaced, or no terminal
        return DEFAULT_COLUMNS


class _Cursor:
    """Whether the last output on the terminal left its line unfinished."""

    within_line = False


def _wrote(data: bytes, descriptor: int) -> None:
    """Note output of a job, so that the next message of pjw begins a line of its own."""
    if os.isatty(descriptor):
        _Cursor.within_line = not data.endswith(b"\n")


def write_all(pieces: Iterator[bytes], descriptor: int) -> None:
    """Write straight to the descriptor: no decoding, and each piece is out before we wait for the next."""
    for data in pieces:
        _wrote(data, descriptor)
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(descriptor, view) :]
            except BlockingIOError:
                # another process that shares this pipe or terminal has set it so for all
                from select import select

                select((), (descriptor,), ())


def begin_line() -> None:
    """Begin a new line on stderr, if stderr is a terminal and output left a line unfinished there."""
    if _Cursor.within_line and sys.stderr.isatty():
        sys.stderr.write("\n")
    _Cursor.within_line = False


def has_colours() -> bool:
    """Return whether stdout is a terminal that shows colours to a user who wants them (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"


# A line on the terminal while one waits; nothing anywhere else.

# Work that is over sooner needs no line.
QUIET_SECONDS: Final = 0.7
TURN_SECONDS: Final = 0.5
_CLEAR: Final = "\r\x1b[K"


class Progress:
    """Shows *words*, which are given the seconds since the beginning, until it is left."""

    def __init__(self, words: Callable[[float], str]) -> None:
        self._words: Final = words
        self._over: Final = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if sys.stderr is not None and sys.stderr.isatty():
            # a daemon: a user who leaves by Ctrl-C does not wait for it
            self._thread = threading.Thread(target=self._show, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _show(self) -> None:
        began = time.monotonic()
        if self._over.wait(QUIET_SECONDS):
            return
        while True:
            sys.stderr.write(f"{_CLEAR}{self._words(time.monotonic() - began)}")
            sys.stderr.flush()
            if self._over.wait(TURN_SECONDS):
                break
        sys.stderr.write(_CLEAR)
        sys.stderr.flush()
