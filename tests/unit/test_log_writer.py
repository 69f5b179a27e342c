"""A log that nobody takes holds nobody up, and says what was lost of it."""

import logging
import os
import pty
import select
import termios
from collections.abc import Iterator

import pytest

from pjw.server.log_setup import QUEUE_MAX, LogWriter

PIPE_BYTES = 4096
LINE = "x" * 99 + "\n"


@pytest.fixture
def ends() -> Iterator[tuple[int, int]]:
    """A pipe that is soon full."""
    reading, writing = os.pipe()
    yield reading, writing
    for descriptor in (reading, writing):
        os.close(descriptor)


def read_until(descriptor: int, end: bytes) -> bytes:
    """All up to *end*."""
    seen = b""
    while not seen.endswith(end):
        assert select.select([descriptor], [], [], 30)[0], seen[-1000:]
        seen += os.read(descriptor, 65536)
    return seen


def test_what_is_lost_is_counted_and_told(ends: tuple[int, int], caplog: pytest.LogCaptureFixture) -> None:
    """Nothing waits for a full pipe; what was kept comes in its order, then the number of the rest."""
    reading, writing = ends
    writer = LogWriter(writing)
    told = logging.getLogger("pjw.server.log_setup")
    handler = logging.StreamHandler(writer)
    told.addHandler(handler)
    try:
        written = 0
        while writer.lost_lines < 7:
            written += writer.write(f"{written}\n") > 0
        assert written > QUEUE_MAX + 7
        writer.start()
        lines = read_until(reading, b"in time\n").splitlines()
    finally:
        told.removeHandler(handler)
    assert lines[:-1] == [b"%d" % number for number in range(written - 7)]
    assert lines[-1] == b"7 lines of this log were lost: nothing read them in time"
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    writer.end()


def test_a_stopped_terminal_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-S: lines wait, and the end does not wait for ever; after Ctrl-Q they come."""
    monkeypatch.setattr("pjw.server.log_setup.END_SECONDS", 0.05)
    ours, theirs = pty.openpty()
    writer = LogWriter(theirs)
    writer.start()
    termios.tcflow(theirs, termios.TCOOFF)
    writer.write("waits\n")
    writer.end()
    assert not select.select([ours], [], [], 0)[0]
    termios.tcflow(theirs, termios.TCOON)
    assert read_until(ours, b"waits\r\n") == b"waits\r\n"
    for descriptor in (ours, theirs):
        os.close(descriptor)


def test_a_reader_that_has_gone() -> None:
    """What cannot be written is counted too; to say so would never end. The end comes at once."""
    reading, gone = os.pipe()
    os.close(reading)
    writer = LogWriter(gone)
    told = logging.getLogger("pjw.server.log_setup")
    handler = logging.StreamHandler(writer)
    told.addHandler(handler)
    try:
        writer.start()
        writer.write("one\ntwo\n")
        writer.end()
    finally:
        told.removeHandler(handler)
    assert writer.lost_lines == 2
    os.close(gone)


def test_somebody_else_s_nonblocking_mode(ends: tuple[int, int]) -> None:
    """Who shares the pipe may have set it: nothing is lost for that."""
    reading, writing = ends
    os.set_blocking(writing, False)
    writer = LogWriter(writing)
    writer.start()
    for _ in range(5000):
        writer.write(LINE)
    writer.write("end\n")
    assert read_until(reading, b"end\n") == LINE.encode() * 5000 + b"end\n"
    assert writer.lost_lines == 0
    writer.end()


def test_all_is_written_at_the_end(ends: tuple[int, int]) -> None:
    """Also what was said before there was a thread, or where there is none."""
    reading, writing = ends
    writer = LogWriter(writing)
    writer.write("first \udcff\n")
    writer.end()
    assert os.read(reading, PIPE_BYTES) == b"first \\udcff\n"
