"""What pjwd says: a line for each record, which nobody outside can forge, in each of its forms."""

import io
import json
import logging
import os
import socket
import sys
from collections.abc import Iterator

import pytest

from pjw.server.log_setup import PLAIN, JsonFormatter, TextFormatter, set_up_logging

FORGED = "x\npjwd: ERROR: forged\r\x1b[2K\u2028\u202e\x00"


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def record(message: str, *arguments: object, bug: Exception | None = None) -> logging.LogRecord:
    """A record of an error."""
    info = (type(bug), bug, None) if bug else None
    return logging.LogRecord("pjw.x", logging.ERROR, "x.py", 1, message, arguments, info)


def test_text_is_level_and_words() -> None:
    """As people read it; what is awaited at every level has none in front."""
    assert TextFormatter().format(record("a %d", 1)) == "pjwd: ERROR: a 1"
    plain = record("ready")
    plain.__dict__.update(PLAIN)
    assert TextFormatter().format(plain) == "pjwd: ready"


def test_no_client_writes_a_line_of_text() -> None:
    """Whatever ends a line or moves a cursor is escaped; of a traceback no line begins like a record."""
    said = TextFormatter().format(record("%s", FORGED, bug=ValueError(FORGED)))
    first, *rest = said.split("\n")
    assert first == r"pjwd: ERROR: x\npjwd: ERROR: forged\r\x1b[2K\u2028\u202e\x00"
    assert rest and all(line.startswith("    ") and line.isprintable() for line in rest)


def test_json_is_an_object_in_a_line() -> None:
    """One line whatever is in it, with the traceback of a bug as a member."""
    said = JsonFormatter().format(record("%s", FORGED, bug=ValueError(FORGED)))
    assert said.isascii() and "\n" not in said
    members = json.loads(said)
    assert list(members) == ["time", "level", "logger", "message", "traceback"]
    assert (members["level"], members["logger"], members["message"]) == ("error", "pjw.x", FORGED)
    assert members["traceback"].startswith("ValueError: ")
    assert "traceback" not in json.loads(JsonFormatter().format(record("x")))


@pytest.mark.parametrize("style", ["text", "json"])
def test_the_journal_is_told_the_priority(monkeypatch: pytest.MonkeyPatch, style: str) -> None:
    """Where stderr is what systemd says leads to the journal, each line has it; elsewhere none has."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        monkeypatch.setattr("sys.stderr", sys.stderr)  # put back, whatever is in its place
        for name, begin in (("0:0", ("pjwd: W", '{"time')), (stream_of(theirs), ("<4>pjwd: W", '<4>{"time'))):
            monkeypatch.setenv("JOURNAL_STREAM", name)
            set_up_logging("warning", style, theirs.fileno()).start()
            logging.getLogger("pjw.x").info("not said")
            logging.getLogger("pjw.x").warning("said")
            assert ours.recv(1000).decode().startswith(begin)


def stream_of(file: socket.socket | io.IOBase) -> str:
    """What systemd would have in JOURNAL_STREAM."""
    status = os.fstat(file.fileno())
    return f"{status.st_dev}:{status.st_ino}"
