"""The queue in the table of jobs: the jobs that wait, their order, and their commands.

A job waits while it has not ended and its `start_ns` is 0 (schema.py). Each function is a statement or a part
of a transaction, and is called in the table's thread. What changes a job looks at its state in the same
statement: of a stop and a start that come at once, one finds that the other was first.
"""

import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass, field, replace
from typing import Final, NamedTuple

from pjw.amounts import exact_size
from pjw.arrays import Array, Element
from pjw.errors import InvalidJobError, JobNotFoundError, LimitReachedError
from pjw.model import (
    BACKOFF_SECONDS_MAX,
    After,
    ArtifactsState,
    Condition,
    EndReason,
    Job,
    JobSpec,
    JobState,
    Limits,
    QueueSpec,
    Retry,
    TerminalSize,
    limit_numbers,
)
from pjw.worker import array_rows
from pjw.worker.job_rows import COLUMNS, READY, WAITS, Row, after_text, job_of, limits_of, limits_text, to_ns
from pjw.worker.settings import Quotas
from pjw.worker.states import JobEvent, transition
from pjw.worker.workspace_rows import is_free

# So many jobs change in one transaction: the table is free for others again within milliseconds.
_CHANGED_MAX: Final = 200

# what is written down, and shown, of a job that ended without a start
STOPPED_BEFORE_START: Final = "it was stopped before its turn came"
SERVER_FAILED: Final = "pjwd failed to start it; the server's log has the details"

_EARLY: Final = f"{WAITS} AND not_before_ns > 0"
# The command of a job, and its secrets; those of an element are stored with its array.
SPEC: Final = (
    "coalesce((SELECT nullif(spec, '') FROM specs WHERE specs.id = jobs.id),"
    " (SELECT spec FROM specs WHERE specs.id = jobs.array_id))"
)
_SECRETS: Final = "(SELECT secrets FROM specs WHERE specs.id = coalesce(jobs.array_id, jobs.id))"


class Head(NamedTuple):
    """The facts about a job that decide its turn; not its command, which may be long."""

    id: int
    client_name: str
    limits: Limits
    priority: int
    # of an array how many of its elements run at once, 0 for any number; None for all else
    at_once: int | None = None
    # of an element
    array_id: int | None = None
    workspace: str = ""
    exclusive: bool = False
    gpus: int = 0
    # what not each machine of a cluster has
    mounts: Sequence[str] = ()
    allow: Sequence[str] = ()
    link: str = ""
    image: str = ""
    # the only node of a cluster that it may have
    chosen_node: str = ""
    # of Slurm's
    partition: str = ""
    constraint: str = ""


@dataclass(frozen=True, slots=True)
class WaitingJob:
    """A job of the queue, and what it is to execute, as it was stored."""

    job: Job
    text: str
    # the name of the file that has its secrets
    token: str | None = None
    # the indices of the array that it is an element of
    indices: str = ""
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def upload(self) -> str:
        """The name of the files that were sent for it; empty where there are none."""
        name: str = json.loads(self.text).get("upload", "")
        return name

    def spec(self) -> JobSpec:
        """Return the spec of the command, with the limits that were asked for. Raises InvalidJobError."""
        stored = json.loads(self.text)
        command, terminal = stored["command"], stored.get("terminal")
        added = {"PJW_ATTEMPT": str(self.job.attempt)} if self.job.attempt else {}
        if self.job.array_id is not None and self.job.array_index is not None:
            added |= array_rows.variables(self.job.array_id, self.job.array_index, self.indices)
        return JobSpec(
            command if isinstance(command, str) else tuple(command),
            stored["limits"],
            name=self.job.name,
            labels=self.job.labels,
            env={**added, **stored["env"]},
            secrets=self.secrets,
            workdir=stored["workdir"],
            split_stderr=self.job.split_stderr,
            input=self.job.input,
            terminal=None if terminal is None else TerminalSize(*terminal),
            upload=stored.get("upload", ""),
            workspace=self.job.workspace,
            exclusive=self.job.exclusive,
            image=self.job.image,
            read_only=self.job.read_only,
            allow=self.job.allow,
            link=self.job.link,
            outputs=tuple(stored.get("outputs", ())),
            output_required=stored.get("output_required", False),
            mounts=self.job.mounts,
            gpus=self.job.gpus,
            node=self.job.chosen_node,
            partition=self.job.partition,
            constraint=self.job.constraint,
        )


def columns_of(spec: JobSpec, now_ns: int) -> dict[str, int | str]:
    """Return the columns of a job's row that say how it waits."""
    queue = spec.queue or QueueSpec()
    not_before_ns = 0 if queue.not_before is None else to_ns(queue.not_before)
    return {
        "queued_ns": now_ns,
        "priority": queue.priority,
        "not_before_ns": not_before_ns if not_before_ns > now_ns else 0,
        "held": queue.held,
        "waits_for": after_text(queue.after),
        "attempt": int(queue.retry is not None),
    }


def keep_spec(
    db: sqlite3.Connection, job_id: int, client_name: str, spec: JobSpec, token: str | None
) -> None:
    """Store what a new job of the queue is to execute, but for its secrets: *token* names their file."""
    stored: dict[str, object] = {
        "command": spec.command if isinstance(spec.command, str) else list(spec.command),
        "limits": limit_numbers(spec.limits),
        "env": dict(spec.env),
        "workdir": spec.workdir,
    }
    if spec.terminal is not None:
        stored["terminal"] = astuple(spec.terminal)
    if spec.upload:
        stored["upload"] = spec.upload
    if spec.outputs:
        stored["outputs"] = list(spec.outputs)
        stored["output_required"] = spec.output_required
    if spec.queue is not None and (retry := spec.queue.retry) is not None:
        stored["retry"] = {**asdict(retry), "codes": sorted(retry.codes)}
    text = json.dumps(stored, ensure_ascii=False)
    size = len(text.encode()) + sum(len(name) + len(value.encode()) for name, value in spec.secrets.items())
    db.execute(
        "INSERT INTO specs (id, client_name, bytes, spec, secrets) VALUES (?, ?, ?, ?, ?)",
        (job_id, client_name, size, text, token),
    )


def placed(db: sqlite3.Connection, client_name: str, spec: JobSpec, before: Sequence[int]) -> JobSpec:
    """Return a spec of a client whose jobs to wait for are all named by their ids.

    Earlier jobs of the same submission have the ids *before*; an element of an array gets one now. Raises
    InvalidJobError for what is not before it, or is named twice; and for an element JobNotFoundError, and
    LimitReachedError when too many have got one so.
    """
    if spec.queue is None or all(each.earlier is None and each.element is None for each in spec.queue.after):
        return spec
    after: list[After] = []
    for each in spec.queue.after:
        if each.earlier is not None and each.earlier >= len(before):
            raise InvalidJobError(
                f"job {len(before)} of a submission cannot wait for job {each.earlier}: it is not before it"
            )
        job_id = each.job_id if each.earlier is None else before[each.earlier]
        if each.element is not None:
            job_id = array_rows.with_row(db, Element(job_id, each.element), client_name)
        after.append(After(job_id, each.condition))
    return replace(spec, queue=replace(spec.queue, after=after))


def depend(
    db: sqlite3.Connection, job_id: int, client_name: str, after: Sequence[After]
) -> tuple[set[int], str]:
    """Have a new job wait for others of its client; those that have not ended, or why it would wait for ever.

    Of a job that was tried again it waits for the newest attempt. Raises JobNotFoundError for what is no job
    of the client, and InvalidJobError for two attempts of one job.
    """
    awaited: set[int] = set()
    for each in after:
        job = None if each.job_id == job_id else _newest_attempt(db, each.job_id, client_name)
        if job is None:
            raise JobNotFoundError(each.job_id)
        if job.id in awaited:
            raise InvalidJobError(f"job {each.job_id} is named twice: job {job.id} is an attempt of it")
        if not job.state.final:
            awaited.add(job.id)
            db.execute("INSERT INTO dependencies VALUES (?, ?, ?)", (job.id, job_id, each.condition))
        elif not job.meets(each.condition):
            return set(), _ended_otherwise(job)
    db.execute("UPDATE jobs SET unmet = ? WHERE id = ?", (len(awaited), job_id))
    return awaited, ""


def _newest_attempt(db: sqlite3.Connection, job_id: int, client_name: str) -> Job | None:
    """Return the newest attempt, of those kept, of a client's job; None when it is none of that client."""
    job: Job | None = None
    next_id: int | None = job_id
    while next_id is not None:
        row = db.execute(
            f"SELECT {COLUMNS} FROM jobs INDEXED BY jobs_of_client WHERE client_name = ? AND id = ?",
            (client_name, next_id),
        ).fetchone()
        if row is None:
            break
        job = job_of(row)
        next_id = job.retried_as
    return job


def _ended_otherwise(job: Job) -> str:
    if job.exit_status is None:
        how = f"ended as {job.reason}" if job.state is JobState.EXITED else f"is {job.state}"
    elif job.reason is EndReason.COMPLETED:
        how = f"ended with exit code {job.exit_status.code}"
    else:
        how = f"ended as {job.reason}"
    return f"job {job.id}, which it waited for, {how}"


@dataclass(frozen=True, slots=True)
class Effects:
    """The consequences of an end: clients with a job that may be ready, and jobs that were cancelled.

    `left` says that there is more to do.
    """

    clients: Sequence[str]
    # their ids and clients
    cancelled: Sequence[tuple[int, str]]
    left: bool


def take_effect(db: sqlite3.Connection, job_id: int, now_ns: int) -> Effects:
    """Let jobs go on that waited for the end of a job, and cancel those that waited for another one.

    No more than _CHANGED_MAX of them at once. Those that are cancelled may be waited for, too.
    """
    row = db.execute(f"SELECT {COLUMNS} FROM jobs WHERE id = ?", (job_id,)).fetchone()
    if row is None:
        # it had its effect, and was forgotten
        return Effects((), (), left=False)
    ended = job_of(row)
    rows = db.execute(
        "SELECT id, condition FROM dependencies WHERE after_id = ? LIMIT ?", (job_id, _CHANGED_MAX)
    ).fetchall()
    clients: set[str] = set()
    cancelled: list[tuple[int, str]] = []
    for waiting_id, condition in rows:
        db.execute("DELETE FROM dependencies WHERE after_id = ? AND id = ?", (job_id, waiting_id))
        if ended.meets(Condition(condition)):
            if row := _changed(db, "unmet = unmet - 1", (), waiting_id, WAITS, "client_name"):
                clients.add(row[0])
        elif row := _end(
            db, waiting_id, EndReason.CANCELLED, _ended_otherwise(ended), now_ns, "id, client_name"
        ):
            cancelled.append(row)
    return Effects(sorted(clients), cancelled, len(rows) == _CHANGED_MAX)


def awaited(db: sqlite3.Connection) -> list[tuple[int, bool]]:
    """Return the jobs that others wait for, each with whether it has ended."""
    query = "SELECT DISTINCT after_id, state IS NOT NULL FROM dependencies JOIN jobs ON jobs.id = after_id"
    return [(job_id, bool(ended)) for job_id, ended in db.execute(query)]


def check_quotas(db: sqlite3.Connection, client_name: str, quotas: Quotas) -> None:
    """Raise LimitReachedError when a client, or all of them, have more in the queue than they may."""
    query = (
        "SELECT total(queued_jobs * (name = ?)), total(queued_jobs), total(queued_bytes * (name = ?)),"
        " total(queued_bytes) FROM clients"
    )
    jobs, all_jobs, size, all_bytes = db.execute(query, (client_name, client_name)).fetchone()
    if quotas.queued_max and jobs > quotas.queued_max:
        raise LimitReachedError(
            f"the queue takes at most {quotas.queued_max} jobs of {client_name}",
            hint="wait until some have started, or stop some; the operator sets clients.queued_max",
            limit="queued_max",
            most=quotas.queued_max,
        )
    if quotas.queued_bytes_max and size > quotas.queued_bytes_max:
        raise LimitReachedError(
            f"the commands and variables of the jobs of {client_name} in the queue may have at most"
            f" {exact_size(quotas.queued_bytes_max)}",
            hint="wait until some have started, or stop some; the operator sets clients.queued_bytes_max",
            limit="queued_bytes_max",
            most=quotas.queued_bytes_max,
        )
    for name, there, most in (
        ("queued_total_max", all_jobs, quotas.queued_total_max),
        ("queued_bytes_total_max", all_bytes, quotas.queued_bytes_total_max),
    ):
        if most and there > most:
            # do not tell a client what others have
            raise LimitReachedError(
                "the queue of this server is full",
                hint=f"try again later; the operator sets clients.{name}",
                limit=name,
                most=most,
            )


def delete(db: sqlite3.Connection, job_id: int) -> None:
    """Delete a job of the queue, as if it had never been there."""
    if db.execute(f"DELETE FROM jobs WHERE id = ? AND {WAITS}", (job_id,)).rowcount:
        forget_spec(db, job_id)
        db.execute("DELETE FROM dependencies WHERE id = ?", (job_id,))


def first_ready(
    db: sqlite3.Connection,
    client_name: str,
    without: Sequence[int],
    busy: Mapping[str, bool],
    *,
    without_gpus: bool = False,
) -> Head | None:
    """Return a client's first job of those that wait for nothing but their turn, nor a workspace."""
    more = " AND gpus = 0" if without_gpus else ""
    head = _first(db, "jobs_ready", client_name, without, more)
    if head is None or is_free(busy, head.workspace, exclusive=head.exclusive):
        return head
    # Thousands may wait for a workspace, so they are not gone through one by one. Of each workspace only the
    # first can be next: those that share it would else keep one that must be alone waiting for ever.
    heads = [
        _first_of(
            _first(db, "jobs_ready_of_workspace", client_name, without, more, workspace, exclusive)
            for exclusive in (False, True)
        )
        for workspace in _ready_workspaces(db, client_name)
    ]
    return _first_of(
        head for head in heads if head and is_free(busy, head.workspace, exclusive=head.exclusive)
    )


def _first_of(heads: Iterable[Head | None]) -> Head | None:
    return min(filter(None, heads), key=lambda head: (-head.priority, head.id), default=None)


def _first(
    db: sqlite3.Connection,
    index: str,
    client_name: str,
    without: Sequence[int],
    more: str,
    *workspace: str | bool,
) -> Head | None:
    marks = ", ".join("?" * len(without))
    only = " AND workspace = ? AND exclusive = ?" if workspace else ""
    row = db.execute(
        "SELECT id, limits, priority, (SELECT indices FROM arrays WHERE arrays.id = jobs.id),"
        " workspace, exclusive, gpus, mounts, allow, link, image, chosen_node, slurm_partition,"
        f" slurm_constraint FROM jobs INDEXED BY {index}"
        f" WHERE client_name = ?{only} AND {READY} AND array_id IS NULL AND id NOT IN ({marks}){more}"
        " ORDER BY priority DESC, id LIMIT 1",
        (client_name, *workspace, *without),
    ).fetchone()
    if row is None:
        return None
    at_once = None if row[3] is None else Array.of(row[3]).at_once
    return Head(
        row[0],
        client_name,
        limits_of(row[1]),
        row[2],
        at_once=at_once,
        workspace=row[4],
        exclusive=bool(row[5]),
        gpus=row[6],
        mounts=json.loads(row[7]) if row[7] else (),
        allow=tuple(row[8].split()),
        link=row[9],
        image=row[10],
        chosen_node=row[11],
        partition=row[12],
        constraint=row[13],
    )


def _ready_workspaces(db: sqlite3.Connection, client_name: str) -> list[str]:
    """Return the workspaces of a client's ready jobs, with "" for none; each by one step of an index."""
    next_one = (
        "SELECT min(workspace) FROM jobs INDEXED BY jobs_ready_of_workspace"
        f" WHERE client_name = :client AND {READY} AND array_id IS NULL"
    )
    query = (
        f"WITH RECURSIVE each_of(found) AS ({next_one} UNION ALL"
        f" SELECT ({next_one} AND workspace > each_of.found) FROM each_of WHERE found IS NOT NULL)"
        " SELECT found FROM each_of WHERE found IS NOT NULL"
    )
    return [name for (name,) in db.execute(query, {"client": client_name})]


def waiting(db: sqlite3.Connection, job_id: int) -> WaitingJob | None:
    """Return a job that waits for its turn alone, with what it is to execute; None when it no longer does."""
    row = db.execute(
        f"SELECT {COLUMNS}, {SPEC}, {_SECRETS}, (SELECT indices FROM arrays WHERE arrays.id = jobs.array_id)"
        f" FROM jobs WHERE id = ? AND {READY}",
        (job_id,),
    ).fetchone()
    return WaitingJob(job_of(row[:-3]), row[-3], row[-2], row[-1] or "") if row else None


def of_clients(db: sqlite3.Connection) -> list[tuple[str, int, int]]:
    """Return clients with jobs in the queue, with the number of their jobs, and that with elements."""
    query = "SELECT name, queued_jobs, queued_jobs + queued_more FROM clients WHERE queued_jobs > 0"
    return db.execute(query).fetchall()


def oldest_ready_ns(db: sqlite3.Connection) -> int | None:
    """When the job was put into the queue that has waited longest; None when none waits."""
    # ids are given in the order of the queue's times
    row = db.execute(
        f"SELECT queued_ns FROM jobs INDEXED BY jobs_queued WHERE {READY} ORDER BY id LIMIT 1"
    ).fetchone()
    return row[0] if row else None


def let_due(db: sqlite3.Connection, now_ns: int) -> tuple[list[str], int | None]:
    """Let jobs whose time has come wait for their turn alone; their clients, and the time of the next."""
    due = db.execute(
        f"UPDATE jobs SET not_before_ns = 0 WHERE id IN (SELECT id FROM jobs INDEXED BY jobs_early"
        f" WHERE {_EARLY} AND not_before_ns <= ? LIMIT ?) RETURNING client_name",
        (now_ns, _CHANGED_MAX),
    ).fetchall()
    return sorted({client_name for (client_name,) in due}), _first_due_ns(db)


def shift_pauses(db: sqlite3.Connection, shift_ns: int, now_ns: int) -> int | None:
    """Let attempts wait their whole time, though the clock was set by *ns*; the next due time.

    No pause is longer than it may be: while no worker ran, nobody has seen by how much the clock was set.
    """
    db.execute(
        # what was queued since then, by the new clock, is right
        "UPDATE jobs SET not_before_ns = min(max(not_before_ns + iif(queued_ns <= ?, ?, 0), 1), ?)"
        f" WHERE id IN (SELECT id FROM jobs INDEXED BY jobs_early WHERE {_EARLY} AND attempt > 1)",
        (now_ns - shift_ns, shift_ns, now_ns + BACKOFF_SECONDS_MAX * 10**9),
    )
    return _first_due_ns(db)


def _first_due_ns(db: sqlite3.Connection) -> int | None:
    row = db.execute(f"SELECT min(not_before_ns) FROM jobs INDEXED BY jobs_early WHERE {_EARLY}").fetchone()
    first: int | None = row[0]
    return first


def set_held(db: sqlite3.Connection, job_id: int, held: bool) -> Job | None:  # noqa: FBT001  by position
    """Hold a job, or release it; None when it does not wait any more."""
    job = _job_or_none(_changed(db, "held = ?", (held,), job_id, WAITS))
    if job is not None and job.array is not None and not held:
        array_rows.release(db, job_id)
    return job


def hold_element(db: sqlite3.Connection, element: Element) -> Job | None:
    """Hold an element that had no turn yet; None when it does not wait without a row any more."""
    job_id = array_rows.take(db, element)
    return None if job_id is None else set_held(db, job_id, held=True)


def cancel_element(db: sqlite3.Connection, element: Element, detail: str, now_ns: int) -> Job | None:
    """End an element that had no turn yet; None when it does not wait without a row any more."""
    job_id = array_rows.take(db, element)
    return None if job_id is None else end_without_start(db, job_id, EndReason.CANCELLED, detail, now_ns)


def cancel_array(
    db: sqlite3.Connection, array_id: int, detail: str, now_ns: int, most: int = _CHANGED_MAX
) -> list[int]:
    """Cancel the elements of an array that wait: at once all without a row, and *most* of those with one.

    Gives the ids of these; fewer than *most* when none is left.
    """
    array_rows.stop(db, array_id, detail, now_ns)
    cancelled = array_rows.waiting_rows(db, array_id, most)
    for job_id in cancelled:
        _end(db, job_id, EndReason.CANCELLED, detail, now_ns, "id")
    return cancelled


def admit(
    db: sqlite3.Connection, job_id: int, limits: Limits, now_ns: int, gpu_names: str = ""
) -> Job | None:
    """Take a job out of the queue; None when it is not there, or not to be started now."""
    transition(JobState.QUEUED, JobEvent.ADMITTED)
    return _job_or_none(
        _changed(
            db,
            "start_ns = ?, limits = ?, gpu_names = ?",
            (now_ns, limits_text(limits), gpu_names),
            job_id,
            READY,
        )
    )


def put_back(db: sqlite3.Connection, job_id: int, now_ns: int) -> None:
    """Put an admitted job back to where it was: it is older than most.

    An element of an array that was stopped meanwhile is cancelled.
    """
    transition(JobState.STARTING, JobEvent.PUT_BACK)
    row = _changed(db, "start_ns = 0", (), job_id, "state IS NULL AND start_ns > 0", "array_id")
    if row is not None and row[0] is not None and array_rows.is_stopped(db, row[0]):
        _end(db, job_id, EndReason.CANCELLED, STOPPED_BEFORE_START, now_ns, "id")


def end_without_start(
    db: sqlite3.Connection, job_id: int, reason: EndReason, detail: str, now_ns: int
) -> Job | None:
    """End a job that was not executed; None when it is not (any more) where such an end may come."""
    return _job_or_none(_end(db, job_id, reason, detail, now_ns, COLUMNS))


def _end(
    db: sqlite3.Connection, job_id: int, reason: EndReason, detail: str, now_ns: int, columns: str
) -> Row | None:
    if reason is EndReason.CANCELLED and array_rows.is_array(db, job_id):
        # those with a row are few: none was started
        cancel_array(db, job_id, detail, now_ns, array_rows.TAKEN_MAX)
        query = f"SELECT {columns} FROM jobs WHERE id = ? AND state IS NOT NULL"
        ended: Row | None = db.execute(query, (job_id,)).fetchone()
        return ended
    if reason is EndReason.CANCELLED:
        state, where = transition(JobState.QUEUED, JobEvent.CANCELLED), WAITS
    else:
        state = transition(JobState.STARTING, JobEvent.START_FAILED)
        where = "state IS NULL AND id IN (SELECT id FROM specs)"
    # an end is never before the beginning, even if the clock is set
    changes = (
        "start_ns = 0, state = ?, end_ns = max(?, queued_ns), reason = ?, detail = ?, output_bytes = 0,"
        " held = 0, not_before_ns = 0, unmet = 0"
    )
    row = _changed(db, changes, (state, now_ns, reason, detail), job_id, where, f"array_id, {columns}")
    if row is None:
        return None
    forget_spec(db, job_id)
    db.execute("DELETE FROM dependencies WHERE id = ?", (job_id,))
    if row[0] is not None:
        array_rows.element_ended(db, row[0], reason, None, now_ns)
    return row[1:]


def settle(db: sqlite3.Connection, job_id: int) -> None:
    """Note that a job was executed: what it executes is kept only where there may be another attempt."""
    if not db.execute(
        "UPDATE specs SET executed = 1 WHERE id = ? AND (SELECT attempt FROM jobs WHERE jobs.id = specs.id)",
        (job_id,),
    ).rowcount:
        forget_spec(db, job_id)


def retry(db: sqlite3.Connection, job: Job, now_ns: int, *, was_stopped: bool) -> Job | None:
    """Put the next attempt of a job into the queue, whose end is in the table by now; None: there is none.

    What waited for the job waits for that.
    """
    row = db.execute(f"SELECT {SPEC} FROM jobs JOIN specs USING (id) WHERE id = ?", (job.id,)).fetchone()
    pause = None
    if job.array_id is not None and array_rows.is_stopped(db, job.array_id):
        was_stopped = True
    if row is not None and not was_stopped:
        # an older version has kept what another one may not take any more
        with suppress(InvalidJobError, KeyError, TypeError):
            pause = Retry(**json.loads(row[0])["retry"]).pause_after(job)
    if pause is None:
        forget_spec(db, job.id)
        return None
    kept = (
        "client_name, command, limits, name, labels, split_stderr, input, workdir, priority, waits_for,"
        " array_id, array_index, workspace, exclusive, image, read_only, artifacts_required, mounts, allow,"
        " link, gpus, chosen_node, slurm_partition, slurm_constraint"
    )
    next_id = db.execute(
        f"INSERT INTO jobs ({kept}, start_ns, queued_ns, not_before_ns, attempt, artifacts)"
        f" SELECT {kept}, 0, ?, ?, attempt + 1, iif(artifacts = '', '', ?) FROM jobs WHERE id = ?",
        (now_ns, now_ns + int(pause * 1e9) if pause else 0, ArtifactsState.PENDING, job.id),
    ).lastrowid
    db.execute("UPDATE jobs SET retried_as = ? WHERE id = ?", (next_id, job.id))
    if job.array_id is not None:
        array_rows.element_retried(db, job.array_id)
    db.execute("UPDATE specs SET executed = 0 WHERE id = ?", (job.id,))
    db.execute("UPDATE specs SET id = ? WHERE id = ?", (next_id, job.id))
    db.execute("UPDATE dependencies SET after_id = ? WHERE after_id = ?", (next_id, job.id))
    return job_of(db.execute(f"SELECT {COLUMNS} FROM jobs WHERE id = ?", (next_id,)).fetchone())


def forget_spec(db: sqlite3.Connection, job_id: int) -> None:
    """Forget what a job was to execute."""
    db.execute("DELETE FROM specs WHERE id = ?", (job_id,))


def has_secrets(db: sqlite3.Connection, token: str) -> bool:
    """Whether a job has these secrets."""
    return db.execute("SELECT 1 FROM specs WHERE secrets = ? LIMIT 1", (token,)).fetchone() is not None


def uploads(db: sqlite3.Connection) -> set[tuple[str, str]]:
    """Return the uploads that jobs of the queue need: their clients and names."""
    # an environment may have a variable of that name, too
    found = db.execute("SELECT client_name, spec FROM specs WHERE instr(spec, '\"upload\": ') > 0")
    named = ((client_name, json.loads(text).get("upload")) for client_name, text in found)
    return {(client_name, name) for client_name, name in named if name}


def spent_secrets(db: sqlite3.Connection) -> list[str]:
    """Secrets that no job has any more."""
    return [token for (token,) in db.execute("SELECT name FROM spent_secrets")]


def admitted(db: sqlite3.Connection) -> list[int]:
    """Return the jobs that were admitted, and of which it is not known here whether they were executed."""
    query = (
        "SELECT id FROM jobs INDEXED BY jobs_alive WHERE state IS NULL AND start_ns > 0"
        " AND id IN (SELECT id FROM specs WHERE executed = 0)"
    )
    return [job_id for (job_id,) in db.execute(query)]


def _changed(
    db: sqlite3.Connection,
    changes: str,
    values: tuple[object, ...],
    job_id: int,
    where: str,
    columns: str = COLUMNS,
) -> Row | None:
    """Change a job that is in some state, and give these columns of it; None when it is not."""
    rows = db.execute(
        f"UPDATE jobs SET {changes} WHERE id = ? AND {where} RETURNING {columns}", (*values, job_id)
    ).fetchall()
    return rows[0] if rows else None


def _job_or_none(row: Row | None) -> Job | None:
    return None if row is None else job_of(row)
