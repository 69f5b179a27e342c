"""The status record that init leaves."""

import pytest

from pjw.model import EndReason, ExitStatus
from pjw.worker.record import RECORD_BYTES, End, Record, parse_record

STARTED = b"started 1700000000000000000\n"
ENDED = b"ended 1700000001000000000 exited 3 none\n"


@pytest.mark.parametrize(
    ("words", "status", "reason"),
    [
        (b"exited 0 none", ExitStatus(code=0), EndReason.COMPLETED),
        (b"exited 255 none", ExitStatus(code=255), EndReason.COMPLETED),
        (b"signaled 9 none", ExitStatus(signal=9), EndReason.COMPLETED),
        (b"signaled 15 stopped", ExitStatus(signal=15), EndReason.STOPPED),
        (b"exited 0 stopped", ExitStatus(code=0), EndReason.STOPPED),
        (b"signaled 9 timed_out", ExitStatus(signal=9), EndReason.TIMED_OUT),
        (b"signaled 9 output_limit", ExitStatus(signal=9), EndReason.OUTPUT_LIMIT),
    ],
)
@pytest.mark.parametrize("padding", [0, 100, RECORD_BYTES - 100])
def test_a_whole_record(words: bytes, status: ExitStatus, reason: EndReason, padding: int) -> None:
    """Both lines, with the zero bytes behind them that the server put there."""
    data = STARTED + b"ended 1700000001000000000 " + words + b"\n" + bytes(padding)
    assert parse_record(data) == Record(
        1_700_000_000_000_000_000, End(1_700_000_001_000_000_000, status, reason)
    )


def test_a_job_that_runs() -> None:
    """Only its start is there."""
    assert parse_record(STARTED + bytes(RECORD_BYTES - len(STARTED))) == Record(1_700_000_000_000_000_000)


@pytest.mark.parametrize(
    "data", [b"", bytes(RECORD_BYTES), b"started", b"started \n", b"started x\n", b"started -1\n", ENDED]
)
def test_nothing_was_recorded(data: bytes) -> None:
    """No start, no record: an end alone is no end of anything."""
    assert parse_record(data) == Record()


@pytest.mark.parametrize("length", range(len(STARTED + ENDED)))
def test_a_record_that_is_cut(length: int) -> None:
    """At whatever byte a crash cuts it, what is not whole does not count, and nothing is guessed."""
    whole = STARTED + ENDED
    for data in (whole[:length], whole[:length] + bytes(50)):
        assert parse_record(data) == (
            Record() if length < len(STARTED) else Record(1_700_000_000_000_000_000)
        )


@pytest.mark.parametrize(
    "ended",
    [
        b"ended 1 exited 3\n",
        b"ended 1 exited 3 bored\n",
        b"ended 1 vanished 3 none\n",
        b"ended 1 exited 1234 none\n",
        b"ended 1 exited -1 none\n",
        b"ended  exited 1 none\n",
        b" ended 1 exited 1 none\n",
        b"ENDED 1 exited 1 none\n",
        b"\0ended 1 exited 1 none\n",
    ],
)
def test_an_end_that_is_none(ended: bytes) -> None:
    """Anything but init's own words is not an end."""
    assert parse_record(STARTED + ended).end is None
