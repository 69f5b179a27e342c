"""WatchJobs: changes of jobs, each once and in order, whatever restarts; on real workers and a real pjwd."""

import asyncio
import json
import os
import random
import select
import signal
import sqlite3
import threading
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, closing
from typing import Any, Final

import grpc
import pytest

from pjw import AsyncClient, JobSpec, QueueSpec
from pjw.errors import LaunchError, SequenceError
from pjw.model import Job, JobChange, JobState
from pjw.v1 import job_worker_pb2 as pb
from pjw.worker import QueueSlots, Worker, changes
from pjw.worker.changes import Batch, Watched
from pjw.worker.pages import JobFilter
from pjw.worker.store import JobStore
from tests.support.service import CALL_SECONDS, Service, reloaded
from tests.support.worker_harness import ASK, DEADLINE_SECONDS, Bench

_S = JobState
ENDED: Final = (_S.EXITED, _S.LOST)


def told(batches: Sequence[Batch]) -> list[JobChange]:
    """All changes of some batches."""
    return [change for batch in batches for change in batch.changes]


def states(changes: Sequence[JobChange], job: Job) -> list[str]:
    """What was told of one job, in order."""
    return ["removed" if each.removed else str(each.job.state) for each in changes if each.job.id == job.id]


async def all_of(
    worker: Worker, owner: str | None = None, since: int | None = 0, **more: object
) -> list[JobChange]:
    """All changes until now."""
    batches = [each async for each in worker.watch_jobs(owner, since=since, follow=False, **more)]  # type: ignore[arg-type]
    return told(batches)


async def until(
    batches: AsyncGenerator[Batch, None], enough: Callable[[list[JobChange]], bool]
) -> list[JobChange]:
    """The changes that come until there are enough."""
    found: list[JobChange] = []
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not enough(found):
            found += (await anext(batches)).changes
    return found


async def test_the_life_of_jobs(bench: Bench) -> None:
    """Each state once: of a plain job and its removal, of one out of the queue, of one that is stopped."""
    worker = await bench.open()
    async with aclosing(worker.watch_jobs(snapshot=False)) as watch:
        assert await anext(watch) == Batch([], 0)
        plain = await worker.start(JobSpec("exit 3"))
        [queued] = await worker.submit([JobSpec(["true"], name="two", queue=QueueSpec(held=True))])
        stopped = await worker.start(JobSpec(["sleep", "300"], labels={"a": "b"}))
        await worker.wait(plain.id)
        await worker.release(queued.id)
        await worker.stop(stopped.id)
        await worker.wait(queued.id)
        await worker.delete(plain.id)
        found = await until(watch, lambda found: "removed" in states(found, plain))
    assert states(found, plain) == ["running", "exited", "removed"]
    assert states(found, stopped) == ["running", "stopping", "exited"]
    assert states(found, queued) == ["queued", "starting", "running", "exited"]
    numbers = [change.sequence for change in found]
    assert numbers == list(range(1, len(found) + 1))
    assert all(change.time is not None for change in found)
    [end] = [
        each for each in found if each.job.id == plain.id and each.job.state is _S.EXITED and not each.removed
    ]
    assert end.job.exit_status is not None
    assert end.job.exit_status.code == 3
    assert [each.job.end for each in found if each.job.id == stopped.id][:2] == [None, None]
    # and the same again, also of what was removed
    again = await all_of(worker)
    assert [(each.sequence, each.job.state, each.removed) for each in again] == [
        (each.sequence, each.job.state, each.removed) for each in found
    ]
    [removed] = [each.job for each in again if each.removed]
    assert (removed.command, removed.exit_status) == ("exit 3", end.job.exit_status)
    assert await all_of(worker, since=numbers[-2]) == again[-1:]


async def test_a_start_that_fails_leaves_no_trace(bench: Bench) -> None:
    """There never was such a job."""
    worker = await bench.open()
    with pytest.raises(LaunchError):
        await worker.start(JobSpec(["/nonexistent"]))
    assert await all_of(worker) == []
    assert await all_of(worker, since=None) == []


async def test_the_beginning(bench: Bench) -> None:
    """Without a number the jobs as they are, then what changes: nothing twice, and nothing missing."""
    worker = await bench.open(queue=QueueSlots(running_max=1, cpu_max_millicores=0))
    done = await worker.start(JobSpec(["true"]))
    await worker.wait(done.id)
    runs = await worker.start(JobSpec(ASK + "read line <&3"))
    [waits] = await worker.submit([JobSpec(["true"], queue=QueueSpec(held=True))])
    async with aclosing(worker.watch_jobs()) as watch:
        first = await anext(watch)
        assert [(each.job.id, str(each.job.state)) for each in first.changes] == [
            (done.id, "exited"),
            (runs.id, "running"),
            (waits.id, "queued"),
        ]
        assert first.sequence is None
        assert [each.job.detail for each in first.changes][2] == "waits until it is released"
        assert all(each.sequence is None and each.time is None for each in first.changes)
        ready = await anext(watch)
        assert (ready.changes, ready.sequence) == ([], 4)
        bench.tell(runs.id)
        await worker.stop(waits.id)
        found = await until(watch, lambda found: len(found) == 2)
    assert {(each.job.id, str(each.job.state)) for each in found} == {
        (runs.id, "exited"),
        (waits.id, "exited"),
    }


async def test_what_changes_during_the_beginning(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The jobs of later pages are told as they are by then, and not again; those of earlier ones change."""
    monkeypatch.setattr(changes, "BATCH", 2)
    worker = await bench.open()
    jobs = await worker.submit([JobSpec(["true"], queue=QueueSpec(held=True))] * 5)
    async with aclosing(worker.watch_jobs()) as watch:
        found = list((await anext(watch)).changes)
        # one that was told, two that were not, of which one is gone before its turn
        await worker.stop(jobs[0].id)
        await worker.stop(jobs[3].id)
        await worker.stop(jobs[4].id)
        await worker.delete(jobs[4].id)
        [late] = await worker.submit([JobSpec(["true"], queue=QueueSpec(held=True))])
        found += await until(watch, lambda more: any(each.job.id == jobs[0].id for each in more))
    assert states(found, jobs[0]) == ["queued", "exited"]
    assert states(found, jobs[1]) == ["queued"]
    assert states(found, jobs[3]) == ["exited"]
    assert states(found, jobs[4]) == []
    assert states(found, late) == ["queued"]


async def test_filters(bench: Bench) -> None:
    """States, labels, a name, ids; a removal is none of a state."""
    worker = await bench.open()
    one = await worker.start(JobSpec(["true"], name="one", labels={"a": "1", "b": "2"}))
    await worker.wait(one.id)
    two = await worker.start(JobSpec(["true"], labels={"a": "1"}))
    await worker.wait(two.id)
    for job in (one, two):
        await worker.delete(job.id)

    async def found(jobs: JobFilter | None = None, *ids: int) -> list[tuple[int, str]]:
        watched = Watched(jobs or JobFilter(), frozenset(ids))
        changes = await all_of(worker, watched=watched)
        return [(each.job.id, "removed" if each.removed else str(each.job.state)) for each in changes]

    life = ["running", "exited", "removed"]
    assert await found(JobFilter(labels={"b": "2"})) == [(one.id, each) for each in life]
    assert await found(JobFilter(name="one")) == [(one.id, each) for each in life]
    assert await found(None, two.id) == [(two.id, each) for each in life]
    assert await found(JobFilter(frozenset({_S.EXITED}))) == [(one.id, "exited"), (two.id, "exited")]
    assert await found(JobFilter(frozenset({_S.EXITED}), {"b": "2"}), two.id) == []
    kept = await worker.start(JobSpec(["true"], name="kept"))
    await worker.wait(kept.id)
    for watched in (Watched(ids=frozenset({kept.id, 99})), Watched(JobFilter(name="kept"))):
        assert [each.job.id for each in await all_of(worker, since=None, watched=watched)] == [kept.id]


async def test_each_client_has_its_own(bench: Bench) -> None:
    """Nothing of another client's jobs, not even by an id; all of them for whoever may see all."""
    worker = await bench.open()
    async with aclosing(worker.watch_jobs("bob", snapshot=False)) as watch:
        await anext(watch)
        hers = await worker.start(JobSpec(["true"]), "alice")
        his = await worker.start(JobSpec(["true"]), "bob")
        found = await until(watch, lambda found: states(found, his) == ["running", "exited"])
    assert states(found, hers) == []
    await worker.wait(hers.id)
    assert [each.job.id for each in await all_of(worker, "alice")] == [hers.id] * 2
    assert await all_of(worker, "bob", watched=Watched(ids=frozenset({hers.id}))) == []
    assert await all_of(worker, "bob", since=None, watched=Watched(ids=frozenset({hers.id}))) == []
    assert await all_of(worker, "eve") == []
    assert len(await all_of(worker)) == 4


async def test_one_that_reads_slowly(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets all, in order, and no more than a bounded number is kept in memory for it."""
    monkeypatch.setattr(changes, "BATCH", 5)
    monkeypatch.setattr(changes, "WAITING_MAX", 10)
    worker = await bench.open()
    fast: list[JobChange] = []

    async def read() -> None:
        async for batch in worker.watch_jobs(snapshot=False):
            fast.extend(batch.changes)

    taken: list[JobChange] = []
    take = JobStore.changes

    async def from_the_table(*arguments: Any) -> tuple[list[JobChange], int]:
        found, reached = await take(*arguments)
        taken.extend(found)
        return found, reached

    reading = asyncio.ensure_future(read())
    async with aclosing(worker.watch_jobs(snapshot=False)) as slow:
        await anext(slow)
        first = asyncio.ensure_future(anext(slow))
        # until it has caught up, and is given what comes
        await asyncio.sleep(0.1)
        [job] = await worker.submit([JobSpec(["true"], queue=QueueSpec(held=True))])
        found = list((await first).changes)
        await worker.stop(job.id)
        for _ in range(20):
            jobs = await worker.submit([JobSpec(["true"], queue=QueueSpec(held=True))] * 4)
            for job in jobs:
                await worker.stop(job.id)
        async with asyncio.timeout(DEADLINE_SECONDS):
            while len(fast) < 162:
                await asyncio.sleep(0.02)
        # all but those in memory come from the table
        monkeypatch.setattr(JobStore, "changes", from_the_table)
        found += await until(slow, lambda more: len(found) + len(more) == 162)
    assert [each.sequence for each in found] == list(range(1, 163))
    assert len(taken) >= 150
    assert [each.sequence for each in fast] == list(range(1, 163))
    reading.cancel()


async def test_numbers_that_are_too_old_or_none(bench: Bench) -> None:
    """A client that fills the table loses its own old changes, and nobody else's."""
    worker = await bench.open()
    his = await worker.start(JobSpec(["true"]), "bob")
    await worker.wait(his.id)
    await worker.submit([JobSpec(["true"], queue=QueueSpec(held=True))], "alice")
    with pytest.raises(SequenceError, match="this server has come to 3 only"):
        await all_of(worker, "bob", since=4)

    await bench.close(worker)
    with closing(sqlite3.connect(bench.state / "jobs.sqlite")) as table, table:
        table.executemany(
            "INSERT INTO changes (job_id, client_name, state) VALUES (2, 'alice', 'queued')", [()] * 21_000
        )
    worker = await bench.open()
    with pytest.raises(SequenceError, match=r"changes up to [0-9]+ are not kept any more") as refused:
        await all_of(worker, "alice", since=5)
    assert refused.value.oldest is not None
    assert 500 < refused.value.oldest < 1100
    assert len(await all_of(worker, "alice", since=refused.value.oldest)) == 21_003 - refused.value.oldest
    assert len(await all_of(worker, "bob")) == 2
    with pytest.raises(SequenceError):
        await all_of(worker)


async def test_what_ended_without_a_worker(bench: Bench) -> None:
    """The next one tells it; what runs on is not told again."""
    worker = await bench.open()
    runs = await worker.start(JobSpec(ASK + "read line <&3"))
    ends = await worker.start(JobSpec(ASK + "read line <&3"))
    init = os.pidfd_open(bench.init_pid(ends.id))
    await bench.close(worker)
    bench.tell(ends.id)
    await asyncio.to_thread(select.select, [init], [], [], DEADLINE_SECONDS)
    os.close(init)
    worker = await bench.open()
    found = await all_of(worker)
    assert (states(found, runs), states(found, ends)) == (["running"], ["running", "exited"])
    bench.tell(runs.id)
    await worker.wait(runs.id)
    assert states(await all_of(worker), runs) == ["running", "exited"]


# --- as a client has it


# what may follow what was told of a job; None: of a job that was not told of before
FOLLOWS: Final = {
    None: {"queued"},
    "queued": {"starting", "exited"},
    # a kill may take the word that it runs
    "starting": {"running", "queued", "exited", "lost"},
    "running": {"stopping", "exited", "lost"},
    "stopping": {"exited", "running", "lost"},
}


def check(found: Sequence[JobChange], jobs: Sequence[Job]) -> None:
    """No gap, no repeat: numbers rise, each job's states are a life, and the last is that of the list."""
    numbers = [change.sequence or 0 for change in found]
    assert numbers == sorted(set(numbers))
    lives: defaultdict[int, list[str]] = defaultdict(list)
    for change in found:
        lives[change.job.id].append(str(change.job.state))
    for job_id, life in lives.items():
        for before, after in zip([None, *life], life):  # noqa: B905  pairs
            assert after in FOLLOWS[before], (job_id, life)
    assert {job_id: life[-1] for job_id, life in lives.items()} == {job.id: str(job.state) for job in jobs}


def test_kills_amid_a_watch(make_service: Callable[..., Service]) -> None:
    """Whatever is killed, whoever watches hears of each change once; so does who comes later, or again."""
    service = make_service(config="[queue]\nrunning_max = 8\ncpu_max_millicores = 0\n").start()
    seed = random.randrange(10**9)
    print("seed", seed)
    chance = random.Random(seed)
    found: list[JobChange] = []
    count = 200
    ends = threading.Semaphore(0)

    def watch() -> None:
        with service.client() as alice:
            for change in alice.watch_jobs(0):
                found.append(change)
                if not change.job.state.final:
                    continue
                ends.release()
                if sum(each.job.state.final for each in found) == count:
                    return

    watching = threading.Thread(target=watch, daemon=True)
    with service.client() as alice:
        watching.start()
        jobs = alice.submit([f"exit {number % 3}" for number in range(count)])
        for _ in range(8):
            time.sleep(chance.uniform(0.02, 0.6))
            service.kill(chance.choice(["server", "launcher", "both"]))
            service.start()
        for job in jobs:
            alice.wait(job.id)
        for _ in range(count):
            assert ends.acquire(timeout=CALL_SECONDS)
        listed = list(alice.list())
        check(found, listed)
        assert len(listed) == count
        again = list(alice.watch_jobs(0, follow=False))
        assert [each.sequence for each in again] == [each.sequence for each in found]
        middle = found[len(found) // 2].sequence
        rest = list(alice.watch_jobs(middle, follow=False))
        assert [each.sequence for each in rest] == [
            each.sequence for each in found if (each.sequence or 0) > (middle or 0)
        ]
        beginning = {each.job.id: each.job.state for each in alice.watch_jobs(follow=False)}
        assert beginning == {job.id: job.state for job in listed}


async def test_asyncio(make_service: Callable[..., Service]) -> None:
    """The same for asyncio; `sequence` is where it is."""
    service = await asyncio.to_thread(make_service().start)
    async with AsyncClient(service.address, *service.files()) as alice, asyncio.timeout(CALL_SECONDS):
        job = await alice.start("exit 3")
        await alice.wait(job.id)
        watch = alice.watch_jobs()
        first = await anext(watch)
        assert (first.job.id, first.job.state, first.sequence, watch.sequence) == (
            job.id,
            "exited",
            None,
            None,
        )
        other = await alice.start("true")
        assert [(await anext(watch)).job.state for _ in range(2)] == ["running", "exited"]
        assert watch.sequence == 4
        await watch.aclose()
        rest = [change async for change in alice.watch_jobs(watch.sequence - 1, follow=False)]
        assert [(each.job.id, each.job.state) for each in rest] == [(other.id, "exited")]
        with pytest.raises(SequenceError) as refused:
            await anext(alice.watch_jobs(99))
        assert refused.value.oldest == 0


def test_roles(make_service: Callable[..., Service]) -> None:
    """Only a viewer or an admin watches all; who is one no more is cut off."""
    roles = '[roles]\nviewers = ["bob"]\n'
    service = make_service(config=roles).start()
    with service.stub("alice") as alice, service.stub("bob") as bob:
        with pytest.raises(grpc.RpcError) as refused:
            next(alice.WatchJobs(pb.WatchJobsRequest(all_clients=True), timeout=CALL_SECONDS))
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
        job = alice.Start(pb.StartRequest(command="true"), timeout=CALL_SECONDS).job
        watch = bob.WatchJobs(pb.WatchJobsRequest(all_clients=True, since=0), timeout=CALL_SECONDS)
        assert next(watch).changes[0].job.id == job.id
        reloaded(service, "")
        with pytest.raises(grpc.RpcError) as refused:
            list(watch)
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
        own = bob.WatchJobs(pb.WatchJobsRequest(since=0, no_follow=True), timeout=CALL_SECONDS)
        assert [list(each.changes) for each in own] == [[]]


def test_limits(make_service: Callable[..., Service]) -> None:
    """A watch is a stream like any other; what is no filter is refused."""
    service = make_service(config="[clients]\nfollowers_max = 2\n").start()
    with service.stub("alice") as alice:
        watches = [alice.WatchJobs(pb.WatchJobsRequest(), timeout=CALL_SECONDS) for _ in range(2)]
        for watch in watches:
            next(watch)
        for request, code in (
            (pb.WatchJobsRequest(), grpc.StatusCode.RESOURCE_EXHAUSTED),
            (pb.WatchJobsRequest(since=7), grpc.StatusCode.RESOURCE_EXHAUSTED),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                next(alice.WatchJobs(request, timeout=CALL_SECONDS))
            assert refused.value.code() is code
        watches.pop().cancel()
        for request, code, words in (
            (pb.WatchJobsRequest(ids=[1] * 501), grpc.StatusCode.INVALID_ARGUMENT, "at most 500 jobs"),
            (pb.WatchJobsRequest(name="!"), grpc.StatusCode.INVALID_ARGUMENT, "no name for a job"),
            (pb.WatchJobsRequest(since=7), grpc.StatusCode.OUT_OF_RANGE, "has come to 0 only"),
            (pb.WatchJobsRequest(since=-1), grpc.StatusCode.OUT_OF_RANGE, "behind change -1"),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                next(alice.WatchJobs(request, timeout=CALL_SECONDS))
            assert refused.value.code() is code, request
            assert words in (refused.value.details() or "")


def test_pjw_events(make_service: Callable[..., Service]) -> None:
    """Lines of JSON in a pipe, a line each at a terminal; it goes on over a restart."""
    service = make_service().start()
    following = service.popen("events", "--since", "0")
    job = service.ok("start", "--name", "one", "--label", "a=b", "exit 3").strip()
    assert service.pjw("wait", job).returncode == 3
    assert following.stdout is not None
    lines = [json.loads(following.stdout.readline()) for _ in range(2)]
    assert [(each["job"]["id"], each["job"]["state"], each["removed"]) for each in lines] == [
        (job, "running", False),
        (job, "exited", False),
    ]
    assert lines[1]["job"]["exitCode"] == 3
    assert [each["sequence"] for each in lines] == ["1", "2"]
    service.stop()
    service.start()
    second = service.ok("start", "true").strip()
    line = json.loads(following.stdout.readline())
    assert (line["job"]["id"], line["sequence"]) == (second, "3")
    following.send_signal(signal.SIGINT)
    following.communicate(timeout=CALL_SECONDS)
    assert following.returncode == 130
    service.ok("wait", second)
    service.ok("rm", job)
    all_lines = service.ok("events", "--since", "0", "--no-follow").splitlines()
    assert [json.loads(each)["removed"] for each in all_lines] == [False, False, False, False, True]
    assert service.ok("events", "--since", "3", "--no-follow", "--job", second, "--json").count("\n") == 1
    assert service.ok("events", "--no-follow") == ""
    [line] = service.ok("events", "--list", "--no-follow").splitlines()
    assert [json.loads(line)[name] for name in ("sequence", "time", "removed")] == [None, None, False]
    shown = service.at_terminal("events", "--since", "0", "--no-follow", "--label", "a=b")
    numbers = [each.split()[0] for each in shown.splitlines()]
    assert numbers == ["1", "2", "5"]
    assert "exited 3" in shown
    assert "one: exit 3" in shown
    code, words = service.refused("events", "--since", "99")
    assert (code, "this server has come to 5 only" in words, "pjw events --list" in words) == (1, True, True)
