"""Placements and nodes in the table of the gateway. One guarded statement makes each change.

Each function is called in the table's thread, in a transaction (`JobStore.transact`): a placement and its job
change together or not at all.
"""

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from pjw.gateway.placement_states import TRANSITIONS, PlacementEvent, PlacementState, before
from pjw.model import ArtifactsState, EndReason, Job, JobState, Limits
from pjw.worker import array_rows, queue_rows
from pjw.worker.job_rows import COLUMNS, READY, WAITS, job_of, to_ns

_PLACEMENT: Final = (
    "job_id, uuid, client_name, state, node, session, node_job_id, attempt, stop_signal, stop_grace, hold,"
    " archived"
)
ARCHIVED: Final = 1
# as `node_job_id`: the node had the job, and does not have it any more
COPY_LOST: Final = -1
_ALIVE: Final = "state IN ('queued', 'claimed', 'running')"


@dataclass(frozen=True, slots=True)
class Placement:
    """A row: a job on its way to a node, and on the node."""

    job_id: int
    uuid: str
    client_name: str
    state: PlacementState
    node: str = ""
    # the node's session in which it was claimed
    session: str = ""
    # the job's id on the node; 0: not known yet
    node_job_id: int = 0
    # how often it was claimed
    attempt: int = 0
    # a stop that a client asked for, and of which the node has perhaps not heard
    stop_signal: int | None = None
    stop_grace: float | None = None
    # the engine's name for its place on the node; empty where the engine gives no places
    hold: str = ""
    # ARCHIVED when the archive has its output
    archived: int = 0


@dataclass(frozen=True, slots=True)
class NodeRow:
    """The last known facts of a node."""

    name: str
    address: str
    version: str
    boot_id: str
    cpu_max_millicores: int
    memory_max_bytes: int
    uid_first: int
    uid_count: int
    drained: bool = False
    is_lost: bool = False
    # which job table it has; empty: its version does not say
    table_id: str = ""


def _placement(row: tuple[Any, ...]) -> Placement:
    return Placement(row[0], row[1], row[2], PlacementState(row[3]), *row[4:])


# --- placements


def place(db: sqlite3.Connection, job_id: int, uuid: str) -> Placement | None:
    """Return the placement of a job whose turn it is, if need be a new one; None when it does not wait so."""
    db.execute(
        "INSERT OR IGNORE INTO placements (job_id, uuid, client_name, state)"
        f" SELECT id, ?, client_name, 'queued' FROM jobs WHERE id = ? AND {READY}",
        (uuid, job_id),
    )
    is_ready = db.execute(f"SELECT 1 FROM jobs WHERE id = ? AND {READY}", (job_id,)).fetchone()
    return find(db, job_id) if is_ready else None


def withdraw(db: sqlite3.Connection, job_id: int) -> bool:
    """Forget the placement of a job that no node has claimed; whether it was so."""
    query = "DELETE FROM placements WHERE job_id = ? AND state = 'queued'"
    return bool(db.execute(query, (job_id,)).rowcount)


def forget_unneeded(db: sqlite3.Connection) -> None:
    """Forget placements of jobs that ended while they waited in the queue again."""
    waits = f"SELECT 1 FROM jobs WHERE jobs.id = placements.job_id AND {WAITS}"
    db.execute(f"DELETE FROM placements WHERE state = 'queued' AND NOT EXISTS ({waits})")


def alive(db: sqlite3.Connection) -> list[tuple[Placement, Job]]:
    """All placements that have not ended, in the order of their jobs, each with its job."""
    of_alive = f"FROM placements INDEXED BY placements_alive WHERE {_ALIVE}"
    placements = db.execute(f"SELECT {_PLACEMENT} {of_alive} ORDER BY job_id").fetchall()
    jobs = {
        row[0]: job_of(row)
        for row in db.execute(f"SELECT {COLUMNS} FROM jobs WHERE id IN (SELECT job_id {of_alive})")
    }
    return [(_placement(row), jobs[row[0]]) for row in placements if row[0] in jobs]


def find(db: sqlite3.Connection, job_id: int) -> Placement | None:
    """Return the placement of a job; None when there is none."""
    row = db.execute(f"SELECT {_PLACEMENT} FROM placements WHERE job_id = ?", (job_id,)).fetchone()
    return _placement(row) if row else None


def by_uuid(db: sqlite3.Connection, uuid: str) -> Placement | None:
    """Return the placement with a uuid; None when there is none."""
    row = db.execute(f"SELECT {_PLACEMENT} FROM placements WHERE uuid = ?", (uuid,)).fetchone()
    return _placement(row) if row else None


def _move(
    db: sqlite3.Connection, job_id: int, event: PlacementEvent, more: str = "", *values: object
) -> bool:
    """Change the state of a placement as *event* does; whether it changed."""
    states = sorted(before(event))
    # one event may lead from different states to different states
    cases = " ".join(f"WHEN '{state}' THEN '{TRANSITIONS[state, event]}'" for state in states)
    marks = ", ".join("?" * len(states))
    return bool(
        db.execute(
            f"UPDATE placements SET state = CASE state {cases} END{more}"
            f" WHERE job_id = ? AND state IN ({marks})",
            (*values, job_id, *states),
        ).rowcount
    )


def claim(
    db: sqlite3.Connection,
    placed: Placement,
    limits: Limits,
    node: str,
    session: str,
    now_ns: int,
    hold: str = "",
) -> Job | None:
    """Let a node claim a job; return the job as it is then, or None when no node can claim it (any more)."""
    placement = find(db, placed.job_id)
    if placement is None or placement.state is not PlacementState.QUEUED or placement.uuid != placed.uuid:
        return None
    if queue_rows.admit(db, placed.job_id, limits, now_ns) is None:
        # it is held
        return None
    if not _move(
        db,
        placed.job_id,
        PlacementEvent.CLAIM,
        ", node = ?, session = ?, hold = ?, attempt = attempt + 1",
        node,
        session,
        hold,
    ):
        raise RuntimeError(f"the placement of job {placed.job_id} changes under our hands")
    db.execute("UPDATE jobs SET node = ? WHERE id = ?", (node, placed.job_id))
    return _job(db, placed.job_id)


def started(db: sqlite3.Connection, job_id: int, node_job: Job) -> Job | None:
    """Record that the command was executed; return the job as it is then, or None when that is old news."""
    if not _move(db, job_id, PlacementEvent.STARTED, ", node_job_id = ?", node_job.id):
        return None
    db.execute(
        "UPDATE jobs SET start_ns = ?, told = iif(told = 'stopping', told, 'running'), workdir = ?"
        " WHERE id = ? AND state IS NULL",
        (to_ns(node_job.start), node_job.workdir, job_id),
    )
    queue_rows.settle(db, job_id)
    return _job(db, job_id)


def put_back(db: sqlite3.Connection, job_id: int, event: PlacementEvent, now_ns: int) -> Job | None:
    """Take a claimed job from its node; return the job as it is then, or None when it was not claimed.

    An element of an array that was stopped meanwhile has ended then.
    """
    if event not in (PlacementEvent.PUT_BACK, PlacementEvent.UNKNOWN):
        raise ValueError(event)
    states = db.execute("SELECT state FROM placements WHERE job_id = ?", (job_id,)).fetchone()
    if states is None or states[0] != PlacementState.CLAIMED:
        return None
    _move(db, job_id, event, ", node = '', session = '', hold = ''")
    queue_rows.put_back(db, job_id, now_ns)
    db.execute("UPDATE jobs SET node = '' WHERE id = ?", (job_id,))
    job = _job(db, job_id)
    if job.state.final:
        _move(db, job_id, PlacementEvent.CANCELLED)
    return job


def cancelled(db: sqlite3.Connection, job_id: int, detail: str, now_ns: int) -> Job | None:
    """End a job without a node; return the job, or None when a node was first."""
    if not _move(db, job_id, PlacementEvent.CANCELLED):
        return None
    return queue_rows.end_without_start(db, job_id, EndReason.CANCELLED, detail, now_ns)


def start_failed(db: sqlite3.Connection, job_id: int, detail: str, now_ns: int) -> Job | None:
    """End a claimed job that can never be executed; return it, or None when it was not claimed."""
    if not _move(db, job_id, PlacementEvent.START_FAILED):
        return None
    return queue_rows.end_without_start(db, job_id, EndReason.START_FAILED, detail, now_ns)


def ended(db: sqlite3.Connection, job_id: int, node_job: Job, now_ns: int) -> Job | None:
    """End a job as its node has recorded its end; return the job, or None when that is old news.

    Its next attempt, if there is one (`retried_as`), is in the queue then.
    """
    if not _move(db, job_id, PlacementEvent.END_SEEN, ", node_job_id = ?", node_job.id):
        return None
    status = node_job.exit_status
    db.execute(
        "UPDATE jobs SET start_ns = ?, state = ?, end_ns = ?, exit_code = ?, signal = ?, reason = ?,"
        " usage = ?, output_bytes = ?, workdir = ?, detail = ?, artifacts = ?, artifact_bytes = ?,"
        " artifacts_detail = ? WHERE id = ? AND state IS NULL",
        (
            to_ns(node_job.start),
            node_job.state,
            to_ns(node_job.end) if node_job.end else None,
            status.code if status and status.signal is None else None,
            status.signal if status else None,
            node_job.reason,
            json.dumps(asdict(node_job.usage)) if node_job.usage else None,
            node_job.output_bytes,
            node_job.workdir,
            node_job.detail,
            node_job.artifacts.state if node_job.artifacts else "",
            node_job.artifacts.bytes if node_job.artifacts else 0,
            node_job.artifacts.detail if node_job.artifacts else "",
            job_id,
        ),
    )
    return _attempt_over(db, job_id, now_ns)


def lost(db: sqlite3.Connection, job_id: int, event: PlacementEvent, detail: str, now_ns: int) -> Job | None:
    """Record that a job is lost with its node; return it, or None when it was not there (any more)."""
    if not _move(db, job_id, event):
        return None
    db.execute(
        "UPDATE jobs SET state = ?, end_ns = ?, reason = ?, detail = ?,"
        " artifacts = iif(artifacts = '', '', ?), artifacts_detail = iif(artifacts = '', '', ?)"
        " WHERE id = ? AND state IS NULL",
        (JobState.LOST, now_ns, EndReason.NODE_LOST, detail, ArtifactsState.FAILED, detail, job_id),
    )
    return _attempt_over(db, job_id, now_ns)


def _attempt_over(db: sqlite3.Connection, job_id: int, now_ns: int) -> Job:
    """Put the next attempt of a job into the queue, or count it in its array; its end is in the table."""
    queue_rows.settle(db, job_id)
    job = _job(db, job_id)
    (was_stopped,) = db.execute(
        "SELECT stop_signal IS NOT NULL FROM placements WHERE job_id = ?", (job_id,)
    ).fetchone()
    if job.attempt and queue_rows.retry(db, job, now_ns, was_stopped=bool(was_stopped)) is not None:
        return _job(db, job_id)
    if job.array_id is not None:
        code = job.exit_status.code if job.exit_status else None
        array_rows.element_ended(db, job.array_id, job.reason, code, now_ns)
    return job


def keep_late_end(db: sqlite3.Connection, job_id: int, node_job_id: int, text: str) -> None:
    """Keep the node's record of a job that is lost, as clients know by now."""
    db.execute(
        "UPDATE placements SET late_end = ?, node_job_id = ? WHERE job_id = ? AND state = 'lost'",
        (text, node_job_id, job_id),
    )


def ask_stop(db: sqlite3.Connection, job_id: int, signal: int, grace: float | None) -> None:
    """Note that a job must stop, until its node has heard of it; clients see the job as STOPPING."""
    db.execute(
        "UPDATE placements SET stop_signal = ?, stop_grace = ? WHERE job_id = ?", (signal, grace, job_id)
    )
    db.execute("UPDATE jobs SET told = 'stopping' WHERE id = ? AND state IS NULL AND start_ns > 0", (job_id,))


def to_fence(db: sqlite3.Connection, node: str) -> list[str]:
    """Return the uuids of jobs that were lost with a node, and whose ends the node has not told since."""
    query = "SELECT uuid FROM placements WHERE node = ? AND state = 'lost' AND late_end = ''"
    return [uuid for (uuid,) in db.execute(query, (node,))]


def to_archive(db: sqlite3.Connection, node: str, count: int) -> list[tuple[Placement, Job]]:
    """Return ended jobs of a node whose output the archive does not have yet, the oldest first."""
    placements = db.execute(
        f"SELECT {_PLACEMENT} FROM placements INDEXED BY placements_to_archive WHERE node = ?"
        " AND state = 'ended' AND archived = 0 AND removed = 0 AND node_job_id > 0 ORDER BY job_id LIMIT ?",
        (node, count),
    ).fetchall()
    return [(_placement(row), _job(db, row[0])) for row in placements]


def archived(db: sqlite3.Connection, job_id: int) -> None:
    """Record that the archive has the output of a job."""
    db.execute("UPDATE placements SET archived = ? WHERE job_id = ?", (ARCHIVED, job_id))


def never_archived(db: sqlite3.Connection, job_id: int) -> bool:
    """Its node does not have all of the output of a job; whether the job is still there."""
    query = "UPDATE placements SET archived = 2 WHERE job_id = ? AND removed = 0"
    return bool(db.execute(query, (job_id,)).rowcount)


def nodes_to_remove(db: sqlite3.Connection) -> list[str]:
    """Return the nodes that still have jobs that were removed here."""
    query = "SELECT DISTINCT node FROM placements INDEXED BY placements_removed WHERE removed"
    return [name for (name,) in db.execute(query)]


def to_remove(db: sqlite3.Connection, node: str, count: int) -> list[Placement]:
    """Placements whose jobs were removed here, and that are still on a node."""
    query = f"SELECT {_PLACEMENT} FROM placements INDEXED BY placements_removed WHERE removed AND node = ?"
    return [_placement(row) for row in db.execute(f"{query} LIMIT ?", (node, count))]


def forget(db: sqlite3.Connection, job_ids: Sequence[int]) -> None:
    """Forget these placements, of which nothing is left on their node."""
    db.executemany("DELETE FROM placements WHERE job_id = ? AND removed", [(each,) for each in job_ids])


def _job(db: sqlite3.Connection, job_id: int) -> Job:
    return job_of(db.execute(f"SELECT {COLUMNS} FROM jobs WHERE id = ?", (job_id,)).fetchone())


# --- nodes


def nodes(db: sqlite3.Connection) -> list[NodeRow]:
    """All nodes that the gateway has ever seen."""
    rows = db.execute(
        "SELECT name, address, version, boot_id, cpu_max_millicores, memory_max_bytes, uid_first, uid_count,"
        " drained, is_lost, table_id FROM nodes ORDER BY name"
    )
    return [NodeRow(*row) for row in rows]


def remove_node(db: sqlite3.Connection, name: str) -> None:
    """Forget a node, and the numbers of its jobs: another machine may come by its name."""
    lose_copies(db, name)
    db.execute("DELETE FROM nodes WHERE name = ?", (name,))
    forget_orphans(db)


def forget_orphans(db: sqlite3.Connection) -> None:
    """Forget the removed jobs whose copies a node was still to remove that is gone for good."""
    db.execute("DELETE FROM placements WHERE removed AND node NOT IN (SELECT name FROM nodes)")


def keep_node(db: sqlite3.Connection, node: NodeRow) -> None:
    """Write down the facts of a node."""
    db.execute(
        "INSERT OR REPLACE INTO nodes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            node.name,
            node.address,
            node.version,
            node.boot_id,
            node.cpu_max_millicores,
            node.memory_max_bytes,
            node.uid_first,
            node.uid_count,
            node.drained,
            node.is_lost,
            node.table_id,
        ),
    )


def lose_copies(db: sqlite3.Connection, node: str) -> None:
    """Note that a node has another table: the numbers of its jobs name other jobs there, or none."""
    db.execute("UPDATE placements SET node_job_id = ? WHERE node = ? AND node_job_id > 0", (COPY_LOST, node))
