"""The jobs of a gateway in the table of a node: known by their request ids, with the ends still to tell.

Each function is called in the table's thread, in a transaction (`JobStore.transact`).
"""

import sqlite3
from collections.abc import Collection
from typing import Final

from pjw.model import Job
from pjw.worker.job_rows import COLUMNS, job_of

# the request ids of such jobs begin with this; the gateway's uuid follows
PREFIX: Final = "cluster:"
# the words of the partial indexes (worker/schema.py)
_OF_CLUSTER: Final = "request_id >= 'cluster:' AND request_id < 'cluster;'"
# The node tells so many ends at a time; the next ones follow their acknowledgements.
TOLD_AT_ONCE: Final = 100


def request_id_of(uuid: str) -> str:
    """Return the request id of a job."""
    return PREFIX + uuid


def table_id(db: sqlite3.Connection) -> str:
    """Return which table this is; see worker/schema.py."""
    (found,) = db.execute("SELECT id FROM identity").fetchone()
    return str(found)


def find(db: sqlite3.Connection, uuid: str) -> Job | None:
    """Return the job with this uuid, as the table has it; None when none was made."""
    row = db.execute(
        f"SELECT {COLUMNS} FROM jobs INDEXED BY jobs_of_cluster WHERE {_OF_CLUSTER} AND request_id = ?",
        (request_id_of(uuid),),
    ).fetchone()
    return job_of(row) if row else None


def ends_to_tell(db: sqlite3.Connection, without: Collection[str]) -> list[tuple[str, Job]]:
    """Jobs with unacknowledged ends, and their uuids; those in *without* are left out."""
    marks = ", ".join("?" * len(without))
    rows = db.execute(
        f"SELECT {COLUMNS}, request_id FROM jobs INDEXED BY jobs_to_report"
        f" WHERE state IS NOT NULL AND reported = 0 AND {_OF_CLUSTER} AND request_id NOT IN ({marks})"
        " ORDER BY id LIMIT ?",
        (*map(request_id_of, without), TOLD_AT_ONCE),
    )
    return [(row[-1].removeprefix(PREFIX), job_of(row[:-1])) for row in rows]


def told(db: sqlite3.Connection, uuid: str) -> None:
    """Note that the gateway has written down the end of this job."""
    db.execute(f"UPDATE jobs SET reported = 1 WHERE {_OF_CLUSTER} AND request_id = ?", (request_id_of(uuid),))


def number_client(db: sqlite3.Connection, name: str, number: int) -> str:
    """Give a client the number that it has at the gateway; empty, or else the conflict that forbids it.

    The number decides the client's user id on all nodes: a node where another client has it must not serve.
    """
    row = db.execute("SELECT number FROM clients WHERE name = ?", (name,)).fetchone()
    if row is not None:
        return "" if row[0] == number else f"{name} has the number {row[0]} here, and {number} at the gateway"
    row = db.execute("SELECT name FROM clients WHERE number = ?", (number,)).fetchone()
    if row is not None:
        return f"the number {number} of {name} at the gateway is that of {row[0]} here"
    db.execute("INSERT INTO clients (name, number) VALUES (?, ?)", (name, number))
    return ""


def tell_again(db: sqlite3.Connection, uuid: str) -> None:
    """Have the end of this job told once more."""
    db.execute(f"UPDATE jobs SET reported = 0 WHERE {_OF_CLUSTER} AND request_id = ?", (request_id_of(uuid),))
