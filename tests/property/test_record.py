"""The status record: whatever is in the file, nothing but a whole record counts."""

from hypothesis import given
from hypothesis import strategies as st

from pjw.model import EndReason, ExitStatus
from pjw.worker.status_record import RECORD_BYTES, End, Record, parse_record

times = st.integers(0, 2**63 - 1)
WORDS = {
    "none": EndReason.COMPLETED,
    "stopped": EndReason.STOPPED,
    "timed_out": EndReason.TIMED_OUT,
    "output_limit": EndReason.OUTPUT_LIMIT,
    "output_failed": EndReason.OUTPUT_FAILED,
}


@given(
    started=times,
    ended=times,
    how=st.tuples(st.just("exited"), st.integers(0, 255))
    | st.tuples(st.just("signaled"), st.integers(1, 64)),
    reason=st.sampled_from(sorted(WORDS)),
    cut=st.integers(0, 200),
)
def test_what_init_writes_is_read(
    started: int, ended: int, how: tuple[str, int], reason: str, cut: int
) -> None:
    """Every record comes back; cut at any byte it is that of a job that runs, or none."""
    first = f"started {started}\n".encode()
    word, number = how
    whole = first + f"ended {ended} {word} {number} {reason}\n".encode()
    status = ExitStatus(code=number) if word == "exited" else ExitStatus(signal=number)
    expected = Record(started, End(ended, status, WORDS[reason]))
    assert parse_record(whole.ljust(RECORD_BYTES, b"\0")) == expected
    if cut < len(whole):
        part = parse_record(whole[:cut].ljust(RECORD_BYTES, b"\0"))
        assert part == (Record(started) if cut >= len(first) else Record())


@given(st.binary(max_size=RECORD_BYTES))
def test_any_bytes(data: bytes) -> None:
    """They are a record or none; nothing is raised."""
    record = parse_record(data)
    assert (record.end, record.usage) == (None, None) or record.started_ns is not None
