"""The queue above a backend that fails as told: what is tried again, what ends, what holds others up."""

import asyncio
from collections import defaultdict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

from pjw.errors import InvalidJobError, JobNotFoundError, KernelError, LimitReachedError, PjwError
from pjw.model import EndReason, Job, JobSpec, JobState, Limits, QueueSpec
from pjw.worker import queue as queue_module
from pjw.worker.queue import ATTEMPTS_MAX, PASSED_MAX, Queue
from pjw.worker.queue_rows import WaitingJob
from pjw.worker.settings import QueueSlots, Quotas, WorkerSettings
from pjw.worker.slots import Slots, Wanting
from pjw.worker.store import JobStore
from pjw.worker.tasks import Background

DEADLINE_SECONDS: Final = 20


class Scripted:
    """Starts jobs by their commands' names: each with the errors that it is to meet first."""

    def __init__(self, store: JobStore) -> None:
        self._store: Final = store
        self.errors: Final[defaultdict[str, deque[PjwError]]] = defaultdict(deque)
        self.started: Final[list[str]] = []
        self.ends: Final[defaultdict[int, asyncio.Event]] = defaultdict(asyncio.Event)
        # raised by who asks for an end
        self.end_error: PjwError | None = None
        # jobs whose starts were begun, and which go on when they may; and those that run
        self.begun: Final[asyncio.Queue[Job]] = asyncio.Queue()
        self.may_start: Final = asyncio.Event()
        self.may_start.set()
        self.running: Final[set[int]] = set()

    async def start_queued(self, waiting: WaitingJob) -> Job:
        """As queue.Starter says."""
        job = waiting.job
        self.begun.put_nowait(job)
        await self.may_start.wait()
        if errors := self.errors[job.command]:
            raise errors.popleft()
        job = await self._store.admit(job.id, job.limits)
        await self._store.settled(job.id)
        self.started.append(job.command)
        self.running.add(job.id)
        return replace(job, state=JobState.RUNNING)

    async def ended(self, job_id: int) -> bool:
        """As queue.Starter says."""
        await self.ends[job_id].wait()
        self.running.discard(job_id)
        if self.end_error is not None:
            raise self.end_error
        return False


class Bench:
    """A queue, its table and its backend."""

    def __init__(self, path: str, slots: int, of: type[Slots] = Slots) -> None:
        self.store: Final = JobStore(path)
        self.backend: Final = Scripted(self.store)
        self.background: Final = Background()
        settings = WorkerSettings(queue=QueueSlots(slots, cpu_max_millicores=0, memory_max_bytes=0))
        self.queue: Final = Queue(self.store, self.backend, self.background, settings, of(settings))

    async def submit(self, *commands: str, client: str = "alice", priority: int = 0) -> list[Job]:
        """Put jobs into the queue."""
        await self.store.client_number(client)
        return await self.submit_specs(
            *(JobSpec(command, queue=QueueSpec(priority)) for command in commands), client=client
        )

    async def submit_specs(self, *specs: JobSpec, client: str = "alice") -> list[Job]:
        """Put jobs into the queue, all at once."""
        jobs, _ = await self.store.enqueue(client, [(spec, Limits()) for spec in specs], Quotas())
        self.queue.added(jobs)
        return jobs

    async def has_started(self, *commands: str) -> None:
        """Wait until just these have been started, in this order."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            while self.backend.started != list(commands):
                assert len(self.backend.started) <= len(commands), self.backend.started
                await asyncio.sleep(0.01)


@asynccontextmanager
async def open_bench(path: str, slots: int, of: type[Slots] = Slots) -> AsyncIterator[Bench]:
    """A queue that has begun."""
    bench = Bench(path, slots, of)
    await bench.queue.begin([])
    bench.background.keep("queue", bench.queue.run())
    yield bench
    assert not bench.background.failed.is_set()
    await bench.background.close()
    bench.store.close()


@pytest.fixture
async def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    """A queue with one slot that has begun; its pauses are short."""
    monkeypatch.setattr(queue_module, "FIRST_PAUSE_SECONDS", 0.1)
    async with open_bench(str(tmp_path / "jobs.sqlite"), 1) as bench:
        yield bench


async def test_a_slot_is_free_again_whatever_became_of_its_job(bench: Bench) -> None:
    """It has ended and was forgotten before anybody waited for it; or nobody can tell."""
    for error in (None, JobNotFoundError(1), KernelError("use", "the table", 5)):
        bench.backend.end_error = error
        bench.backend.started.clear()
        first, second = await bench.submit("first", "second")
        await bench.has_started("first")
        bench.backend.ends[first.id].set()
        await bench.has_started("first", "second")
        bench.backend.ends[second.id].set()


async def test_what_the_host_lacks_holds_up_all_and_passes(bench: Bench) -> None:
    """No space, no processes: the job stays first, says so, and is tried again."""
    bench.backend.errors["first"].extend(LimitReachedError("no space is left") for _ in range(3))
    first, second = await bench.submit("first", "second")
    async with asyncio.timeout(DEADLINE_SECONDS):
        while "tries again soon" not in bench.queue.shown(second).detail:
            await asyncio.sleep(0.01)
    await bench.has_started("first")
    bench.backend.ends[first.id].set()
    await bench.has_started("first", "second")


async def test_what_the_kernel_refuses_again_and_again_ends(bench: Bench) -> None:
    """So that one job holds no other up for ever; what happened is the log's alone."""
    bench.backend.errors["bad"].extend(KernelError("make", "/secret", 22) for _ in range(ATTEMPTS_MAX))
    bad, _ = await bench.submit("bad", "good")
    await bench.has_started("good")
    ended = await bench.store.get(bad.id)
    assert ended is not None
    assert (ended.state, ended.reason) == (JobState.EXITED, EndReason.START_FAILED)
    assert "secret" not in ended.detail


async def test_what_can_never_be_started_ends_at_once(bench: Bench) -> None:
    """With the words of a refused start."""
    bench.backend.errors["bad"].append(InvalidJobError("limit pids_max must be at most 7"))
    bad, _ = await bench.submit("bad", "good")
    await bench.has_started("good")
    ended = await bench.store.get(bad.id)
    assert ended is not None
    assert (ended.reason, ended.detail) == (EndReason.START_FAILED, "limit pids_max must be at most 7")


async def test_limits_of_one_client_and_of_all(bench: Bench) -> None:
    """The first holds up its client, the second everybody, both until a job has ended."""
    refusal = LimitReachedError("alice has enough", limit="running_max", most=1)
    bench.backend.errors["alices"].append(refusal)
    [alices] = await bench.submit("alices", priority=9)
    async with asyncio.timeout(DEADLINE_SECONDS):
        while "alice has enough" not in bench.queue.shown(alices).detail:
            await asyncio.sleep(0.01)
    [bobs] = await bench.submit("bobs", client="bob")
    await bench.has_started("bobs")
    bench.backend.errors["alices"].append(LimitReachedError("enough", limit="running_total_max", most=1))
    bench.backend.ends[bobs.id].set()
    bench.queue.job_ended(bobs)
    async with asyncio.timeout(DEADLINE_SECONDS):
        while "waits: enough" not in bench.queue.shown(alices).detail:
            await asyncio.sleep(0.01)
    [carols] = await bench.submit("carols", client="carol")
    assert bench.queue.shown(carols).detail in ("waits: enough", "waits for its turn")
    assert bench.backend.started == ["bobs"]
    bench.queue.room_was_made()
    await bench.has_started("bobs", "alices")


async def test_elements_that_are_alone_come_one_by_one(tmp_path: Path) -> None:
    """While one is being started, or runs, no other is drawn; what needs no workspace goes before them."""
    async with asyncio.timeout(DEADLINE_SECONDS), open_bench(str(tmp_path / "jobs.sqlite"), 8) as bench:
        backend, queue = bench.backend, bench.queue
        # as workspaces do: a job that has none keeps none busy
        without: set[int] = set()
        queue.busy = lambda _: {"w": True} if backend.running - without else {}
        backend.may_start.clear()
        await bench.store.client_number("alice")
        array, other = await bench.submit_specs(
            JobSpec("x", workspace="w", exclusive=True, queue=QueueSpec(array="1-3")),
            JobSpec("y", queue=QueueSpec()),
        )
        without.add(other.id)
        first = await backend.begun.get()
        assert (first.array_index, first.workspace, first.exclusive) == (1, "w", True)
        assert (await backend.begun.get()).id == other.id
        assert "a job that is being started uses" in queue.shown(array).detail
        backend.ends[other.id].set()
        backend.may_start.set()
        for index in (1, 2, 3):
            element = first if index == 1 else await backend.begun.get()
            assert element.array_index == index
            assert list(queue.elements(array.id)) == [element.id]
            backend.ends[element.id].set()


class _ShutSlots(Slots):
    """No room for jobs with a mount, which others may pass."""

    def has_room(self, job: Wanting) -> bool:
        return not job.mounts and super().has_room(job)

    def passed_over(self, job: Wanting) -> str:
        return "waits for its mount" if job.mounts else ""


async def test_others_pass_what_they_take_no_room_from(tmp_path: Path) -> None:
    """Of any client; but a client with too many such jobs waits for these, until there may be room."""
    async with open_bench(str(tmp_path / "jobs.sqlite"), 3, _ShutSlots) as bench:
        await bench.store.client_number("alice")
        await bench.store.client_number("bob")
        shut = JobSpec("shut", mounts=["data"], queue=QueueSpec(1))
        [first] = await bench.submit_specs(shut)
        await bench.submit("open")
        await bench.has_started("open")
        assert bench.queue.shown(first).detail == "waits for its mount"
        await bench.submit_specs(*[shut] * (PASSED_MAX - 1))
        await bench.submit("behind")
        await bench.submit("bob's", client="bob")
        await bench.has_started("open", "bob's")
        async with asyncio.timeout(DEADLINE_SECONDS):
            while "alice" not in bench.queue._held_up:
                await asyncio.sleep(0.01)
        await bench.queue.cancel(first.id)
        await bench.has_started("open", "bob's", "behind")


class _PassedSlots(Slots):
    """Others may pass a job with a mount that has no room; nobody has more than one GPU now."""

    def passed_over(self, job: Wanting) -> str:
        return "waits for its mount" if job.mounts or self.is_hopeless(job) else ""

    def has_room(self, job: Wanting) -> bool:
        return not self.is_hopeless(job) and super().has_room(job)

    def is_hopeless(self, job: Wanting) -> bool:
        return job.gpus > 1


async def test_a_job_that_was_passed_has_the_slot_that_an_end_frees(tmp_path: Path) -> None:
    """Though a gateway tells the end before the slot is free, and nothing else happens."""
    async with open_bench(str(tmp_path / "jobs.sqlite"), 1, _PassedSlots) as bench:
        [first] = await bench.submit("first")
        await bench.has_started("first")
        [passed] = await bench.submit_specs(JobSpec("passed", mounts=["data"], queue=QueueSpec()))
        async with asyncio.timeout(DEADLINE_SECONDS):
            while bench.queue.shown(passed).detail != "waits for its mount":
                await asyncio.sleep(0.01)
        bench.queue.job_ended(first)
        await asyncio.sleep(0)
        bench.backend.ends[first.id].set()
        await bench.has_started("first", "passed")


async def test_a_job_for_gpus_of_a_node_that_is_away_holds_up_no_others_with_gpus(tmp_path: Path) -> None:
    """Their GPUs are not what it waits for."""
    async with open_bench(str(tmp_path / "jobs.sqlite"), 3, _PassedSlots) as bench:
        bench.queue.free_gpus = lambda: 1
        await bench.store.client_number("alice")
        await bench.submit_specs(
            JobSpec("many", gpus=2, queue=QueueSpec(1)), JobSpec("one", gpus=1, queue=QueueSpec())
        )
        await bench.has_started("one")
