"""Jobs that wait in a throttle of disk IO: they end all the same, and hold nobody up for long."""

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pjw.errors import InvalidJobError
from pjw.launcher.processes import find_init
from pjw.launcher.protocol import Done, Kill, Launched, Remove
from pjw.model import EndReason, ExitStatus, Job, JobSpec, JobState
from pjw.server.end_jobs import instance_cgroups
from pjw.worker import Worker
from pjw.worker.settings import FLOOR, NO_CEILING, NO_LIMIT_ONLY
from tests.root.test_launcher_hostile import Peer
from tests.support.service import wait_for
from tests.support.worker_harness import MIB, Bench, read_all

# What a client could ask for before there were floors: at this rate the job's writes take a minute.
CRAWLING = {"io_wbps_max": 4096, "io_wiops_max": 2, "io_rbps_max": 4096, "io_riops_max": 2}
# each sync is one that the job itself waits for, on v1 too
WRITES = "exec dd if=/dev/zero of=file bs=4k count=200 conv=fsync 2>/dev/null"
# far above what an end takes, far below what the writes would
ENDS_SECONDS = 20
# what a client may ask for at least
LEAST_IO = {name: least for name, least in FLOOR.items() if least not in (0, NO_LIMIT_ONLY)}
EVICT_AND_READ = [
    *("/usr/bin/python3", "-I", "-S", "-c"),
    (
        "import os, sys\n"
        "file = os.open(sys.argv[1], os.O_RDONLY)\n"
        "while True:\n"
        "    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)\n"
        "    os.pread(file, 1 << 17, 0)\n"
    ),
]


def state_of(pid: int) -> str:
    """One letter: how a process is (proc(5))."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


async def ended(worker: Worker, command: str, **limits: int) -> tuple[Job, bytes]:
    """A job that may wait for the disk, at its end, and its output."""
    async with asyncio.timeout(ENDS_SECONDS):
        job = await worker.start(JobSpec(command, {**CRAWLING, **limits}))
        output = await read_all(worker, job.id)
        return await worker.wait(job.id), output


async def throttled_job(bench: Bench, worker: Worker, command: str = WRITES, **limits: int) -> int:
    """The id of a job that waits for the disk."""
    job = await worker.start(JobSpec(command, {**CRAWLING, **limits}))
    init = bench.init_pid(job.id)
    wait_for(lambda: any(state_of(pid) == "D" for pid in bench.processes() if pid != init))
    return job.id


@pytest.fixture
async def crawling(bench: Bench) -> Worker:
    """A worker whose operator has set no floor."""
    return await bench.open(floor=NO_CEILING)


async def test_the_time_limit_ends_a_throttled_job(bench: Bench, crawling: Worker) -> None:
    """S2: init lifts the throttle when it kills; the reason is the limit of time."""
    job_id = await throttled_job(bench, crawling, time_max_seconds=1)
    async with asyncio.timeout(ENDS_SECONDS):
        job = await crawling.wait(job_id)
    assert (job.reason, job.exit_status) == (EndReason.TIMED_OUT, ExitStatus(signal=9))


async def test_the_time_limit_holds_without_a_launcher(bench: Bench) -> None:
    """S2: it is init's own doing, so nobody else need be there."""
    worker = await bench.open(floor=NO_CEILING)
    job_id = await throttled_job(bench, worker, time_max_seconds=2)
    pidfd = os.pidfd_open(bench.init_pid(job_id))
    try:
        await bench.close(worker)
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(pidfd, ended.set)
        async with asyncio.timeout(ENDS_SECONDS):
            await ended.wait()
        loop.remove_reader(pidfd)
    finally:
        os.close(pidfd)
    worker = await bench.open()
    assert (await worker.get(job_id)).reason is EndReason.TIMED_OUT


async def test_the_output_limit_ends_a_throttled_job(bench: Bench, crawling: Worker) -> None:
    """S2: one process waits for the disk while another writes too much."""
    # the shell alone: a program that is not in memory yet would be read at the same crawl
    script = f"({WRITES}) & sleep 1; while :; do echo yes; done"
    job, output = await ended(crawling, script, output_max_bytes=1000)
    assert (job.reason, len(output)) == (EndReason.OUTPUT_LIMIT, 1000)


async def test_what_a_command_leaves_in_a_throttle_ends_with_it(bench: Bench, crawling: Worker) -> None:
    """S2: init kills what outlives the command, and waits for it."""
    job, _ = await ended(crawling, f"({WRITES}) & sleep 1; exit 3")
    assert (job.reason, job.exit_status) == (EndReason.COMPLETED, ExitStatus(code=3))


async def test_a_stop_ends_a_throttled_job(bench: Bench, crawling: Worker) -> None:
    """S2: at the end of its grace period, recorded by its init as ever."""
    job_id = await throttled_job(bench, crawling)
    async with asyncio.timeout(ENDS_SECONDS):
        job = await crawling.stop(job_id, grace_seconds=0.1)
    assert (job.state, job.reason) == (JobState.EXITED, EndReason.STOPPED)


async def test_a_grace_period_is_throttled(bench: Bench, crawling: Worker) -> None:
    """A stop with a long grace period is no way around a limit."""
    job_id = await throttled_job(bench, crawling, f"trap 'echo told' TERM; ({WRITES}) & wait; wait")
    stopping = asyncio.ensure_future(crawling.stop(job_id, grace_seconds=60))
    await bench.wait_for_output(job_id, b"told\n")
    assert throttles(bench, job_id) != []
    await crawling.stop(job_id, grace_seconds=0)
    await stopping


def throttles(bench: Bench, job_id: int) -> list[str]:
    """The limits of disk IO that a job's cgroup has."""
    names = (
        "io.max",
        *(f"blkio.throttle.{k}_{v}_device" for k in ("read", "write") for v in ("bps", "iops")),
    )
    paths = [path / name for path in bench.cgroups(job_id) for name in names]
    return [line for path in paths if path.exists() for line in path.read_text().splitlines()]


def test_the_last_resort_ends_a_throttled_job(bench: Bench) -> None:
    """S2: the launcher kills a job with its init, as it does the jobs that no table knows."""
    peer = Peer(bench)
    try:
        limits = peer.hello.ceiling.with_overrides(CRAWLING)
        assert isinstance(peer.launch(1, ("sh", "-c", WRITES), limits=limits), Launched)
        wait_for(lambda: any(state_of(pid) == "D" for pid in bench.processes()))
        assert peer.ask(Kill(1, init_too=True)) == Done()
        wait_for(lambda: bench.processes() == [], ENDS_SECONDS)
        wait_for(lambda: peer.ask(Remove(1)) == Done())
    finally:
        peer.close()


def end_jobs(bench: Bench, grace: str = "0.2") -> tuple[int, str]:
    """The exit code of `pjwd end-jobs`, and what it says."""
    done = subprocess.run(
        (sys.executable, "-m", "pjw.server.main", "end-jobs", "--grace", grace, "--state-dir", bench.state),
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


async def test_end_jobs_ends_a_throttled_job(bench: Bench) -> None:
    """V1, V5: also when an init of an older version leaves that to others; not while a launcher is there."""
    peer = Peer(bench)
    limits = peer.hello.ceiling.with_overrides(CRAWLING)
    assert isinstance(peer.launch(1, ("sh", "-c", WRITES), limits=limits), Launched)
    wait_for(lambda: any(state_of(pid) == "D" for pid in bench.processes()))
    code, words = end_jobs(bench)
    assert (code, "is in use by another pjwd" in words) == (1, True)
    peer.socket.close()
    assert peer.end() == 0
    peer.close()
    assert end_jobs(bench) == (0, "jobs ended: 1\n")
    assert bench.cgroups() == []
    await bench.open()


async def test_end_jobs_has_a_grace_period_of_its_own(bench: Bench) -> None:
    """Not init's for a host that goes down; and what ends meanwhile hides no job (V5)."""
    worker = await bench.open(stop_grace_seconds=1)
    late = "trap 'sleep 1.2; exit 7' TERM; echo up; while :; do sleep 0.02; done"
    job = await worker.start(JobSpec(late))
    await bench.wait_for_output(job.id, b"up\n")
    await bench.close(worker)
    init = bench.init_pid(job.id)
    pidfd = find_init(lambda: [2**22 + 1, init])
    assert pidfd is not None
    os.close(pidfd)
    assert end_jobs(bench, "20") == (0, "jobs ended: 1\n")
    ended = await (await bench.open()).get(job.id)
    assert (ended.reason, ended.exit_status) == (EndReason.STOPPED, ExitStatus(7))


def test_end_jobs_looks_where_pjwd_makes_cgroups(tmp_path: Path) -> None:
    """`pjw/INSTANCE`, wherever pjwd was started, and root's: not what users call so in their own."""
    for path in (
        "pjw/i-1/client-1/job-1",
        "pjwd.service/pjw/i-1",
        "pjw/i-2",
        "elsewhere/i-1",
        "user/pjw/i-1",
    ):
        (tmp_path / path).mkdir(parents=True)
    os.chown(tmp_path / "user/pjw/i-1", 1000, 1000)
    found = {str(path.relative_to(tmp_path)) for path in instance_cgroups(tmp_path, "i-1")}
    assert found == {"pjw/i-1", "pjwd.service/pjw/i-1"}


# --- floors


async def test_a_floor(worker: Worker) -> None:
    """S1: less than the floor cannot be asked for, nor any limit of reads; the floor and "no limit" can."""
    for name, least in FLOOR.items():
        if least:
            bound = "0, no limit," if least == NO_LIMIT_ONLY else f"at least {least}"
            with pytest.raises(InvalidJobError, match=f"limit {name} must be {bound} on this server"):
                await worker.start(JobSpec("true", {name: least - 1}))
            for allowed in {least, 0} - {NO_LIMIT_ONLY}:
                job = await worker.start(JobSpec("true", {name: allowed}))
                assert (await worker.wait(job.id)).exit_status == ExitStatus(code=0)


async def test_a_cold_file_that_a_job_reads_over_and_over(worker: Worker, visible: Path) -> None:
    """S1: with the least disk IO that a client may ask for; root reads it too, and waits a moment at most."""
    cold = visible / "cold"
    cold.write_bytes(os.urandom(32 * MIB))
    cold.chmod(0o644)
    with cold.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    job = await worker.start(JobSpec([*EVICT_AND_READ, str(cold)], LEAST_IO))
    slowest = 0.0
    for offset in range(0, 4 * MIB, 128 * 1024):
        began = time.monotonic()
        await asyncio.to_thread(read_at, cold, offset)
        slowest = max(slowest, time.monotonic() - began)
    await worker.stop(job.id, grace_seconds=0)
    assert slowest < 1


def read_at(path: Path, offset: int) -> bytes:
    """Four bytes of a file."""
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        return file.read(4)
