"""The interface files of cgroups, for both drivers: mounts, values, throttles, and processes that must end.

A pid is no identity: all code here that signals a process holds its pidfd meanwhile.
"""

import errno
import fcntl
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Final

from pjw.errors import JobStateError, KernelError

# A cgroup whose processes cannot fork has shown all of them after two passes.
KILL_PASSES: Final = 4

# So many pidfds are open at once at most; the usual soft limit of open files is 1024.
PIDFDS_AT_ONCE: Final = 128

# of a job: the kernel's default, which a new cgroup has
CPU_PERIOD_USEC: Final = 100_000
# For the usage of all of a client's jobs, or of all jobs: a throttle here holds up many, so it is brief.
SUM_PERIOD_USEC: Final = 20_000

# Above these the kernel refuses or truncates a value. All of them are beyond what any
# machine has, so that a limit this high limits nothing and the highest value says the same.
CPU_QUOTA_MAX_USEC: Final = 2**40
PIDS_MAX: Final = 2**22
IOPS_MAX: Final = 2**32 - 1


@dataclass(frozen=True, slots=True)
class CgroupMount:
    """One line of /proc/self/mountinfo."""

    id: int
    device: str
    root: str
    point: str
    options: str
    fs_type: str
    source: str
    super_options: frozenset[str]


@dataclass(frozen=True, slots=True, eq=False)
class TopDirectory:
    """A directory above cgroups: its path, and a descriptor of it.

    Paths are looked up from the descriptor: a lookup from the root takes the kernel longer than the write.
    """

    path: str
    descriptor: int | None

    def close(self) -> None:
        """Close the descriptor."""
        if self.descriptor is not None:
            os.close(self.descriptor)


# for absolute paths
ROOT: Final = TopDirectory("/", None)


def open_top(path: str) -> TopDirectory:
    """Open a directory as a top. The caller closes it. Raises KernelError."""
    try:
        return TopDirectory(path, os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
    except OSError as error:
        raise KernelError("open", path, error.errno or errno.EIO) from error


def read_mounts(path: str = "/proc/self/mountinfo") -> list[CgroupMount]:
    """Return every mount that this process sees, in the kernel's order."""
    return parse_mounts(read_text(path, path))


def parse_mounts(table: str) -> list[CgroupMount]:
    """Return every mount of a table, in its order (proc_pid_mountinfo(5))."""
    mounts = []
    # not splitlines(): the kernel escapes newlines, and no other character that ends a line for Python
    for line in filter(None, table.split("\n")):
        left, _, right = line.partition(" - ")
        mount_id, _parent, device, root, point, options, *_propagation = left.split(" ")
        fs_type, source, super_options = right.split(" ")[:3]
        mounts.append(
            CgroupMount(
                id=int(mount_id),
                device=device,
                root=_unescape(root),
                point=_unescape(point),
                options=options,
                fs_type=fs_type,
                source=_unescape(source),
                super_options=frozenset(super_options.split(",")),
            )
        )
    return mounts


def _unescape(field: str) -> str:
    # The kernel writes blank, tab, newline, backslash and "#" as three octal digits.
    first, *rest = field.split("\\")
    return first + "".join(chr(int(part[:3], 8)) + part[3:] for part in rest)


def read_text(path: str, subject: str, top: TopDirectory = ROOT) -> str:
    """Read the whole of a small file of the kernel, below *top*; *subject* is its name in errors."""
    # not open(): its buffers and its look at the file are five more system calls
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=top.descriptor)
        try:
            return b"".join(iter(partial(os.read, descriptor, 65_536), b"")).decode(errors="surrogateescape")
        finally:
            os.close(descriptor)
    except OSError as error:
        raise KernelError("read", subject, error.errno or errno.EIO) from error


def read_number(path: str, subject: str, top: TopDirectory = ROOT) -> int:
    """Read the number in a file of the kernel that holds nothing else, by a single read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=top.descriptor)
        try:
            return int(os.read(descriptor, 64))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise KernelError("read", subject, error.errno or errno.EIO) from error


def write_text(path: str, value: str, subject: str, top: TopDirectory = ROOT) -> None:
    """Write *value* with one write(2), as kernel files want it; never create the file."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC, dir_fd=top.descriptor)
        try:
            os.write(descriptor, value.encode())
        finally:
            os.close(descriptor)
    except OSError as error:
        raise KernelError(f"write {value!r} to", subject, error.errno or errno.EIO) from error


def read_pids(directory: str) -> list[int]:
    """Return the processes in a cgroup, by their pids here; none when the cgroup is gone."""
    path = f"{directory}/cgroup.procs"
    try:
        text = read_text(path, path)
    except KernelError as error:
        # ENODEV: removed between our open and our read
        if error.errno in (errno.ENOENT, errno.ENODEV):
            return []
        raise
    # The kernel shows a process of a foreign pid namespace as 0.
    return sorted({int(line) for line in text.split()} - {0})


def read_fields(text: str) -> dict[str, int]:
    """Read lines of `name value`, as in cpu.stat."""
    return {name: int(value) for name, value in (line.split() for line in text.splitlines())}


def job_ids_in(directory: str, prefix: str = "job-") -> set[int]:
    """Return the jobs that have a directory in *directory*; other names there are not ours."""
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise KernelError("list", directory, error.errno or errno.EIO) from error
    ids = (name.removeprefix(prefix) for name in names if name.startswith(prefix))
    return {int(job_id) for job_id in ids if job_id.isascii() and job_id.isdigit() and job_id[0] != "0"}


def make_parent(path: str, hint: str | None = None) -> None:
    """Make a directory above the jobs'; one that is there from an earlier start is right."""
    try:
        os.mkdir(path, 0o755)
    except FileExistsError:
        pass
    except OSError as error:
        raise KernelError("make cgroup", path, error.errno or errno.EIO, hint=hint) from error


def not_set(name: str, value: int, subject: str, why: str) -> str:
    """Say that a sum does not have the requested value."""
    return f"cannot set {name} of {subject} to {value}: {why}"


def remove_parents(instance: str) -> None:
    """Remove an instance's directory and `pjw` above it, as far as they are empty."""
    parent = os.path.dirname(instance)
    with locked(os.path.dirname(parent)), suppress(OSError):
        os.rmdir(instance)
        os.rmdir(parent)


@contextmanager
def locked(directory: str) -> Iterator[None]:
    """Keep other launchers from making or removing parents below *directory* meanwhile."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def kill_processes(list_pids: Callable[[], list[int]]) -> None:
    """Send SIGKILL to each process of a cgroup, and to forks under way that show only then."""
    killed: set[int] = set()
    for _ in range(KILL_PASSES):
        pids = [pid for pid in list_pids() if pid not in killed]
        if not pids:
            return
        for start in range(0, len(pids), PIDFDS_AT_ONCE):
            with _pidfds(pids[start : start + PIDFDS_AT_ONCE]) as pidfds:
                # Read again now that the pidfds are held. A pid that was recycled before is no longer in the
                # list; one recycled since does not name the process of its pidfd.
                still_there = set(list_pids())
                for pid in pidfds.keys() & still_there:
                    _kill(pidfds[pid])
        killed.update(pids)


def it_exists(subject: str) -> JobStateError:
    """Make the refusal of a second cgroup for one job."""
    return JobStateError(f"cannot create the cgroup of {subject}: it exists")


def make_cgroup(place: str, subject: str, top: TopDirectory) -> None:
    """Make a cgroup's directory below *top*. JobStateError when it is there."""
    try:
        os.mkdir(place, 0o755, dir_fd=top.descriptor)
    except FileExistsError:
        raise it_exists(subject) from None
    except OSError as error:
        directory = os.path.join(top.path, place)
        raise KernelError("make cgroup", f"{directory} of {subject}", error.errno or errno.EIO) from error


def try_rmdir(place: str, subject: str, top: TopDirectory) -> bool:
    """Remove a cgroup's directory below *top*, unless something is in it: then false."""
    try:
        os.rmdir(place, dir_fd=top.descriptor)
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno == errno.EBUSY:
            return False
        directory = os.path.join(top.path, place)
        raise KernelError("remove cgroup", f"{directory} of {subject}", error.errno or errno.EIO) from error
    return True


@contextmanager
def _pidfds(pids: list[int]) -> Iterator[dict[int, int]]:
    pidfds: dict[int, int] = {}
    try:
        for pid in pids:
            try:
                pidfds[pid] = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            except OSError as error:
                raise KernelError("open a pidfd of", f"process {pid}", error.errno or errno.EIO) from error
        yield pidfds
    finally:
        for pidfd in pidfds.values():
            os.close(pidfd)


def _kill(pidfd: int) -> None:
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


@contextmanager
def opened(paths: Iterable[tuple[TopDirectory, str]], flags: int, subject: str) -> Iterator[list[int]]:
    """Open *paths*, each below its top; close them at the end."""
    descriptors: list[int] = []
    try:
        for top, path in paths:
            try:
                descriptors.append(os.open(path, flags | os.O_CLOEXEC, dir_fd=top.descriptor))
            except OSError as error:
                raise KernelError("open the cgroup of", subject, error.errno or errno.EIO) from error
        yield descriptors
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


# Limits of disk IO, and their removal: no signal ends a process that waits in a throttle.
#
# The kernel charges a throttled bio to a process in an uninterruptible sleep, which SIGKILL does not end
# (state D): at two bytes a second that takes days. So each kill of a job lifts its throttles as well.

# The files of v1 and of v2 that hold a limit for each disk, and the value that means "none" there.
NO_THROTTLE: Final = {
    "blkio.throttle.read_bps_device": "0",
    "blkio.throttle.write_bps_device": "0",
    "blkio.throttle.read_iops_device": "0",
    "blkio.throttle.write_iops_device": "0",
    "io.max": "rbps=max wbps=max riops=max wiops=max",
}
# Init lifts the limits of at most this many disks (init/init.h, LIFTS_MAX); the launcher lifts all.
DISKS_MAX: Final = 64
# half made or half removed; ENODEV: between the open and the write, or a disk that was taken away
_GONE: Final = (errno.ENOENT, errno.ENODEV)


def lift(directory: str) -> None:
    """Take every limit of disk IO off a cgroup, of whichever version.

    Raises KernelError for the first limit that it cannot take off, after it has tried all others.
    """
    failed: KernelError | None = None
    for name, none in NO_THROTTLE.items():
        path = f"{directory}/{name}"
        try:
            # a line for each disk that has a limit: `254:0 1048576`, `254:0 rbps=1048576 wbps=max …`
            disks = [line.split()[0] for line in read_text(path, path).splitlines()]
        except KernelError as error:
            failed = failed or _unless_gone(error)
            continue
        for disk in disks:
            try:
                write_text(path, f"{disk} {none}", path)
            except KernelError as error:
                failed = failed or _unless_gone(error)
    if failed is not None:
        raise failed


def _unless_gone(error: KernelError) -> KernelError | None:
    return None if error.errno in _GONE else error


def lift_words(names: Sequence[str], descriptors: Sequence[int], disks: Sequence[str]) -> list[str | int]:
    """Return the options of init that let it lift the limits itself, when the launcher is not there.

    *names* are the files of one version that hold the limits, *descriptors* the same files, open for writing.
    The kernel checks the rights of the process that opened a file of a cgroup. So init may write to it
    without any capability.
    """
    if not names:
        return []
    none = NO_THROTTLE[names[0]]
    return [
        *(word for descriptor in descriptors for word in ("--lift-fd", descriptor)),
        *(word for disk in disks[:DISKS_MAX] for word in ("--lift", f"{disk} {none}")),
    ]
