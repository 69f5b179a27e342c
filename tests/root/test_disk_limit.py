"""A file system that is about to be full: the job with most scratch is ended, others go on (S6)."""

import asyncio
import os
import resource
import select
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pjw.errors import LimitReachedError
from pjw.launcher import protocol
from pjw.launcher.policy import instance_name
from pjw.launcher.protocol import Opened, Refused, ScratchUse
from pjw.launcher.scratch_use import count
from pjw.model import EndReason, ExitStatus, Job, JobState
from pjw.worker import Worker
from pjw.worker.settings import DiskMarks, Quotas
from tests.root.test_launcher_hostile import Peer
from tests.support.disks import fill, free_bytes, small_disk
from tests.support.worker_harness import (
    ASK,
    DEADLINE_SECONDS,
    MIB,
    Bench,
    WorkerProcess,
    open_bench,
    start,
    start_said,
)

# a python without start-up files, for a job
PYTHON = "/usr/bin/python3 -I -S -c"
IDLE = "exec sleep 1000"


@pytest.fixture
def disk() -> Iterator[Path]:
    """A file system that a job fills in no time: 24 MiB, 6,000 inodes."""
    with small_disk(24) as point:
        yield point


def files(number: int) -> str:
    """A command that makes so many files."""
    return f"{PYTHON} 'for i in range({number}): open(str(i), \"w\").close()'"


async def ended(worker: Worker, job: Job) -> Job:
    """The final snapshot of a job."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        return await worker.wait(job.id)


async def starts_again(worker: Worker, client: str) -> Job:
    """Another client's start, which may be refused while the disk is full, and works then."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while True:
            try:
                return await start(worker, IDLE, client)
            except LimitReachedError:
                await asyncio.sleep(0.05)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("script", "what"),
    [(f"cat /dev/zero >fill; {IDLE}", "bytes"), (f"{files(100_000)}; {IDLE}", "inodes")],
    ids=["bytes", "inodes"],
)
async def test_the_job_with_most_is_ended(
    disk: Path, caplog: pytest.LogCaptureFixture, script: str, what: str, *, shared: bool
) -> None:
    """Of bytes or of inodes; on the disk of the table or on its own. Nobody else is, no row is lost."""
    directory = disk if shared else None
    async with open_bench(directory) as bench:
        worker = await bench.open(scratch_dir="" if shared else str(disk))
        little = await start_said(
            worker, f"head -c 2000 /dev/zero >some; echo written; {IDLE}", b"written", "bob"
        )
        filler = await start(worker, script, "alice", io_wbps_max=0, io_wiops_max=0)
        job = await ended(worker, filler)
        assert (job.state, job.reason, job.exit_status) == (
            JobState.EXITED,
            EndReason.DISK_LIMIT,
            ExitStatus(signal=signal.SIGKILL),
        )
        assert f"ended job {filler.id} of alice, which used " in caplog.text
        assert f"the file system of {disk}/{'state/scratch has ' if shared else 'i-'}" in caplog.text
        assert f" (disk.free_{what}_min)" in caplog.text
        again = await starts_again(worker, "bob")
        assert [each.id for each in await worker.list()][:2] == [little.id, filler.id]
        for each in (little, again):
            assert (await worker.get(each.id)).state is JobState.RUNNING
        await bench.close(worker)
        worker = await bench.open()
        assert (await worker.get(filler.id)).reason is EndReason.DISK_LIMIT


async def test_many_small_jobs_of_one_client_are_counted_together(disk: Path, bench: Bench) -> None:
    """Who has one larger job does not pay for who has ten."""
    worker = await bench.open(scratch_dir=str(disk), disk=DiskMarks(6 * MIB, 0))
    write = "head -c {} /dev/zero >some; sync; echo written; exec sleep 1000"
    largest = await start_said(worker, write.format(3 * MIB), b"written", "bob")
    small = [await start_said(worker, write.format(2 * MIB), b"written", "alice") for _ in range(6)]
    # the disk is too full before this one has written all, so it is any of them that ends
    small.append(await start(worker, write.format(2 * MIB), "alice"))
    ends = [asyncio.ensure_future(ended(worker, job)) for job in small]
    done, others = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    assert {end.result().reason for end in done} == {EndReason.DISK_LIMIT}
    for other in others:
        other.cancel()
    await asyncio.wait(others)
    assert (await worker.get(largest.id)).state is JobState.RUNNING


@pytest.mark.parametrize("mapped", [False, True])
async def test_a_file_without_a_name_is_found(disk: Path, bench: Bench, *, mapped: bool) -> None:
    """A job that unlinks what it fills, or only has it mapped, is found as the one with most."""
    worker = await bench.open(scratch_dir=str(disk))
    await start_said(worker, f"head -c 1M /dev/zero >some; echo written; {IDLE}", b"written", "bob")
    script = f"""exec {PYTHON} '
import mmap, os, signal
file = os.open("hidden", os.O_RDWR | os.O_CREAT)
os.unlink("hidden")
try:
    while True: os.write(file, bytes(65536))
except OSError:
    pass
if {mapped}:
    kept = mmap.mmap(file, 4096)
    os.close(file)
signal.pause()
'"""
    hidden = await start(worker, script, "alice", io_wbps_max=0, io_wiops_max=0)
    assert (await ended(worker, hidden)).reason is EndReason.DISK_LIMIT


async def test_others_fill_the_disk(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Then the end of a job would give nothing back, so none is ended, and the log says so once."""
    async with open_bench(disk) as bench:
        worker = await bench.open()
        job = await start_said(worker, f"head -c 2000 /dev/zero >some; echo written; {IDLE}", b"written")
        fill(disk / "foreign", leave=MIB // 2)
        async with asyncio.timeout(DEADLINE_SECONDS):
            while "no job uses so much of it that its end would help" not in caplog.text:
                await asyncio.sleep(0.1)
        (disk / "foreign").unlink()
        assert (await worker.get(job.id)).state is JobState.RUNNING
        assert caplog.text.count("no job uses so much of it that its end would help") == 1
        assert f"the file system of {disk}/state/scratch has " in caplog.text


async def test_marks_that_are_off(disk: Path, bench: Bench) -> None:
    """With 0 a full disk is the job's own trouble, as it was; a reload turns them on."""
    worker = await bench.open(scratch_dir=str(disk), disk=DiskMarks(0, 0))
    job = await start_said(
        worker, f"cat /dev/zero >fill; echo full; {IDLE}", b"full", io_wbps_max=0, io_wiops_max=0
    )
    assert free_bytes(disk) < MIB
    assert (await worker.get(job.id)).state is JobState.RUNNING
    settings = {name: getattr(bench.settings, name) for name in bench.settings.__dataclass_fields__}
    worker.reconfigure(type(bench.settings)(**{**settings, "disk": DiskMarks()}))
    assert (await ended(worker, job)).reason is EndReason.DISK_LIMIT


@pytest.mark.parametrize("kill_first", [True, False])
async def test_the_reason_survives_kill_9(bench: Bench, *, kill_first: bool) -> None:
    """Between the note and the kill, and between the kill and the row: the next worker knows why."""
    process = WorkerProcess(bench)
    job_id = process.start(ASK + IDLE)
    init = bench.init_pid(job_id)
    pidfd = os.pidfd_open(init)
    if kill_first:
        process.kill()
    else:
        os.kill(process.process.pid, signal.SIGSTOP)
    # as StateDir.note_end_for_disk does
    (bench.state / "jobs" / str(job_id) / "status").chmod(0o700)
    if not kill_first:
        os.kill(init, signal.SIGQUIT)
        await asyncio.to_thread(_wait_for_end, pidfd)
        process.kill()
    os.close(pidfd)
    worker = await bench.open()
    assert (await ended(worker, await worker.get(job_id))).reason is EndReason.DISK_LIMIT


def _wait_for_end(pidfd: int) -> None:
    select.select([pidfd], [], [], DEADLINE_SECONDS)


async def test_scratch_is_in_the_account_of_a_client(
    disk: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At stored_bytes_max a start is refused for what jobs have in their scratch directories, too."""
    monkeypatch.setattr("pjw.worker.disk.COUNT_SECONDS", 0)
    worker = await bench.open(scratch_dir=str(disk), quotas=Quotas(stored_bytes_max=2 * MIB))
    await start_said(worker, f"head -c 3M /dev/zero >some; sync; echo written; {IDLE}", b"written", "alice")
    async with asyncio.timeout(DEADLINE_SECONDS):
        while (await worker.quota("alice")).stored_bytes < 3 * MIB:
            await asyncio.sleep(0.05)
    with pytest.raises(
        LimitReachedError, match="of output, artifacts, input, scratch, workspaces and images, and at most 2M"
    ):
        await start(worker, IDLE, "alice")
    await start(worker, IDLE, "bob")


# --- what is counted


def place(tmp_path: Path, **trees: dict[str, Any]) -> str:
    """Scratch directories with trees in them."""
    for job_id, tree in trees.items():
        for name, size in tree.items():
            path = tmp_path / job_id.strip("_") / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bytes(size))
    return str(tmp_path)


def test_links_lead_nowhere_and_names_count_once(tmp_path: Path) -> None:
    """A link to a large tree of the host counts as a link; two names of a file are one file."""
    here = place(tmp_path, _1={"a": 100_000, "b/c": 0}, _2={"x": 1})
    (tmp_path / "1/usr").symlink_to("/usr")
    (tmp_path / "1/again").hardlink_to(tmp_path / "1/a")
    uses = count("i-none", [here])
    assert sorted(uses) == [1, 2]
    assert uses[1].inodes == 4
    assert 100_000 <= uses[1].bytes < 200_000


def test_an_endless_tree_takes_no_longer_and_hides_nobody(tmp_path: Path) -> None:
    """Within the time each has its turn, so that the largest is the largest, counted to its end or not."""
    here = place(tmp_path, _1={str(number): 0 for number in range(9000)}, _2={"x": 5_000_000})
    uses = count("i-none", [here], seconds=0.005)
    assert uses[1].inodes <= 9000
    uses = count("i-none", [here])
    assert (uses[1].inodes, uses[2].bytes >= 5_000_000) == (9000, True)


def test_a_tree_that_is_too_deep_counts_as_the_largest(tmp_path: Path) -> None:
    """More levels than there are descriptors cannot hide what is below them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    deep = tmp_path / "1"
    deep.mkdir()
    descriptor = os.open(deep, os.O_PATH)
    for _ in range(200):
        os.mkdir("d", dir_fd=descriptor)
        below = os.open("d", os.O_PATH, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    os.close(descriptor)
    assert count("i-none", [str(tmp_path)])[1].inodes == 200
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        assert count("i-none", [str(tmp_path)])[1].inodes > 2**50
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_one_count_at_a_time(bench: Bench) -> None:
    """S6: a server that asks again and again has one process for it."""
    peer = Peer(bench)
    try:
        # at once: the first count takes no time
        for _ in range(2):
            peer.send(protocol.encode(7, ScratchUse()))
        assert peer.hear() == Opened()
        refused = peer.hear()
        assert isinstance(refused, Refused)
        assert "scratch directories are being counted" in refused.operation
    finally:
        peer.close()
    assert instance_name(str(bench.state)).startswith("i-")
