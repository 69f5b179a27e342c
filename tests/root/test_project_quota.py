"""Project quotas: a limit for each job's scratch, where kernel and file system have them (ext4, xfs; S6)."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pjw.errors import ConfigError
from pjw.launcher.policy import instance_name
from pjw.launcher.project_quota import FIRST, ProjectQuotas, project_of
from pjw.model import EndReason
from pjw.worker.settings import DiskMarks
from tests.support.disks import small_disk
from tests.support.worker_harness import MIB, Bench, run, start, start_said

IDLE = "exec sleep 1000"
PYTHON = "/usr/bin/python3 -I -S -c"


@pytest.fixture(params=["ext4", "xfs"])
def quota_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system with project quotas, where this kernel has them."""
    if not os.path.exists("/dev/loop-control"):
        pytest.skip("no loop device here")
    make = {
        "ext4": ["mkfs.ext4", "-q", "-F", "-O", "project,quota", "-E", "quotatype=prjquota"],
        "xfs": ["mkfs.xfs", "-q"],
    }[request.param]
    if shutil.which(make[0]) is None:
        pytest.skip(f"no {make[0]} here")
    image, point = tmp_path / "image", tmp_path / "disk"
    point.mkdir()
    subprocess.run(["truncate", "-s", "64M" if request.param == "ext4" else "320M", image], check=True)
    subprocess.run([*make, image], check=True)
    done = subprocess.run(["mount", "-o", "loop,prjquota", image, point], capture_output=True, check=False)
    if done.returncode != 0 or "prjquota" not in options_of(point):
        if done.returncode == 0:
            subprocess.run(["umount", point], check=True)
        pytest.skip(f"this kernel has no project quotas on {request.param}")
    yield point
    subprocess.run(["umount", point], check=True)


def options_of(point: Path) -> str:
    """The options of a mount."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return next(line for line in lines if line.split()[4] == str(point))


def use(bench: Bench, disk: Path, job_id: int) -> tuple[int, int]:
    """What the kernel has counted for a job."""
    place = disk / instance_name(str(bench.state))
    descriptor = os.open(place, os.O_PATH)
    try:
        quotas = ProjectQuotas.find(descriptor, place.name)
        assert quotas is not None
        used = quotas.use(job_id, str(place / str(job_id)))
        assert used is not None
        return used
    finally:
        os.close(descriptor)


async def test_a_job_has_no_more_than_its_limit(quota_disk: Path, bench: Bench) -> None:
    """Of bytes and of inodes; another has as much again, and what was used is free when the job is over."""
    worker = await bench.open(
        scratch_dir=str(quota_disk), scratch_bytes_max=4 * MIB, scratch_inodes_max=100, disk=DiskMarks(0, 0)
    )
    free = os.statvfs(quota_disk).f_bfree
    fill = "cat /dev/zero >fill; stat -c size=%s fill; rm fill;"
    files = f"""{PYTHON} '
made = 0
try:
    for made in range(1000): open(str(made), "w").close()
except OSError as error:
    print("files=%d errno=%d" % (made, error.errno), flush=True)
';"""
    for client in ("alice", "bob"):
        job = await start_said(worker, f"{fill} {files} {IDLE}", b"errno=", client)
        said = bench.output(job.id)
        size = int(said.split(b"size=")[1].split()[0])
        assert 3 * MIB < size <= 4 * MIB
        assert b"files=99 errno=122" in said or b"files=99 errno=28" in said, said
    assert use(bench, quota_disk, 1)[1] == 100
    for job in await worker.list():
        await worker.stop(job.id, grace_seconds=0)
    os.sync()
    assert os.statvfs(quota_disk).f_bfree >= free - 1024
    _, output = await run(worker, "cat /dev/zero >fill; stat -c size=%s fill", "alice")
    assert b"size=" in output


async def test_the_kernel_s_count_finds_who_has_most(quota_disk: Path, bench: Bench) -> None:
    """Without a walk, also what has no name and no descriptor in a process."""
    worker = await bench.open(scratch_dir=str(quota_disk))
    await start_said(worker, f"head -c 2M /dev/zero >some; echo written; {IDLE}", b"written", "bob")
    # the file is nowhere but in a socket
    script = f"""exec {PYTHON} '
import os, signal, socket
file = os.open("hidden", os.O_RDWR | os.O_CREAT)
os.unlink("hidden")
ours, theirs = socket.socketpair()
socket.send_fds(ours, [b"x"], [file])
try:
    while True: os.write(file, bytes(65536))
except OSError:
    os.close(file)
signal.pause()
'"""
    hidden = await start(worker, script, "alice", io_wbps_max=0, io_wiops_max=0)
    assert (await worker.wait(hidden.id)).reason is EndReason.DISK_LIMIT


async def test_limits_without_quotas_are_refused_in_words(bench: Bench) -> None:
    """As limits of disk IO without a disk are; nothing is left."""
    with small_disk(8) as disk, pytest.raises(ConfigError, match="has no project quotas") as refused:
        await bench.open(scratch_dir=str(disk), scratch_bytes_max=MIB)
    assert refused.value.hint is not None
    assert "prjquota" in refused.value.hint
    await bench.open(scratch_dir="", scratch_bytes_max=0)


def test_project_ids() -> None:
    """Each job of an instance its own, for 16 million jobs; never those that people give, nor "none"."""
    instances = (f"i-{number:012x}" for number in (0, 1, 63, 2**48 - 1))
    ids = [
        project_of(instance, job_id) for instance in instances for job_id in (1, 2, 2**24 - 1, 2**24, 2**53)
    ]
    assert min(ids) >= FIRST
    assert max(ids) < 2**32 - 1
    assert len({project_of("i-000000000001", job_id) for job_id in range(1, 10_000)}) == 9_999
    assert project_of("i-000000000001", 5) != project_of("i-000000000002", 5)
