"""The status record of a job: any bytes are a record that the job table can keep, or none."""

from dataclasses import astuple

from pjw.launcher.protocol import ACCOUNTS_OFFSET
from pjw.worker.status_record import parse_record


def seeds() -> list[bytes]:
    """Whole, half and no records."""
    return [
        b"started 1790000000123456789\nended 1790000001123456789 exited 0 none\n",
        b"started 1790000000123456789\nended 1790000001123456789 signaled 9 stopped\n\0\0",
        b"started 1790000000123456789\nended 1790000001123456789 exited 255 output_limit\n",
        b"started 1790000000123456789\n",
        b"started 1790000000123456789\n".ljust(ACCOUNTS_OFFSET, b"\0") + b"used 1 2 3 4 5\n",
        bytes(64),
    ]


def one_input(data: bytes) -> None:
    """Read it; every number must be one that exists, and fit into the table."""
    record = parse_record(data)
    times: list[int | None] = [record.started_ns]
    if record.end is not None:
        status = record.end.exit_status
        times.append(record.end.ended_ns)
        assert 0 <= status.code <= 255
        assert status.signal is None or 1 <= status.signal <= 64
        assert record.started_ns is not None
    if record.usage is not None:
        times.extend(astuple(record.usage))
    assert all(time is None or 0 <= time < 2**63 for time in times)
