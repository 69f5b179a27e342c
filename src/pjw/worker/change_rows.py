"""Changes of state in the table of jobs, as its triggers have written them (schema.py).

Each function is called in the table's thread.
"""

import json
import sqlite3
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Final, NamedTuple

from pjw.errors import SequenceError
from pjw.model import EndReason, ExitStatus, Job, JobChange, JobState
from pjw.worker.job_rows import COLUMNS, Row, counts_of, from_ns, job_of, limits_of, to_ns
from pjw.worker.pages import JobFilter, read_page

# A change shows no more of a command than a line does: it may have half a megabyte.
COMMAND_CHARACTERS: Final = 256
_COLUMNS: Final = COLUMNS.replace("command,", f"substr(command, 1, {COMMAND_CHARACTERS}),", 1)
_REMOVED: Final = "removed"
# the marker that a backup leaves, see server/backup.py
BASE: Final = "base"


class KeptChanges(NamedTuple):
    """The range of changes that can be requested: those behind `floor`, up to `last`."""

    floor: int
    last: int


@dataclass(frozen=True, slots=True)
class SnapshotPage:
    """Some jobs as they were when the last change was `last`, and behind which id the next page begins."""

    jobs: Sequence[Job]
    next_after: int | None
    last: int


def kept(db: sqlite3.Connection, owner: str | None) -> KeptChanges:
    """Return the range of the kept changes of one client's jobs, or of all."""
    query = (
        "SELECT max((SELECT seq FROM change_floor), coalesce(max(changes_from), 0)),"
        " coalesce((SELECT max(seq) FROM changes), 0) FROM clients"
    )
    if owner is None:
        row = db.execute(query).fetchone()
    else:
        row = db.execute(f"{query} WHERE name = ?", (owner,)).fetchone()
    return KeptChanges(*row)


def read_changes(
    db: sqlite3.Connection, owners: Collection[str | None], since: int, count: int
) -> tuple[list[JobChange], int]:
    """Return at most *count* changes behind *since*, and the number that they are complete to.

    Of some clients, or of all (None). Raises SequenceError when some of these are not kept any more, or
    *since* is none of this table.
    """
    whose = None if None in owners else [name for name in owners if name is not None]
    _check(db, owners, since)
    where, arguments = "", []
    if whose is not None:
        where, arguments = f" AND client_name IN ({', '.join('?' * len(whose))})", list(whose)
    rows = db.execute(
        "SELECT seq, time_ms, job_id, client_name, state FROM changes"
        f" WHERE seq > ?{where} AND state <> '{BASE}' ORDER BY seq LIMIT ?",
        (since, *arguments, count),
    ).fetchall()
    jobs = _jobs(db, {row[2] for row in rows})
    removed = _removed(db, {row[2] for row in rows} - set(jobs))
    changes = [
        _change(row, job) for row in rows if (job := jobs.get(row[2]) or removed.get(row[2])) is not None
    ]
    return changes, rows[-1][0] if len(rows) == count else max(since, kept(db, None).last)


def _check(db: sqlite3.Connection, owners: Collection[str | None], since: int) -> None:
    there = [kept(db, owner) for owner in owners]
    floor, last = max(each.floor for each in there), there[0].last
    if since < floor:
        raise SequenceError(
            f"cannot resume behind change {since}: changes up to {floor} are not kept any more",
            hint="begin anew with the jobs as they are now: pjw events --list",
            oldest=floor,
        )
    if since > last:
        raise SequenceError(
            f"cannot resume behind change {since}: this server has come to {last} only",
            hint="is the number another server's? Begin anew: pjw events --list",
            oldest=floor,
        )


def read_snapshot(
    db: sqlite3.Connection,
    owner: str | None,
    after: int,
    count: int,
    wanted: JobFilter,
    ids: Collection[int],
) -> SnapshotPage:
    """Return jobs that fit as they are now, behind id *after*.

    A job that is being started at once is not among them: the change comes when its command runs.
    """
    if ids:
        jobs, next_after = [job for job in _jobs(db, set(ids)).values() if wanted.fits(job)], None
        jobs = [job for job in jobs if owner in (None, job.client_name)]
    else:
        page = read_page(db, owner, after, count, wanted, False)
        jobs, next_after = list(page.jobs), page.next_after
    begun = [job.id for job in jobs if job.state is JobState.STARTING]
    marks = ", ".join("?" * len(begun))
    told = dict(db.execute(f"SELECT id, told FROM jobs WHERE id IN ({marks})", begun)) if begun else {}
    shown = []
    for job in jobs:
        state = JobState(told.get(job.id) or job.state)
        if state is JobState.STARTING and job.queued is None:
            continue
        if not wanted.states or state in wanted.states:
            shown.append(replace(job, state=state, command=job.command[:COMMAND_CHARACTERS]))
    return SnapshotPage(sorted(shown, key=lambda job: job.id), next_after, kept(db, None).last)


class Note(NamedTuple):
    """A job runs, or is being stopped."""

    state: JobState
    start_ns: int
    job_id: int


def note(db: sqlite3.Connection, notes: Sequence[Note]) -> None:
    """Write down the notes about jobs that have not ended."""
    db.executemany(
        "UPDATE jobs SET told = ?, start_ns = ?"
        " WHERE id = ? AND state IS NULL AND start_ns > 0 AND told <> ?",
        [(state, start_ns, job_id, state) for state, start_ns, job_id in notes],
    )


def _jobs(db: sqlite3.Connection, job_ids: Collection[int]) -> dict[int, Job]:
    marks = ", ".join("?" * len(job_ids))
    rows = db.execute(f"SELECT {_COLUMNS} FROM jobs WHERE id IN ({marks})", list(job_ids))
    return {row[0]: job_of(row) for row in rows}


def _removed(db: sqlite3.Connection, job_ids: Collection[int]) -> dict[int, Job]:
    """Return the facts still known of jobs that were removed."""
    if not job_ids:
        return {}
    marks = ", ".join("?" * len(job_ids))
    rows = db.execute(
        "SELECT id, client_name, command, limits, start_ns, state, end_ns, exit_code, signal, reason,"
        " output_bytes, name, labels, queued_ns, attempt, retried_as, array_id, array_index, array_counts"
        f" FROM removed_jobs WHERE id IN ({marks})",
        list(job_ids),
    )
    return {row[0]: _job_of_removed(row) for row in rows}


def _job_of_removed(row: Row) -> Job:
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
        size,
        name,
        labels,
        queued_ns,
        attempt,
        retried_as,
        array_id,
        array_index,
        array,
    ) = row
    return Job(
        job_id,
        client_name,
        command,
        JobState(state or JobState.QUEUED),
        limits_of(limits),
        from_ns(start_ns or queued_ns or 0),
        end=from_ns(end_ns) if end_ns is not None else None,
        exit_status=ExitStatus.of(code, signal),
        reason=EndReason(reason) if reason else None,
        output_bytes=size,
        name=name,
        labels=json.loads(labels),
        queued=from_ns(queued_ns) if queued_ns is not None else None,
        attempt=attempt,
        retried_as=retried_as,
        array=counts_of(array),
        array_id=array_id,
        array_index=array_index,
    )


def _change(row: Row, job: Job) -> JobChange:
    sequence, time_ms, _, _, state = row
    time = datetime.fromtimestamp(time_ms / 1000, UTC)
    if state == _REMOVED:
        return JobChange(job, sequence, time, removed=True)
    if job.state.final and state not in (JobState.EXITED, JobState.LOST):
        # as it was before its end
        job = replace(
            job,
            end=None,
            exit_status=None,
            reason=None,
            usage=None,
            output_bytes=None,
            detail="",
            retried_as=None,
        )
    if state == JobState.QUEUED:
        job = replace(job, start=job.queued or job.start)
    return JobChange(replace(job, state=JobState(state)), sequence, time)


def finish(db: sqlite3.Connection, notes: list[Note], job: Job) -> None:
    """Write down how a job ended, with its notes that are not in the table yet."""
    status = job.exit_status
    if len(notes) > 1:
        note(db, notes)
    db.execute(
        "UPDATE jobs SET told = coalesce(?, told), start_ns = ?, state = ?, end_ns = ?, exit_code = ?,"
        " signal = ?, reason = ?, usage = ?, output_bytes = ?, artifacts = ?, artifact_bytes = ?,"
        " artifacts_detail = ? WHERE id = ?",
        (
            notes[-1].state if notes else None,
            to_ns(job.start),
            job.state,
            to_ns(job.end) if job.end else None,
            # older versions read a code or a signal, never both
            status.code if status and status.signal is None else None,
            status.signal if status else None,
            job.reason,
            json.dumps(asdict(job.usage)) if job.usage else None,
            job.output_bytes,
            job.artifacts.state if job.artifacts else "",
            job.artifacts.bytes if job.artifacts else 0,
            job.artifacts.detail if job.artifacts else "",
            job.id,
        ),
    )
