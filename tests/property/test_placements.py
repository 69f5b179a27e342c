"""Lives of placements in any order of events, by the table alone and in the table of a gateway."""

import sqlite3
import time
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime

from hypothesis import given, settings
from hypothesis import strategies as st

from pjw.arrays import Array
from pjw.gateway import placement_rows
from pjw.gateway.placement_states import (
    OF_THE_NODE,
    TRANSITIONS,
    PlacementEvent,
    PlacementState,
    after,
    before,
)
from pjw.model import EndReason, ExitStatus, Job, JobSpec, JobState, Limits, QueueSpec, Retry
from pjw.worker import array_rows, queue_rows
from pjw.worker.job_rows import COLUMNS, job_of
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
    placement = placement_rows.find(db, job_id)
    assert placement is not None
    match event:
        case E.CLAIM:
            return placement_rows.claim(db, placement, Limits(), "n1", "s1", now)
        case E.CANCELLED:
            return placement_rows.cancelled(db, job_id, "why", now)
        case E.STARTED:
            return placement_rows.started(db, job_id, NODE_JOB)
        case E.PUT_BACK:
            return placement_rows.put_back(db, job_id, event, now)
        case E.START_FAILED:
            return placement_rows.start_failed(db, job_id, "why", now)
        case E.END_SEEN:
            return placement_rows.ended(db, job_id, NODE_JOB, now)
        case E.NODE_LOST:
            return placement_rows.lost(db, job_id, event, "why", now)
        case E.UNKNOWN:
            if placement.state is S.RUNNING:
                return placement_rows.lost(db, job_id, event, "why", now)
            return placement_rows.put_back(db, job_id, event, now)


def _queued(db: sqlite3.Connection) -> int:
    db.execute("INSERT INTO clients (name, number) VALUES ('alice', 0)")
    spec = JobSpec("true", queue=QueueSpec())
    job_id = db.execute(
        "INSERT INTO jobs (client_name, command, limits, start_ns, queued_ns)"
        " VALUES ('alice', 'true', '{}', 0, 1)"
    ).lastrowid
    assert job_id is not None
    queue_rows.keep_spec(db, job_id, "alice", spec, None)
    assert placement_rows.place(db, job_id, "uuid") is not None
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
            placement = placement_rows.find(db, job_id)
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
            assert bool(placement_rows.alive(db)) is not state.final


class _Elements:
    """An array of a gateway, whose elements are tried again, in a table alone."""

    def __init__(self, db: sqlite3.Connection, indices: str) -> None:
        self._db = db
        spec = JobSpec(
            "true", queue=QueueSpec(array=indices, retry=Retry(2, backoff_seconds=0, if_lost=True))
        )
        db.execute("INSERT INTO clients (name, number) VALUES ('alice', 0)")
        job_id = db.execute(
            "INSERT INTO jobs (client_name, command, limits, start_ns, queued_ns, attempt)"
            " VALUES ('alice', 'true', '{}', 0, 1, 1)"
        ).lastrowid
        assert job_id is not None
        self.id = job_id
        queue_rows.keep_spec(db, job_id, "alice", spec, None)
        array_rows.make(db, job_id, "alice", indices)
        self._count = len(Array.of(indices))
        self._uuids = 0

    def job(self, job_id: int) -> Job:
        query = f"SELECT {COLUMNS} FROM jobs WHERE id = ?"  # noqa: S608  a constant
        return job_of(self._db.execute(query, (job_id,)).fetchone())

    def draw(self) -> bool:
        """Have a node claim the element that is next; whether there is one."""
        found = array_rows.draw(self._db, self.id, ())
        if found is None:
            return False
        self._uuids += 1
        placement = placement_rows.place(self._db, found[0], f"uuid-{self._uuids}")
        assert placement is not None
        assert placement_rows.claim(self._db, placement, Limits(), "n1", "s1", time.time_ns()) is not None
        # the answer was lost on its way, and the node asks again
        assert placement_rows.claim(self._db, placement, Limits(), "n1", "s1", time.time_ns()) is None
        return True

    def placed(self) -> list[tuple[placement_rows.Placement, Job]]:
        """The elements that a node has."""
        return [each for each in placement_rows.alive(self._db) if each[0].state is not S.QUEUED]

    def check(self) -> None:
        """No element is forgotten, none runs twice, and the array ends with its last one."""
        array, placed = self.job(self.id), self.placed()
        assert array.array is not None
        ended = array.array.succeeded + array.array.failed + array.array.cancelled
        assert ended + array.array.waiting + len(placed) == self._count
        assert array.state.final is (ended == self._count)
        indices = [job.array_index for _, job in placed]
        assert len(indices) == len(set(indices))
        assert not any(job.state.final for _, job in placed)
        followed = self._db.execute("SELECT retried_as FROM jobs WHERE retried_as IS NOT NULL").fetchall()
        assert len(followed) == len(set(followed))


FAILED_JOB = replace(NODE_JOB, exit_status=ExitStatus(1))
_ACTIONS = ("draw", "started", "good", "bad", "lost", "put_back", "stop", "hold", "release", "cancel")


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(_ACTIONS), st.integers(0, 3)), max_size=40))
def test_an_array_of_a_gateway_forgets_no_element(actions: list[tuple[str, int]]) -> None:
    """Whatever nodes tell of its elements, and whoever holds, stops or cancels it meanwhile."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        EMPTY.backup(db)
        array, now = _Elements(db, "1-4%3"), time.time_ns()
        for action, pick in actions:
            placed = array.placed()
            job_id = placed[pick % len(placed)][1].id if placed else 0
            match action:
                case "draw":
                    array.draw()
                case "hold" | "release":
                    queue_rows.set_held(db, array.id, action == "hold")
                case "cancel":
                    queue_rows.cancel_array(db, array.id, "why", now)
                case _ if not job_id:
                    pass
                case "started":
                    placement_rows.started(db, job_id, NODE_JOB)
                case "good" | "bad":
                    placement_rows.ended(db, job_id, NODE_JOB if action == "good" else FAILED_JOB, now)
                case "lost":
                    placement_rows.lost(db, job_id, E.NODE_LOST, "why", now)
                case "put_back":
                    placement_rows.put_back(db, job_id, E.PUT_BACK, now)
                case "stop":
                    placement_rows.ask_stop(db, job_id, 15, None)
            array.check()
        queue_rows.set_held(db, array.id, False)
        while array.placed() or array.draw():
            for _, job in array.placed():
                placement_rows.ended(db, job.id, NODE_JOB, now)
            array.check()
        assert array.job(array.id).state.final
