"""Pages of the table of jobs. A page costs the same in any table, whatever the request."""

import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Final

from pjw.model import Job, JobState
from pjw.worker.job_rows import COLUMNS, job_of

# A page of long commands ends early, so that it fits into the 4 MiB that gRPC's clients take, and so that no
# client's list fills the memory: a command may have half a megabyte.
PAGE_CHARACTERS: Final = 256 * 1024
# So many rows are looked at for one page at most: where few fit, it has few jobs, or none, and the next goes
# on. They take the table a millisecond, in which no other call can use it; at most 60 ms, where each has as
# many and as long labels as it may, and all of them are requested.
ROWS_LOOKED_AT: Final = 2_000
_ID_MAX: Final = 2**63 - 1


@dataclass(frozen=True, slots=True)
class JobFilter:
    """The wanted jobs: in one of these states, with all of these labels, of this name, of this array.

    An empty field sets no condition.
    """

    states: frozenset[JobState] = frozenset()
    labels: Mapping[str, str] = field(default_factory=dict)
    name: str = ""
    array_id: int | None = None

    def fits(self, job: Job) -> bool:
        """Return whether a job has the labels and the name, whatever its state."""
        return self.name in ("", job.name) and self.labels.items() <= dict(job.labels).items()


ALL_JOBS: Final = JobFilter()
_QUEUED: Final = frozenset({JobState.QUEUED})


@dataclass(frozen=True, slots=True)
class Page:
    """Some jobs, and the id behind which the next page begins; None when there is none.

    The table does not know the state of unfinished jobs: a caller that does leaves out those that do not fit.
    """

    jobs: Sequence[Job]
    next_after: int | None


def read_page(
    db: sqlite3.Connection,
    client_name: str | None,
    after: int,
    count: int,
    wanted: JobFilter,
    newest_first: bool,  # noqa: FBT001  called by position, from another thread
) -> Page:
    """Return at most *count* jobs that fit, of one client or all, behind id *after* (0: from the first)."""
    begun = wanted.states - _QUEUED
    if begun != wanted.states and begun and not any(state.final for state in begun):
        # each of the two has its own index
        parts = [
            read_page(db, client_name, after, count, replace(wanted, states=states), newest_first)
            for states in (_QUEUED, begun)
        ]
        return _merged(parts, count, newest_first)
    # the page, and the rows among which it looks
    query, looked_at = (_Query(newest_first, after, client_name) for _ in range(2))
    last: int | None = None
    if wanted.array_id is not None:
        # its elements have their own index, and there is one for each that ran
        query.add("array_id = ?", wanted.array_id)
    if wanted.name:
        # lets SQLite choose the index of names
        query.add("name = ? AND name <> ''", wanted.name)
    bounded = bool(
        wanted.labels or wanted.states or wanted.array_id is not None or (wanted.name and client_name is None)
    )
    if wanted.states == _QUEUED:
        bounded = bool(wanted.labels or wanted.name or wanted.array_id is not None)
        for each in (query, looked_at):
            each.source = f"jobs INDEXED BY jobs_queued{'' if client_name is None else '_of_client'}"
            each.add("state IS NULL AND start_ns = 0")
    elif wanted.states and not any(state.final for state in wanted.states):
        # few, and in an index of their own
        query.source, bounded = "jobs INDEXED BY jobs_alive", False
        query.add("state IS NULL AND start_ns > 0")
    elif wanted.states:
        # NULL: perhaps the end of an ended job is not written yet
        marks = ", ".join("?" * len(wanted.states))
        query.add(f"(state IN ({marks}) OR state IS NULL)", *sorted(wanted.states))
    if bounded and (last := _last_to_look_at(db, looked_at)) is not None:
        query.add(f"id {query.until} ?", last)
    for key, value in wanted.labels.items():
        query.add("json_extract(labels, ?) = ?", f'$."{key}"', value)
    jobs: list[Job] = []
    characters = 0
    with closing(db.execute(query.select(COLUMNS), (*query.arguments, count))) as rows:
        for row in rows:
            jobs.append(job_of(row))
            characters += _characters(jobs[-1])
            if characters >= PAGE_CHARACTERS:
                break
    if len(jobs) == count or characters >= PAGE_CHARACTERS:
        last = jobs[-1].id
    return Page(jobs, last)


def _merged(parts: Sequence[Page], count: int, newest_first: bool) -> Page:  # noqa: FBT001
    """Merge two pages; end at the earlier of their ends, so that no job before it is left out."""
    ends = [part.next_after for part in parts if part.next_after is not None]
    last = (max if newest_first else min)(ends, default=None)
    jobs = sorted((job for part in parts for job in part.jobs), key=lambda job: job.id, reverse=newest_first)
    if last is not None:
        jobs = [job for job in jobs if (job.id >= last if newest_first else job.id <= last)]
    if len(jobs) > count:
        jobs = jobs[:count]
        last = jobs[-1].id
    return Page(jobs, last)


class _Query:
    def __init__(self, newest_first: bool, after: int, client_name: str | None) -> None:  # noqa: FBT001
        self.source = "jobs"
        self.until: Final = ">=" if newest_first else "<="
        self._order: Final = "id DESC" if newest_first else "id"
        self._conditions: Final = ["id < ?" if newest_first else "id > ?"]
        self.arguments: Final[list[str | int]] = [after or _ID_MAX if newest_first else after]
        if client_name is not None:
            self.add("client_name = ?", client_name)

    def add(self, condition: str, *arguments: str | int) -> None:
        self._conditions.append(condition)
        self.arguments.extend(arguments)

    def select(self, columns: str) -> str:
        conditions = " AND ".join(self._conditions)
        order = f"ORDER BY {self._order} LIMIT ?"
        return f"SELECT {columns} FROM {self.source} WHERE {conditions} {order}"  # noqa: S608  all ours


def _last_to_look_at(db: sqlite3.Connection, query: _Query) -> int | None:
    """Return the row at which a page ends however few fit; None when fewer rows are left."""
    row = db.execute(f"{query.select('id')} OFFSET ?", (*query.arguments, 1, ROWS_LOOKED_AT - 1)).fetchone()
    return row[0] if row else None


def _characters(job: Job) -> int:
    return len(job.command) + sum(len(key) + len(value) for key, value in job.labels.items())
