"""Rows of ended jobs: their removal, and the choice of the next one when more is kept than allowed.

A transaction around several of these calls is the caller's.
"""

import sqlite3
from collections.abc import Sequence
from typing import Final

from pjw.worker.settings import Retention


# The job that goes first when more is kept than allowed, by the member of Retention that bounds it; `:most`
# is its value. A total is brought down at the cost of the client that has most: no client can push the jobs
# of others out. Its bound is inside the question for that client: outside, SQLite would ask it again for each
# of the client's jobs.
def _to_prune(which: str = "", who: str = "") -> dict[str, str]:
    return {
        "age_seconds": "SELECT id FROM jobs WHERE state IS NOT NULL AND end_ns < :now - :most * 1000000000"
        f"{which} ORDER BY end_ns LIMIT 1",
        "jobs_per_client": "SELECT id FROM jobs WHERE state IS NOT NULL AND client_name ="
        f" (SELECT name FROM clients WHERE ended_jobs > :most{who} LIMIT 1){which} ORDER BY end_ns LIMIT 1",
        "bytes_per_client": "SELECT id FROM jobs WHERE output_bytes + artifact_bytes > 0 AND client_name ="
        f" (SELECT name FROM clients WHERE ended_bytes > :most{who} LIMIT 1){which} ORDER BY end_ns LIMIT 1",
        "jobs_total": "SELECT id FROM jobs WHERE state IS NOT NULL AND client_name ="
        " (SELECT name FROM clients WHERE (SELECT sum(ended_jobs) FROM clients) > :most"
        f"{who} ORDER BY ended_jobs DESC LIMIT 1){which} ORDER BY end_ns LIMIT 1",
        "bytes_total": "SELECT id FROM jobs WHERE output_bytes + artifact_bytes > 0 AND client_name ="
        " (SELECT name FROM clients WHERE (SELECT sum(ended_bytes) FROM clients) > :most"
        f"{who} ORDER BY ended_bytes DESC LIMIT 1){which} ORDER BY end_ns LIMIT 1",
    }


_TO_PRUNE: Final = _to_prune()
# A node keeps an ended job until the gateway has written its end down. A client whose ended jobs are all of
# that kind is not asked for: others may have more than may be kept.
_TOLD: Final = "(reported OR coalesce(request_id, '') < 'cluster:' OR request_id >= 'cluster;')"
_TOLD_TO_PRUNE: Final = _to_prune(
    f" AND {_TOLD}",
    f" AND EXISTS (SELECT 1 FROM jobs WHERE state IS NOT NULL AND client_name = clients.name AND {_TOLD})",
)


def remove(db: sqlite3.Connection, job_id: int) -> bool:
    """Move the row of an ended job to the removals, until its files are gone; return whether it could go.

    One whose end has had no effect on others yet stays.
    """
    query = (
        "DELETE FROM jobs WHERE id = ? AND state IS NOT NULL"
        " AND NOT EXISTS (SELECT 1 FROM dependencies WHERE after_id = jobs.id)"
    )
    if not db.execute(query, (job_id,)).rowcount:
        return False
    db.execute("INSERT INTO removals VALUES (?)", (job_id,))
    return True


def prune(db: sqlite3.Connection, retention: Retention, now_ns: int, count: int) -> list[int]:
    """Remove at most *count* ended jobs that are more than may be kept; return their ids."""
    pruned: list[int] = []
    while len(pruned) < count:
        job_id = _first_to_prune(db, retention, now_ns)
        if job_id is None or not remove(db, job_id):
            break
        pruned.append(job_id)
    return pruned


def _first_to_prune(db: sqlite3.Connection, retention: Retention, now_ns: int) -> int | None:
    for name, query in (_TOLD_TO_PRUNE if retention.keeps_untold else _TO_PRUNE).items():
        most = getattr(retention, name)
        row = db.execute(query, {"most": most, "now": now_ns}).fetchone() if most else None
        if row is not None:
            return int(row[0])
    return None


def removals(db: sqlite3.Connection) -> list[int]:
    """Return the jobs whose rows are gone, and whose files may still be there."""
    return [job_id for (job_id,) in db.execute("SELECT id FROM removals")]


def removed(db: sqlite3.Connection, job_ids: Sequence[int]) -> None:
    """Forget removals whose files are gone as well."""
    db.executemany("DELETE FROM removals WHERE id = ?", [(job_id,) for job_id in job_ids])


def first_end_ns(db: sqlite3.Connection, *, told: bool) -> int | None:
    """Return when the first job ended, *told*: of those that may be removed; None when none has."""
    which = f" AND {_TOLD}" if told else ""
    query = f"SELECT end_ns FROM jobs WHERE state IS NOT NULL{which} ORDER BY end_ns LIMIT 1"
    row = db.execute(query).fetchone()
    return row[0] if row else None


def ended_bytes(db: sqlite3.Connection, client_name: str) -> tuple[int, int]:
    """Return the bytes that a client's ended jobs keep, and those of all clients."""
    query = "SELECT total(ended_bytes * (name = ?)), total(ended_bytes) FROM clients"
    own, all_clients = db.execute(query, (client_name,)).fetchone()
    return int(own), int(all_clients)


def totals(db: sqlite3.Connection) -> list[tuple[str, int, int]]:
    """Return for each client the number of its ended jobs, and the bytes of their output."""
    return db.execute("SELECT name, ended_jobs, ended_bytes FROM clients").fetchall()
