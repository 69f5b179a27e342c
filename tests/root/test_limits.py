"""What limits do to real jobs, and what a full disk does to everybody."""

import asyncio
import hashlib
import logging
import os
import resource
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from pjw.errors import ConfigError, LimitReachedError
from pjw.model import EndReason, ExitStatus, JobState
from pjw.output.inotify import Inotify
from pjw.worker import Worker
from tests.support.disks import fill, free_bytes, small_disk
from tests.support.worker_harness import (
    ASK,
    DEADLINE_SECONDS,
    MIB,
    Bench,
    check_no_new_descriptors,
    open_bench,
    open_descriptors,
    python,
    read_all,
    run,
    start,
    start_said,
)

# --- CPU, memory, processes, disk


async def test_cpu_is_limited_and_counted(worker: Worker) -> None:
    """0.3 s of CPU at 300 millicores take most of a second, and the counter says 0.3 s."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    script = "import time\nwhile time.process_time() < 0.3: pass"
    job, _ = await run(worker, python(script), cpu_max_millicores=300)
    assert loop.time() - begun > 0.75
    assert job.usage is not None
    assert job.usage.cpu_usage_usec >= 300_000
    # user mode Linux counts what other programs of its host take from it
    assert job.usage.cpu_usage_usec < 600_000 or "PJW_VM_GUEST" in os.environ


EAT = python("x = bytearray(200_000_000)")


async def test_out_of_memory_is_the_reason(worker: Worker) -> None:
    """A job that takes more than its memory is killed, and says why; the peak is at the limit."""
    job, _ = await run(worker, EAT, memory_max_bytes=32 * MIB)
    assert (job.reason, job.exit_status) == (EndReason.OOM_KILLED, ExitStatus(signal=9))
    assert job.usage is not None
    assert job.usage.oom_kills >= 1
    assert 24 * MIB < job.usage.memory_peak_bytes <= 32 * MIB


async def test_out_of_memory_is_never_guessed(worker: Worker) -> None:
    """SIGKILL, and a code of 137, from other hands are what they are: completed."""
    for command, status in (("kill -9 $$", ExitStatus(signal=9)), ("exit 137", ExitStatus(code=137))):
        job, _ = await run(worker, command, memory_max_bytes=32 * MIB)
        assert (job.reason, job.exit_status) == (EndReason.COMPLETED, status)
        assert job.usage is not None
        assert job.usage.oom_kills == 0


@pytest.mark.parametrize(("code", "reason"), [(0, EndReason.COMPLETED), (3, EndReason.OOM_KILLED)])
async def test_a_child_that_is_killed_for_memory(worker: Worker, code: int, reason: EndReason) -> None:
    """A job that lost a child and still succeeds has completed; one that then fails says why."""
    script = f'/usr/bin/python3 -I -S -c "x = bytearray(200_000_000)"; echo child $?; exit {code}'
    job, output = await run(worker, script, memory_max_bytes=32 * MIB)
    assert b"child 137\n" in output
    assert (job.reason, job.exit_status) == (reason, ExitStatus(code=code))
    assert job.usage is not None
    assert job.usage.oom_kills >= 1


async def test_repeated_oom_kills_are_a_number(
    worker: Worker, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ten children killed for memory are a count of ten: no event and no line of a log for each."""
    script = 'for i in 1 2 3 4 5 6 7 8 9 10; do /usr/bin/python3 -I -S -c "x = bytearray(200_000_000)"; done'
    with caplog.at_level(logging.DEBUG, "pjw"):
        job, output = await run(worker, f"{{ {script}; }} 2>/dev/null; echo over", memory_max_bytes=32 * MIB)
    assert output == b"over\n"
    assert (job.reason, job.exit_status) == (EndReason.COMPLETED, ExitStatus(code=0))
    assert job.usage is not None
    assert job.usage.oom_kills >= 10
    # the launcher has our stderr
    assert (caplog.messages, capfd.readouterr().err) == ([], "")


async def test_swap_does_not_stretch_the_memory(bench: Bench, worker: Worker) -> None:
    """The job's cgroup may not swap."""
    job = await start(worker, ["sleep", "60"], memory_max_bytes=32 * MIB)
    for cgroup in bench.cgroups(job.id):
        for name, value in (("memory.swappiness", "0"), ("memory.swap.max", "0")):
            if (cgroup / name).exists():
                assert (cgroup / name).read_text().strip() == value


# Bounded, should the limit not hold: at most 300 processes, for at most 20 s.
BOMB = python(
    """
import os, signal, time
signal.alarm(20)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
count = 0
for _ in range(300):
    try:
        if os.fork() == 0:
            signal.alarm(20)
            while True:
                try:
                    if os.fork() == 0: signal.alarm(20)
                except OSError: time.sleep(0.01)
        count += 1
    except OSError as error:
        print('held', error.errno, count, flush=True)
        break
while True: time.sleep(1)
"""
)


async def test_a_fork_bomb_is_held_and_stopped(bench: Bench, worker: Worker) -> None:
    """It gets EAGAIN at pids_max, others start and end meanwhile, and a stop leaves none of it."""
    bomb = await start_said(worker, BOMB, b"held 11 ", pids_max=20)
    assert len(bench.processes()) <= 20
    assert (await run(worker, ["echo", "alive"], client="other"))[1] == b"alive\n"
    async with asyncio.timeout(10):
        ended = await worker.stop(bomb.id, grace_seconds=0.1)
    assert ended.reason is EndReason.STOPPED
    bench.check_nothing_remains()


async def test_direct_writes_are_throttled_and_counted(worker: Worker) -> None:
    """4 MiB at 2 MiB/s take about two seconds on v1 and v2 alike when they go past the page cache."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    command = "dd if=/dev/zero of=$HOME/file bs=64k count=64 oflag=direct 2>/dev/null"
    job, _ = await run(worker, command, io_wbps_max=2 * MIB)
    assert job.exit_status == ExitStatus(code=0)
    assert 1.2 < loop.time() - begun < DEADLINE_SECONDS
    assert job.usage is not None
    assert job.usage.io_write_bytes >= 4 * MIB


# --- time and output


async def test_the_time_limit(bench: Bench, worker: Worker) -> None:
    """After its time a job is killed, whatever it ignores, and says why."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    job, output = await run(
        worker, "trap '' TERM; echo begun; while :; do sleep 60; done", time_max_seconds=1
    )
    assert 0.9 < loop.time() - begun < 30
    assert (job.reason, job.exit_status, output) == (EndReason.TIMED_OUT, ExitStatus(signal=9), b"begun\n")
    bench.check_nothing_remains()


async def test_a_time_limit_that_is_not_reached(worker: Worker) -> None:
    """It leaves no trace."""
    job, _ = await run(worker, ["true"], time_max_seconds=60)
    assert (job.reason, job.exit_status) == (EndReason.COMPLETED, ExitStatus(code=0))


@pytest.mark.parametrize("limit", [1, 1000, 65_536, 3 * MIB + 1])
async def test_the_output_limit_is_exact(worker: Worker, limit: int) -> None:
    """What was written up to the limit stays readable, to the byte; the job ends and says why."""
    job, output = await run(worker, "yes 0123456789", output_max_bytes=limit)
    assert job.reason is EndReason.OUTPUT_LIMIT
    assert output == (b"0123456789\n" * (limit // 11 + 1))[:limit]


async def test_output_of_exactly_the_limit_is_within_it(worker: Worker) -> None:
    """The limit is what a job may write, not what it must stay below."""
    job, output = await run(worker, "head -c 1000 /dev/zero", output_max_bytes=1000)
    assert (job.reason, job.exit_status, len(output)) == (EndReason.COMPLETED, ExitStatus(code=0), 1000)


@pytest.mark.parametrize("written", [256 * MIB, pytest.param(10**9, marks=pytest.mark.slow)])
async def test_much_output_with_little_memory(worker: Worker, written: int) -> None:
    """So much without a newline, with a limit of 64 MB of memory: all is there, nothing was killed."""
    job = await start(worker, f"head -c {written} /dev/zero", memory_max_bytes=64 * MIB)
    size = 0
    # with so little memory it waits for the disk
    async with asyncio.timeout(4 * DEADLINE_SECONDS):
        async for chunk in worker.logs(job.id):
            size += len(chunk)
        job = await worker.wait(job.id)
    assert size == written
    assert (job.reason, job.exit_status) == (EndReason.COMPLETED, ExitStatus(code=0))
    assert job.usage is not None
    assert job.usage.oom_kills == 0


async def test_a_full_tmp_is_enospc(worker: Worker) -> None:
    """/tmp holds half of the job's memory: it is full before anything is killed."""
    script = (
        "head -c 200000000 /dev/zero > /tmp/file; echo $?; rm /tmp/file; echo x > /tmp/file && cat /tmp/file"
    )
    job, output = await run(worker, script, memory_max_bytes=64 * MIB)
    assert output.endswith(b"No space left on device\n1\nx\n")
    assert job.usage is not None
    assert job.usage.oom_kills == 0


# --- a full disk


@pytest.fixture
def disk() -> Iterator[Path]:
    """A disk of 48 MB."""
    if "PJW_VM_GUEST" in os.environ and not os.path.exists("/dev/loop-control"):
        pytest.skip("user mode Linux has no loop device; the host of CI runs this")
    with small_disk(48) as point:
        yield point


@pytest.fixture
async def small(disk: Path) -> AsyncIterator[Bench]:
    """A state directory on that disk, and the proof that nothing stays behind."""
    async with open_bench(disk) as bench:
        yield bench


async def test_a_job_that_fills_the_disk(small: Bench) -> None:
    """Its ENOSPC is its own: the worker answers, refuses starts as LimitReachedError, and goes on later."""
    worker = await small.open()
    done, _ = await run(worker, "echo words")
    before = free_bytes(small.state)
    script = ASK + "echo begun; cat /dev/zero > big; echo full; read x <&3; echo go; exit 4"
    job = await start_said(worker, script, b"full\n")
    descriptors = open_descriptors()
    # whatever a job may leave free after its ENOSPC
    fill(small.state / "rest")
    for _ in range(3):
        with pytest.raises(LimitReachedError):
            await start(worker, ["true"])
        with pytest.raises(LimitReachedError):
            await start(worker, ["true"], client="never seen before")
    check_no_new_descriptors(descriptors)
    assert await worker.get(done.id) == done
    assert await read_all(worker, done.id) == b"words\n"
    assert (await worker.get(job.id)).state is JobState.RUNNING
    assert [known.id for known in await worker.list()] == [done.id, job.id]
    (small.state / "rest").unlink()
    ended = await worker.stop(job.id)
    assert ended.reason is EndReason.STOPPED
    # all but what the table and one more job's files hold
    assert free_bytes(small.state) > before - MIB
    again, output = await run(worker, "echo again")
    assert (output, again.exit_status) == (b"again\n", ExitStatus(code=0))
    assert [known.id for known in await worker.list()] == [done.id, job.id, again.id]
    await small.close(worker)
    worker = await small.open()
    assert [known.id for known in await worker.list()] == [done.id, job.id, again.id]


async def test_output_waits_for_space(small: Bench) -> None:
    """A job whose output finds no space is held back, loses no byte, and goes on when there is space."""
    worker = await small.open()
    filler = small.state / "filler"
    fill(filler, leave=4 * MIB)
    size = 12 * MIB
    script = f"""
import os, random
source = random.Random(7)
for _ in range({size // 65_536}): os.write(1, source.randbytes(65_536))
"""
    job = await start(worker, python(script))
    reading = asyncio.ensure_future(read_all(worker, job.id))
    output = small.state / "jobs" / str(job.id) / "output"
    await _fill_up(small, output)
    assert (await worker.get(job.id)).state is JobState.RUNNING
    assert not reading.done()
    assert output.stat().st_size < size
    (small.state / "rest").unlink()
    filler.unlink()
    async with asyncio.timeout(DEADLINE_SECONDS):
        got = await reading
        ended = await worker.wait(job.id)
    assert (ended.reason, ended.exit_status) == (EndReason.COMPLETED, ExitStatus(code=0))
    expected = await asyncio.to_thread(subprocess.check_output, python(script))
    assert hashlib.sha256(got).digest() == hashlib.sha256(expected).digest()


async def _fill_up(small: Bench, output: Path) -> None:
    """Wait until a job has written 1 MiB, then take all that is left."""
    inotify, changed = Inotify(), asyncio.Event()
    watch = inotify.watch(str(output), changed.set)
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            while output.stat().st_size < MIB:
                await changed.wait()
                changed.clear()
    finally:
        inotify.unwatch(watch)
        inotify.close()
    await asyncio.to_thread(fill, small.state / "rest")


async def test_a_held_job_can_be_stopped(small: Bench) -> None:
    """A job that waits for space ends when it is stopped, after its grace period at the latest."""
    worker = await small.open()
    fill(small.state / "filler", leave=2 * MIB)
    job = await start(worker, ["yes"])
    await _fill_up(small, small.state / "jobs" / str(job.id) / "output")
    async with asyncio.timeout(10):
        ended = await worker.stop(job.id, grace_seconds=0.5)
    assert ended.reason is EndReason.STOPPED
    assert ended.exit_status is not None
    assert ended.exit_status.signal in (9, 15)
    for name in ("filler", "rest"):
        (small.state / name).unlink()
    # the row, and with it the removal of the cgroup, may still wait for space
    await small.close(worker)
    worker = await small.open()
    assert (await worker.get(job.id)).exit_status == ended.exit_status


@pytest.mark.parametrize("end", ["exec sleep 1000", "exit 0"])
async def test_output_that_can_never_be_written_ends_its_job(bench: Bench, worker: Worker, end: str) -> None:
    """Where init may not write so long a file, the job does not wait for that for ever (B4)."""
    job = await start_said(worker, ASK + f"echo ready; read x <&3; head -c 9000 /dev/zero; {end}", b"ready\n")
    resource.prlimit(bench.init_pid(job.id), resource.RLIMIT_FSIZE, (8000, 8000))
    bench.tell(job.id)
    async with asyncio.timeout(DEADLINE_SECONDS):
        ended = await worker.wait(job.id)
    assert (ended.reason, ended.output_bytes) == (EndReason.OUTPUT_FAILED, 8000)


async def test_the_end_of_a_job_is_kept_on_a_full_disk(small: Bench) -> None:
    """Its record fits into space that was set aside, so that its end is known at once and after a restart."""
    worker = await small.open()
    job = await start_said(worker, ASK + "echo ready; read x <&3; exit 7", b"ready\n")
    fill(small.state / "filler")
    small.tell(job.id)
    async with asyncio.timeout(10):
        ended = await worker.wait(job.id)
    assert (ended.reason, ended.exit_status) == (EndReason.COMPLETED, ExitStatus(code=7))
    (small.state / "filler").unlink()
    await small.close(worker)
    worker = await small.open()
    again = await worker.get(job.id)
    assert (again.reason, again.exit_status, again.end) == (ended.reason, ended.exit_status, ended.end)


async def test_a_removal_makes_room_on_a_full_disk(small: Bench) -> None:
    """Also by a worker that was started on the full disk; and then jobs can be started again."""
    worker = await small.open()
    # more than the disk's own files leave free again when they are removed
    jobs = [(await run(worker, f"head -c {4 * MIB} /dev/zero"))[0].id for _ in range(2)]
    fill(small.state / "filler")
    await worker.delete(jobs[0])
    fill(small.state / "more filler")
    await small.close(worker)
    fill(small.state / "still more filler")
    worker = await small.open()
    with pytest.raises(LimitReachedError):
        await start(worker, ["true"])
    await worker.delete(jobs[1])
    job, output = await run(worker, "echo there is room")
    assert (job.exit_status, output) == (ExitStatus(code=0), b"there is room\n")


async def test_a_worker_on_a_full_disk_says_so(small: Bench) -> None:
    """It cannot be opened there: one clear error, and nothing stays open."""
    filler = small.directory / "filler"
    fill(filler)
    before = open_descriptors()
    with pytest.raises(ConfigError, match=r"cannot use the state directory .*: no space left on device"):
        await small.open()
    check_no_new_descriptors(before)
    filler.unlink()
