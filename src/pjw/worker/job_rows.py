"""Rows of the table of jobs to values."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final

from pjw.model import (
    After,
    ArrayCounts,
    Artifacts,
    ArtifactsState,
    Condition,
    EndReason,
    ExitStatus,
    Job,
    JobState,
    Limits,
    Usage,
)

COLUMNS: Final = (
    "id, client_name, command, limits, start_ns, state, end_ns, exit_code, signal, reason, usage,"
    " artifacts, artifact_bytes, artifacts_detail, artifacts_required,"
    " output_bytes, name, labels, split_stderr, input, workdir, queued_ns, priority, not_before_ns, held,"
    " detail, waits_for, unmet, attempt, retried_as, array_id, array_index, workspace, exclusive,"
    " image, read_only, mounts, allow, link, gpus, node, chosen_node, slurm_partition,"
    " slurm_constraint,"
    " (SELECT json_array(indices, count, waiting, succeeded, failed, cancelled) FROM arrays"
    " WHERE arrays.id = jobs.id)"
)
# a job that waits in the queue
WAITS: Final = "state IS NULL AND start_ns = 0"
# one that waits for nothing but its turn
READY: Final = f"{WAITS} AND held = 0 AND not_before_ns = 0 AND unmet = 0"
# as many as COLUMNS names, in their order
Row = tuple[Any, ...]


def to_ns(time: datetime) -> int:
    """Return nanoseconds since 1970, exact to the microsecond that a datetime holds."""
    return int(time.timestamp()) * 1_000_000_000 + time.microsecond * 1000


def from_ns(ns: int) -> datetime:
    """Return the time in UTC, cut to microseconds."""
    seconds, rest = divmod(ns, 1_000_000_000)
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest // 1000)


# Most jobs have the default limits, or those of another job.
@lru_cache(maxsize=64)
def limits_text(limits: Limits) -> str:
    """Format limits as a row has them."""
    return json.dumps(asdict(limits))


@lru_cache(maxsize=64)
def limits_of(text: str) -> Limits:
    """Parse the limits of a row."""
    return Limits(**json.loads(text))


def counts_of(text: str | None) -> ArrayCounts | None:
    """Parse the counts of an array from JSON; None for a job that is none."""
    return ArrayCounts(*json.loads(text)) if text else None


def job_of(row: Row) -> Job:
    """Return the job of a row; an unfinished one is STARTING, for the table does not know more."""
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
        artifacts,
        artifact_bytes,
        artifacts_detail,
        artifacts_required,
        size,
        name,
        labels,
        split_stderr,
        has_input,
        workdir,
        queued_ns,
        priority,
        not_before_ns,
        held,
        detail,
        after,
        unmet,
        attempt,
        retried_as,
        array_id,
        array_index,
        workspace,
        exclusive,
        image,
        read_only,
        mounts,
        allow,
        link,
        gpus,
        node,
        chosen_node,
        partition,
        constraint,
        array,
    ) = row
    without_end = JobState.QUEUED
    if start_ns:
        # an array has no command of its own that could be about to be executed
        without_end = JobState.RUNNING if array else JobState.STARTING
    return Job(
        id=job_id,
        client_name=client_name,
        command=command,
        state=JobState(state) if state else without_end,
        limits=limits_of(limits),
        start=from_ns(start_ns or queued_ns or 0),
        end=from_ns(end_ns) if end_ns is not None else None,
        exit_status=ExitStatus.of(code, signal),
        reason=EndReason(reason) if reason else None,
        usage=Usage(**json.loads(usage)) if usage else None,
        # an array has those of its elements; one that never ran has none
        artifacts=Artifacts(
            ArtifactsState(artifacts), artifact_bytes, artifacts_detail, bool(artifacts_required)
        )
        if artifacts and not array and not (state and artifacts == ArtifactsState.PENDING)
        else None,
        output_bytes=size,
        name=name,
        labels=json.loads(labels),
        split_stderr=bool(split_stderr),
        input=bool(has_input),
        detail=detail,
        workdir=workdir,
        queued=from_ns(queued_ns) if queued_ns is not None else None,
        priority=priority,
        not_before=from_ns(not_before_ns) if not_before_ns else None,
        held=bool(held),
        after=after_of(after) if after else (),
        unmet=unmet,
        attempt=attempt,
        retried_as=retried_as,
        array=counts_of(array),
        array_id=array_id,
        array_index=array_index,
        workspace=workspace,
        exclusive=bool(exclusive),
        image=image,
        read_only=bool(read_only),
        mounts=tuple(json.loads(mounts)) if mounts else (),
        allow=tuple(allow.split()),
        link=link,
        gpus=gpus,
        node=node,
        chosen_node=chosen_node,
        partition=partition,
        constraint=constraint,
    )


def after_text(after: Iterable[After]) -> str:
    """Return the jobs that a job waits for, as a row has them."""
    return " ".join(map(str, after))


def after_of(text: str) -> tuple[After, ...]:
    """Return the jobs that a job waits for, from its row."""
    pairs = (each.split(":") for each in text.split())
    return tuple(After(int(job_id), Condition(condition)) for job_id, condition in pairs)
