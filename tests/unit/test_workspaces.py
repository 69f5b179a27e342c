"""Workspaces in the table: whose turn it is beside those that wait for one, and the quotas."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from pjw.errors import LimitReachedError, PageTokenError, WorkspaceBusyError, WorkspaceNotFoundError
from pjw.model import TOO_DEEP, EndReason, Limits
from pjw.server.queries import after_workspace, token_after_workspace
from pjw.v1 import job_worker_pb2 as pb
from pjw.worker import array_rows, queue_rows, workspace_rows
from pjw.worker.queue_rows import Head
from pjw.worker.schema import MIGRATIONS, migrate
from pjw.worker.settings import Quotas


@pytest.fixture
def db() -> Iterator[sqlite3.Connection]:
    """An empty table."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        migrate(db, "table")
        yield db


def add(db: sqlite3.Connection, workspace: str = "", *, exclusive: bool = False, priority: int = 0) -> int:
    """A job that waits for its turn alone; its id."""
    job_id = db.execute(
        "INSERT INTO jobs (client_name, command, limits, start_ns, queued_ns, workspace, exclusive, priority)"
        " VALUES ('alice', 'true', '{}', 0, 1, ?, ?, ?)",
        (workspace, exclusive, priority),
    ).lastrowid
    assert job_id is not None
    return job_id


def first(db: sqlite3.Connection, *without: int, **busy: bool) -> int | None:
    """Whose turn it is while these workspaces are used, each by one that is alone there or not."""
    head = queue_rows.first_ready(db, "alice", without, busy)
    return None if head is None else head.id


def test_whose_turn_it_is_beside_workspaces(db: sqlite3.Connection) -> None:
    """By priority and age, and none that waits for a workspace; in none, one always may."""
    alone, _, without = add(db, "a", exclusive=True), add(db, "a"), add(db)
    low = add(db, "b", exclusive=True, priority=-1)
    assert first(db) == alone
    assert first(db, a=False) == without
    assert first(db, a=True) == without
    assert first(db, without, a=True) == low
    assert first(db, without, a=True, b=False) is None
    assert first(db, other=True) == alone
    urgent = add(db, "b", priority=5)
    assert first(db, a=True) == urgent
    assert first(db, a=True, b=True) == without


def test_those_that_share_do_not_overtake(db: sqlite3.Connection) -> None:
    """One that is to be alone comes in its order, or never would; before it others share as they like."""
    before, alone, behind = add(db, "a"), add(db, "a", exclusive=True), add(db, "a")
    assert first(db, a=False) == before
    assert first(db, before, a=False) is None
    assert first(db, before) == alone
    assert first(db, before, alone) == behind
    urgent = add(db, "a", priority=1)
    assert first(db, before, a=False) == urgent


def test_an_array_and_its_elements_count(db: sqlite3.Connection) -> None:
    """It is one job while elements wait; an element names the workspace of its array from its turn on."""
    workspace_rows.name(db, "alice", "a", 1, Quotas())
    array_id = add(db, "a", exclusive=True)
    array_rows.make(db, array_id, "alice", "1-2")
    head = queue_rows.first_ready(db, "alice", (), {})
    assert head == Head(array_id, "alice", Limits(), 0, 0, None, "a", True)

    def jobs() -> int:
        return workspace_rows.listed(db, "alice")[0].jobs

    assert jobs() == 1
    elements: list[int] = []
    for count in (2, 2):
        drawn = array_rows.draw(db, array_id, elements)
        assert drawn is not None
        elements.append(drawn[0])
        admitted = queue_rows.admit(db, drawn[0], Limits(), 2)
        assert admitted is not None
        assert (admitted.workspace, admitted.exclusive) == ("a", True)
        assert jobs() == count
    with pytest.raises(WorkspaceBusyError, match=f"job {array_id} uses it"):
        workspace_rows.begin_removal(db, "alice", "a")
    for job_id in elements:
        db.execute("UPDATE jobs SET state = 'exited', end_ns = 3 WHERE id = ?", (job_id,))
        array_rows.element_ended(db, array_id, EndReason.COMPLETED, 0, 3)
    assert jobs() == 0
    workspace_rows.begin_removal(db, "alice", "a")


def test_thousands_that_wait_cost_nobody(db: sqlite3.Connection) -> None:
    """They are not gone through one by one: what comes behind them is found at once."""
    for _ in range(20_000):
        add(db, "a", exclusive=True)
    behind = add(db, "b")
    began = time.process_time()
    for _ in range(50):
        assert first(db, a=False) == behind
    assert time.process_time() - began < 1


def test_a_quota_of_their_number(db: sqlite3.Connection) -> None:
    """One that is there is used again; one more is refused, also beside one that is being removed."""
    quotas = Quotas(workspaces_max=2)
    for name in ("a", "b", "a"):
        workspace_rows.name(db, "alice", name, 1, quotas)
    workspace_rows.begin_removal(db, "alice", "b")
    with pytest.raises(LimitReachedError, match=r"alice has 2 workspaces, and at most 2 may be"):
        workspace_rows.name(db, "alice", "c", 1, quotas)
    with pytest.raises(WorkspaceBusyError, match=r"^the workspace b is being removed$"):
        workspace_rows.name(db, "alice", "b", 1, quotas)
    workspace_rows.name(db, "bob", "c", 1, quotas)
    workspace_rows.gone(db, "alice", "b")
    workspace_rows.name(db, "alice", "c", 1, quotas)
    assert [each.name for each in workspace_rows.listed(db, "alice")] == ["a", "c"]


def test_they_are_listed_page_by_page(db: sqlite3.Connection) -> None:
    """By client and name; of one client or of all; a page goes on behind the last of the one before."""
    for client, name in (("bob", "a"), ("alice", "b"), ("bob", "c"), ("alice", "a"), ("carol", "x")):
        workspace_rows.name(db, client, name, 1, Quotas())
    workspace_rows.begin_removal(db, "carol", "x")

    def page(owner: str | None, *after: str, count: int = -1) -> list[tuple[str, str]]:
        token = pb.ListWorkspacesRequest(page_token="/".join(after))
        found = workspace_rows.listed(db, owner, after_workspace(token), count)
        return [(each.client_name, each.name) for each in found]

    every = [("alice", "a"), ("alice", "b"), ("bob", "a"), ("bob", "c")]
    assert page(None) == every
    assert page("bob") == every[2:]
    assert page(None, count=3) == every[:3]
    assert page(None, "bob", "a", count=3) == every[3:]
    # another's name says only where to begin
    assert page("alice", "bob", "a") == []
    assert page("bob", "alice", "b") == every[2:]
    assert token_after_workspace(workspace_rows.listed(db, None)[2]) == "bob/a"
    for wrong in ("7", "alice/", "alice/../x", "/"):
        with pytest.raises(PageTokenError, match="page token"):
            after_workspace(pb.ListWorkspacesRequest(page_token=wrong))


def test_a_quota_of_their_bytes(db: sqlite3.Connection) -> None:
    """Of all that a client has; another's are another's, and one that nobody can count is not in the sum."""
    for client, name in (("alice", "a"), ("alice", "b"), ("bob", "b")):
        workspace_rows.name(db, client, name, 1, Quotas())
        workspace_rows.counted(db, client, name, 1000, 3)
    assert workspace_rows.total_bytes(db, "alice") == (2000, 3000)
    assert workspace_rows.counted(db, "bob", "b", TOO_DEEP, TOO_DEEP) == (1000, 3)
    assert workspace_rows.total_bytes(db, "alice") == (2000, 2000)
    assert workspace_rows.total_bytes(db, "bob") == (TOO_DEEP, 2000)
    workspace_rows.name(db, "alice", "a", 1, Quotas(workspace_bytes_max=2000))
    with pytest.raises(
        LimitReachedError, match=r"the workspaces of alice have .*\(2000 bytes\), and may have at most"
    ):
        workspace_rows.name(db, "alice", "a", 1, Quotas(workspace_bytes_max=1999))


def test_a_removal_beside_jobs(db: sqlite3.Connection) -> None:
    """One that a queued job names stays; of none there is none to remove."""
    workspace_rows.name(db, "alice", "a", 1, Quotas())
    job_id = add(db, "a")
    with pytest.raises(WorkspaceBusyError, match=f"job {job_id} waits in the queue for it"):
        workspace_rows.begin_removal(db, "alice", "a")
    assert workspace_rows.unused(db, 10, 5) == []
    assert workspace_rows.first_unused_ns(db) is None
    for client, name in (("bob", "a"), ("alice", "b")):
        with pytest.raises(WorkspaceNotFoundError):
            workspace_rows.begin_removal(db, client, name)
    db.execute("UPDATE jobs SET state = 'exited'")
    assert workspace_rows.unused(db, 10, 5) == [("alice", "a")]
    workspace_rows.begin_removal(db, "alice", "a")


def test_jobs_of_before_have_none() -> None:
    """The table of the version before: its jobs are as they were, without a workspace."""
    version = next(number for number, script in enumerate(MIGRATIONS) if "TABLE workspaces" in script)
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        for script in MIGRATIONS[:version]:
            db.executescript(script)
        db.execute(f"PRAGMA user_version = {version}")
        db.execute(
            "INSERT INTO jobs (client_name, command, limits, start_ns) VALUES ('alice', 'true', '{}', 5)"
        )
        migrate(db, "table")
        assert db.execute("SELECT workspace, exclusive FROM jobs").fetchall() == [("", 0)]
