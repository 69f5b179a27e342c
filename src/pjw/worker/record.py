"""Reads the status record that a job's init wrote: when it began, and how it ended."""

import re
import signal
from dataclasses import dataclass
from typing import Final

from pjw.model import EndReason, ExitStatus

# Room for the record is allocated before the job starts, so that even on a full disk its
# end can be written down.
RECORD_BYTES: Final = 4096

_STARTED: Final = re.compile(rb"started (\d{1,19})\n")
_ENDED: Final = re.compile(
    rb"ended (\d{1,19}) (exited|signaled) (\d{1,3}) (none|stopped|timed_out|output_limit|output_failed)\n"
)
# What can be: init writes a 64-bit time, and what wait(2) says.
_NS_MAX: Final = 2**63 - 1
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
    """How a command ended, at `ended_ns` of CLOCK_REALTIME."""

    ended_ns: int
    exit_status: ExitStatus
    reason: EndReason


@dataclass(frozen=True, slots=True)
class Record:
    """What init has recorded so far."""

    started_ns: int | None = None
    end: End | None = None


def parse_record(data: bytes) -> Record:
    """Read a record; what is not whole, as after a crash of the host, counts as not written."""
    started = _STARTED.match(data)
    if started is None or int(started[1]) > _NS_MAX:
        return Record()
    ended = _ENDED.match(data, started.end())
    if ended is None or int(ended[1]) > _NS_MAX or int(ended[3]) not in _NUMBERS[ended[2]]:
        return Record(started_ns=int(started[1]))
    number = int(ended[3])
    status = ExitStatus(code=number) if ended[2] == b"exited" else ExitStatus(signal=number)
    return Record(started_ns=int(started[1]), end=End(int(ended[1]), status, _REASONS[ended[4]]))
