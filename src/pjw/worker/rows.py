"""Rows of the table of jobs to values."""

import json
from dataclasses import asdict
from datetime import UTC, datetime
from functools import lru_cache
from typing import Final

from pjw.model import EndReason, ExitStatus, Job, JobState, Limits, Usage

COLUMNS: Final = (
    "id, client_name, command, limits, start_ns, state, end_ns, exit_code, signal, reason, usage,"
    " output_bytes, name, labels, split_stderr, input, workdir"
)
_Number = int | None
_Text = str | None
Row = tuple[
    int, str, str, str, int, _Text, _Number, _Number, _Number, _Text, _Text, _Number, str, str, int, int, str
]


def to_ns(time: datetime) -> int:
    """Nanoseconds since 1970, exact to the microsecond that a datetime holds."""
    return int(time.timestamp()) * 1_000_000_000 + time.microsecond * 1000


def from_ns(ns: int) -> datetime:
    """The time in UTC, cut to microseconds."""
    seconds, rest = divmod(ns, 1_000_000_000)
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest // 1000)


# Most jobs have the default limits, or those of another job.
@lru_cache(maxsize=64)
def limits_text(limits: Limits) -> str:
    """Limits as a row has them."""
    return json.dumps(asdict(limits))


@lru_cache(maxsize=64)
def _limits_of(text: str) -> Limits:
    return Limits(**json.loads(text))


def job_of(row: Row) -> Job:
    """The job of a row; one that has not ended is STARTING, for the table does not know more."""
    (
        job_id,
        client_name,
        command,
        limits,
        start_ns,
        state,
        end_ns,
        code,
        signal,
        reason,
        usage,
        size,
        *rest,
    ) = row
    name, labels, split_stderr, has_input, workdir = rest
    return Job(
        id=job_id,
        client_name=client_name,
        command=command,
        state=JobState(state) if state else JobState.STARTING,
        limits=_limits_of(limits),
        start=from_ns(start_ns),
        end=from_ns(end_ns) if end_ns is not None else None,
        exit_status=ExitStatus.of(code, signal),
        reason=EndReason(reason) if reason else None,
        usage=Usage(**json.loads(usage)) if usage else None,
        output_bytes=size,
        name=str(name),
        labels=json.loads(str(labels)),
        split_stderr=bool(split_stderr),
        input=bool(has_input),
        workdir=str(workdir),
    )
