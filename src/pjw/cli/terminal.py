"""The properties of stdout. Its width: `shutil` knows too, and takes 3 ms to import, for its archives."""

import os
import sys
from typing import Final

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


def wrote(data: bytes, descriptor: int) -> None:
    """Note output of a job, so that the next message of pjw begins a line of its own."""
    if os.isatty(descriptor):
        _Cursor.within_line = not data.endswith(b"\n")


def begin_line() -> None:
    """Begin a new line on stderr, if stderr is a terminal and output left a line unfinished there."""
    if _Cursor.within_line and sys.stderr.isatty():
        sys.stderr.write("\n")
    _Cursor.within_line = False


def has_colours() -> bool:
    """Return whether stdout is a terminal that shows colours to a user who wants them (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"
