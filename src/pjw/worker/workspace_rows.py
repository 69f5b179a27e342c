"""Workspaces in the table of jobs: their names, their sizes, and the jobs that name them.

The images that clients have loaded are among them, by keys that are names of no workspace (image_rows.py).

Each function is a part of a transaction, and is called in the table's thread.
"""

import sqlite3
from collections.abc import Mapping
from typing import Final

from pjw.amounts import exact_size
from pjw.errors import LimitReachedError, WorkspaceBusyError, WorkspaceNotFoundError
from pjw.model import TOO_DEEP, JobSpec, Workspace, is_image_key
from pjw.worker.job_rows import from_ns
from pjw.worker.settings import Quotas

# workspaces of a client that jobs use, each with whether one of them is alone there
NOTHING_BUSY: Final[Mapping[str, bool]] = {}

_USED: Final = (
    "SELECT 1 FROM jobs INDEXED BY jobs_alive_of_workspace WHERE state IS NULL AND workspace <> ''"
    " AND client_name = workspaces.client_name AND workspace = workspaces.name"
)
# not the directory of an image that a client has loaded
_NAMED: Final = "name >= 'A'"
_UNUSED: Final = f"removing = 0 AND {_NAMED} AND NOT EXISTS ({_USED})"


def is_free(busy: Mapping[str, bool], workspace: str, *, exclusive: bool) -> bool:
    """Return whether a job may be in a workspace together with those in it; it always may in none."""
    there = busy.get(workspace) if workspace else None
    return there is None or not (there or exclusive)


def columns_of(spec: JobSpec) -> dict[str, int | str]:
    """Return the columns of a job's row that name its workspace, and its image."""
    named: dict[str, int | str] = {"workspace": spec.workspace, "exclusive": spec.exclusive}
    return {**named, "image": spec.image, "read_only": spec.read_only} if spec.image else named


def being_removed(name: str) -> WorkspaceBusyError:
    """Return the error for a workspace that is on its way out."""
    return WorkspaceBusyError(
        f"the workspace {name} is being removed", hint="try again when it is gone", workspace=name
    )


def name(db: sqlite3.Connection, client_name: str, workspace: str, now_ns: int, quotas: Quotas) -> None:
    """Have a row for a workspace that a job is about to use.

    Raises LimitReachedError when the client has too many of them, or too much in them; WorkspaceBusyError
    for one that is being removed.
    """
    _check_bytes(db, client_name, quotas)
    row = db.execute(
        "UPDATE workspaces SET used_ns = max(used_ns, ?) WHERE client_name = ? AND name = ?"
        " RETURNING removing",
        (now_ns, client_name, workspace),
    ).fetchone()
    if row is not None:
        if row[0]:
            raise being_removed(workspace)
        return
    (count,) = db.execute(
        f"SELECT count(*) FROM workspaces WHERE client_name = ? AND {_NAMED}", (client_name,)
    ).fetchone()
    # images have their own number
    if quotas.workspaces_max and count >= quotas.workspaces_max and not is_image_key(workspace):
        raise LimitReachedError(
            f"cannot make the workspace {workspace}: {client_name} has {count} workspaces,"
            f" and at most {quotas.workspaces_max} may be",
            hint="remove one: pjw workspace rm NAME; the operator sets clients.workspaces_max",
            limit="workspaces_max",
            most=quotas.workspaces_max,
        )
    db.execute(
        "INSERT INTO workspaces (client_name, name, made_ns, used_ns) VALUES (?, ?, ?, ?)",
        (client_name, workspace, now_ns, now_ns),
    )


def _check_bytes(db: sqlite3.Connection, client_name: str, quotas: Quotas) -> None:
    most = quotas.workspace_bytes_max
    there = total_bytes(db, client_name)[0] if most else 0
    if most and there > most:
        raise LimitReachedError(
            f"the workspaces of {client_name} have {exact_size(there)}, and may have at most"
            f" {exact_size(most)}",
            hint="remove one: pjw workspace rm NAME; the operator sets clients.workspace_bytes_max",
            limit="workspace_bytes_max",
            most=most,
        )


def total_bytes(db: sqlite3.Connection, client_name: str) -> tuple[int, int]:
    """Return the bytes of a client's workspaces, and of all clients', as last counted.

    One that is too deep to be counted is too much for its client, and nothing in the sum of all.
    """
    own, every = db.execute(
        "SELECT total(bytes * (client_name = ?)), total(bytes * (bytes < ?)) FROM workspaces",
        (client_name, TOO_DEEP),
    ).fetchone()
    return int(own), int(every)


def listed(
    db: sqlite3.Connection, owner: str | None, after: tuple[str, str] = ("", ""), count: int = -1
) -> list[Workspace]:
    """Return the workspaces of one client, or of all, by clients and names; none being removed.

    No more than *count*, but for -1, from behind the one with this client and name.
    """
    # an array counts as one job while elements wait, and these count for themselves from their turns on
    users = (
        f"{_USED.replace('SELECT 1', 'SELECT count(*)')}"
        " AND NOT (start_ns > 0 AND id IN (SELECT id FROM arrays))"
    )
    whose, own = ("", ()) if owner is None else (" AND client_name = ?", (owner,))
    return [
        Workspace(found, from_ns(made_ns), from_ns(used_ns), size, inodes, jobs, client_name)
        for found, made_ns, used_ns, size, inodes, jobs, client_name in db.execute(
            f"SELECT name, made_ns, used_ns, bytes, inodes, ({users}), client_name FROM workspaces"
            f" WHERE removing = 0 AND {_NAMED} AND (client_name, name) > (?, ?){whose}"
            " ORDER BY client_name, name LIMIT ?",
            (*after, *own, count),
        )
    ]


def used(db: sqlite3.Connection, client_name: str, workspace: str, now_ns: int) -> None:
    """Note that a job has ended in a workspace."""
    db.execute(
        "UPDATE workspaces SET used_ns = max(used_ns, ?) WHERE client_name = ? AND name = ?",
        (now_ns, client_name, workspace),
    )


def counted(
    db: sqlite3.Connection, client_name: str, workspace: str, size: int, inodes: int
) -> tuple[int, int]:
    """Note the count of a workspace; return the bytes and inodes of the count before."""
    this = "WHERE client_name = ? AND name = ?"
    had = db.execute(f"SELECT bytes, inodes FROM workspaces {this}", (client_name, workspace)).fetchone()
    db.execute(f"UPDATE workspaces SET bytes = ?, inodes = ? {this}", (size, inodes, client_name, workspace))
    return had or (0, 0)


def begin_removal(db: sqlite3.Connection, client_name: str, workspace: str) -> None:
    """Let no job use a workspace from now on; again where an attempt to remove it has failed.

    Raises WorkspaceNotFoundError, and WorkspaceBusyError while a job that has not ended names it.
    """
    holder = db.execute(
        "SELECT id, start_ns FROM jobs INDEXED BY jobs_alive_of_workspace WHERE state IS NULL"
        " AND workspace <> '' AND client_name = ? AND workspace = ? ORDER BY id LIMIT 1",
        (client_name, workspace),
    ).fetchone()
    if holder is not None:
        raise in_use(workspace, holder[0], is_queued=not holder[1])
    if not db.execute(
        "UPDATE workspaces SET removing = 1 WHERE client_name = ? AND name = ?", (client_name, workspace)
    ).rowcount:
        raise WorkspaceNotFoundError(workspace)


def in_use(workspace: str, holder: int | None, *, is_queued: bool = False) -> WorkspaceBusyError:
    """Return the error for the removal of a workspace that a job uses, or is going to."""
    if holder is None:
        return WorkspaceBusyError(
            f"cannot remove the workspace {workspace}: a job is being started in it", workspace=workspace
        )
    doing = "waits in the queue for it" if is_queued else "uses it"
    return WorkspaceBusyError(
        f"cannot remove the workspace {workspace}: job {holder} {doing}",
        hint=f"wait for its end, or stop it: pjw stop {holder}",
        workspace=workspace,
        holder=holder,
    )


def gone(db: sqlite3.Connection, client_name: str, workspace: str) -> None:
    """Delete the row of a workspace that was removed."""
    db.execute(
        "DELETE FROM workspaces WHERE client_name = ? AND name = ? AND removing = 1", (client_name, workspace)
    )


def unused(db: sqlite3.Connection, before_ns: int, count: int) -> list[tuple[str, str]]:
    """Return at most *count* workspaces and their clients, that no job names or has used since then."""
    query = f"SELECT client_name, name FROM workspaces WHERE {_UNUSED} AND used_ns < ? LIMIT ?"
    return db.execute(query, (before_ns, count)).fetchall()


def first_unused_ns(db: sqlite3.Connection) -> int | None:
    """Return the last use of the workspace that is unused for longest; None when jobs name all."""
    row = db.execute(f"SELECT min(used_ns) FROM workspaces WHERE {_UNUSED}").fetchone()
    return row[0] if row else None


def known(db: sqlite3.Connection) -> list[tuple[str, int, str, bool]]:
    """Return all workspaces: clients with their numbers, names, and whether they are being removed."""
    query = (
        "SELECT client_name, number, workspaces.name, removing FROM workspaces"
        " JOIN clients ON clients.name = client_name"
    )
    return [
        (client_name, number, each, bool(removing))
        for client_name, number, each, removing in db.execute(query)
    ]
