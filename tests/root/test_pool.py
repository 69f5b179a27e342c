"""Inits that wait for a job: the next start takes one, and none of what was guessed wrong reaches a job."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pjw.model import JobState
from pjw.worker import Worker
from pjw.worker.settings import WAITING_INITS
from tests.support.init_harness import wait_readable
from tests.support.service import wait_for, waiting_ids, waiting_inits
from tests.support.worker_harness import MIB, Bench, WorkerProcess, run, start


def waiting(bench: Bench) -> dict[int, int]:
    """The pids of the inits that wait, by the ids that they wait for, once the pool is full."""
    wait_for(lambda: len(waiting_inits(bench.state)) == WAITING_INITS)
    return waiting_inits(bench.state)


def mounts_of(pid: int) -> str:
    """What a process has mounted; nothing once it has ended."""
    try:
        return Path(f"/proc/{pid}/mountinfo").read_text()
    except (FileNotFoundError, ProcessLookupError, OSError):
        return ""


@pytest.fixture
def disk(bench: Bench) -> Iterator[Path]:
    """An empty directory of the host; whatever is mounted there is unmounted in the end."""
    path = bench.directory / "disk"
    path.mkdir()
    yield path
    if os.path.ismount(path):
        unmount(path)


def unmount(path: Path) -> None:
    """Unmount what is mounted there."""
    subprocess.run(["umount", path], check=True)


def forbid_programs(path: Path) -> None:
    """Change the mount there."""
    subprocess.run(["mount", "-o", "remount,bind,noexec", path], check=True)


def mount_file(path: Path, words: str) -> None:
    """Mount a file system there with a file that any user may read."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "pjw-test", path], check=True)
    (path / "file").write_text(words)


async def test_the_next_start_takes_an_init_that_waits(bench: Bench, worker: Worker) -> None:
    """Job after job, each has the init that waited for it, and others wait again."""
    await run(worker, ["true"])
    for job_id in (2, 3, 4):
        expected = waiting(bench)[job_id]
        job = await start(worker, ["sleep", "60"])
        assert job.id == job_id
        assert bench.init_pid(job_id) == expected
    for job_id in (2, 3, 4):
        await worker.stop(job_id, grace_seconds=0)


async def test_an_operator_can_tell_who_waits(bench: Bench, worker: Worker) -> None:
    """V8: by the name that ps and systemd-cgls show; with a job it says that it runs."""
    await run(worker, ["true"])
    init = waiting(bench)[2]
    shown = Path(f"/proc/{init}/cmdline")
    assert shown.read_bytes().startswith(b"pjw-init: waiting\0--hostname\0job-2\0--scratch\0")
    await start(worker, ["sleep", "60"])
    assert shown.read_bytes().startswith(b"pjw-init: running\0--hostname\0job-2\0--scratch\0")


async def test_none_waits_before_the_first_start(bench: Bench, worker: Worker) -> None:
    """A service that nobody uses keeps no processes ready."""
    assert waiting_ids(bench.state) == set()
    await run(worker, ["true"])
    assert len(waiting(bench)) == WAITING_INITS


async def test_an_operator_who_wants_none(bench: Bench) -> None:
    """Every init is made for its job, when that is started."""
    worker = await bench.open(waiting_inits=0)
    for _ in range(3):
        assert (await run(worker, ["echo", "words"]))[1] == b"words\n"
    assert waiting_ids(bench.state) == set()


async def test_limits_that_were_guessed_wrong(bench: Bench, worker: Worker) -> None:
    """The jobs have the limits that were asked for, in cgroups made for them, and later guesses are right."""
    await run(worker, ["true"])
    taken = []
    for job_id in range(2, WAITING_INITS + 3):
        guessed = waiting(bench)[job_id]
        assert (await start(worker, ["sleep", "60"], pids_max=7, memory_max_bytes=64 * MIB)).id == job_id
        pids_max = {path.read_text() for group in bench.cgroups(job_id) for path in group.glob("pids.max")}
        assert pids_max == {"7\n"}
        taken.append(bench.init_pid(job_id) == guessed)
        await worker.stop(job_id, grace_seconds=0)
    assert taken == [False] * WAITING_INITS + [True]


async def test_limits_that_init_keeps_itself(bench: Bench, worker: Worker) -> None:
    """The time and the output of a job are bounded by its order: whoever waits will do."""
    await run(worker, ["true"])
    guessed = waiting(bench)[2]
    await start(worker, ["sleep", "60"], output_max_bytes=1000, time_max_seconds=600)
    assert bench.init_pid(2) == guessed
    await worker.stop(2, grace_seconds=0)


async def test_what_the_host_mounts_the_next_job_sees(bench: Bench, disk: Path) -> None:
    """Also when its init would have waited since before that, where the disk is to be seen."""
    worker = await bench.open(visible_paths=(str(disk),))
    await run(worker, ["true"])
    waiting(bench)
    mount_file(disk, "mounted since")
    bench.directory.chmod(0o755)
    assert (await run(worker, ["cat", str(disk / "file")]))[1] == b"mounted since"


async def test_what_the_host_unmounts_is_let_go_of(bench: Bench, disk: Path) -> None:
    """At once and not at the next start: the disk would stay busy."""
    worker = await bench.open(visible_paths=(str(disk),))
    mount_file(disk, "")
    await run(worker, ["true"])
    pids = waiting(bench).values()
    assert all(str(disk) in mounts_of(pid) for pid in pids)
    unmount(disk)
    wait_for(lambda: not any(str(disk) in mounts_of(pid) for pid in pids))


async def test_what_the_host_forbids_of_a_mount_is_forbidden_to_the_next_job(
    bench: Bench, disk: Path
) -> None:
    """A mount that is changed is another one, for inits that wait and for the template of the next."""
    worker = await bench.open(visible_paths=(str(disk),))
    mount_file(disk, "#!/bin/sh\n")
    (disk / "file").chmod(0o755)
    bench.directory.chmod(0o755)
    assert (await run(worker, f"{disk}/file; echo $?"))[1] == b"0\n"
    waiting(bench)
    forbid_programs(disk)
    assert (await run(worker, f"{disk}/file 2>/dev/null; echo $?"))[1] == b"126\n"


async def test_an_init_that_was_killed_while_it_waited(bench: Bench, worker: Worker) -> None:
    """Nobody is told of it: the job gets another one."""
    await run(worker, ["true"])
    pid = waiting(bench)[2]
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        wait_readable(pidfd, "the end of the init")
        job, output = await run(worker, ["echo", "words"])
    finally:
        os.close(pidfd)
    assert (job.id, job.state, output) == (2, JobState.EXITED, b"words\n")


async def test_a_launcher_that_is_killed_leaves_none_that_waits(bench: Bench) -> None:
    """They end by themselves; the next launcher removes their directories."""
    first = WorkerProcess(bench)
    first.start("true")
    pids = waiting(bench).values()
    first.kill(launcher_first=True)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    assert waiting_ids(bench.state) != set()
    worker = await bench.open()
    assert waiting_ids(bench.state) == set()
    assert (await run(worker, ["echo", "words"]))[1] == b"words\n"
