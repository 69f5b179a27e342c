"""The status record that init leaves."""

import os

import pytest

from pjw.launcher.jobs import keep_accounts
from pjw.launcher.protocol import ACCOUNTS_OFFSET
from pjw.model import EndReason, ExitStatus, Usage
from pjw.worker.status_record import RECORD_BYTES, End, KeptArtifacts, Packing, Record, parse_record

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
    ("words", "kept"),
    [
        (b"artifacts whole \n", KeptArtifacts(Packing.WHOLE, "")),
        (b"artifacts nothing \n", KeptArtifacts(Packing.NOTHING, "")),
        (b"artifacts stopped \nartifacts whole \n", KeptArtifacts(Packing.STOPPED, "")),
        (b"artifacts late \n", KeptArtifacts(Packing.LATE, "")),
        (b"artifacts killed \n", KeptArtifacts(Packing.KILLED, "")),
        (
            b"artifacts failed cannot read \xff\x1b[2J: why\n",
            KeptArtifacts(Packing.FAILED, r"cannot read \xff\x1b[2J: why"),
        ),
        (b"artifacts whole", None),
        (b"artifacts whole " + b"x" * 401 + b"\n", None),
        (b"artifacts some \n", None),
        (b"", None),
    ],
)
def test_what_has_become_of_artifacts(words: bytes, kept: KeptArtifacts | None) -> None:
    """It comes behind the end; names are in it, which the job has chosen."""
    record = parse_record(STARTED + ENDED + words + bytes(100))
    assert record.kept == kept and record.end is not None
    assert parse_record(STARTED + words).kept is None


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


USAGE = Usage(1, 2**63 - 1, 3, 0, 5)


@pytest.mark.parametrize("init", [STARTED + ENDED, STARTED])
def test_accounts_are_read_as_they_were_kept(init: bytes) -> None:
    """They stand behind what init has written, whether it could write the end or not."""
    status = os.memfd_create("status")
    os.write(status, init.ljust(RECORD_BYTES, b"\0"))
    try:
        assert keep_accounts(status, USAGE)
        data = os.pread(status, RECORD_BYTES, 0)
    finally:
        os.close(status)
    assert len(data) == RECORD_BYTES
    assert parse_record(data).usage == USAGE
    # a version before this one reads the rest as it was
    assert data.startswith(init + b"\0")


def test_accounts_that_cannot_be_kept() -> None:
    """That is told, and raises nothing."""
    status = os.open(os.devnull, os.O_RDONLY)
    try:
        assert not keep_accounts(status, USAGE)
    finally:
        os.close(status)


@pytest.mark.parametrize(
    "used",
    [
        b"",
        b"used 1 2 3 4 5",
        b"used 1 2 3 4\n",
        b"used 1 2 3 4 5 6\n",
        b"used 1 2 3 4 -5\n",
        b"used 1 2 3 4 9223372036854775808\n",
        b" used 1 2 3 4 5\n",
    ],
)
def test_accounts_that_are_none(used: bytes) -> None:
    """Anything but the launcher's own line is no account, and takes nothing from the end."""
    record = parse_record((STARTED + ENDED).ljust(ACCOUNTS_OFFSET, b"\0") + used)
    assert record.usage is None
    assert record.end is not None
