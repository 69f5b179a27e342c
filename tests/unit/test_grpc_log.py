"""gRPC's lines on their way to our log: at their level, few of them, none that is waited for."""

import logging
import subprocess
import sys

import pytest

from pjw.server import grpc_log
from pjw.server.grpc_log import LINES_MAX, LINES_SECONDS, Budget, tell

# What is said by whom, when a pipe is in the place of descriptor 2.
PROGRAM = """
import logging, os, sys
from pjw.server import grpc_log
from pjw.server.log_setup import set_up_logging
set_up_logging("warning", "text").start()
pipe = grpc_log.take_stderr()
os.write(2, b"E1129 03:12:00.123456   12345 tcp_server.cc:123] half of")
relay = grpc_log.relay(pipe)
os.write(2, b" it\\nI1129 03:12:00.123456   12345 a.cc:1] unheard\\n\\xff is no text\\n")
logging.getLogger().error("our own")
print("a traceback", file=sys.stderr)
os.close(2)
relay.join()
"""


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set."""
    at = [1000.0]
    monkeypatch.setattr("pjw.server.grpc_log.time.monotonic", lambda: at[0])
    return at


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (
            "E1129 03:12:00.123456   12345 tcp.cc:12] no: way] out",
            (logging.ERROR, "no: way] out (tcp.cc:12)"),
        ),
        ("W1129 03:12:00.123456   12345 tcp.cc:12] hm", (logging.WARNING, "hm (tcp.cc:12)")),
        ("F1129 03:12:00.123456   12345 tcp.cc:12] dead", (logging.CRITICAL, "dead (tcp.cc:12)")),
        ("terminate called", (logging.WARNING, "terminate called")),
    ],
)
def test_a_line(line: str, told: tuple[int, str], caplog: pytest.LogCaptureFixture) -> None:
    """Its level is gRPC's, its words are whole, its place is behind them; what is no record is a warning."""
    tell(line, Budget())
    [record] = caplog.records
    assert (record.levelno, record.getMessage()) == (told[0], f"grpc: {told[1]}")


def test_what_nobody_wants_costs_no_budget(caplog: pytest.LogCaptureFixture) -> None:
    """Empty lines, and those below our level."""
    budget = Budget()
    with caplog.at_level(logging.WARNING):
        for _ in range(LINES_MAX):
            tell("", budget)
            tell("I1129 03:12:00.123456   12345 a.cc:1] chatter", budget)
        tell("heard", budget)
    assert [record.getMessage() for record in caplog.records] == ["grpc: heard"]


def test_a_flood_is_cut(now: list[float], caplog: pytest.LogCaptureFixture) -> None:
    """A number of lines in a number of seconds; then their number is told, once."""
    budget = Budget()
    for number in range(LINES_MAX + 5):
        tell(f"line {number}", budget)
    assert len(caplog.records) == LINES_MAX
    now[0] += LINES_SECONDS
    tell("later", budget)
    tell("and on", budget)
    assert [record.getMessage() for record in caplog.records[LINES_MAX:]] == [
        "grpc: 5 lines were left out",
        "grpc: later",
        "grpc: and on",
    ]


def test_a_line_in_parts(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Reads end where they like."""
    parts = iter([b"one\ntw", b"o", b"\nthree\n", b""])
    with monkeypatch.context() as patch:
        patch.setattr("pjw.server.grpc_log.os.read", lambda *_: next(parts))
        grpc_log.relay(-1).join()
    assert [record.getMessage() for record in caplog.records] == ["grpc: one", "grpc: two", "grpc: three"]


def test_the_place_of_stderr() -> None:
    """What is written to descriptor 2 is logged; our own lines and tracebacks go where it went."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True
    )
    assert sorted(done.stderr.splitlines()) == [
        "a traceback",
        "pjwd: ERROR: grpc: half of it (tcp_server.cc:123)",
        "pjwd: ERROR: our own",
        "pjwd: WARNING: grpc: \\xff is no text",
    ]


def test_a_full_pipe_holds_nobody_up() -> None:
    """What finds it full is lost: a thread of gRPC's that waited would hold up all calls."""
    program = (
        "import os\nfrom pjw.server import grpc_log\ngrpc_log.take_stderr()\n"
        "try:\n    while True: os.write(2, bytes(4096))\nexcept BlockingIOError: print('lost')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=True)
    assert done.stdout == b"lost\n"


def test_no_child_has_the_pipe() -> None:
    """The launcher's words are not gRPC's, and no job gets a descriptor of ours."""
    program = (
        "import os\nfrom pjw.server import grpc_log\nours = grpc_log.take_stderr()\n"
        "print(os.get_inheritable(ours), os.get_inheritable(2))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=True)
    assert done.stdout == b"False False\n"
