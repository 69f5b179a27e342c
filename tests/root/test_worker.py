"""The library from end to end, with real jobs: start, get, list, stop, wait, logs."""

import asyncio
import hashlib
import os
import stat
import subprocess
import sys
from contextlib import aclosing
from datetime import UTC, datetime, timedelta

import pytest

from pjw.errors import (
    ConfigError,
    InvalidJobError,
    JobNotFoundError,
    LauncherGoneError,
    LaunchError,
    LimitReachedError,
    OffsetError,
    WorkerClosedError,
)
from pjw.model import EndReason, ExitStatus, JobState, Limits
from pjw.worker import Part, Worker
from tests.support.seen import watches
from tests.support.worker_harness import (
    ASK,
    MIB,
    PROJECT,
    Bench,
    check_no_new_descriptors,
    launchers_of,
    open_descriptors,
    read_all,
    read_until,
    run,
    start,
    start_said,
)

# What the README shows: a whole program.
README_PROGRAM = """
import asyncio
import sys

from pjw import JobSpec, Worker


async def main(state_dir: str) -> int:
    async with await Worker.open(state_dir) as worker:
        job = await worker.start(JobSpec("for i in 1 2 3; do echo $i; done; exit 7"))
        async for chunk in worker.logs(job.id):
            sys.stdout.buffer.write(chunk)
            sys.stdout.flush()
        job = await worker.wait(job.id)
    print(f"job {job.id}: {job.state}, {job.exit_status}")
    return job.exit_status.code


sys.exit(asyncio.run(main(sys.argv[1])))
"""


async def test_the_readme_program_runs(bench: Bench) -> None:
    """Twenty lines run a job without a server, show its output and its exit code."""
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-B", "-c", README_PROGRAM, str(bench.state)],
        capture_output=True,
        check=False,
        cwd=PROJECT,
        timeout=60,
    )
    assert len(README_PROGRAM.strip().splitlines()) <= 20
    assert done.stdout.decode() == "1\n2\n3\njob 1: exited, ExitStatus(code=7, signal=None)\n"
    assert (done.returncode, done.stderr) == (7, b"")


async def test_a_job_runs_and_its_end_is_known(worker: Worker) -> None:
    """Start answers with a running job; its end has a time, a code, a reason and the usage."""
    before = datetime.now(UTC)
    job = await start(worker, "echo hello; exec sleep 60")
    assert (job.id, job.state, job.command, job.client_name) == (
        1,
        JobState.RUNNING,
        "echo hello; exec sleep 60",
        "local",
    )
    assert (job.end, job.exit_status, job.reason, job.usage) == (None, None, None, None)
    assert before <= job.start <= datetime.now(UTC)
    await worker.stop(job.id)
    job, output = await run(worker, "echo one; echo two >&2; exit 3")
    assert output == b"one\ntwo\n"
    assert (job.id, job.state, job.exit_status, job.reason) == (
        2,
        JobState.EXITED,
        ExitStatus(code=3),
        EndReason.COMPLETED,
    )
    assert job.end is not None
    assert timedelta(0) <= job.end - job.start < timedelta(seconds=30)
    assert job.usage is not None
    assert job.usage.cpu_usage_usec > 0
    assert job.usage.memory_peak_bytes > 0
    assert job.usage.oom_kills == 0


async def test_get_list_and_wait_agree(worker: Worker) -> None:
    """The snapshots of get, list, wait and stop are the same, while a job runs and after its end."""
    job = await start(worker, ["sleep", "60"])
    assert await worker.get(job.id) == job
    assert await worker.list() == [job]
    assert worker.live_count == 1
    ended = await worker.stop(job.id)
    assert ended.state is JobState.EXITED
    assert [await worker.get(job.id), await worker.wait(job.id), await worker.stop(job.id)] == [ended] * 3
    assert await worker.list() == [ended]
    assert worker.live_count == 0


async def test_a_snapshot_is_of_one_moment(bench: Bench, worker: Worker) -> None:
    """Looked at as often as possible around its end, a job either runs or has ended, with all that says."""
    for _ in range(5):
        job = await start_said(worker, ASK + "echo ready; read x <&3; exit 3", b"ready\n")
        bench.tell(job.id)
        async with asyncio.timeout(10):
            while not job.state.final:
                job = await worker.get(job.id)
                known = (job.end, job.exit_status, job.reason, job.usage)
                assert job.state is JobState.RUNNING or None not in known
                assert job.state is JobState.EXITED or known == (None, None, None, None)
                await asyncio.sleep(0)
        assert job.exit_status == ExitStatus(code=3)


async def test_list_pages(worker: Worker) -> None:
    """A page begins behind an id and has at most so many jobs, in the order of their ids."""
    for number in range(5):
        await run(worker, ["true"], client="even" if number % 2 == 0 else "odd")
    assert [job.id for job in await worker.list(count=2)] == [1, 2]
    assert [job.id for job in await worker.list(after=2, count=2)] == [3, 4]
    assert [job.id for job in await worker.list(after=5)] == []
    assert [job.id for job in await worker.list("even")] == [1, 3, 5]
    assert [job.id for job in await worker.list("even", after=1, count=1)] == [3]
    assert await worker.list("nobody") == []


async def test_the_jobs_of_others_do_not_exist(worker: Worker) -> None:
    """Another's job, running or ended, is answered like one that was never there."""
    running = await start(worker, ["sleep", "60"], client="alice")
    ended, _ = await run(worker, ["true"], client="alice")
    for job_id in (running.id, ended.id, 99):
        message = f"no job {job_id}"
        for call in (worker.get, worker.wait):
            with pytest.raises(JobNotFoundError, match=f"^{message}$"):
                await call(job_id, owner="bob")
        with pytest.raises(JobNotFoundError, match=f"^{message}$"):
            await worker.stop(job_id, owner="bob")
        with pytest.raises(JobNotFoundError, match=f"^{message}$"):
            await anext(worker.logs(job_id, owner="bob"))
    assert (await worker.get(running.id, owner="alice")).state is JobState.RUNNING


@pytest.mark.parametrize("job_id", [0, -1, 99, 2**53, 2**63 - 1, 2**63, -(2**63), 2**100])
async def test_unknown_ids_are_not_found(worker: Worker, job_id: int) -> None:
    """No number is too small, too large or too negative for a plain answer."""
    for call in (worker.get, worker.wait, worker.stop):
        with pytest.raises(JobNotFoundError):
            await call(job_id)
    with pytest.raises(JobNotFoundError):
        await anext(worker.logs(job_id))


async def test_every_reader_gets_every_byte(bench: Bench, worker: Worker) -> None:
    """Readers that join before, while and after a job writes all get the same bytes."""
    count = 8 * MIB
    job = await start(
        worker, ASK + f"echo; read x <&3; head -c {count} /dev/urandom; echo start; read x <&3; echo end"
    )
    early = [asyncio.ensure_future(_digest(worker, job.id)) for _ in range(8)]
    await read_until(worker, job.id, b"\n")
    bench.tell(job.id)
    await read_until(worker, job.id, b"start\n")
    late = [asyncio.ensure_future(_digest(worker, job.id)) for _ in range(8)]
    bench.tell(job.id)
    await worker.wait(job.id)
    digests = [*await asyncio.gather(*early, *late), await _digest(worker, job.id)]
    assert len(set(digests)) == 1
    assert digests[0][0] == count + len(b"\nstart\nend\n")


async def _digest(worker: Worker, job_id: int) -> tuple[int, str]:
    size, digest = 0, hashlib.sha256()
    async for chunk in worker.logs(job_id):
        size += len(chunk)
        digest.update(chunk)
    return size, digest.hexdigest()


async def test_a_stalled_reader_holds_up_nobody(worker: Worker) -> None:
    """A reader that takes one chunk and stops keeps neither the job nor another reader waiting."""
    job = await start(worker, f"head -c {4 * MIB} /dev/zero")
    async with aclosing(worker.logs(job.id)) as stalled:
        first = await anext(stalled)
        assert len(await read_all(worker, job.id)) == 4 * MIB
        assert (await worker.wait(job.id)).exit_status == ExitStatus(code=0)
        assert len(first + b"".join([chunk async for chunk in stalled])) == 4 * MIB


async def test_output_from_any_offset(worker: Worker) -> None:
    """From the start, the middle and the very end; beyond it, or before 0, is an OffsetError."""
    job, _ = await run(worker, "printf 0123456789")
    for offset in (0, 1, 9, 10):
        assert await read_all(worker, job.id, offset) == b"0123456789"[offset:]
    for offset in (-1, 11, 2**63, -(2**63)):
        with pytest.raises(OffsetError):
            await read_all(worker, job.id, offset)


async def test_output_comes_as_it_is_written(bench: Bench, worker: Worker) -> None:
    """A byte is delivered while the job goes on, also to a reader that began at the end of what was there."""
    job = await start_said(worker, ASK + "echo first; read x <&3; echo second; sleep 60", b"first\n")
    async with aclosing(worker.logs(job.id, Part(offset=len(b"first\n")))) as chunks:
        second = asyncio.ensure_future(anext(chunks))
        await asyncio.sleep(0)
        bench.tell(job.id)
        assert await second == b"second\n"
    assert (await worker.get(job.id)).state is JobState.RUNNING


async def test_binary_output_is_untouched(worker: Worker) -> None:
    """All 256 byte values, NUL and invalid UTF-8 among them, arrive as they were written."""
    every = bytes(range(256)) * 3
    script = "import os; os.write(1, bytes(range(256)) * 3)"
    assert (await run(worker, ["/usr/bin/python3", "-I", "-S", "-c", script]))[1] == every


async def test_a_cancelled_reader_leaves_nothing(bench: Bench, worker: Worker) -> None:
    """Followers of a silent job that are cancelled give their descriptor and their watch back."""
    job = await start(worker, ["sleep", "60"])
    before, output = open_descriptors(), bench.state / "jobs" / str(job.id) / "output"
    # the worker itself has one: init tells there that the output is held
    watched = watches(output)
    readers = [asyncio.ensure_future(read_all(worker, job.id)) for _ in range(20)]
    while len(open_descriptors()) < len(before) + 20:
        await asyncio.sleep(0)
    # one more for all of them
    assert watches(output) == watched + 1
    for reader in readers:
        reader.cancel()
    await asyncio.gather(*readers, return_exceptions=True)
    check_no_new_descriptors(before)
    assert watches(output) == watched


async def test_a_cancelled_wait_ends_nothing(worker: Worker) -> None:
    """Whoever stops waiting changes nothing for the job or for others who wait."""
    job = await start(worker, ["sleep", "60"])
    one, other = (asyncio.ensure_future(worker.wait(job.id)) for _ in range(2))
    await asyncio.sleep(0)
    one.cancel()
    await asyncio.gather(one, return_exceptions=True)
    assert (await worker.get(job.id)).state is JobState.RUNNING
    await worker.stop(job.id)
    assert (await other).state is JobState.EXITED


async def test_limits_are_defaults_with_overrides(bench: Bench) -> None:
    """A job has the operator's defaults, except where its spec says otherwise."""
    worker = await bench.open(default_limits=Limits(pids_max=10, memory_max_bytes=64 * MIB))
    job, _ = await run(worker, ["true"], pids_max=20)
    assert (job.limits.pids_max, job.limits.memory_max_bytes) == (20, 64 * MIB)
    assert (await worker.get(job.id)).limits == job.limits


async def test_a_ceiling_is_a_ceiling(bench: Bench) -> None:
    """Above it, or with no limit where there is a ceiling, a start is refused and leaves nothing."""
    worker = await bench.open(ceiling=Limits(pids_max=600))
    for value in (601, 0):
        with pytest.raises(InvalidJobError, match="limit pids_max must be at most 600"):
            await start(worker, ["true"], pids_max=value)
    with pytest.raises(InvalidJobError, match="no limit is called 'pids'"):
        await start(worker, ["true"], pids=1)
    assert await worker.list() == []
    job, _ = await run(worker, ["true"], pids_max=600)
    assert job.id == 1


async def test_every_client_gets_one_user_and_keeps_it(bench: Bench) -> None:
    """The user id of a client is its own, for every job, over a restart; when none is left that is said."""
    first = bench.settings.uid_first
    worker = await bench.open(uid_count=2)

    async def uid(client: str) -> int:
        return int((await run(worker, "id -u", client=client))[1])

    assert [await uid(client) for client in ("alice", "bob", "alice")] == [first, first + 1, first]
    with pytest.raises(LimitReachedError, match="all 2 user ids for clients are taken"):
        await uid("carol")
    await bench.close(worker)
    worker = await bench.open(uid_count=3)
    assert [await uid(client) for client in ("bob", "alice", "carol")] == [first + 1, first, first + 2]


async def test_a_client_name_is_only_data(worker: Worker) -> None:
    """Names that look like paths, SQL or terminal codes are stored and matched as they are."""
    for name in ("../../etc", "'; DROP TABLE jobs; --", "a\nb", "\x1b[31m", "ü", "x" * 10_000):
        job, _ = await run(worker, ["true"], client=name)
        assert [found.id for found in await worker.list(name)] == [job.id]
        assert (await worker.get(job.id, owner=name)).client_name == name


async def test_two_workers_cannot_share_a_state_directory(bench: Bench) -> None:
    """The second is told who has it, and the first goes on."""
    worker = await bench.open()
    with pytest.raises(ConfigError, match=r"jobs\.sqlite is in use by another pjwd"):
        await Worker.open(str(bench.state), bench.settings)
    assert (await run(worker, ["echo", "still here"]))[1] == b"still here\n"


@pytest.mark.parametrize("place", ["itself", "its parent"])
@pytest.mark.parametrize("change", ["owner", "group", "everybody"])
async def test_a_state_directory_that_others_may_move_is_refused(
    bench: Bench, place: str, change: str
) -> None:
    """Root makes nothing where somebody else could put a link in the way; a sticky parent will do."""
    bench.state.mkdir()
    directory = bench.state if place == "itself" else bench.directory
    if change == "owner":
        os.chown(directory, 65_534, 0)
    else:
        directory.chmod(0o770 if change == "group" else 0o777)
    with pytest.raises(ConfigError, match=f"others than root may write {directory}$") as raised:
        await bench.open()
    assert raised.value.hint is not None
    assert list(bench.state.iterdir()) == []
    if change == "everybody":
        directory.chmod(0o1777)
        if place == "itself":
            with pytest.raises(ConfigError, match="others than root"):
                await bench.open()
        else:
            await bench.open()
    os.chown(directory, 0, 0)
    directory.chmod(0o700)


async def test_nobody_else_on_the_host_may_read_the_table(bench: Bench) -> None:
    """The table has everybody's commands: whatever the umask, its files are root's alone."""
    former = os.umask(0)
    try:
        worker = await bench.open()
    finally:
        os.umask(former)
    await run(worker, "true")
    files = sorted(bench.state.glob("jobs.sqlite*"))
    assert [path.name for path in files] == ["jobs.sqlite", "jobs.sqlite-wal"]
    assert [(path.stat().st_uid, stat.S_IMODE(path.stat().st_mode)) for path in files] == [(0, 0o600)] * 2


async def test_a_closed_worker_lets_jobs_go_on(bench: Bench) -> None:
    """close() ends no job; the next worker finds it again, with nothing missing."""
    worker = await bench.open()
    job = await start_said(worker, ASK + "echo before; read x <&3; echo after", b"before\n")
    await bench.close(worker)
    bench.tell(job.id)
    await bench.wait_for_output(job.id, b"after\n")
    worker = await bench.open()
    assert await read_all(worker, job.id) == b"before\nafter\n"
    assert (await worker.wait(job.id)).exit_status == ExitStatus(code=0)


async def test_waiters_are_told_when_the_worker_closes(bench: Bench) -> None:
    """wait(), stop() and logs() of a job that goes on end with LauncherGoneError, never hang."""
    worker = await bench.open()
    job = await start_said(worker, "trap '' TERM; echo ready; while :; do sleep 1; done", b"ready")
    waiting = [
        asyncio.ensure_future(worker.wait(job.id)),
        asyncio.ensure_future(worker.stop(job.id, grace_seconds=60)),
        asyncio.ensure_future(read_all(worker, job.id)),
    ]
    for _ in range(10):
        await asyncio.sleep(0)
    await bench.close(worker)
    async with asyncio.timeout(5):
        results = await asyncio.gather(*waiting, return_exceptions=True)
    # two of them wait for the launcher, and one for output
    assert [type(result) for result in results] == [LauncherGoneError, LauncherGoneError, WorkerClosedError]


async def test_a_wait_for_a_job_that_never_came_to_be_ends(worker: Worker) -> None:
    """Who guessed the id of a job in mid-launch, and waits for it, hears that there is no such job."""
    starting = asyncio.ensure_future(start(worker, ["/nonexistent"]))
    while not worker.live_count:
        await asyncio.sleep(0)
    waiting = asyncio.ensure_future(worker.wait(1))
    with pytest.raises(LaunchError):
        await starting
    async with asyncio.timeout(5):
        with pytest.raises(JobNotFoundError):
            await waiting


async def test_a_worker_leaves_no_zombie(bench: Bench) -> None:
    """A closed worker has collected its launcher: a program may open one after the other."""
    worker = await bench.open()
    bench.workers.remove(worker)
    await worker.close()
    left = launchers_of(os.getpid())
    for pid in left:
        await asyncio.to_thread(os.waitpid, pid, 0)
    assert left == []


async def test_many_starts_at_once(worker: Worker) -> None:
    """64 starts at the same time make 64 jobs with ids, output and ends of their own."""
    jobs = await asyncio.gather(*(start(worker, f"echo {number}; exit {number}") for number in range(64)))
    assert sorted(job.id for job in jobs) == list(range(1, 65))
    ended = await asyncio.gather(*(worker.wait(job.id) for job in jobs))
    outputs = await asyncio.gather(*(read_all(worker, job.id) for job in jobs))
    for number, (job, output) in enumerate(zip(ended, outputs, strict=True)):
        assert (job.exit_status, output) == (ExitStatus(code=number), b"%d\n" % number)


async def test_not_root_is_said(bench: Bench) -> None:
    """Without root there is no worker, and the message says what to do."""
    script = (
        "import os, asyncio\nfrom pjw import Worker\nos.setuid(65534)\nasyncio.run(Worker.open('/tmp/none'))"
    )
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-B", "-c", script.replace("os.setuid", "import pjw.worker; os.setuid")],
        capture_output=True,
        check=False,
        cwd=PROJECT,
        timeout=60,
    )
    assert b"ConfigError: starting jobs needs root" in done.stderr
