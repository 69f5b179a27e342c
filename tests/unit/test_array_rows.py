"""Arrays in the table: in whatever order things happen, each element ends once, and the counts are right."""

import sqlite3
from collections import Counter
from itertools import pairwise
from typing import Final

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pjw.arrays import Array, Element
from pjw.model import EndReason, Job, JobSpec, Limits, QueueSpec
from pjw.worker import array_rows, queue_rows, schema
from pjw.worker.job_rows import COLUMNS, job_of

ARRAY: Final = 1
CLIENT: Final = "alice"


class Life(RuleBasedStateMachine):
    """An array in the table, as the queue uses it, beside what we know of each of its elements."""

    def __init__(self) -> None:
        super().__init__()
        self.db = sqlite3.connect(":memory:", isolation_level=None)
        schema.migrate(self.db, ":memory:")
        self.db.execute("INSERT INTO clients (name, number) VALUES (?, 0)", (CLIENT,))
        self.now = 0
        # by index: waits, held, runs, or how it ended
        self.known: dict[int, str] = {}
        self.starts: Counter[int] = Counter()
        self.stopped = False
        # those that were admitted, and of which it is not written down that they were executed
        self.starting: set[int] = set()
        self.worst = 0

    def teardown(self) -> None:
        """Nothing is left of an array that is removed."""
        self.db.execute("DELETE FROM jobs")
        assert self.db.execute("SELECT count(*) FROM arrays").fetchone() == (0,)
        assert self.db.execute("SELECT count(*) FROM array_taken").fetchone() == (0,)
        assert self.db.execute("SELECT queued_more FROM clients").fetchone() == (0,)
        self.db.close()

    @initialize(text=st.sampled_from(["5", "1-3", "0-8:4,3", "9,1,5-7"]))
    def make(self, text: str) -> None:
        """Put it into the queue."""
        spec = JobSpec("x", queue=QueueSpec(array=text))
        self.db.execute(
            "INSERT INTO jobs (id, client_name, command, limits, start_ns, queued_ns)"
            " VALUES (?, ?, 'x', '{}', 0, 1)",
            (ARRAY, CLIENT),
        )
        queue_rows.keep_spec(self.db, ARRAY, CLIENT, spec, None)
        array_rows.make(self.db, ARRAY, CLIENT, text)
        self.array = Array.of(text)
        self.known = {self.array.index(place): "waits" for place in range(len(self.array))}

    def _id_of(self, index: int) -> int:
        found = array_rows.find(self.db, Element(ARRAY, index), CLIENT)
        assert found is not None
        return found.id

    def _some(self, data: st.DataObject, *states: str) -> int | None:
        fitting = [index for index, state in self.known.items() if state in states]
        return data.draw(st.sampled_from(fitting)) if fitting else None

    @rule(is_admitted=st.booleans())
    def start_next(self, is_admitted: bool) -> None:
        """Draw the next element, and start it, or not: a crash comes between."""
        drawn = array_rows.draw(self.db, ARRAY, ())
        may = [index for index, state in self.known.items() if state == "waits"]
        assert (drawn is None) == (self.stopped or not may)
        if drawn is None:
            return
        job_id, index = drawn
        assert index in may
        if is_admitted:
            assert queue_rows.admit(self.db, job_id, Limits(), self._time()) is not None
            self.known[index] = "runs"
            self.starting.add(index)
            self.starts[index] += 1

    @rule(data=st.data())
    def put_back(self, data: st.DataObject) -> None:
        """What was admitted could not be started now."""
        fitting = sorted(self.starting)
        if not fitting:
            return
        index = data.draw(st.sampled_from(fitting))
        self.starting.remove(index)
        queue_rows.put_back(self.db, self._id_of(index), self._time())
        self.known[index] = "cancelled" if self.stopped else "waits"
        self.worst = max(self.worst, int(self.stopped))
        self.starts[index] -= 1

    @rule(data=st.data(), code=st.sampled_from([0, 0, 1, 7]))
    def end(self, data: st.DataObject, code: int) -> None:
        """One that runs ends by itself."""
        if (index := self._some(data, "runs")) is None:
            return
        # executed
        queue_rows.settle(self.db, self._id_of(index))
        self.starting.discard(index)
        self.db.execute(
            "UPDATE jobs SET state = 'exited', end_ns = ?, exit_code = ?, reason = 'completed' WHERE id = ?",
            (self._time(), code, self._id_of(index)),
        )
        array_rows.element_ended(self.db, ARRAY, EndReason.COMPLETED, code, self.now)
        self.known[index] = "failed" if code else "succeeded"
        self.worst = max(self.worst, code)

    @rule(data=st.data())
    def cancel_one(self, data: st.DataObject) -> None:
        """Somebody stops an element that waits, with a row or without."""
        index = self._some(data, "waits", "held")
        if index is None or self.stopped:
            return
        if job_id := self._id_of(index):
            assert queue_rows.end_without_start(self.db, job_id, EndReason.CANCELLED, "d", self._time())
        else:
            assert queue_rows.cancel_element(self.db, Element(ARRAY, index), "d", self._time())
        self.known[index], self.worst = "cancelled", max(self.worst, 1)

    @rule(data=st.data())
    def hold_one(self, data: st.DataObject) -> None:
        """Somebody holds an element that waits."""
        index = self._some(data, "waits")
        if index is None or self.stopped:
            return
        if job_id := self._id_of(index):
            assert queue_rows.set_held(self.db, job_id, held=True)
        else:
            assert queue_rows.hold_element(self.db, Element(ARRAY, index))
        self.known[index] = "held"

    @rule()
    def release_all(self) -> None:
        """Somebody releases the array."""
        if queue_rows.set_held(self.db, ARRAY, held=False) is not None:
            self.known = {index: "waits" if state == "held" else state for index, state in self.known.items()}

    @precondition(lambda self: sum(self.starts.values()) > 1)
    @rule()
    def stop(self) -> None:
        """Somebody stops the array: what waits never starts."""
        queue_rows.cancel_array(self.db, ARRAY, "d", self._time())
        for index, state in self.known.items():
            if state in ("waits", "held"):
                self.known[index], self.worst = "cancelled", max(self.worst, 1)
        self.stopped = True

    @invariant()
    def counts_are_right(self) -> None:
        """Those of the array, of the client, and its state; each index has one row at most."""
        if not self.known:
            return
        job, states = self._job(ARRAY), Counter(self.known.values())
        waiting = states["waits"] + states["held"]
        assert job.array is not None
        assert (job.array.waiting, job.array.running) == (waiting, states["runs"])
        assert (job.array.succeeded, job.array.failed, job.array.cancelled) == (
            states["succeeded"],
            states["failed"],
            states["cancelled"],
        )
        over = not waiting and not states["runs"]
        assert (job.state.final, job.state == "queued") == (over, waiting > 0)
        if over and job.was_started:
            assert job.exit_status is not None
            assert job.exit_status.code == self.worst
        rows = self.db.execute("SELECT array_index FROM jobs WHERE array_id = ?", (ARRAY,)).fetchall()
        assert len(rows) == len(set(rows))
        assert max(self.starts.values(), default=0) <= 1
        [(_, _, queued)] = queue_rows.of_clients(self.db) or [("", 0, 0)]
        assert queued == waiting + len(self.starting)

    @invariant()
    def changes_are_told(self) -> None:
        """Of each job every state that it has had, in order, and each once in a row."""
        if not self.known:
            return
        told: dict[int, list[str]] = {}
        for job_id, state in self.db.execute("SELECT job_id, state FROM changes ORDER BY seq"):
            told.setdefault(job_id, []).append(state)
        for job_id, states in told.items():
            assert states[0] == "queued"
            assert all(one != other for one, other in pairwise(states)), (job_id, states)
            assert states[-1] == self._job(job_id).state
        assert len(told) == self.db.execute("SELECT count(*) FROM jobs").fetchone()[0]

    def _job(self, job_id: int) -> Job:
        query = f"SELECT {COLUMNS} FROM jobs WHERE id = ?"  # noqa: S608  a constant
        return job_of(self.db.execute(query, (job_id,)).fetchone())

    def _time(self) -> int:
        self.now += 1000
        return self.now


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
