"""kill -9 of worker, launcher and init: what runs goes on, what ended is known, nothing is guessed."""

import asyncio
import os
import signal
import sqlite3
from contextlib import aclosing, suppress

import pytest

from pjw.errors import LauncherGoneError, OutputLostError
from pjw.model import EndReason, ExitStatus, JobSpec, JobState, Limits
from pjw.worker import Worker
from tests.support.service import instance_cgroups
from tests.support.worker_harness import (
    ASK,
    MIB,
    Bench,
    WorkerProcess,
    launchers_of,
    read_all,
    run,
    start,
    start_said,
)

# Lines that are long enough to tell a gap or a repeat, from 0 on, each after it was asked for.
COUNT = ASK + "echo ready; i=0; while read x <&3; do echo line $i of output; i=$((i+1)); done"


def kill_launcher() -> None:
    """SIGKILL to the launcher of this process."""
    (launcher,) = launchers_of(os.getpid())
    os.kill(launcher, signal.SIGKILL)


async def gone(worker: Worker) -> None:
    """Wait until the worker has seen that its launcher is gone."""
    async with asyncio.timeout(10):
        await worker.gone()


# --- the worker is killed


@pytest.mark.parametrize("both", [False, True])
async def test_a_running_job_is_adopted(bench: Bench, both: bool) -> None:
    """It goes on without worker and launcher; the next worker has all its output, stops it, knows its end."""
    first = WorkerProcess(bench)
    job_id = first.start(COUNT)
    await bench.wait_for_output(job_id, b"ready\n")
    init = bench.init_pid(job_id)
    for number in range(3):
        bench.tell(job_id)
        await bench.wait_for_output(job_id, b"line %d of output\n" % number)
    first.kill(launcher_first=both)
    # nobody is there, and the job goes on
    bench.tell(job_id)
    await bench.wait_for_output(job_id, b"line 3 of output\n")

    worker = await bench.open()
    assert bench.init_pid(job_id) == init
    job = await worker.get(job_id)
    assert (job.state, job.command) == (JobState.RUNNING, COUNT)
    reading = asyncio.ensure_future(read_all(worker, job_id))
    bench.tell(job_id)
    await bench.wait_for_output(job_id, b"line 4 of output\n")
    ended = await worker.stop(job_id)
    assert await reading == b"ready\n" + b"".join(b"line %d of output\n" % number for number in range(5))
    assert (ended.state, ended.reason) == (JobState.EXITED, EndReason.STOPPED)
    assert ended.start == job.start
    bench.check_nothing_remains()


@pytest.mark.parametrize("both", [False, True])
async def test_a_job_that_ended_meanwhile(bench: Bench, both: bool) -> None:
    """Its output is whole; code, signal, usage and OOM kill are known, as if somebody had watched."""
    first = WorkerProcess(bench)
    big = 4 * MIB
    code = first.start(ASK + f"echo ready; read x <&3; head -c {big} /dev/zero; exit 9")
    number = first.start(ASK + "echo ready; read x <&3; kill -USR1 $$")
    hungry = first.start(
        ASK + "echo ready; read x <&3; exec python3 -c 'x = bytearray(200000000)'", memory_max_bytes=32 * MIB
    )
    for job_id in (code, number, hungry):
        await bench.wait_for_output(job_id, b"ready\n")
    pidfds = [os.pidfd_open(bench.init_pid(job_id)) for job_id in (code, number, hungry)]
    first.kill(launcher_first=both)
    for job_id, pidfd in zip((code, number, hungry), pidfds, strict=True):
        bench.tell(job_id)
        await _readable(pidfd)
        os.close(pidfd)

    worker = await bench.open()
    bench.check_nothing_remains()
    assert await read_all(worker, code) == b"ready\n" + bytes(big)
    assert ((await worker.get(code)).exit_status, (await worker.get(code)).reason) == (
        ExitStatus(code=9),
        EndReason.COMPLETED,
    )
    assert (await worker.get(number)).exit_status == ExitStatus(signal=signal.SIGUSR1)
    killed = await worker.get(hungry)
    assert (killed.exit_status, killed.reason) == (ExitStatus(signal=signal.SIGKILL), EndReason.OOM_KILLED)
    for job in await worker.list():
        assert job.usage is not None
        assert job.usage.cpu_usage_usec > 0
        assert job.end is not None
        assert job.end >= job.start


async def _readable(descriptor: int) -> None:
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(descriptor, ready.set)
    try:
        async with asyncio.timeout(30):
            await ready.wait()
    finally:
        loop.remove_reader(descriptor)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("answered", [0, 1, 5, 11])
async def test_killed_in_mid_launch(bench: Bench, answered: int, both: bool) -> None:
    """12 starts under way: what was acknowledged runs, all else is over or gone, no id comes twice."""
    first = WorkerProcess(bench)
    for number in range(12):
        first.write(do="start", command=f"echo job {number}; exec sleep 60", limits={})
    acknowledged = [first.read()["started"] for _ in range(answered)]
    first.kill(launcher_first=both)

    worker = await bench.open()
    jobs = {job.id: job for job in await worker.list()}
    assert set(acknowledged) <= set(jobs)
    for job_id in acknowledged:
        assert jobs[job_id].state is JobState.RUNNING
        assert (await worker.stop(job_id)).reason is EndReason.STOPPED
    for job in jobs.values():
        # never seen to start, so never a guess: it runs, or it is over with what is known of it
        assert job.state in (JobState.RUNNING, JobState.EXITED, JobState.LOST)
        ended = await worker.stop(job.id, grace_seconds=0)
        assert (ended.exit_status is None) == (ended.state is JobState.LOST)
    bench.check_nothing_remains()
    new, _ = await run(worker, ["true"])
    assert new.id > max(jobs, default=0)


@pytest.mark.parametrize("both", [False, True])
async def test_killed_in_mid_stop(bench: Bench, both: bool) -> None:
    """A stop dies with the worker: the job, deaf to SIGTERM, goes on until the next worker stops it."""
    first = WorkerProcess(bench)
    job_id = first.start("trap 'echo heard' TERM; echo ready; while :; do sleep 60 & wait; done")
    await bench.wait_for_output(job_id, b"ready\n")
    first.write(do="stop", id=job_id, grace=60)
    await bench.wait_for_output(job_id, b"heard\n")
    first.kill(launcher_first=both)

    worker = await bench.open()
    assert (await worker.get(job_id)).state is JobState.RUNNING
    ended = await worker.stop(job_id, grace_seconds=0)
    assert (ended.reason, ended.exit_status) == (EndReason.STOPPED, ExitStatus(signal=signal.SIGKILL))


async def test_a_stop_that_had_begun_is_the_reason(bench: Bench) -> None:
    """A job that ends by a stop whose worker was killed says that it was stopped."""
    first = WorkerProcess(bench)
    job_id = first.start(
        ASK + "trap 'echo heard; read x <&3; exit 3' TERM; echo ready; while :; do sleep 1000 & wait; done"
    )
    await bench.wait_for_output(job_id, b"ready\n")
    first.write(do="stop", id=job_id, grace=60)
    await bench.wait_for_output(job_id, b"heard\n")
    pidfd = os.pidfd_open(bench.init_pid(job_id))
    first.kill()
    bench.tell(job_id)
    await _readable(pidfd)
    os.close(pidfd)
    worker = await bench.open()
    job = await worker.get(job_id)
    assert (job.reason, job.exit_status) == (EndReason.STOPPED, ExitStatus(code=3))


async def test_killed_again_and_again(bench: Bench) -> None:
    """Ten workers, each killed with a job running: ids go up, and the last worker has all of them."""
    ids = []
    for number in range(10):
        process = WorkerProcess(bench)
        ids.append(process.start(f"echo {number}; exec sleep 1000"))
        process.kill(launcher_first=number % 2 == 0)
    assert ids == list(range(1, 11))
    worker = await bench.open()
    for number, job_id in enumerate(ids):
        await bench.wait_for_output(job_id, b"%d\n" % number)
        assert (await worker.get(job_id)).state is JobState.RUNNING


async def test_limits_survive(bench: Bench) -> None:
    """An adopted job keeps its limits: its cgroup is the same, time and output limits still end it."""
    first = WorkerProcess(bench)
    slow = first.start("exec sleep 60", time_max_seconds=2)
    loud = first.start(ASK + "echo ready; read x <&3; yes", output_max_bytes=1000)
    await bench.wait_for_output(loud, b"ready\n")
    bomb = first.start("exec sleep 60", pids_max=7)
    first.kill()
    worker = await bench.open()
    bench.tell(loud)
    assert (await worker.wait(loud)).reason is EndReason.OUTPUT_LIMIT
    assert len(await read_all(worker, loud)) == 1000
    assert (await worker.wait(slow)).reason is EndReason.TIMED_OUT
    assert (await worker.get(bomb)).limits.pids_max == 7
    assert [
        (path / "pids.max").read_text() for path in bench.cgroups(bomb) if (path / "pids.max").exists()
    ] == ["7\n"]


# --- the launcher is killed


async def test_without_its_launcher_a_worker_says_so(bench: Bench) -> None:
    """start, stop and wait raise LauncherGoneError; get, list and logs still answer; jobs run on."""
    worker = await bench.open()
    done, _ = await run(worker, "echo done")
    job = await start_said(worker, COUNT, b"ready\n")
    bench.tell(job.id)
    await bench.wait_for_output(job.id, b"line 0")
    waiting = [asyncio.ensure_future(worker.wait(job.id)), asyncio.ensure_future(worker.stop(job.id, 60))]
    reading = asyncio.ensure_future(read_all(worker, job.id))
    await asyncio.sleep(0)
    kill_launcher()
    await gone(worker)
    async with asyncio.timeout(10):
        results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(result) for result in results] == [LauncherGoneError] * 2
    for call in (start(worker, ["true"]), worker.stop(job.id), worker.wait(job.id)):
        async with asyncio.timeout(10):
            with pytest.raises(LauncherGoneError):
                await call
    assert await worker.get(done.id) == done
    assert await read_all(worker, done.id) == b"done\n"
    # no start has left a row for the next worker to call lost
    assert [known.id for known in await worker.list()] == [done.id, job.id]
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    await bench.close(worker)
    worker = await bench.open()
    assert [known.id for known in await worker.list()] == [done.id, job.id]


async def test_followers_outlive_the_launcher(bench: Bench) -> None:
    """A follower gets every byte until the job's end, although nobody can account for the job any more."""
    worker = await bench.open()
    job = await start_said(worker, ASK + "echo one; read x <&3; echo two", b"one\n")
    reading = asyncio.ensure_future(read_all(worker, job.id))
    kill_launcher()
    await gone(worker)
    bench.tell(job.id)
    async with asyncio.timeout(10):
        assert await reading == b"one\ntwo\n"
    await bench.close(worker)
    worker = await bench.open()
    assert (await worker.get(job.id)).exit_status == ExitStatus(code=0)


@pytest.mark.parametrize("turns", [0, 5, 20, 60, 200])
async def test_the_launcher_dies_in_mid_launch(bench: Bench, turns: int) -> None:
    """A start in flight ends with LauncherGoneError or a job; the next worker knows which jobs there are."""
    worker = await bench.open()
    starts = [asyncio.ensure_future(start(worker, ["sleep", "60"])) for _ in range(8)]
    for _ in range(turns):
        await asyncio.sleep(0)
    kill_launcher()
    async with asyncio.timeout(10):
        results = await asyncio.gather(*starts, return_exceptions=True)
    started = [result.id for result in results if not isinstance(result, BaseException)]
    assert {type(result) for result in results if isinstance(result, BaseException)} <= {LauncherGoneError}
    await bench.close(worker)

    worker = await bench.open()
    jobs = {job.id: job for job in await worker.list()}
    assert all(jobs[job_id].state is JobState.RUNNING for job_id in started)
    for job_id in jobs:
        await worker.stop(job_id, grace_seconds=0)
    bench.check_nothing_remains()
    assert (await run(worker, ["true"]))[0].id > max(jobs, default=0)


async def test_a_stopped_launcher_holds_up_only_what_needs_it(bench: Bench) -> None:
    """While the launcher is frozen, output flows and get answers; a start is done when it thaws."""
    worker = await bench.open()
    job = await start_said(worker, COUNT, b"ready\n")
    (launcher,) = launchers_of(os.getpid())
    os.kill(launcher, signal.SIGSTOP)
    try:
        starting = asyncio.ensure_future(start(worker, "echo started"))
        bench.tell(job.id)
        await bench.wait_for_output(job.id, b"line 0 of output\n")
        assert (await worker.get(job.id)).state is JobState.RUNNING
        assert not starting.done()
    finally:
        os.kill(launcher, signal.SIGCONT)
    async with asyncio.timeout(10):
        started = await starting
        assert await read_all(worker, started.id) == b"started\n"


# --- init is killed


async def test_a_job_whose_init_is_killed_is_lost(bench: Bench) -> None:
    """kill -9 of init from outside takes the job with it; nobody recorded its end, and nobody guesses one."""
    worker = await bench.open()
    job = await start_said(worker, ASK + "echo words; exec sleep 60", b"words\n")
    os.kill(bench.init_pid(job.id), signal.SIGKILL)
    async with asyncio.timeout(10):
        lost = await worker.wait(job.id)
    assert (lost.state, lost.reason, lost.exit_status) == (JobState.LOST, EndReason.LOST, None)
    assert lost.end is not None
    assert lost.usage is not None
    assert await read_all(worker, job.id) == b"words\n"
    bench.check_nothing_remains()
    assert await worker.stop(job.id) == lost


async def test_a_job_whose_init_is_killed_meanwhile_is_lost(bench: Bench) -> None:
    """The same when no worker was there."""
    first = WorkerProcess(bench)
    job_id = first.start("echo words; exec sleep 60")
    await bench.wait_for_output(job_id, b"words\n")
    init = bench.init_pid(job_id)
    pidfd = os.pidfd_open(init)
    first.kill()
    os.kill(init, signal.SIGKILL)
    await _readable(pidfd)
    os.close(pidfd)
    worker = await bench.open()
    lost = await worker.get(job_id)
    assert (lost.state, lost.reason, lost.exit_status) == (JobState.LOST, EndReason.LOST, None)
    assert await read_all(worker, job_id) == b"words\n"


# --- the host goes down


def crashed(bench: Bench, output: int | None = None) -> None:
    """Make the closed state directory look as after a crash of the host, a job's output cut to 3 bytes."""
    with sqlite3.connect(bench.state / "jobs.sqlite") as db:
        db.execute("UPDATE host SET boot_id = 'another'")
    db.close()
    if output is not None:
        os.truncate(bench.state / "jobs" / str(output) / "output", 3)


async def test_a_job_that_the_host_took_along(bench: Bench) -> None:
    """LOST, because the host was restarted: that is known, and nothing else is guessed."""
    first = WorkerProcess(bench)
    job_id = first.start("echo words; exec sleep 60")
    await bench.wait_for_output(job_id, b"words\n")
    init = bench.init_pid(job_id)
    pidfd = os.pidfd_open(init)
    first.kill(launcher_first=True)
    os.kill(init, signal.SIGKILL)
    await _readable(pidfd)
    os.close(pidfd)
    crashed(bench)
    worker = await bench.open()
    lost = await worker.get(job_id)
    assert (lost.state, lost.reason, lost.exit_status) == (JobState.LOST, EndReason.HOST_RESTARTED, None)
    assert await read_all(worker, job_id) == b"words\n"
    # told once: the next job that is lost in this boot is not the host's
    job = await start_said(worker, "echo words; exec sleep 60", b"words\n")
    os.kill(bench.init_pid(job.id), signal.SIGKILL)
    assert (await worker.wait(job.id)).reason is EndReason.LOST


async def test_a_launch_that_was_interrupted(bench: Bench) -> None:
    """A row without a process, as a kill between the two leaves it: LOST, and the reason says why."""
    worker = await bench.open()
    job = await worker.store.add("local", JobSpec("x"), Limits())
    await bench.close(worker)
    worker = await bench.open()
    lost = await worker.get(job.id)
    assert (lost.state, lost.reason, lost.exit_status) == (JobState.LOST, EndReason.LAUNCH_INTERRUPTED, None)
    assert await read_all(worker, job.id) == b""


async def test_what_a_power_cut_brings_back(bench: Bench) -> None:
    """A scratch directory that was removed, and files of a job whose row was not on the disk: both go."""
    worker = await bench.open()
    job, _ = await run(worker, "echo words")
    await bench.close(worker)
    crashed(bench)
    scratch = bench.state / "scratch" / str(job.id) / "deep"
    scratch.mkdir(parents=True)
    never_told = bench.state / "jobs" / str(job.id + 1)
    never_told.mkdir()
    for name in ("output", "status"):
        (never_told / name).write_text("of a start that nobody was told of")
    worker = await bench.open()
    assert bench.scratch() == []
    new, output = await run(worker, "echo new")
    assert (new.id, output) == (job.id + 1, b"new\n")


async def test_output_that_the_disk_did_not_have(bench: Bench) -> None:
    """What is left is given, and then an error that says so: never an end that looks whole."""
    worker = await bench.open()
    job, _ = await run(worker, "echo words")
    await bench.close(worker)
    crashed(bench, job.id)
    worker = await bench.open()
    assert await worker.get(job.id) == job
    got = []
    with pytest.raises(OutputLostError, match="3 of 6 bytes are on the server's disk"):  # noqa: PT012  a loop
        async for chunk in worker.logs(job.id):
            got.append(chunk)  # noqa: PERF401  what came before the error counts
    assert got == [b"wor"]
    (bench.state / "jobs" / str(job.id) / "output").unlink()
    with pytest.raises(OutputLostError, match="0 of 6 bytes are on the server's disk"):
        await read_all(worker, job.id)


async def test_an_output_that_is_cut_short_while_its_job_runs(bench: Bench) -> None:
    """Readers get no NULs in the place of what is gone, and no end that looks whole."""
    worker = await bench.open()
    script = "trap 'echo after; exit 0' TERM; echo before; sleep 1000 & wait"
    job = await start_said(worker, script, b"before\n")
    output = bench.state / "jobs" / str(job.id) / "output"
    async with aclosing(worker.logs(job.id)) as chunks:
        assert await anext(chunks) == b"before\n"
        os.truncate(output, 0)
        with pytest.raises(OutputLostError, match="was cut short; 0 bytes are left"):
            await anext(chunks)
    async with aclosing(worker.logs(job.id)) as chunks:
        ended = asyncio.ensure_future(worker.stop(job.id))
        assert await anext(chunks) == b"after\n"
        with pytest.raises(OutputLostError, match="6 bytes are left"):
            await anext(chunks)
    assert (await ended).output_bytes == 6
    with pytest.raises(OutputLostError, match="6 bytes are left"):
        await read_all(worker, job.id)


async def test_a_frozen_init_is_killed_in_the_end(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop gets through even when init cannot act: the last resort kills it, and says what is known."""
    monkeypatch.setattr("pjw.worker.stopping.LAST_RESORT_SECONDS", 0.2)
    worker = await bench.open()
    job = await start_said(worker, "echo words; exec sleep 60", b"words\n")
    os.kill(bench.init_pid(job.id), signal.SIGSTOP)
    async with asyncio.timeout(10):
        ended = await worker.stop(job.id, grace_seconds=0)
    assert (ended.state, ended.reason) == (JobState.EXITED, EndReason.STOPPED)
    assert ended.exit_status == ExitStatus(signal=signal.SIGKILL)
    bench.check_nothing_remains()


# --- what is left of a table


async def test_a_lost_table_leaves_no_job(bench: Bench) -> None:
    """Jobs that no table knows, as it was taken away, are ended and removed: nobody could ask for them."""
    first = WorkerProcess(bench)
    for _ in range(3):
        first.start("exec sleep 1000")
    first.kill()
    for path in bench.state.glob("jobs.sqlite*"):
        path.unlink()
    worker = await bench.open()
    assert await worker.list() == []
    bench.check_nothing_remains()


async def test_what_a_crash_in_mid_removal_leaves(bench: Bench) -> None:
    """Empty cgroups and scratch files of a job that has ended in the table are removed at the next start."""
    worker = await bench.open()
    job, _ = await run(worker, ["true"])
    parents = instance_cgroups(bench.state)
    await bench.close(worker)
    for parent in parents[:2]:
        (parent / f"job-{job.id}").mkdir(parents=True)
    (bench.state / "scratch" / str(job.id)).mkdir()
    (bench.state / "scratch" / str(job.id) / "file").write_text("x")
    worker = await bench.open()
    bench.check_nothing_remains()
    assert await worker.get(job.id) == job


@pytest.mark.parametrize("both", [False, True])
async def test_killed_in_mid_removal(bench: Bench, both: bool) -> None:
    """A job that leaves 20,000 files, and a kill while they are removed: the next worker removes the rest."""
    first = WorkerProcess(bench)
    script = "for i in range(20000): open(str(i), 'w').close()"
    job_id = first.start(ASK + f'read x <&3; /usr/bin/python3 -I -S -c "{script}"')
    pidfd = os.pidfd_open(bench.init_pid(job_id))
    bench.tell(job_id)
    await _readable(pidfd)
    os.close(pidfd)
    directory = bench.state / "scratch" / str(job_id)
    # seen from outside: the removal has begun, or is over on a quick machine
    async with asyncio.timeout(30):
        with suppress(FileNotFoundError):
            # with the fifo
            while len(os.listdir(directory)) > 20000:
                await asyncio.sleep(0)
    first.kill(launcher_first=both)
    worker = await bench.open()
    bench.check_nothing_remains()
    assert (await worker.get(job_id)).exit_status == ExitStatus(code=0)
