"""Lives of jobs in the queue, in any order of calls: the real table, beside a model of a few lines."""

import asyncio
import tempfile
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from pjw.model import After, Condition, EndReason, ExitStatus, JobSpec, JobState, Limits, QueueSpec
from pjw.worker.settings import Quotas
from pjw.worker.store import JobStore, NotQueuedError

S = JobState
LATER = datetime(2100, 1, 1, tzinfo=UTC)
LATER_NS = int((LATER + timedelta(days=1)).timestamp()) * 10**9


@dataclass
class Waiting:
    """One job of the model."""

    priority: int
    held: bool
    is_early: bool
    after: dict[int, Condition]
    state: JobState = S.QUEUED
    succeeded: bool = False

    @property
    def is_ready(self) -> bool:
        """Whether the job waits for nothing but its turn."""
        return self.state is S.QUEUED and not (self.held or self.is_early or self.after)


class Model:
    """What the documents say of the queue."""

    def __init__(self) -> None:
        self.jobs: dict[int, Waiting] = {}

    def end(self, job_id: int, *, succeeded: bool) -> None:
        """End a job, and have that its effect on those that wait for it."""
        job = self.jobs[job_id]
        job.state, job.succeeded, job.held, job.is_early = S.EXITED, succeeded, False, False
        job.after.clear()
        for other_id, other in self.jobs.items():
            condition = other.after.pop(job_id, None)
            if condition is not None and not meets(condition, succeeded=succeeded):
                self.end(other_id, succeeded=False)

    @property
    def turns(self) -> list[int]:
        """The jobs that wait for nothing but their turn: by priority, then by age."""
        ready = [(-job.priority, job_id) for job_id, job in self.jobs.items() if job.is_ready]
        return [job_id for _, job_id in sorted(ready)]


def meets(condition: Condition, *, succeeded: bool) -> bool:
    """Whether an end is one that a job waits for."""
    return condition is Condition.ANY or succeeded is (condition is Condition.OK)


class Life:
    """Makes each call in the table and in the model."""

    def __init__(self, store: JobStore) -> None:
        self.store = store
        self.model = Model()

    async def enqueue(self, data: st.DataObject) -> None:
        """Put a job into the queue, maybe held, for later, and behind others."""
        known = (
            data.draw(st.lists(st.sampled_from(sorted(self.model.jobs)), unique=True, max_size=2))
            if (self.model.jobs)
            else []
        )
        after = {job_id: data.draw(st.sampled_from(Condition)) for job_id in known}
        held, is_early = data.draw(st.booleans()), data.draw(st.booleans())
        priority = data.draw(st.integers(-1, 1))
        queue = QueueSpec(
            priority, LATER if is_early else None, held, [After(*each) for each in after.items()]
        )
        [job], awaited = await self.store.enqueue(
            "alice", [(JobSpec("true", queue=queue), Limits())], Quotas()
        )
        ends = {job_id: self.model.jobs[job_id] for job_id in after if self.model.jobs[job_id].state.final}
        left = {job_id: condition for job_id, condition in after.items() if job_id not in ends}
        self.model.jobs[job.id] = Waiting(priority, held, is_early, left)
        in_vain = [each for each, end in ends.items() if not meets(after[each], succeeded=end.succeeded)]
        if in_vain:
            self.model.end(job.id, succeeded=False)
        else:
            assert awaited == set(left)

    async def hold(self, job_id: int, *, held: bool) -> None:
        """Hold or release a job: only one that waits can be."""
        job = self.model.jobs[job_id]
        changed = await self.store.set_held(job_id, held=held)
        assert (changed is not None) is (job.state is S.QUEUED)
        if changed is not None:
            job.held = held

    async def admit(self, job_id: int) -> None:
        """Take a job out of the queue: only one that waits for nothing but its turn."""
        job = self.model.jobs[job_id]
        try:
            await self.store.admit(job_id, Limits())
        except NotQueuedError:
            assert not job.is_ready
        else:
            assert job.is_ready
            job.state = S.STARTING

    async def put_back(self, job_id: int) -> None:
        """Put an admitted job back; the call changes no other."""
        await self.store.put_back(job_id)
        if self.model.jobs[job_id].state is S.STARTING:
            self.model.jobs[job_id].state = S.QUEUED

    async def end_without_start(self, job_id: int, reason: EndReason) -> None:
        """Cancel a job that waits; or say that one could not be started."""
        ended = await self.store.end_without_start(job_id, reason, "why")
        possible = {S.QUEUED} if reason is EndReason.CANCELLED else {S.QUEUED, S.STARTING}
        assert (ended is not None) is (self.model.jobs[job_id].state in possible)
        if ended is not None:
            self.model.end(job_id, succeeded=False)
            await self.take_effect(job_id)

    async def run(self, job_id: int, code: int) -> None:
        """Have a job run to its end, from its turn on."""
        if self.model.jobs[job_id].is_ready:
            await self.admit(job_id)
        if self.model.jobs[job_id].state is not S.STARTING:
            return
        await self.store.settled(job_id)
        job = await self.store.get(job_id)
        assert job is not None
        end = replace(
            job, state=S.EXITED, end=LATER, exit_status=ExitStatus(code), reason=EndReason.COMPLETED
        )
        await self.store.finish(end)
        self.model.end(job_id, succeeded=code == 0)
        await self.take_effect(job_id)

    async def take_effect(self, job_id: int) -> None:
        """Do as the queue does after an end."""
        ended = [job_id]
        while ended:
            effects = await self.store.take_effect(ended.pop())
            ended += [each for each, _ in effects.cancelled]

    async def come_due(self) -> None:
        """Let the time come that jobs wait for."""
        await self.store.let_due(LATER_NS)
        for job in self.model.jobs.values():
            job.is_early = False

    async def check(self) -> None:
        """Compare the table with the model."""
        for job_id, job in self.model.jobs.items():
            found = await self.store.get(job_id, "alice")
            assert found is not None
            assert (found.state, found.held) == (job.state, job.held and job.state is S.QUEUED)
        turns: list[int] = []
        while (head := await self.store.first_ready("alice", turns)) is not None:
            turns.append(head.id)
        assert turns == self.model.turns


CALLS = (
    "enqueue",
    "enqueue",
    "run",
    "run",
    "hold",
    "release",
    "admit",
    "put_back",
    "cancel",
    "fail",
    "run",
    "come_due",
)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_order_of_calls(data: st.DataObject) -> None:
    """Each job is where the model has it, and their turns are the model's."""

    async def live(store: JobStore) -> None:
        life = Life(store)
        await store.client_number("alice")
        for _ in range(data.draw(st.integers(1, 40))):
            call = data.draw(st.sampled_from(CALLS)) if life.model.jobs else "enqueue"
            if call == "enqueue":
                await life.enqueue(data)
            elif call == "come_due":
                await life.come_due()
            else:
                job_id = data.draw(st.sampled_from(sorted(life.model.jobs)))
                match call:
                    case "hold" | "release":
                        await life.hold(job_id, held=call == "hold")
                    case "admit":
                        await life.admit(job_id)
                    case "put_back":
                        await life.put_back(job_id)
                    case "cancel":
                        await life.end_without_start(job_id, EndReason.CANCELLED)
                    case "fail":
                        await life.end_without_start(job_id, EndReason.START_FAILED)
                    case "run":
                        await life.run(job_id, data.draw(st.integers(0, 1)))
            await life.check()

    with tempfile.TemporaryDirectory() as directory, closing(JobStore(str(Path(directory, "jobs")))) as store:
        asyncio.run(live(store))
