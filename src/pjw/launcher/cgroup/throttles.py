"""Limits of disk IO, and their removal: no signal ends a process that waits in a throttle.

A bio that is held back there is charged to a process in an uninterruptible sleep, which SIGKILL does not end
(state D): at two bytes a second that takes days. So each kill of a job lifts its throttles as well.
"""

import errno
from collections.abc import Sequence
from typing import Final

from pjw.errors import KernelError
from pjw.launcher.cgroup import files

# The files of v1 and of v2 that hold a limit for each disk, and the value that means "none" there.
NO_THROTTLE: Final = {
    "blkio.throttle.read_bps_device": "0",
    "blkio.throttle.write_bps_device": "0",
    "blkio.throttle.read_iops_device": "0",
    "blkio.throttle.write_iops_device": "0",
    "io.max": "rbps=max wbps=max riops=max wiops=max",
}
# Init lifts the limits of at most so many disks (init/init.h, LIFTS_MAX); the launcher lifts all.
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
            disks = [line.split()[0] for line in files.read_text(path, path).splitlines()]
        except KernelError as error:
            failed = failed or _unless_gone(error)
            continue
        for disk in disks:
            try:
                files.write_text(path, f"{disk} {none}", path)
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
