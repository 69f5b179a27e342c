"""gRPC's own lines on stderr become records of our log, at a rate that people can read.

gRPC's core always writes to descriptor 2. So descriptor 2 becomes a pipe, which a thread reads; our own lines
go to a copy of the old descriptor 2 (logs.py). A writer never waits for the pipe: when it is full,
the line is lost.
"""

import logging
import os
import re
import threading
import time
from typing import Final

# absl's: E1129 03:12:00.123456   12345 tcp_server.cc:123] words
_LINE: Final = re.compile(r"([IWEF])\d{4} \S+\s+\d+ (\S+:\d+)\] (.*)")
_LEVELS: Final = {"I": logging.INFO, "W": logging.WARNING, "E": logging.ERROR, "F": logging.CRITICAL}
LINES_MAX: Final = 20
LINES_SECONDS: Final = 10.0
_READ_BYTES: Final = 65_536

log: Final = logging.getLogger("pjw.grpc")


def take_stderr() -> int:
    """Make descriptor 2 a pipe, and return its reading end for `relay`. Call it before gRPC is imported.

    `set_up_logging` has kept the old one.
    """
    ours, theirs = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(theirs, False)
    os.dup2(theirs, 2, inheritable=False)
    os.close(theirs)
    return ours


def relay(descriptor: int) -> threading.Thread:
    """Log the text from the pipe from now on, without privilege; return the thread that does."""
    thread = threading.Thread(target=_run, args=(descriptor,), name="pjw-grpc-log", daemon=True)
    thread.start()
    return thread


def _run(descriptor: int) -> None:
    budget = Budget()
    rest = b""
    while data := os.read(descriptor, _READ_BYTES):
        *lines, rest = (rest + data).split(b"\n")
        rest = rest[-_READ_BYTES:]
        for line in lines:
            tell(line.decode(errors="backslashreplace"), budget)


def tell(line: str, budget: "Budget") -> None:
    """Log one line, unless there were too many."""
    found = _LINE.match(line)
    level, text = (_LEVELS[found[1]], f"{found[3]} ({found[2]})") if found else (logging.WARNING, line)
    if not line or not log.isEnabledFor(level):
        return
    allowed, left_out = budget.take()
    if left_out:
        log.warning("grpc: %d lines were left out", left_out)
    if allowed:
        log.log(level, "grpc: %s", text)


class Budget:
    """A number of lines in a number of seconds."""

    def __init__(self) -> None:
        self._until = 0.0
        self._left = self._left_out = 0

    def take(self) -> tuple[bool, int]:
        """Return whether to tell a line, and the number left out since that was last mentioned."""
        now, left_out = time.monotonic(), 0
        if now >= self._until:
            self._until, self._left = now + LINES_SECONDS, LINES_MAX
            left_out, self._left_out = self._left_out, 0
        if self._left == 0:
            self._left_out += 1
            return False, 0
        self._left -= 1
        return True, left_out
