"""What is removed: ended jobs that somebody removes, or that are more than the operator keeps; no others."""

import asyncio
import os
import sqlite3
from contextlib import aclosing
from typing import Any

import pytest

from pjw.errors import JobNotFoundError, JobStateError, LimitReachedError
from pjw.model import JobSpec, JobState
from pjw.worker.settings import Quotas, Retention
from tests.support.service import wait_for
from tests.support.worker_harness import ASK, MIB, Bench, BenchWorker, read_all, run, start, start_said


def files(bench: Bench) -> list[str]:
    """The jobs that have files, by their ids."""
    return sorted(path.name for path in (bench.state / "jobs").iterdir())


async def ids(worker: BenchWorker, wanted: list[int]) -> None:
    """Wait until these are the jobs that there are: what prunes runs beside us, after an end was told."""
    async with asyncio.timeout(20):
        while [job.id for job in await worker.list()] != wanted or await worker.store.removals():
            await asyncio.sleep(0.01)


async def test_a_removed_job_is_gone(bench: Bench) -> None:
    """Row, output and status; its id is like one that never was, and is not used again."""
    worker = await bench.open()
    kept, _ = await run(worker, "echo kept")
    job, _ = await run(worker, "echo gone")
    await worker.delete(job.id)
    for call in (worker.get, worker.delete, worker.stop, worker.wait):
        with pytest.raises(JobNotFoundError):
            await call(job.id)
    with pytest.raises(JobNotFoundError):
        await read_all(worker, job.id)
    assert files(bench) == [str(kept.id)]
    assert (await run(worker, "true"))[0].id == job.id + 1


@pytest.mark.parametrize("split", [False, True])
async def test_a_silent_job_is_removed_by_the_names_of_its_files(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, *, split: bool
) -> None:
    """One call for each file that it has: those that it may have had would cost each job as much again."""
    worker = await bench.open()
    unlinked: list[str] = []
    unlink = os.unlink

    def noted(path: str, *, dir_fd: int | None = None) -> None:
        unlinked.append(path)
        unlink(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", noted)
    job = await worker.start(JobSpec("true", split_stderr=split))
    await worker.wait(job.id)
    await asyncio.to_thread(wait_for, lambda: files(bench) == [])
    names = ["output", "status", "times", *(["stderr", "stderr_times"] if split else [])]
    assert unlinked == [f"{job.id}/{name}" for name in names]


async def test_a_job_that_runs_is_not_removed(bench: Bench) -> None:
    """Refused with the next step as a hint; the job goes on."""
    worker = await bench.open()
    job = await start_said(worker, ASK + "echo ready; read x <&3", b"ready\n")
    with pytest.raises(JobStateError, match=f"cannot remove job {job.id}: it has not ended") as caught:
        await worker.delete(job.id)
    assert caught.value.hint == f"pjw stop {job.id}"
    assert (await worker.get(job.id)).state is JobState.RUNNING
    bench.tell(job.id)
    await worker.wait(job.id)
    await worker.delete(job.id)


async def test_another_client_cannot_remove_it(bench: Bench) -> None:
    """It does not exist for others, ended or not."""
    worker = await bench.open()
    job, _ = await run(worker, "echo mine", "alice")
    with pytest.raises(JobNotFoundError):
        await worker.delete(job.id, "bob")
    assert await read_all(worker, job.id) == b"mine\n"
    await worker.delete(job.id, "alice")


async def test_who_reads_reads_on(bench: Bench) -> None:
    """A reader in the middle of an output that is removed has all of it."""
    worker = await bench.open()
    job, _ = await run(worker, f"head -c {4 * MIB} /dev/zero")
    got = 0
    async with aclosing(worker.logs(job.id)) as chunks:
        async for chunk in chunks:
            if not got:
                await worker.delete(job.id)
                assert files(bench) == []
            got += len(chunk)
    assert got == 4 * MIB


async def test_two_removals_at_once(bench: Bench) -> None:
    """One of them removes it; none fails in another way than with "no such job"."""
    worker = await bench.open()
    job, _ = await run(worker, "echo x")
    results = await asyncio.gather(*(worker.delete(job.id) for _ in range(10)), return_exceptions=True)
    assert all(result is None or isinstance(result, JobNotFoundError) for result in results)
    assert (await worker.list(), files(bench)) == ([], [])


async def test_what_a_crash_left_of_a_removal(bench: Bench) -> None:
    """The row was gone and the files were not: the next worker removes them."""
    worker = await bench.open()
    job, _ = await run(worker, "echo x")
    kept, _ = await run(worker, "echo kept")
    await worker.store.remove(job.id)
    assert str(job.id) in files(bench)
    await bench.close(worker)
    worker = await bench.open()
    async with asyncio.timeout(20):
        while await worker.store.removals():
            await asyncio.sleep(0.01)
    assert files(bench) == [str(kept.id)]


async def test_no_more_jobs_than_may_be_kept(bench: Bench) -> None:
    """The one that ended first goes first, whatever its id; another client's are another matter."""
    worker = await bench.open(retention=Retention(jobs_per_client=2))
    slow = await start_said(worker, ASK + "echo slow; read x <&3", b"slow\n")
    others, _ = await run(worker, "echo other", "other")
    quick = [(await run(worker, f"echo {number}"))[0].id for number in range(2)]
    bench.tell(slow.id)
    await worker.wait(slow.id)
    await ids(worker, [slow.id, others.id, quick[1]])
    assert files(bench) == sorted(map(str, (slow.id, others.id, quick[1])))


async def test_a_job_that_runs_is_never_pruned(bench: Bench) -> None:
    """However old it is and however much it has written."""
    worker = await bench.open(retention=Retention(age_seconds=1, jobs_per_client=1, bytes_per_client=1))
    job = await start_said(worker, ASK + "echo much; read x <&3", b"much\n")
    for number in range(3):
        await run(worker, f"echo {number}")
    await ids(worker, [job.id])
    assert (await worker.get(job.id)).state is JobState.RUNNING


async def test_no_more_bytes_than_may_be_kept(bench: Bench) -> None:
    """Jobs without output do not go for the sake of those with much."""
    worker = await bench.open(retention=Retention(bytes_per_client=3 * MIB))
    silent, _ = await run(worker, "true")
    large = [(await run(worker, f"head -c {MIB} /dev/zero"))[0].id for _ in range(5)]
    await ids(worker, [silent.id, *large[2:]])
    assert (await worker.numbers()).clients["local"].stored_bytes == 3 * MIB
    assert await worker.store.ended_bytes("local") == (3 * MIB, 3 * MIB)


@pytest.mark.parametrize("total", ["jobs_total", "bytes_total"])
async def test_a_total_is_at_the_cost_of_who_has_most(bench: Bench, total: str) -> None:
    """A client who fills the server loses its own jobs, and the few of another stay."""
    most: Any = {"jobs_total": 4, "bytes_total": 4 * MIB}[total]
    worker = await bench.open(retention=Retention(**{total: most}))
    few, _ = await run(worker, f"head -c {MIB} /dev/zero", "modest")
    many = [(await run(worker, f"head -c {MIB} /dev/zero", "greedy"))[0].id for _ in range(6)]
    await ids(worker, [few.id, *many[3:]])


async def test_jobs_grow_old(bench: Bench) -> None:
    """A job goes when it has become too old, without another end to set that off; a younger one stays."""
    worker = await bench.open(retention=Retention(age_seconds=2))
    old, _ = await run(worker, "echo old")
    await ids(worker, [])
    assert files(bench) == []
    await bench.close(worker)
    worker = await bench.open(retention=Retention(age_seconds=3600))
    young, _ = await run(worker, "echo young")
    assert young.id == old.id + 1
    await bench.close(worker)
    worker = await bench.open()
    assert await read_all(worker, young.id) == b"young\n"


async def test_what_became_too_old_while_nobody_looked(bench: Bench) -> None:
    """It is removed at the next start, more than one batch of it."""
    worker = await bench.open()
    job, _ = await run(worker, "echo x")
    await bench.close(worker)
    with sqlite3.connect(bench.state / "jobs.sqlite") as db:
        columns = "client_name, command, limits, start_ns, state, end_ns, exit_code, reason, output_bytes"
        copy = f"INSERT INTO jobs ({columns}) SELECT {columns} FROM jobs WHERE id = ?"  # noqa: S608
        for _ in range(250):
            db.execute(copy, (job.id,))
        db.execute("UPDATE jobs SET end_ns = 1")
    db.close()
    worker = await bench.open(retention=Retention(age_seconds=3600))
    await ids(worker, [])
    assert files(bench) == []


async def test_files_of_an_ended_job(bench: Bench) -> None:
    """Its output and its times, and nothing where there is none: a million leave no empty directories."""
    worker = await bench.open()
    silent, _ = await run(worker, "true")
    job, _ = await run(worker, "echo words")
    async with asyncio.timeout(20):
        expected = {f"jobs/{job.id}/output", f"jobs/{job.id}/times"}
        while {str(path.relative_to(bench.state)) for path in bench.state.glob("jobs/*/*")} != expected:
            await asyncio.sleep(0.01)
    assert (silent.output_bytes, job.output_bytes) == (0, 6)
    assert await read_all(worker, silent.id) == b""
    await bench.close(worker)
    worker = await bench.open()
    assert [await read_all(worker, each.id) for each in (silent, job)] == [b"", b"words\n"]
    assert await worker.get(job.id) == job


async def test_a_quota_of_running_jobs(bench: Bench) -> None:
    """A burst of starts gets as many jobs as the quota; refused ones leave nothing; an end makes room."""
    worker = await bench.open(quotas=Quotas(running_max=3))
    starts = (start(worker, ["sleep", "60"]) for _ in range(10))
    results = await asyncio.gather(*starts, return_exceptions=True)
    refused = [result for result in results if isinstance(result, BaseException)]
    assert [type(each) for each in refused] == [LimitReachedError] * 7
    running = await worker.list()
    assert len(running) == 3
    other = await start(worker, ["sleep", "60"], "other")
    await worker.stop(running[0].id, grace_seconds=0)
    again = await start(worker, ["sleep", "60"])
    # what failed to start counts no more
    await worker.stop(again.id, grace_seconds=0)
    for _ in range(5):
        with pytest.raises(Exception, match="cannot execute"):
            await start(worker, ["/nonexistent"])
    # and those of before a restart do
    await bench.close(worker)
    worker = await bench.open()
    await start(worker, ["sleep", "60"])
    with pytest.raises(LimitReachedError):
        await start(worker, ["sleep", "60"])
    assert (await worker.get(other.id)).state is JobState.RUNNING


async def test_a_quota_of_stored_bytes(bench: Bench) -> None:
    """What runs counts as well as what has ended; a removal makes room."""
    worker = await bench.open(quotas=Quotas(stored_bytes_max=2 * MIB))
    ended, _ = await run(worker, f"head -c {MIB} /dev/zero")
    running = await start_said(worker, f"head -c {MIB} /dev/zero; echo done; sleep 60", b"done\n")
    with pytest.raises(LimitReachedError, match=rf"have 2.0M \({2 * MIB + 5} bytes\) of output") as caught:
        await start(worker, ["true"])
    assert "pjw rm ID" in (caught.value.hint or "")
    await run(worker, "true", "other")
    await worker.delete(ended.id)
    await run(worker, "true")
    assert (await worker.get(running.id)).state is JobState.RUNNING
