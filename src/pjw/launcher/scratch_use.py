"""The contents of scratch directories: bytes and inodes of each job, counted by a process of its own.

A hostile job's tree may be endless, so the process counts for SECONDS, and all jobs take turns: a job with
very many inodes has the highest count, finished or not.
"""

import os
import re
import resource
import signal
import stat
import sys
import time
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from pjw.launcher.cgroup.interface_files import job_ids_in
from pjw.launcher.image_store import image_of
from pjw.launcher.scratch import find_quotas
from pjw.model import TOO_DEEP

SECONDS: Final = 3.0
# then the process ends, if its counts are not read
_LIFE_SECONDS: Final = 30
# entries of one job before the next one's turn
_TURN: Final = 1000

# A directory that is being read: its descriptor, and the iterator of os.scandir(), which has no public type.
_Level = tuple[int, Any]
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(slots=True)
class FileCount:
    """The files of one job, as far as they were counted."""

    bytes: float = 0
    inodes: float = 0

    def add(self, status: os.stat_result) -> None:
        """Count one name of an inode: all its names are in this one's directory."""
        names = max(status.st_nlink, 1) if not stat.S_ISDIR(status.st_mode) else 1
        self.bytes += status.st_blocks * 512 / names
        self.inodes += 1 / names


def spawn_count(instance: str, places: tuple[str, ...]) -> tuple[int, int]:
    """Begin to count jobs' files below *places*; return the pid of the counter, and a pipe of its words.

    The words are a line for each job, with its id, bytes and inodes. Raises OSError.
    """
    return spawn_counter("pjw.launcher.scratch_use", instance, *places)


def spawn_counter(module: str, *arguments: str) -> tuple[int, int]:
    """Run a module that counts; return the pid of its process, and a pipe of its words. Raises OSError."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        argv = [sys.executable, "-I", "-m", module, *arguments]
        pid = os.posix_spawn(sys.executable, argv, {}, file_actions=[(os.POSIX_SPAWN_DUP2, writing, 1)])
    except BaseException:
        os.close(reading)
        raise
    finally:
        os.close(writing)
    return pid, reading


def count(instance: str, places: list[str], seconds: float = SECONDS) -> dict[int, FileCount]:
    """Count the files of each job, as far as possible in the time given."""
    deadline = time.monotonic() + seconds
    uses: dict[int, FileCount] = {}
    walked: dict[int, FileCount] = {}
    walks: list[Generator[None, None, None]] = []
    devices: set[int] = set()
    with_image: set[int] = set()
    for place in places:
        try:
            descriptor = os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        quotas = find_quotas(descriptor, instance)
        for job_id in job_ids_in(place, prefix=""):
            path = os.path.join(place, str(job_id))
            counted = quotas.use(job_id, path) if quotas is not None else None
            uses[job_id] = FileCount(*(counted or (0, 0)))
            if counted is None:
                devices.add(os.fstat(descriptor).st_dev)
                walked[job_id] = uses[job_id]
                if image_of(path):
                    with_image.add(job_id)
                walks.append(walk(path, uses[job_id]))
        os.close(descriptor)
    # the kernel has counted the others' already
    walks.append(_walk_open(instance.encode(), devices, walked, with_image))
    while walks and time.monotonic() < deadline:
        walks = [each for each in walks if _goes_on(each, deadline)]
    for each in walks:
        each.close()
    return uses


def _goes_on(walking: Generator[None, None, None], deadline: float) -> bool:
    """Give a walk its turn; whether it has more to do."""
    if time.monotonic() > deadline:
        return True
    return all(next(walking, walking) is None for _ in range(_TURN))


def walk(path: str, use: FileCount) -> Generator[None, None, None]:
    """Count the files below a directory, a step for each name; no link is followed, no mount entered."""
    # By descriptors, since the job renames as it likes meanwhile.
    levels: list[_Level] = []
    try:
        _enter(levels, path, None)
        device = os.fstat(levels[0][0]).st_dev
        while levels:
            here, entries = levels[-1]
            entry = next(entries, None)
            if entry is None:
                _leave(levels)
                continue
            with suppress(FileNotFoundError, NotADirectoryError):
                status = entry.stat(follow_symlinks=False)
                use.add(status)
                if stat.S_ISDIR(status.st_mode) and status.st_dev == device:
                    _enter(levels, entry.name, here)
            yield
    except FileNotFoundError:
        return  # removed meanwhile
    except OSError:
        use.bytes = use.inodes = TOO_DEEP
    finally:
        while levels:
            _leave(levels)


def _leave(levels: list[_Level]) -> None:
    descriptor, entries = levels.pop()
    entries.close()
    os.close(descriptor)


def _enter(levels: list[_Level], name: str, parent: int | None) -> None:
    descriptor = os.open(name, _DIRECTORY, dir_fd=parent)
    try:
        levels.append((descriptor, os.scandir(descriptor)))
    except OSError:
        os.close(descriptor)
        raise


def _walk_open(
    instance: bytes, devices: set[int], uses: dict[int, FileCount], with_image: set[int]
) -> Generator[None, None, None]:
    """Count files that have no name any more, and that processes of jobs have open or mapped.

    One that is on its way through a socket alone is not found. Of a job with an image a file of the image
    counts too, which the job has removed and has open: it looks like one that the job has written.
    """
    job_of_cgroup = re.compile(
        b"/" + re.escape(instance) + rb"/(?:[^\n]*/)?job-([1-9]\d{0,15})(?:/|$)", re.MULTILINE
    )
    seen: set[tuple[int, int]] = set()
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        yield
        # gone meanwhile; or not ours to look into (ptrace(2), CAP_SYS_PTRACE)
        with suppress(OSError):
            with open(f"/proc/{pid}/cgroup", "rb") as cgroups:
                found = job_of_cgroup.search(cgroups.read())
            use = uses.get(int(found[1])) if found else None
            if found is None or use is None:
                continue
            # files written to an image belong to its overlay, which has its own device
            own = {os.stat(f"/proc/{pid}/root").st_dev} if int(found[1]) in with_image else set()
            for directory in (f"/proc/{pid}/fd", f"/proc/{pid}/map_files"):
                for name in os.listdir(directory):
                    yield
                    with suppress(FileNotFoundError):
                        status = os.stat(f"{directory}/{name}")
                        which = (status.st_dev, status.st_ino)
                        if status.st_nlink == 0 and status.st_dev in devices | own and which not in seen:
                            seen.add(which)
                            use.add(status)


def main() -> int:
    """Count, and print a line for each job."""
    # by the kernel, whatever call hangs
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_LIFE_SECONDS)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    instance, *places = sys.argv[1:]
    uses = count(instance, places).items()
    words = b"".join(b"%d %d %d\n" % (job_id, round(use.bytes), round(use.inodes)) for job_id, use in uses)
    print_words(words)
    return 0


def print_words(words: bytes) -> None:
    """Write to stdout. Not by sys.stdout, which complains when its reader has gone."""
    with suppress(BrokenPipeError):
        while words:
            words = words[os.write(1, words) :]


if __name__ == "__main__":
    sys.exit(main())
