"""pjwd's log on stderr: one line for each record, as text or as JSON. A call that logs never waits.

A line is ours from its first byte on: text from outside is escaped, so that no client can write a line that
looks like another record. Under systemd each line begins with its priority (sd-daemon(3)).
"""

import atexit
import json
import logging
import os
import sys
from datetime import UTC, datetime
from typing import Final

from pjw.server.log_writer import LogWriter

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
