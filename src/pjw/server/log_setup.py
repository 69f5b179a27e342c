"""pjwd's log on stderr: one line for each record, as text or as JSON. A call that logs never waits.

A line is ours from its first byte on: text from outside is escaped, so that no client can write a line that
looks like another record. Under systemd each line begins with its priority (sd-daemon(3)).
"""

import atexit
import io
import json
import logging
import os
import select
import sys
import threading
from datetime import UTC, datetime
from queue import SimpleQueue
from typing import Final

# A text file in the place of stderr, whose writes never wait.
#
# A write to a full pipe, to a terminal that Ctrl-S has stopped or to a disk that hangs may take for ever, and
# would hold up the event loop with every call. So a thread of its own writes. O_NONBLOCK does not help: it
# would hold for every process that has the same terminal or pipe open (open(2), "open file description").

# Records, with their tracebacks, that may wait to be written. Further ones are dropped and counted.
QUEUE_MAX: Final = 10_000
# Seconds that pjwd, when it ends, waits for the rest to be written.
END_SECONDS: Final = 2.0

log: Final = logging.getLogger(__name__)


class LogWriter(io.TextIOBase):
    """Writes text to a descriptor, in its order, from a thread that `start` starts.

    Before `start` it writes the text that it can write without waiting at once, such as the reason for a long
    start, and keeps the rest.
    """

    def __init__(self, descriptor: int) -> None:
        """Own *descriptor*, for as long as the process lives."""
        self._descriptor: Final = descriptor
        # only this queue allows a put that interrupts another one: from a signal handler, or a __del__
        self._pieces: Final[SimpleQueue[bytes]] = SimpleQueue()
        self._ending: Final = threading.Event()
        self._counting: Final = threading.RLock()
        self.lost_lines = 0
        # A daemon: a reader that never reads must not keep the process from ending.
        self._thread: Final = threading.Thread(target=self._run, name="pjw-log", daemon=True)

    def start(self) -> None:
        """Start the thread, unless it has been started."""
        if self._thread.ident is None:
            self._thread.start()

    def write(self, text: str) -> int:
        """Queue text to be written. Never waits, and never fails."""
        piece = text.encode(errors="backslashreplace")
        if self._thread.ident is None and self._pieces.empty() and self._takes_now(piece):
            self._write_whole(piece)
        elif self._pieces.qsize() < QUEUE_MAX:
            self._pieces.put(piece)
        else:
            self._lose(piece)
        return len(text)

    def fileno(self) -> int:
        """Return the descriptor that is written to."""
        return self._descriptor

    def end(self) -> None:
        """Wait until everything is written, END_SECONDS at most."""
        self._ending.set()
        self._pieces.put(b"")
        if self._thread.ident is None:
            # the thread could not be started
            self._run()
        else:
            self._thread.join(END_SECONDS)

    def _run(self) -> None:
        told = 0
        while not (self._ending.is_set() and self._pieces.empty()):
            was_taken = self._write_whole(self._pieces.get())
            # a reader that takes nothing at all would lose this line as well, and the next one about it
            if was_taken and self._pieces.empty() and (lost := self.lost_lines) > told:
                log.error("%d lines of this log were lost: nothing read them in time", lost - told)
                told = lost

    def _takes_now(self, piece: bytes) -> bool:
        # a pipe or terminal that is ready takes at least PIPE_BUF bytes (pipe(7))
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        return len(piece) <= select.PIPE_BUF and bool(poll.poll(0))

    def _write_whole(self, piece: bytes) -> bool:
        """Write a piece; return whether a reader took something."""
        rest = memoryview(piece)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:
                # another process has set O_NONBLOCK
                poll = select.poll()
                poll.register(self._descriptor, select.POLLOUT)
                poll.poll()
            except OSError:
                # no reader, or no space: no reader would see a message
                self._lose(piece)
                return False
        return bool(piece)

    def _lose(self, piece: bytes) -> None:
        with self._counting:
            self.lost_lines += piece.count(b"\n")


FORMATS: Final = ("text", "json")
LEVELS: Final = ("debug", "info", "warning", "error")
# syslog's numbers, by logging's
_PRIORITY: Final = {
    logging.DEBUG: 7,
    logging.INFO: 6,
    logging.WARNING: 4,
    logging.ERROR: 3,
    logging.CRITICAL: 2,
}
# A record with this is logged at every level, and without its level in front: operators wait for it.
PLAIN: Final = {"plain": True}


def set_up_logging(level: str, style: str, descriptor: int = 2) -> LogWriter:
    """Have log records, and everything else for stderr, written to a copy of *descriptor*.

    The caller starts the writer's thread. At the end of the process the writer writes the rest.
    """
    formatter: logging.Formatter = JsonFormatter() if style == "json" else TextFormatter()
    writer = LogWriter(os.dup(descriptor))
    atexit.register(writer.end)
    sys.stderr = writer
    handler = logging.StreamHandler(writer)
    handler.setFormatter(_Journal(formatter) if _is_journal(descriptor) else formatter)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    return writer


def set_level(level: str) -> None:
    """Say less or more from now on."""
    logging.getLogger().setLevel(level.upper())


class TextFormatter(logging.Formatter):
    """`pjwd: LEVEL: words`; of a bug, the traceback in lines that begin with spaces."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record as text."""
        level = "" if getattr(record, "plain", False) else f"{record.levelname}: "
        text = f"pjwd: {level}{escaped(record.getMessage())}"
        if record.exc_info:
            lines = self.formatException(record.exc_info).split("\n")
            text += "".join(f"\n    {escaped(line)}" for line in lines)
        return text


class JsonFormatter(logging.Formatter):
    """An object in a line: time, level, logger, message, and of a bug its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record as JSON."""
        members = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")[:-6] + "Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            members["traceback"] = self.formatException(record.exc_info)
        return json.dumps(members)


class _Journal(logging.Formatter):
    """The priority in front of each line, which the journal takes off again."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner: Final = inner

    def format(self, record: logging.LogRecord) -> str:
        """Format a record with its priority before each line."""
        level = record.levelno - record.levelno % 10
        prefix = f"<{_PRIORITY.get(level, 6)}>"
        return "\n".join(prefix + line for line in self._inner.format(record).split("\n"))


def escaped(text: str) -> str:
    """Escape characters of *text* that end a line, move a cursor or are no characters."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _is_journal(descriptor: int) -> bool:
    # systemd says which file leads to the journal: a redirected stderr is another one
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    status = os.fstat(descriptor)
    return (device, inode) == (str(status.st_dev), str(status.st_ino))
