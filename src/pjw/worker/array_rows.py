"""Arrays in the table of jobs: a row for each array, and for those of its elements that had their turn.

Each function is a part of a transaction, and is called in the table's thread. Triggers keep the number of
waiting elements (schema.py), whichever code changes an element's row; the results of their ends are counted
here.
"""

import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from pjw.arrays import Array, Element
from pjw.errors import JobNotFoundError, LimitReachedError
from pjw.model import EndReason, Job, JobState
from pjw.worker.job_rows import COLUMNS, READY, WAITS, from_ns, job_of

# Elements that are held or stopped one by one cost a row each before their turn, and are skipped then.
TAKEN_MAX: Final = 10_000
# of an element that did not end by itself
_FAILED: Final = 1
# the columns that an element takes from its array
_KEPT: Final = (
    "client_name, command, limits, labels, split_stderr, workdir, priority, attempt, workspace, exclusive,"
    " image, read_only, artifacts, artifacts_required, mounts, allow, link, gpus, chosen_node,"
    " slurm_partition, slurm_constraint"
)


def make(db: sqlite3.Connection, array_id: int, client_name: str, indices: str) -> None:
    """Make a new job, whose row is there, an array."""
    count = len(Array.of(indices))
    db.execute(
        "INSERT INTO arrays (id, client_name, indices, count, unseen, waiting) VALUES (?, ?, ?, ?, ?, ?)",
        (array_id, client_name, indices, count, count, count),
    )


def draw(db: sqlite3.Connection, array_id: int, without: Sequence[int]) -> tuple[int, int] | None:
    """Return the id and the index of the array's next element to start; None when there is none.

    One that was put back, or waits for another attempt, starts before one that has no row yet. That one gets
    its row now.
    """
    row = db.execute(
        "SELECT next, unseen, indices FROM arrays WHERE id = ? AND stopped_ns = 0 AND EXISTS"
        f" (SELECT 1 FROM jobs WHERE jobs.id = arrays.id AND {READY})",
        (array_id,),
    ).fetchone()
    if row is None:
        return None
    place, unseen, indices = row
    marks = ", ".join("?" * len(without))
    known = db.execute(
        "SELECT id, array_index FROM jobs INDEXED BY jobs_waiting_of_array WHERE array_id = ?"
        f" AND array_id IS NOT NULL AND {WAITS} AND held = 0 AND not_before_ns = 0 AND id NOT IN ({marks})"
        " ORDER BY id LIMIT 1",
        (array_id, *without),
    ).fetchone()
    if known is not None:
        return int(known[0]), int(known[1])
    if not unseen:
        return None
    while db.execute("DELETE FROM array_taken WHERE array_id = ? AND place = ?", (array_id, place)).rowcount:
        db.execute("UPDATE arrays SET taken = taken - 1 WHERE id = ?", (array_id,))
        place += 1
    db.execute("UPDATE arrays SET next = ? WHERE id = ?", (place + 1, array_id))
    index = Array.of(indices).index(place)
    return _see(db, Element(array_id, index)), index


def take(db: sqlite3.Connection, element: Element) -> int | None:
    """Give an element that waits a row out of its turn; its id, None when it does not wait without one.

    Raises LimitReachedError when too many of the array's elements had one so.
    """
    row = db.execute(
        "SELECT next, unseen, taken, indices FROM arrays WHERE id = ?", (element.array_id,)
    ).fetchone()
    if row is None or not row[1]:
        return None
    first, _, taken, indices = row
    place = Array.of(indices).place(element.index)
    if place is None or place < first:
        return None
    if taken >= TAKEN_MAX:
        raise LimitReachedError(
            f"at most {TAKEN_MAX} elements of an array can be held or stopped one by one before their turn",
            hint=f"hold or stop the whole array, {element.array_id}",
        )
    if not db.execute("INSERT OR IGNORE INTO array_taken VALUES (?, ?)", (element.array_id, place)).rowcount:
        return None
    db.execute("UPDATE arrays SET taken = taken + 1 WHERE id = ?", (element.array_id,))
    return _see(db, element)


def with_row(db: sqlite3.Connection, element: Element, client_name: str) -> int:
    """Return the id of a client's element in its newest attempt, to wait for; make a missing row now.

    Raises JobNotFoundError, and LimitReachedError as `take`.
    """
    found = find(db, element, client_name)
    if found is None:
        raise JobNotFoundError(str(element))
    if found.id:
        return found.id
    # one that was cancelled with its array, and has no row, ends as the array does
    return take(db, element) or element.array_id


def _see(db: sqlite3.Connection, element: Element) -> int:
    """Insert the row of an element that had none; return its id. Its command is stored with its array."""
    job_id = db.execute(
        f"INSERT INTO jobs ({_KEPT}, start_ns, queued_ns, array_id, array_index)"
        f" SELECT {_KEPT}, 0, queued_ns, id, ? FROM jobs WHERE id = ?",
        (element.index, element.array_id),
    ).lastrowid
    assert job_id is not None
    db.execute(
        "INSERT INTO specs (id, client_name, bytes, spec)"
        " SELECT id, client_name, length(command), '' FROM jobs WHERE id = ?",
        (job_id,),
    )
    db.execute("UPDATE arrays SET unseen = unseen - 1 WHERE id = ?", (element.array_id,))
    return job_id


def is_stopped(db: sqlite3.Connection, array_id: int) -> bool:
    """Return whether no more elements of an array shall start."""
    row = db.execute("SELECT stopped_ns FROM arrays WHERE id = ?", (array_id,)).fetchone()
    return row is None or row[0] > 0


def being_stopped(db: sqlite3.Connection) -> list[int]:
    """Return arrays that were stopped, and still have a waiting element: a crash broke the stop off."""
    query = "SELECT id FROM arrays INDEXED BY arrays_being_stopped WHERE stopped_ns > 0 AND waiting > 0"
    return [array_id for (array_id,) in db.execute(query)]


def stop(db: sqlite3.Connection, array_id: int, detail: str, now_ns: int) -> bool:
    """Cancel all elements of an array without a row, and let none get one; return whether it is one.

    Those with a row are ended one by one.
    """
    found = db.execute(
        "UPDATE arrays SET stopped_ns = ?, cancelled = cancelled + unseen, waiting = waiting - unseen,"
        " worst = max(worst, ?), unseen = 0 WHERE id = ? AND stopped_ns = 0",
        (now_ns, _FAILED, array_id),
    ).rowcount
    if found:
        db.execute("UPDATE jobs SET detail = ? WHERE id = ? AND state IS NULL", (detail, array_id))
        close_if_over(db, array_id, now_ns)
    return bool(found) or is_array(db, array_id)


def is_array(db: sqlite3.Connection, job_id: int) -> bool:
    """Return whether a job is an array."""
    return db.execute("SELECT 1 FROM arrays WHERE id = ?", (job_id,)).fetchone() is not None


def waiting_rows(db: sqlite3.Connection, array_id: int, most: int) -> list[int]:
    """Return elements of an array that wait and have a row: *most* of them, or all."""
    query = (
        "SELECT id FROM jobs INDEXED BY jobs_waiting_of_array WHERE array_id = ? AND array_id IS NOT NULL"
        f" AND {WAITS} LIMIT ?"
    )
    return [job_id for (job_id,) in db.execute(query, (array_id, most))]


def release(db: sqlite3.Connection, array_id: int) -> None:
    """Release the elements of an array that are held one by one."""
    db.execute(
        "UPDATE jobs SET held = 0 WHERE id IN (SELECT id FROM jobs INDEXED BY jobs_waiting_of_array"
        f" WHERE array_id = ? AND array_id IS NOT NULL AND {WAITS} AND held > 0)",
        (array_id,),
    )


def element_ended(
    db: sqlite3.Connection, array_id: int, reason: EndReason | None, code: int | None, now_ns: int
) -> None:
    """Count the end of an element, which is in the table by now, and end the array when it was the last one.

    *code* is its exit code; None when it has none.
    """
    if reason is EndReason.COMPLETED and code == 0:
        column, worst = "succeeded", 0
    else:
        column, worst = "cancelled" if reason is EndReason.CANCELLED else "failed", max(code or 0, _FAILED)
    db.execute(
        f"UPDATE arrays SET {column} = {column} + 1, worst = max(worst, ?) WHERE id = ?", (worst, array_id)
    )
    close_if_over(db, array_id, now_ns)


def element_retried(db: sqlite3.Connection, array_id: int) -> None:
    """Count an ended element as waiting again, as its next attempt."""
    db.execute("UPDATE arrays SET waiting = waiting + 1 WHERE id = ?", (array_id,))


def close_if_over(db: sqlite3.Connection, array_id: int, now_ns: int) -> None:
    """End an array all of whose elements have ended."""
    row = db.execute(
        "SELECT count, started_ns, stopped_ns, failed, worst FROM arrays"
        " WHERE id = ? AND succeeded + failed + cancelled = count",
        (array_id,),
    ).fetchone()
    if row is None:
        return
    count, started_ns, stopped_ns, failed, worst = row
    code, detail = worst, None
    if failed == count and not _was_one_started(db, array_id):
        # the start of each had begun, no more
        started_ns = 0
    if started_ns:
        reason = EndReason.STOPPED if stopped_ns else EndReason.COMPLETED
    else:
        reason, code = EndReason.START_FAILED if failed else EndReason.CANCELLED, None
        detail = None if stopped_ns else f"none of its {count} elements was started"
    db.execute(
        "UPDATE jobs SET start_ns = ?, state = ?, end_ns = max(?, queued_ns, ?), reason = ?, exit_code = ?,"
        " detail = coalesce(?, detail), output_bytes = 0, held = 0, not_before_ns = 0, unmet = 0"
        " WHERE id = ? AND state IS NULL",
        (started_ns, JobState.EXITED, now_ns, started_ns, reason, code, detail, array_id),
    )
    db.execute("DELETE FROM specs WHERE id = ?", (array_id,))
    db.execute("DELETE FROM dependencies WHERE id = ?", (array_id,))


def _was_one_started(db: sqlite3.Connection, array_id: int) -> bool:
    query = (
        "SELECT 1 FROM jobs INDEXED BY jobs_of_array WHERE array_id = ? AND array_id IS NOT NULL"
        " AND start_ns > 0 LIMIT 1"
    )
    return db.execute(query, (array_id,)).fetchone() is not None


def find(db: sqlite3.Connection, element: Element, client_name: str | None) -> Job | None:
    """Return an element in its newest attempt, of one client's array or any; None if there is none.

    One without a row has no id. None, too, for one whose row was removed.
    """
    array = _array_job(db, element.array_id, client_name)
    if array is None or array.array is None:
        return None
    row = db.execute(
        f"SELECT {COLUMNS} FROM jobs INDEXED BY jobs_of_array WHERE array_id = ? AND array_index = ?"
        " AND array_id IS NOT NULL ORDER BY id DESC LIMIT 1",
        (element.array_id, element.index),
    ).fetchone()
    if row is not None:
        return job_of(row)
    place = Array.of(array.array.indices).place(element.index)
    first, stopped_ns = db.execute(
        "SELECT next, stopped_ns FROM arrays WHERE id = ?", (element.array_id,)
    ).fetchone()
    was_taken = "SELECT 1 FROM array_taken WHERE array_id = ? AND place = ?"
    if place is None or place < first or db.execute(was_taken, (element.array_id, place)).fetchone():
        return None
    unseen = replace(
        array,
        id=0,
        name="",
        state=JobState.QUEUED,
        start=array.queued or array.start,
        array=None,
        array_id=element.array_id,
        array_index=element.index,
        detail="",
        end=None,
        exit_status=None,
        reason=None,
        output_bytes=None,
    )
    if not stopped_ns:
        return unseen
    return replace(
        unseen,
        state=JobState.EXITED,
        end=from_ns(stopped_ns),
        reason=EndReason.CANCELLED,
        detail=array.detail,
        output_bytes=0,
    )


def _array_job(db: sqlite3.Connection, array_id: int, client_name: str | None) -> Job | None:
    whose, arguments = (
        ("INDEXED BY jobs_of_client WHERE client_name = ? AND", (client_name,))
        if client_name is not None
        else ("WHERE", ())
    )
    row = db.execute(f"SELECT {COLUMNS} FROM jobs {whose} id = ?", (*arguments, array_id)).fetchone()
    return job_of(row) if row else None


def rows_of(db: sqlite3.Connection, array_id: int, most: int) -> list[int]:
    """Return elements of an array that have a row: *most* of them, or all."""
    query = "SELECT id FROM jobs INDEXED BY jobs_of_array WHERE array_id = ? AND array_id IS NOT NULL LIMIT ?"
    return [job_id for (job_id,) in db.execute(query, (array_id, most))]


def variables(array_id: int, index: int, indices: str) -> dict[str, str]:
    """Return the environment variables of an element's command."""
    array = Array.of(indices)
    values = {"ID": array_id, "INDEX": index, "COUNT": len(array), "MIN": array.lowest, "MAX": array.highest}
    return {f"PJW_ARRAY_{name}": str(value) for name, value in values.items()}
