"""Lives of placements in any order of events, by the table alone and in the table of a gateway."""

import sqlite3
import time
from contextlib import closing
from datetime import UTC, datetime

from hypothesis import given, settings
from hypothesis import strategies as st

from pjw.gateway import rows
from pjw.gateway.states import OF_THE_NODE, TRANSITIONS, PlacementEvent, PlacementState, after, before
from pjw.model import EndReason, ExitStatus, Job, JobSpec, JobState, Limits, QueueSpec
from pjw.worker import queue_rows
from pjw.worker.schema import migrate

E, S = PlacementEvent, PlacementState


@given(st.lists(st.sampled_from(E), max_size=30))
def test_any_order_of_events(events: list[PlacementEvent]) -> None:
    """What runs is never queued again, an end is for ever, and only a claim gives a node the job."""
    state, seen = S.QUEUED, [S.QUEUED]
    for event in events:
        following = after(state, event)
        if following is None:
            continue
        assert not state.final
        if state is S.QUEUED:
            assert event in (E.CLAIM, E.CANCELLED)
        if event is E.CLAIM:
            assert state is S.QUEUED
        state = following
        seen.append(state)
    if S.RUNNING in seen:
        assert not {S.QUEUED, S.CLAIMED} & set(seen[seen.index(S.RUNNING) :])
    if S.LOST in seen:
        assert S.CLAIMED in seen
    assert sum(each.final for each in seen) <= 1


def test_the_table_is_whole() -> None:
    """Every state is reached, what is not final can end, and no event leads out of what is final."""
    assert {S.QUEUED, *TRANSITIONS.values()} == set(S)
    for state in S:
        ends = {event for event in E if (following := after(state, event)) and following.final}
        assert bool(ends) is not state.final
    for event in E:
        assert before(event)
    for event in OF_THE_NODE:
        # of a job that no node has, a node's word changes nothing
        assert after(S.QUEUED, event) is None


NOW = datetime(2026, 1, 1, tzinfo=UTC)
NODE_JOB = Job(
    7,
    "alice",
    "true",
    JobState.EXITED,
    Limits(),
    NOW,
    NOW,
    ExitStatus(0),
    EndReason.COMPLETED,
    output_bytes=3,
)


def _apply(db: sqlite3.Connection, job_id: int, event: PlacementEvent) -> Job | None:
    """What the gateway does at an event."""
    now = time.time_ns()
    placement = rows.find(db, job_id)
    assert placement is not None
    match event:
        case E.CLAIM:
            return rows.claim(db, placement, Limits(), "n1", "s1", now)
        case E.CANCELLED:
            return rows.cancelled(db, job_id, "why", now)
        case E.STARTED:
            return rows.started(db, job_id, NODE_JOB)
        case E.PUT_BACK:
            return rows.put_back(db, job_id, event, now)
        case E.START_FAILED:
            return rows.start_failed(db, job_id, "why", now)
        case E.END_SEEN:
            return rows.ended(db, job_id, NODE_JOB, now)
        case E.NODE_LOST:
            return rows.lost(db, job_id, event, "why", now)
        case E.UNKNOWN:
            if placement.state is S.RUNNING:
                return rows.lost(db, job_id, event, "why", now)
            return rows.put_back(db, job_id, event, now)


def _queued(db: sqlite3.Connection) -> int:
    db.execute("INSERT INTO clients (name, number) VALUES ('alice', 0)")
    spec = JobSpec("true", queue=QueueSpec())
    job_id = db.execute(
        "INSERT INTO jobs (client_name, command, limits, start_ns, queued_ns)"
        " VALUES ('alice', 'true', '{}', 0, 1)"
    ).lastrowid
    assert job_id is not None
    queue_rows.keep_spec(db, job_id, "alice", spec, None)
    assert rows.place(db, job_id, "uuid") is not None
    return job_id


def _empty_table() -> sqlite3.Connection:
    db = sqlite3.connect(":memory:", isolation_level=None)
    migrate(db, ":memory:")
    return db


EMPTY = _empty_table()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(E), max_size=12))
def test_the_table_of_a_gateway_follows_it(events: list[PlacementEvent]) -> None:
    """Each change is the table's own, the job changes with it, and old news change nothing of both."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        EMPTY.backup(db)
        job_id, state = _queued(db), S.QUEUED
        for event in events:
            following = after(state, event)
            job = _apply(db, job_id, event)
            assert (job is None) is (following is None), (state, event)
            state = following or state
            placement = rows.find(db, job_id)
            assert placement is not None
            assert placement.state is state
            if job is None:
                continue
            expected = {
                S.QUEUED: JobState.QUEUED,
                S.CLAIMED: JobState.STARTING,
                S.RUNNING: JobState.STARTING,
                S.ENDED: JobState.EXITED,
                S.LOST: JobState.LOST,
            }
            assert job.state is expected[state]
            assert (placement.node == "n1") is (state is not S.QUEUED and event is not E.CANCELLED)
            assert bool(rows.alive(db)) is not state.final
