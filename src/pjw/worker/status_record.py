"""Reads a job's status record: its start and end, by init; its usage, by the launcher."""

import re
import signal
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from pjw.launcher.protocol import ACCOUNTS_OFFSET
from pjw.model import EndReason, ExitStatus, Usage

# Room for the record is allocated before the job starts, so that even on a full disk its
# end can be written down.
RECORD_BYTES: Final = 4096

_STARTED: Final = re.compile(rb"started (\d{1,19})\n")
_ENDED: Final = re.compile(
    rb"ended (\d{1,19}) (exited|signaled) (\d{1,3}) (none|stopped|timed_out|output_limit|output_failed)\n"
)
_ARTIFACTS: Final = re.compile(rb"artifacts (whole|nothing|failed|stopped|late|killed) ([^\n]{0,400})\n")
_USED: Final = re.compile(rb"used" + 5 * rb" (\d{1,19})" + rb"\n")
# The possible values: init writes a 64-bit time, and the status of wait(2).
_NUMBER_MAX: Final = 2**63 - 1
_NUMBERS: Final = {b"exited": range(256), b"signaled": range(1, signal.NSIG)}
_REASONS: Final = {
    b"none": EndReason.COMPLETED,
    b"stopped": EndReason.STOPPED,
    b"timed_out": EndReason.TIMED_OUT,
    b"output_limit": EndReason.OUTPUT_LIMIT,
    b"output_failed": EndReason.OUTPUT_FAILED,
}


@dataclass(frozen=True, slots=True)
class End:
    """The end of a command, at `ended_ns` of CLOCK_REALTIME."""

    ended_ns: int
    exit_status: ExitStatus
    reason: EndReason


class Packing(StrEnum):
    """The result of packing the artifacts of a job, as its init records it."""

    WHOLE = "whole"
    NOTHING = "nothing"
    FAILED = "failed"
    STOPPED = "stopped"
    LATE = "late"
    KILLED = "killed"


@dataclass(frozen=True, slots=True)
class KeptArtifacts:
    """The same, with words for a person: the failure, or the files left out; empty where there are none."""

    packing: Packing
    words: str


@dataclass(frozen=True, slots=True)
class Record:
    """The record so far: by init, and when that has ended by the launcher."""

    started_ns: int | None = None
    end: End | None = None
    usage: Usage | None = None
    kept: KeptArtifacts | None = None


def parse_record(data: bytes) -> Record:
    """Parse a record; a part that is not whole, as after a crash of the host, counts as not written."""
    started = _STARTED.match(data)
    if started is None or int(started[1]) > _NUMBER_MAX:
        return Record()
    ended = _ENDED.match(data, started.end())
    end = _parse_end(ended)
    kept = None if ended is None or end is None else _parse_kept(data, ended.end())
    return Record(int(started[1]), end, _parse_usage(data), kept)


def _parse_end(ended: re.Match[bytes] | None) -> End | None:
    if ended is None or int(ended[1]) > _NUMBER_MAX or int(ended[3]) not in _NUMBERS[ended[2]]:
        return None
    number = int(ended[3])
    status = ExitStatus(code=number) if ended[2] == b"exited" else ExitStatus(signal=number)
    return End(int(ended[1]), status, _REASONS[ended[4]])


def _parse_kept(data: bytes, start: int) -> KeptArtifacts | None:
    found = _ARTIFACTS.match(data, start)
    if found is None:
        return None
    # names are in it, which the job has chosen
    words = found[2].decode("utf-8", "backslashreplace")
    shown = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in words)
    return KeptArtifacts(Packing(found[1].decode()), shown)


def _parse_usage(data: bytes) -> Usage | None:
    used = _USED.match(data, ACCOUNTS_OFFSET)
    if used is None:
        return None
    numbers = [int(number) for number in used.groups()]
    return Usage(*numbers) if max(numbers) <= _NUMBER_MAX else None
