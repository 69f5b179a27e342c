"""Cgroups of jobs on the real kernel: v1 or v2, whichever this host has."""

import errno
import itertools
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pjw.errors import ConfigError, JobStateError, KernelError
from pjw.launcher import cgroup as cgroups
from pjw.launcher.cgroup import Cgroup, Hierarchy, files, v1, v2
from pjw.model import Limits

MIB = 1024**2
UNLIMITED = Limits(0, 0, 0, 0, 0, 0, 0, 0, 0)
DEADLINE_SECONDS = 60.0
NUMBERS = itertools.count(1)


def limits(**values: int) -> Limits:
    """No limits but these."""
    return UNLIMITED.with_overrides(values)


def directories(cgroup: Cgroup) -> list[Path]:
    """Where the cgroup is: one place on v2, one for each hierarchy on v1."""
    if isinstance(cgroup, v1.V1Cgroup):
        return [Path(directory) for directory in cgroup.directories]
    assert isinstance(cgroup, v2.V2Cgroup)
    return [Path(cgroup.directory)]


def value(cgroup: Cgroup, v1_name: str, v2_name: str) -> str:
    """The effective value of a limit; the controller of a v1 file is its first word."""
    if isinstance(cgroup, v1.V1Cgroup):
        controller, _, _ = v1_name.partition(".")
        return Path(cgroup.by_controller[controller], v1_name).read_text(encoding="ascii").strip()
    (directory,) = directories(cgroup)
    return (directory / v2_name).read_text(encoding="ascii").strip()


def instance_directories(instance: str) -> list[Path]:
    """Every directory that the instance has, whichever hierarchy it is in."""
    points = [Path(mount.point) for mount in files.read_mounts() if mount.fs_type.startswith("cgroup")]
    return [point / "pjw" / instance for point in points if (point / "pjw" / instance).is_dir()]


@pytest.fixture
def disk_dir() -> Iterator[Path]:
    """A directory on a disk; pytest's own may lie on a tmpfs."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="pjw-test-") as directory:
        yield Path(directory)


@pytest.fixture
def instance() -> Iterator[str]:
    """A name of our own; whatever is left under it afterwards fails the test."""
    name = f"test-{os.getpid()}-{next(NUMBERS)}"
    assert instance_directories(name) == []
    yield name
    left = [path for top in instance_directories(name) for path in top.iterdir() if path.is_dir()]
    for top in instance_directories(name):
        for path in left:
            if path.parent == top:
                path.rmdir()
        top.rmdir()
    assert left == []


@pytest.fixture
def hierarchy(instance: str, disk_dir: Path) -> Hierarchy:
    """Limits of io go to the disk under `disk_dir`."""
    return cgroups.open_hierarchy(instance, io_devices=cgroups.disks_under([str(disk_dir)]))


@pytest.fixture
def create(hierarchy: Hierarchy) -> Iterator[Callable[..., Cgroup]]:
    """Make job after job; kill and remove them at the end."""
    ids = itertools.count(1)
    made: list[Cgroup] = []

    def create_one(**values: int) -> Cgroup:
        made.append(hierarchy.create(next(ids), limits(**values)))
        return made[-1]

    yield create_one
    for cgroup in made:
        if any(directory.is_dir() for directory in directories(cgroup)):
            cgroup.kill()
            cgroup.remove()


@contextmanager
def running(cgroup: Cgroup, code: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run Python code inside the cgroup, entered before its first line; `say()` writes to stdout."""
    procs = [str(directory / "cgroup.procs") for directory in directories(cgroup)]
    prologue = (
        f"import os, sys, time\nfor path in {procs!r}:\n    open(path, 'w').write('0')\n"
        "def say(text): print(text, flush=True)\n"
    )
    command = [sys.executable, "-I", "-S", "-c", prologue + code, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


def next_line(process: subprocess.Popen[bytes]) -> str:
    """What the code says next, or a failure when that takes too long."""
    assert process.stdout
    assert select.select([process.stdout], [], [], DEADLINE_SECONDS)[0], "the code says nothing"
    return process.stdout.readline().decode().strip()


def test_every_limit_is_effective_before_any_process(create: Callable[..., Cgroup], disk_dir: Path) -> None:
    """The kernel shows what was asked for, memory rounded to pages and swap off."""
    cgroup = create(
        cpu_max_millicores=250,
        memory_max_bytes=64 * MIB + 1,
        pids_max=7,
        io_rbps_max=1_000_000,
        io_wbps_max=2_000_000,
        io_riops_max=300,
        io_wiops_max=400,
    )
    (disk,) = cgroups.disks_under([str(disk_dir)])
    assert cgroup.pids() == []
    assert value(cgroup, "memory.limit_in_bytes", "memory.max") == str(64 * MIB)
    assert value(cgroup, "pids.max", "pids.max") == "7"
    if isinstance(cgroup, v1.V1Cgroup):
        assert value(cgroup, "cpu.cfs_quota_us", "") == "25000"
        assert value(cgroup, "cpu.cfs_period_us", "") == "100000"
        assert value(cgroup, "memory.swappiness", "") == "0"
        if Path(cgroup.by_controller["memory"], "memory.memsw.limit_in_bytes").exists():
            assert value(cgroup, "memory.memsw.limit_in_bytes", "") == str(64 * MIB)
        expected = {"read_bps": 1_000_000, "write_bps": 2_000_000, "read_iops": 300, "write_iops": 400}
        for name, number in expected.items():
            assert value(cgroup, f"blkio.throttle.{name}_device", "") == f"{disk} {number}"
    else:
        assert value(cgroup, "", "cpu.max") == "25000 100000"
        assert value(cgroup, "", "memory.swap.max") == "0"
        assert value(cgroup, "", "memory.oom.group") == "0"
        assert value(cgroup, "", "io.max") == f"{disk} rbps=1000000 wbps=2000000 riops=300 wiops=400"


def test_a_limit_of_zero_limits_nothing(create: Callable[..., Cgroup]) -> None:
    """0 is written nowhere, so the kernel's own "no limit" stays."""
    cgroup = create()
    assert value(cgroup, "cpu.cfs_quota_us", "cpu.max").split()[0] in ("-1", "max")
    memory = value(cgroup, "memory.limit_in_bytes", "memory.max")
    assert memory == "max" or int(memory) > 2**60
    assert value(cgroup, "pids.max", "pids.max") == "max"
    assert value(cgroup, "blkio.throttle.read_bps_device", "io.max") == ""


def test_limits_beyond_any_machine_are_accepted(create: Callable[..., Cgroup]) -> None:
    """The highest value of the model is no error, and no wrapped-around small limit."""
    cgroup = create(**{name: 2**62 for name, _ in UNLIMITED.items()})
    assert value(cgroup, "pids.max", "pids.max") == "max"
    if isinstance(cgroup, v1.V1Cgroup):
        iops = value(cgroup, "blkio.throttle.read_iops_device", "")
        assert iops == "" or int(iops.split()[1]) >= 2**32 - 1
        assert int(value(cgroup, "cpu.cfs_quota_us", "")) == 2**40
    else:
        assert "riops=1 " not in value(cgroup, "", "io.max")
        assert value(cgroup, "", "cpu.max") == f"{2**40} 100000"


def test_the_least_limits_are_accepted(create: Callable[..., Cgroup]) -> None:
    """What the model lets pass, the kernel takes; for io it takes 2 and, on v2, refuses 1."""
    cgroup = create(
        cpu_max_millicores=10,
        memory_max_bytes=2 * MIB,
        pids_max=2,
        io_rbps_max=2,
        io_wbps_max=2,
        io_riops_max=2,
        io_wiops_max=2,
    )
    assert value(cgroup, "cpu.cfs_quota_us", "cpu.max").split()[0] == "1000"


def test_creating_a_job_twice_is_refused_and_leaves_the_first(hierarchy: Hierarchy) -> None:
    """The second request must not touch a job that may be running."""
    first = hierarchy.create(1, limits(pids_max=9))
    with pytest.raises(JobStateError, match="job 1"):
        hierarchy.create(1, limits(pids_max=5))
    assert value(first, "pids.max", "pids.max") == "9"
    assert hierarchy.job_ids() == [1]
    first.remove()


def test_a_failure_half_way_leaves_nothing(instance: str) -> None:
    """A limit that the kernel refuses names its file and job, and takes the directories back."""
    hierarchy = cgroups.open_hierarchy(instance, io_devices=["4095:77"])
    with pytest.raises(KernelError, match=r"(io\.max|read_bps_device) of job 5: .* \(ENODEV\)"):
        hierarchy.create(5, Limits())
    assert hierarchy.job_ids() == []
    assert hierarchy.find(5) is None


def test_an_io_limit_without_a_disk_is_refused(instance: str) -> None:
    """Never silently missing, and nothing is made for it."""
    hierarchy = cgroups.open_hierarchy(instance)
    with pytest.raises(ConfigError, match="cannot limit the disk IO of job 5: no disk was named") as caught:
        hierarchy.create(5, limits(io_wiops_max=10))
    assert caught.value.hint
    assert hierarchy.job_ids() == []
    hierarchy.create(6, limits(pids_max=5)).remove()


def test_init_enters_by_the_descriptors(create: Callable[..., Cgroup]) -> None:
    """The options name descriptors that a spawned program inherits, and that lead into the cgroup."""
    cgroup = create()
    code = (
        "import os, sys\n"
        "for option, number in zip(sys.argv[1::2], map(int, sys.argv[2::2])):\n"
        "    if option == '--cgroup-fd':\n"
        "        number = os.open('cgroup.procs', os.O_WRONLY, dir_fd=number)\n"
        "    os.write(number, b'0')\n"
        "os.write(1, b'in\\n'); os.read(0, 1)"
    )
    hold, release = os.pipe()
    hear, tell = os.pipe()
    with cgroup.init_arguments() as arguments:
        descriptors = [int(number) for number in arguments[1::2]]
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-I", "-S", "-c", code, *arguments],
            {},
            file_actions=[(os.POSIX_SPAWN_DUP2, hold, 0), (os.POSIX_SPAWN_DUP2, tell, 1)],
        )
    os.close(tell)
    try:
        assert os.read(hear, 3) == b"in\n"
        assert cgroup.pids() == [pid]
        for directory in directories(cgroup):
            assert (directory / "cgroup.procs").read_text(encoding="ascii") == f"{pid}\n"
    finally:
        os.close(release)
        os.waitpid(pid, 0)
        os.close(hold)
        os.close(hear)
    for descriptor in descriptors:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def test_a_busy_loop_is_throttled(create: Callable[..., Cgroup]) -> None:
    """Under a tenth of a CPU the kernel stops the loop in period after period, and counts its CPU."""
    # little enough for a busy machine to have more for it
    cgroup = create(cpu_max_millicores=100)
    code = "end = time.process_time() + 0.2\nwhile time.process_time() < end: pass\nsay('done')"
    with running(cgroup, code) as process:
        assert next_line(process) == "done"
    stat = dict(line.split() for line in value(cgroup, "cpu.stat", "cpu.stat").splitlines())
    # 0.2 s of CPU is 10 ms in each of 20 periods, some of it used up before the limit bites
    assert int(stat["nr_throttled"]) >= 10
    # some kernels count in ticks
    assert cgroup.usage().cpu_usage_usec >= 150_000


def test_a_memory_hog_is_killed_and_counted(create: Callable[..., Cgroup]) -> None:
    """The cgroup's own counter tells an OOM kill from any other SIGKILL."""
    hog = create(memory_max_bytes=32 * MIB)
    other = create(memory_max_bytes=32 * MIB)
    with running(hog, "say(len(b'x' * (200 << 20)))") as process:
        assert process.wait(DEADLINE_SECONDS) == -signal.SIGKILL
    with running(other, "say('up'); time.sleep(1000)") as process:
        assert next_line(process) == "up"
        process.kill()
        process.wait(DEADLINE_SECONDS)
    assert hog.usage().oom_kills >= 1
    assert other.usage().oom_kills == 0
    if hog.usage().memory_peak_bytes:
        assert 16 * MIB < hog.usage().memory_peak_bytes <= 32 * MIB
        assert 0 < other.usage().memory_peak_bytes < 32 * MIB


def test_fork_fails_at_the_limit_of_processes(create: Callable[..., Cgroup]) -> None:
    """Of three processes the first is the job's own, two are forked, one more is refused."""
    cgroup = create(pids_max=3)
    code = (
        # bounded: should the limit fail, this must not flood the host
        "count = number = 0\n"
        "while not number and count < 9:\n"
        "    try:\n"
        "        if not os.fork(): time.sleep(1000)\n"
        "        count += 1\n"
        "    except OSError as error: number = error.errno\n"
        "say(f'{count} {number}'); time.sleep(1000)"
    )
    with running(cgroup, code) as process:
        assert next_line(process) == f"2 {errno.EAGAIN}"
        assert len(cgroup.pids()) == 3
        assert process.pid in cgroup.pids()
        cgroup.kill()


def test_direct_io_is_throttled_and_counted(create: Callable[..., Cgroup], disk_dir: Path) -> None:
    """8 MiB at 4 MiB/s take their time, both ways, and each is counted once."""
    cgroup = create(io_rbps_max=4 * MIB, io_wbps_max=4 * MIB)
    code = (
        "import mmap\n"
        "buffer = mmap.mmap(-1, 1 << 20)\n"
        "file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT | os.O_DIRECT)\n"
        "for move in (os.pwritev, os.preadv):\n"
        "    start = time.monotonic()\n"
        "    for block in range(8): move(file, [buffer], block << 20)\n"
        "    say(time.monotonic() - start)\n"
    )
    with running(cgroup, code, str(disk_dir / "file")) as process:
        write_seconds, read_seconds = float(next_line(process)), float(next_line(process))
        process.wait(DEADLINE_SECONDS)
    # The first slice of time is free, so a little less than the 2 s of the arithmetic is right.
    assert write_seconds > 1.3
    assert read_seconds > 1.3
    usage = cgroup.usage()
    assert 8 * MIB <= usage.io_write_bytes < 12 * MIB
    assert 8 * MIB <= usage.io_read_bytes < 16 * MIB


def test_remove_waits_for_a_dying_process(create: Callable[..., Cgroup]) -> None:
    """EBUSY is no error while the last process is on its way out; a zombie does not count."""
    cgroup = create()
    with running(cgroup, "say('up'); time.sleep(1)") as process:
        assert next_line(process) == "up"
        assert cgroup.pids() == [process.pid]
        cgroup.remove()
        # waited for by remove, though nobody has reaped it yet
        assert process.poll() == 0
    assert not any(directory.exists() for directory in directories(cgroup))
    cgroup.remove()


def test_remove_of_a_living_job_fails_and_leaves_it(
    create: Callable[..., Cgroup], hierarchy: Hierarchy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its deadline it says so; nothing was removed, and it works once the job is dead."""
    monkeypatch.setattr(files, "SETTLE_SECONDS", 0.2)
    cgroup = create()
    with running(cgroup, "say('up'); time.sleep(1000)") as process:
        assert next_line(process) == "up"
        with pytest.raises(KernelError, match=r"job 1: .* \(EBUSY\)"):
            cgroup.remove()
        assert all(directory.is_dir() for directory in directories(cgroup))
        assert hierarchy.job_ids() == [1]
        monkeypatch.undo()
        cgroup.kill()
        cgroup.remove()
        assert process.wait(DEADLINE_SECONDS) == -signal.SIGKILL
    assert hierarchy.find(1) is None


def test_kill_ends_a_fork_bomb_and_nothing_else(create: Callable[..., Cgroup]) -> None:
    """Processes that fork as fast as they die cannot outrun it; another job lives on."""
    bomb, other = create(pids_max=100, cpu_max_millicores=500), create()
    # The first forks at most 200; each of these forks once and exits, over and over, so
    # that pids change all the time. Should kill fail, they end by themselves after a minute.
    code = (
        "import signal\n"
        "signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
        "first, end, left = os.getpid(), time.monotonic() + 60, 200\n"
        "say('up')\n"
        "while time.monotonic() < end and left:\n"
        "    try: child = os.fork()\n"
        "    except OSError: continue\n"
        "    if child and os.getpid() != first: os._exit(0)\n"
        "    if child: left -= 1\n"
        "time.sleep(60)\n"
    )
    with running(other, "say('up'); time.sleep(1000)") as bystander, running(bomb, code) as process:
        assert next_line(bystander) == next_line(process) == "up"
        deadline = time.monotonic() + DEADLINE_SECONDS
        while len(bomb.pids()) < 50:
            assert time.monotonic() < deadline
        bomb.kill()
        bomb.remove()
        assert bystander.poll() is None
        assert other.pids() == [bystander.pid]


def test_kill_of_an_empty_or_removed_cgroup_is_no_error(create: Callable[..., Cgroup]) -> None:
    """Whoever kills last comes too late, and that is fine."""
    cgroup = create()
    cgroup.kill()
    cgroup.remove()
    cgroup.kill()
    assert cgroup.pids() == []


def test_leftovers_are_found_and_removed(hierarchy: Hierarchy) -> None:
    """A create that a crash cut short is still a job to clean up; foreign names are not."""
    for job_id in (12, 3):
        hierarchy.create(job_id, limits())
    cgroup = hierarchy.find(12)
    assert cgroup
    for directory in directories(cgroup)[:-1]:
        directory.rmdir()
    foreign = [
        directories(cgroup)[-1].with_name(name) for name in ("job-x", "other", "job-", "job-²", "job-03")
    ]
    for path in foreign:
        path.mkdir()
    assert hierarchy.job_ids() == [3, 12]
    assert cgroup.pids() == []
    assert cgroup.usage().oom_kills == 0
    for job_id in hierarchy.job_ids():
        found = hierarchy.find(job_id)
        assert found
        found.kill()
        found.remove()
    assert hierarchy.job_ids() == []
    for path in foreign:
        path.rmdir()


def test_jobs_are_found_again_after_a_restart(hierarchy: Hierarchy, instance: str, disk_dir: Path) -> None:
    """Opening the same instance again finds its jobs running under their limits."""
    cgroup = hierarchy.create(8, limits(pids_max=9))
    with running(cgroup, "say('up'); time.sleep(1000)") as process:
        assert next_line(process) == "up"
        again = cgroups.open_hierarchy(instance, io_devices=cgroups.disks_under([str(disk_dir)]))
        assert again.job_ids() == [8]
        found = again.find(8)
        assert found
        assert found.pids() == [process.pid]
        assert value(found, "pids.max", "pids.max") == "9"
        found.kill()
        found.remove()


def test_the_host_is_described(hierarchy: Hierarchy) -> None:
    """The check names what the drivers use, and nothing is missing where they work."""
    host = cgroups.describe_host()
    assert host.version == hierarchy.version
    assert "memory" in host.present
    assert host.missing == ()
    assert host.hint is None


def test_a_missing_controller_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the memory controller nothing starts, and the operator reads what to do."""
    mounts = [
        mount
        for mount in files.read_mounts()
        if mount.fs_type == "cgroup" and not mount.super_options & {"memory", "blkio"}
    ]
    monkeypatch.setattr(files, "read_mounts", lambda: mounts)
    with pytest.raises(ConfigError, match="memory") as caught:
        cgroups.open_hierarchy("test-never")
    assert caught.value.hint
