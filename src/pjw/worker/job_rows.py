"""Rows of the table of jobs: their columns as values, and what is written of each job."""

import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final

from pjw.errors import NameTakenError
from pjw.model import (
    After,
    ArrayCounts,
    Artifacts,
    ArtifactsState,
    Condition,
    EndReason,
    ExitStatus,
    Job,
    JobSpec,
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


class AlreadyStartedError(Exception):
    """A client has asked with this request id before, and got a job then."""

    def __init__(self, job_id: int) -> None:
        """Make the error; *job_id* is the job that the request has started."""
        super().__init__(f"the request has started job {job_id}")
        self.job_id: Final = job_id


def listed(texts: Sequence[str]) -> str:
    """Format a list of texts as a row has it."""
    return json.dumps(list(texts), ensure_ascii=False)


# columns of a new job that a plain start leaves as they are
NO_COLUMNS: Final[Mapping[str, int | str]] = {}


def insert(
    db: sqlite3.Connection,
    client_name: str,
    spec: JobSpec,
    limits: Limits,
    start_ns: int,
    more: Mapping[str, int | str] = NO_COLUMNS,
) -> int:
    """Insert a job; return its id. Raises NameTakenError and AlreadyStartedError."""
    if spec.outputs:
        required = int(spec.output_required)
        more = {**more, "artifacts": ArtifactsState.PENDING, "artifacts_required": required}
    if spec.mounts:
        more = {**more, "mounts": listed(spec.mounts)}
    if spec.gpus:
        more = {**more, "gpus": spec.gpus}
    if spec.node:
        more = {**more, "chosen_node": spec.node}
    if spec.partition or spec.constraint:
        more = {**more, "slurm_partition": spec.partition, "slurm_constraint": spec.constraint}
    if spec.allow or spec.link:
        more = {**more, "allow": " ".join(spec.allow), "link": spec.link}
    try:
        cursor = db.execute(
            "INSERT INTO jobs (client_name, command, limits, start_ns, name, labels, split_stderr,"
            f" input, request_id, workdir{''.join(f', {name}' for name in more)})"
            f" VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?{', ?' * len(more)})",
            (
                client_name,
                spec.display,
                limits_text(limits),
                start_ns,
                spec.name,
                json.dumps(dict(spec.labels)) if spec.labels else "{}",
                spec.split_stderr,
                spec.input,
                spec.request_id or None,
                spec.directory,
                *more.values(),
            ),
        )
    except sqlite3.IntegrityError:
        if spec.request_id and (started := of_request(db, client_name, spec.request_id)) is not None:
            raise AlreadyStartedError(started) from None
        bearer = _bearer(db, client_name, spec.name)
        if bearer is None:
            raise
        raise NameTakenError(
            f"cannot start a job called {spec.name}: job {bearer} is called that, and has not ended",
            hint=f"pjw stop {bearer}; or choose another name",
            holder=bearer,
        ) from None
    assert cursor.lastrowid is not None
    return cursor.lastrowid


def _bearer(db: sqlite3.Connection, client_name: str, name: str) -> int | None:
    query = "SELECT id FROM jobs WHERE client_name = ? AND name = ? AND name <> '' AND state IS NULL"
    row = db.execute(query, (client_name, name)).fetchone()
    return row[0] if row else None


def of_request(db: sqlite3.Connection, client_name: str, request_id: str) -> int | None:
    """Return the job that a client's request with this id has started; None when it has started none."""
    query = "SELECT id FROM jobs WHERE client_name = ? AND request_id = ?"
    row = db.execute(query, (client_name, request_id)).fetchone()
    return row[0] if row else None


def find(db: sqlite3.Connection, job_id: int, client_name: str | None) -> Job | None:
    """Return one job, of one client or of any; None when there is none."""
    # Looked for among the client's own, so that another's job takes the time that none takes.
    whose, arguments = (
        ("INDEXED BY jobs_of_client WHERE client_name = ? AND", (client_name,))
        if client_name is not None
        else ("WHERE", ())
    )
    query = f"SELECT {COLUMNS} FROM jobs {whose} id = ?"
    row = db.execute(query, (*arguments, job_id)).fetchone()
    return job_of(row) if row else None


def gpus_of_jobs(db: sqlite3.Connection) -> dict[int, tuple[str, ...]]:
    """Return the GPUs of the jobs that were begun, and whose end has not been written down."""
    query = (
        "SELECT id, gpu_names FROM jobs INDEXED BY jobs_alive"
        " WHERE state IS NULL AND start_ns > 0 AND gpu_names <> ''"
    )
    return {job_id: tuple(json.loads(names)) for job_id, names in db.execute(query)}


def alive(db: sqlite3.Connection) -> list[Job]:
    """Return the jobs that were begun, and whose end has not been written down."""
    return [
        job_of(row)
        for row in db.execute(
            f"SELECT {COLUMNS} FROM jobs INDEXED BY jobs_alive WHERE state IS NULL AND start_ns > 0"
            " AND id NOT IN (SELECT id FROM arrays) ORDER BY id"
        )
    ]
