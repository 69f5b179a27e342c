"""Cgroups of jobs on the real kernel: v1 or v2, whichever this host has."""

import errno
import itertools
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from pjw.errors import ConfigError, JobStateError, KernelError
from pjw.launcher import cgroup as cgroups
from pjw.launcher.cgroup import Cgroup, Hierarchy, interface_files, v1, v2
from pjw.launcher.departures import Departures, Waiter
from pjw.launcher.processes import Watcher
from pjw.model import DEFAULT_SHARE, GroupUse, Limits, Share, Sums
from tests.support.service import wait_for

MIB = 1024**2
UNLIMITED = Limits(0, 0, 0, 0, 0, 0, 0, 0, 0)
DEADLINE_SECONDS = 60.0
# of a client; nobody is it here
UID = 1_900_000_007
NUMBERS = itertools.count(1)


def limits(**values: int) -> Limits:
    """No limits but these."""
    return UNLIMITED.with_overrides(values)


def remove(cgroup: Cgroup) -> None:
    """Remove it, when its last process has left it."""
    wait_for(cgroup.try_remove)


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
    points = [
        Path(mount.point) for mount in interface_files.read_mounts() if mount.fs_type.startswith("cgroup")
    ]
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
    found = [path for top in instance_directories(name) for path, _, _ in os.walk(top, topdown=False)]
    for path in found:
        os.rmdir(path)
    assert [path for path in found if not path.endswith(name)] == []


@pytest.fixture
def hierarchy(instance: str, disk_dir: Path) -> Iterator[Hierarchy]:
    """Limits of io go to the disk under `disk_dir`."""
    hierarchy = cgroups.open_hierarchy(instance, io_devices=cgroups.disks_under([str(disk_dir)]))
    yield hierarchy
    hierarchy.release()


@pytest.fixture
def create(hierarchy: Hierarchy) -> Iterator[Callable[..., Cgroup]]:
    """Make job after job; kill and remove them at the end."""
    ids = itertools.count(1)
    made: list[Cgroup] = []

    def create_one(**values: int) -> Cgroup:
        made.append(hierarchy.create(next(ids), limits(**values), UID))
        return made[-1]

    yield create_one
    for cgroup in made:
        if any(directory.is_dir() for directory in directories(cgroup)):
            cgroup.kill()
            remove(cgroup)


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
    first = hierarchy.create(1, limits(pids_max=9), UID)
    with pytest.raises(JobStateError, match="job 1"):
        hierarchy.create(1, limits(pids_max=5), UID)
    assert value(first, "pids.max", "pids.max") == "9"
    assert hierarchy.job_ids() == [1]
    remove(first)


def test_a_failure_half_way_leaves_nothing(instance: str) -> None:
    """A limit that the kernel refuses names its file and job, and takes the directories back."""
    hierarchy = cgroups.open_hierarchy(instance, io_devices=["4095:77"])
    with pytest.raises(KernelError, match=r"(io\.max|write_bps_device) of job 5: .* \(ENODEV\)"):
        hierarchy.create(5, Limits(), UID)
    assert hierarchy.job_ids() == []
    assert hierarchy.find(5) is None


def test_an_io_limit_without_a_disk_is_refused(instance: str) -> None:
    """Never silently missing, and nothing is made for it."""
    hierarchy = cgroups.open_hierarchy(instance)
    with pytest.raises(ConfigError, match="cannot limit the disk IO of job 5: no disk was named") as caught:
        hierarchy.create(5, limits(io_wiops_max=10), UID)
    assert caught.value.hint
    assert hierarchy.job_ids() == []
    remove(hierarchy.create(6, limits(pids_max=5), UID))


# Prints what a job's cgroup has the kernel open, make and remove, from its beginning to its end.
OF_ONE_LIFE = """
import json, sys
from pjw.launcher import cgroup
from pjw.model import Limits
instance, disk_dir, uid = sys.argv[1], sys.argv[2], int(sys.argv[3])
hierarchy = cgroup.open_hierarchy(instance, io_devices=cgroup.disks_under([disk_dir]))
other = hierarchy.create(1, Limits(), uid)
found = {"open": [], "os.mkdir": [], "os.rmdir": []}
sys.addaudithook(lambda name, arguments: found[name].append(arguments[0]) if name in found else None)
job = hierarchy.create(2, Limits(), uid)
with job.init_arguments():
    pass
job.make_equal()
job.usage()
assert job.try_remove()
print(json.dumps(found))
assert other.try_remove()
"""


def test_a_life_costs_no_more_calls_than_it_needs(
    hierarchy: Hierarchy, instance: str, disk_dir: Path
) -> None:
    """Each takes the launcher microseconds: no file is opened in vain, and none by its whole path."""
    words = [sys.executable, "-I", "-c", OF_ONE_LIFE, instance, str(disk_dir), str(UID)]
    found = json.loads(subprocess.check_output(words))
    places = 1 if isinstance(hierarchy, v2.V2Hierarchy) else len(instance_directories(instance))
    assert len(found["os.mkdir"]) == len(found["os.rmdir"]) == places
    assert len(found["open"]) <= (13 if isinstance(hierarchy, v2.V2Hierarchy) else 15 + places)
    paths = [path for each in found.values() for path in each]
    assert {os.path.commonpath([path, f"client-{UID}/job-2"]) for path in paths} == {f"client-{UID}/job-2"}


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
        # --cgroup is the path at which the job is shown it, with cgroup v2
        ways = [pair for pair in zip(arguments[::2], arguments[1::2], strict=True) if pair[0] != "--cgroup"]
        words = [str(word) for pair in ways for word in pair]
        descriptors = [int(number) for _, number in ways]
        for number in descriptors:
            os.set_inheritable(number, True)
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-I", "-S", "-c", code, *words],
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


def test_a_cgroup_goes_with_its_last_process(create: Callable[..., Cgroup], hierarchy: Hierarchy) -> None:
    """No error and nothing removed before; a zombie does not count; and what is gone can be removed again."""
    cgroup = create()
    with running(cgroup, "say('up'); time.sleep(1000)") as process:
        assert next_line(process) == "up"
        assert cgroup.pids() == [process.pid]
        assert not cgroup.try_remove()
        assert all(directory.is_dir() for directory in directories(cgroup))
        assert hierarchy.job_ids() == [1]
        cgroup.kill()
        remove(cgroup)
        # gone, though nobody has reaped it yet
        assert process.poll() == -signal.SIGKILL
    assert not any(directory.exists() for directory in directories(cgroup))
    assert hierarchy.find(1) is None
    assert cgroup.try_remove()


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
        remove(bomb)
        assert bystander.poll() is None
        assert other.pids() == [bystander.pid]


def test_kill_of_an_empty_or_removed_cgroup_is_no_error(create: Callable[..., Cgroup]) -> None:
    """Whoever kills last comes too late, and that is fine."""
    cgroup = create()
    cgroup.kill()
    remove(cgroup)
    cgroup.kill()
    assert cgroup.pids() == []


def test_leftovers_are_found_and_removed(hierarchy: Hierarchy) -> None:
    """A create that a crash cut short is still a job to clean up; foreign names are not."""
    for job_id in (12, 3):
        hierarchy.create(job_id, limits(), UID)
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
        remove(found)
    assert hierarchy.job_ids() == []
    for path in foreign:
        path.rmdir()
    # what is not ours has kept the directory of the client
    foreign[0].parent.rmdir()


def test_jobs_are_found_again_after_a_restart(hierarchy: Hierarchy, instance: str, disk_dir: Path) -> None:
    """Opening the same instance again finds its jobs running under their limits."""
    cgroup = hierarchy.create(8, limits(pids_max=9), UID)
    with running(cgroup, "say('up'); time.sleep(1000)") as process:
        assert next_line(process) == "up"
        again = cgroups.open_hierarchy(instance, io_devices=cgroups.disks_under([str(disk_dir)]))
        assert again.job_ids() == [8]
        found = again.find(8)
        assert found
        assert found.pids() == [process.pid]
        assert value(found, "pids.max", "pids.max") == "9"
        found.kill()
        remove(found)


# --- departures: nobody waits for a cgroup but who wants to know


class Told:
    """What somebody who waits for a departure is told."""

    def __init__(self, departures: Departures, job_id: int = 1) -> None:
        self.words: list[str] = []
        self.hint: str | None = None
        departures.wait_for(job_id, Waiter(lambda: self.words.append("gone"), self._late))

    def _late(self, error: KernelError) -> None:
        self.words.append(str(error))
        self.hint = error.hint


@pytest.fixture
def watcher() -> Iterator[Watcher]:
    """What tells of ends and timers."""
    watcher = Watcher()
    yield watcher
    watcher.close()


def test_a_departure_that_is_late_goes_on(create: Callable[..., Cgroup], watcher: Watcher) -> None:
    """Who waits is told what is in its way, then and later at once; and nothing is left at its end (S2)."""
    cgroup, departures, order = create(), Departures(watcher), []
    with running(cgroup, "say('up'); time.sleep(1000)") as process:
        assert next_line(process) == "up"
        departures.begin(1, cgroup, lambda: order.append("finish"), late_seconds=0.1)
        departures.go_on(1)
        first = Told(departures)
        while not first.words:
            watcher.run_once()
        second = Told(departures)
        for told in (first, second):
            assert told.words == ["cannot remove the cgroup of job 1: device or resource busy (EBUSY)"]
            assert re.fullmatch(rf"process {process.pid} \(python[\d.]*\) in state S.*", told.hint or "")
        began = time.monotonic()
        # what is late keeps no launcher from its end
        departures.settle()
        assert time.monotonic() - began < 1
        cgroup.kill()
        while 1 in departures:
            watcher.run_once()
        assert order == ["finish"]
    assert Told(departures).words == ["gone"]


def test_a_departure_tells_who_waits_when_it_is_over(create: Callable[..., Cgroup], watcher: Watcher) -> None:
    """After whoever has begun it."""
    cgroup, departures, order = create(), Departures(watcher), list[str]()
    with running(cgroup, "say('up'); time.sleep(1000)") as process:
        assert next_line(process) == "up"
        departures.begin(1, cgroup, lambda: order.append("finish"))
        departures.go_on(1)
        departures.wait_for(1, Waiter(lambda: order.append("gone"), lambda error: order.append(str(error))))
        assert order == []
        cgroup.kill()
        departures.settle()
    assert order == ["finish", "gone"]


def test_what_cannot_be_removed_is_tried_again(watcher: Watcher, tmp_path: Path) -> None:
    """Whoever waits is told the error of now, not that of the first time."""
    path, finished = tmp_path / "cgroup", list[str]()
    path.symlink_to(tmp_path)
    departures = Departures(watcher)
    departures.begin(1, v2.V2Cgroup(1, str(path)), lambda: finished.append("finish"))
    departures.go_on(1)
    for _ in range(2):
        [words] = Told(departures).words
        assert words.startswith(f"cannot remove cgroup {path} of job 1: not a directory (ENOTDIR)")
    path.unlink()
    path.mkdir()
    while 1 in departures:
        watcher.run_once()
    assert finished == ["finish"]


# --- the three levels


def old_place(instance: str, job_id: int) -> list[Path]:
    """Where a version before this layout has a job's directories: not below a client's."""
    return [path / f"job-{job_id}" for path in instance_directories(instance)]


def test_a_job_is_below_its_client_which_goes_with_the_last(hierarchy: Hierarchy, instance: str) -> None:
    """The client is a number there; its directory comes with its first job and goes with its last (S5)."""
    first, second = (hierarchy.create(job_id, limits(), UID) for job_id in (1, 2))
    other = hierarchy.create(3, limits(), UID + 1)
    tops = instance_directories(instance)
    assert {path.relative_to(path.parents[1]).as_posix() for path in directories(first)} == {
        f"client-{UID}/job-1"
    }
    remove(first)
    assert all((top / f"client-{UID}").is_dir() for top in tops)
    remove(second)
    assert not any((top / f"client-{UID}").exists() for top in tops)
    assert hierarchy.job_ids() == [3]
    remove(other)
    assert not any(path.is_dir() for top in tops for path in top.iterdir())


def test_a_create_that_fails_leaves_no_client(instance: str) -> None:
    """Neither the job's directory nor that of its client, which has no other job."""
    hierarchy = cgroups.open_hierarchy(instance, io_devices=["4095:77"])
    with pytest.raises(KernelError):
        hierarchy.create(5, Limits(), UID)
    assert not any(path.is_dir() for top in instance_directories(instance) for path in top.iterdir())


def test_a_job_of_the_version_before_is_where_it_was(hierarchy: Hierarchy, instance: str) -> None:
    """Found, accounted, killed and removed there, beside clients' directories; its id is not given again."""
    for path in old_place(instance, 4):
        path.mkdir()
    hierarchy.create(5, limits(), UID)
    again = cgroups.open_hierarchy(instance)
    old = again.find(4)
    assert old
    assert directories(old) == old_place(instance, 4)
    with running(old, "say('up'); time.sleep(1000)") as process:
        assert next_line(process) == "up"
        assert old.pids() == [process.pid]
        assert old.measure().pids == 1
        with pytest.raises(JobStateError, match="job 4"):
            again.create(4, limits(), UID)
        old.kill()
        assert process.wait(DEADLINE_SECONDS) == -signal.SIGKILL
        assert old.usage().memory_peak_bytes >= 0
        remove(old)
    assert again.job_ids() == [5]
    new = again.find(5)
    assert new
    remove(new)
    assert again.job_ids() == []


def test_a_client_that_an_older_version_made_does_not_swap(hierarchy: Hierarchy, instance: str) -> None:
    """V1: a job has this of its client's directory, which older versions made without it."""
    if not isinstance(hierarchy, v1.V1Hierarchy):
        pytest.skip("on v2 each job has a limit of swap")
    hierarchy.create(1, limits(), UID)
    [client] = [path / f"client-{UID}" for path in instance_directories(instance) if "/memory/" in str(path)]
    (client / "memory.swappiness").write_text("60")
    again = cgroups.open_hierarchy(instance)
    jobs = [again.create(2, limits(), UID), again.create(3, limits(), UID + 1)]
    assert [value(job, "memory.swappiness", "") for job in jobs] == ["0", "0"]
    old = again.find(1)
    assert old
    for job in (old, *jobs):
        remove(job)


def test_an_empty_client_that_a_crash_has_left_goes(hierarchy: Hierarchy, instance: str) -> None:
    """A launcher may be killed between the two directories; the next one looks."""
    for path in instance_directories(instance):
        (path / f"client-{UID}").mkdir()
    cgroups.open_hierarchy(instance)
    assert not any(path.is_dir() for top in instance_directories(instance) for path in top.iterdir())


def group_value(hierarchy: Hierarchy, instance: str, place: str, v1_name: str, v2_name: str) -> str:
    """The value of a limit of the instance ('.') or of a client."""
    name = v1_name if isinstance(hierarchy, v1.V1Hierarchy) else v2_name
    # on v1 one directory for each controller, of which one has it
    [found] = [path for top in instance_directories(instance) if (path := top / place / name).exists()]
    return found.read_text(encoding="ascii").strip()


def group_cpu(hierarchy: Hierarchy, instance: str, place: str) -> int:
    """The processor time of the instance or of a client, in thousandths; 0 is any."""
    if isinstance(hierarchy, v1.V1Hierarchy):
        quota = int(group_value(hierarchy, instance, place, "cpu.cfs_quota_us", ""))
        period = int(group_value(hierarchy, instance, place, "cpu.cfs_period_us", ""))
        return quota * 1000 // period if quota > 0 else 0
    quota_word, period_word = group_value(hierarchy, instance, place, "cpu.", "cpu.max").split()
    return 0 if quota_word == "max" else int(quota_word) * 1000 // int(period_word)


def test_sums_are_effective_for_all_jobs_and_for_a_client(hierarchy: Hierarchy, instance: str) -> None:
    """The kernel shows what was asked for, at both levels; 0 takes a bound away again (S5)."""
    assert hierarchy.set_sums(Sums(512 * MIB, 400, 900)) == []
    share = Share(300, Sums(128 * MIB, 50, 500))
    job = hierarchy.create(1, limits(), UID, share)
    client = f"client-{UID}"
    for place, memory, pids, cpu in ((".", 512 * MIB, "400", 900), (client, 128 * MIB, "50", 500)):
        assert group_value(hierarchy, instance, place, "memory.limit_in_bytes", "memory.max") == str(memory)
        assert group_value(hierarchy, instance, place, "pids.max", "pids.max") == pids
        assert group_cpu(hierarchy, instance, place) == cpu
    weight = group_value(hierarchy, instance, client, "cpu.shares", "cpu.weight")
    assert weight == ("3072" if hierarchy.version == 1 else "300")
    assert hierarchy.share_of(UID) == share
    assert hierarchy.set_share(UID, DEFAULT_SHARE) == []
    assert group_value(hierarchy, instance, client, "pids.max", "pids.max") == "max"
    assert group_cpu(hierarchy, instance, client) == 0
    assert hierarchy.set_sums(Sums()) == []
    assert group_cpu(hierarchy, instance, ".") == 0
    remove(job)
    assert hierarchy.share_of(UID) is None
    assert hierarchy.set_share(UID, share) == []


def test_a_job_has_no_more_processor_time_than_those_above_it(hierarchy: Hierarchy, instance: str) -> None:
    """On v1 a quota above the parent's is EINVAL: such a job starts all the same, and has its parent's."""
    assert hierarchy.set_sums(Sums(cpu_max_millicores=700)) == []
    job = hierarchy.create(1, limits(cpu_max_millicores=1000), UID, Share(sums=Sums(cpu_max_millicores=900)))
    other = hierarchy.create(2, limits(cpu_max_millicores=1000), UID + 1)
    if hierarchy.version == 1:
        assert group_cpu(hierarchy, instance, f"client-{UID}") == 700
        assert [value(each, "cpu.cfs_quota_us", "") for each in (job, other)] == ["70000", "70000"]
    for each in (job, other):
        remove(each)


def test_a_sum_that_cannot_be_lowered_is_told(hierarchy: Hierarchy) -> None:
    """Less processor time than a running job has (v1), less memory than is used: in words; nobody dies."""
    job = hierarchy.create(1, limits(cpu_max_millicores=800), UID)
    code = "data = b'x' * (64 << 20)\nsay('up'); time.sleep(1000)"
    with running(job, code) as process:
        assert next_line(process) == "up"
        words = hierarchy.set_sums(Sums(memory_max_bytes=20 * MIB, cpu_max_millicores=200))
        memory = next(text for text in words if "memory_max_bytes of all jobs" in text)
        assert "are used" in memory
        if hierarchy.version == 1:
            assert any("cpu_max_millicores of all jobs to 200" in text for text in words)
        assert process.poll() is None
        job.kill()
        remove(job)
        process.wait(DEADLINE_SECONDS)
    # the kernel forgets the quota of a cgroup that was removed only after a while
    wait_for(lambda: hierarchy.set_sums(Sums(memory_max_bytes=20 * MIB, cpu_max_millicores=200)) == [])


def test_the_instance_holds_the_sum_of_processes(hierarchy: Hierarchy) -> None:
    """Jobs without limits, of two clients, have no more processes together than the sum says."""
    assert hierarchy.set_sums(Sums(pids_max=20)) == []
    jobs = [hierarchy.create(number, limits(), UID + number) for number in (1, 2)]
    code = (
        "count = 0\n"
        "while count < 30:\n"
        "    try:\n"
        "        if not os.fork(): time.sleep(1000)\n"
        "        count += 1\n"
        "    except OSError: break\n"
        "say(str(count)); time.sleep(1000)"
    )
    with running(jobs[0], "say('up'); time.sleep(1000)") as one, running(jobs[1], code) as other:
        assert next_line(one) == "up"
        assert next_line(other) in ("18", "19")
        assert hierarchy.use_of(UID + 1).pids == 1
        assert hierarchy.use_of(UID + 2).pids >= 19
        for job in jobs:
            job.kill()
            remove(job)
    assert hierarchy.use_of(UID + 2) == GroupUse()


def test_six_jobs_of_one_client_weigh_as_much_as_one_of_another(hierarchy: Hierarchy) -> None:
    """Busy loops on one processor: each client has half of it, and not a seventh (S5)."""
    cpu = min(os.sched_getaffinity(0))
    many = [hierarchy.create(number, limits(), UID) for number in range(1, 7)]
    single = hierarchy.create(7, limits(), UID + 1)
    code = f"os.sched_setaffinity(0, [{cpu}]); say('up')\nwhile True: pass"

    def used() -> tuple[int, int]:
        return hierarchy.use_of(UID).cpu_usage_usec, hierarchy.use_of(UID + 1).cpu_usage_usec

    with ExitStack() as stack:
        for job in (*many, single):
            assert next_line(stack.enter_context(running(job, code))) == "up"
        before = used()
        deadline = time.monotonic() + DEADLINE_SECONDS
        # enough for the scheduler to be fair, however little of this processor the machine has for us
        while sum(used()) - sum(before) < 2_000_000:
            assert time.monotonic() < deadline
            select.select([], [], [], 0.05)
        of_many, of_single = (after - earlier for after, earlier in zip(used(), before, strict=True))
        for job in (*many, single):
            job.kill()
            remove(job)
    assert 0.7 < of_single / of_many < 1.4


def test_a_client_with_twice_the_weight_has_twice_the_time(hierarchy: Hierarchy) -> None:
    """The operator's weight is what the kernel shares a processor by."""
    cpu = min(os.sched_getaffinity(0))
    light = hierarchy.create(1, limits(), UID)
    heavy = hierarchy.create(2, limits(), UID + 1, Share(300))
    code = f"os.sched_setaffinity(0, [{cpu}]); say('up')\nwhile True: pass"
    with running(light, code) as first, running(heavy, code) as second:
        assert [next_line(first), next_line(second)] == ["up", "up"]
        before = hierarchy.use_of(UID).cpu_usage_usec, hierarchy.use_of(UID + 1).cpu_usage_usec
        deadline = time.monotonic() + DEADLINE_SECONDS
        while hierarchy.use_of(UID).cpu_usage_usec - before[0] < 400_000:
            assert time.monotonic() < deadline
            select.select([], [], [], 0.05)
        of_light = hierarchy.use_of(UID).cpu_usage_usec - before[0]
        of_heavy = hierarchy.use_of(UID + 1).cpu_usage_usec - before[1]
        for job in (light, heavy):
            job.kill()
            remove(job)
    assert 2 < of_heavy / of_light < 4.5


# --- the host


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
        for mount in interface_files.read_mounts()
        if mount.fs_type == "cgroup" and not mount.super_options & {"memory", "blkio"}
    ]
    monkeypatch.setattr(interface_files, "read_mounts", lambda: mounts)
    with pytest.raises(ConfigError, match="memory") as caught:
        cgroups.open_hierarchy("test-never")
    assert caught.value.hint
