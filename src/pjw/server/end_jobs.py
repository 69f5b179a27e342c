"""pjwd end-jobs: end running jobs, as `pjw stop` would, when their service has been stopped for good.

It needs root on the host, and neither a certificate nor a role. It signals each init, which ends its job and
records how: a pjwd that starts again finds the jobs `stopped`. The removal of the Debian package runs it.
"""

import os
import select
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

from pjw.errors import ConfigError, KernelError
from pjw.launcher.cgroup import interface_files
from pjw.launcher.lock import hold_lock
from pjw.launcher.policy import instance_name
from pjw.launcher.processes import INIT_SIGNAL_FIRST, find_init
from pjw.worker.launcher_process import require_root

CGROUPS: Final = Path("/sys/fs/cgroup")
KILL_SECONDS: Final = 10


def end_jobs(state_dir: str, grace_seconds: float) -> int:
    """End every job of a state directory, with SIGKILL after *grace_seconds*; return the number of jobs.

    Raises ConfigError while a pjwd serves the directory, and when a job does not end.
    """
    require_root()
    state_dir = os.path.realpath(state_dir)
    if os.path.isdir(state_dir):
        # held until this process ends, so that no pjwd starts another job meanwhile
        hold_lock(state_dir)
    parents = instance_cgroups(CGROUPS, instance_name(state_dir))
    pidfds = inits_of(parents)
    count = len(pidfds)
    # Init passes it on to every process of its job; SIGTERM as itself would bring init's own grace period.
    # For SIGQUIT it kills them.
    pidfds = end(pidfds, INIT_SIGNAL_FIRST + signal.SIGTERM, grace_seconds)
    lift_throttles(parents)
    pidfds = end(pidfds, signal.SIGQUIT, KILL_SECONDS)
    if pidfds:
        raise ConfigError(
            f"cannot end all jobs of {state_dir}: {len(pidfds)} still run",
            hint="a job that waits for its disk in the kernel ends with that; try again later",
        )
    for parent in parents:
        for path, _, _ in os.walk(parent, topdown=False):
            try:
                os.rmdir(path)
            except OSError as error:
                raise KernelError("remove the cgroup", path, error.errno or 0) from error
        # it stays when another pjwd has jobs in it
        with suppress(OSError):
            parent.parent.rmdir()
    return count


def lift_throttles(parents: list[Path]) -> None:
    """Lift limits of disk IO, so that waiting jobs can end: an older version's init does not lift them."""
    for parent in parents:
        for directory in parent.glob("**/job-*/"):
            with suppress(KernelError):
                interface_files.lift(str(directory))


def instance_cgroups(top: Path, instance: str) -> list[Path]:
    """Return root's cgroups of an instance, one in each hierarchy: `pjw/INSTANCE`, where pjwd started.

    A user with a cgroup delegated by systemd may make directories of any name there, but owns them.
    """
    found = []
    for path, names, _ in os.walk(top):
        if os.path.basename(path) == "pjw" and instance in names:
            parent = Path(path, instance)
            # the cgroup may vanish meanwhile
            with suppress(FileNotFoundError):
                if all(each.stat().st_uid == 0 for each in (parent, parent.parent)):
                    found.append(parent)
    return found


def inits_of(parents: Sequence[Path]) -> list[int]:
    """Return a pidfd of each init below *parents*: of each job, and of each init that waits for a job."""
    pidfds: dict[str, int] = {}
    for parent in parents:
        for job in parent.glob("**/job-*/"):
            # with cgroup v1 a job has a cgroup in each hierarchy
            if job.name not in pidfds and (pidfd := find_init(partial(_pids_in, job))) is not None:
                pidfds[job.name] = pidfd
    return list(pidfds.values())


def _pids_in(cgroup: Path) -> list[int]:
    try:
        return interface_files.read_pids(str(cgroup))
    except KernelError:
        # the cgroup has gone
        return []


def end(pidfds: list[int], number: int, seconds: float) -> list[int]:
    """Send a signal; return the processes that have not ended after *seconds*."""
    poll = select.poll()
    left = set(pidfds)
    for pidfd in pidfds:
        poll.register(pidfd, select.POLLIN)
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, number)
    deadline = time.monotonic() + seconds
    while left and (remaining := deadline - time.monotonic()) > 0:
        for pidfd, _ in poll.poll(remaining * 1000):
            poll.unregister(pidfd)
            left.remove(pidfd)
            os.close(pidfd)
    return sorted(left)
