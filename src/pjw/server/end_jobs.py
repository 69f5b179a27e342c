"""pjwd end-jobs: end running jobs, as `pjw stop` would, when their service has been stopped for good.

It needs root on the host, and neither a certificate nor a role. It signals each init, which ends its job and
records how: a pjwd that starts again finds the jobs `stopped`. The removal of the Debian package runs it.
"""

import os
import select
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from pjw.errors import ConfigError, KernelError
from pjw.launcher.cgroup import throttles
from pjw.launcher.lock import hold_lock
from pjw.launcher.policy import instance_name
from pjw.launcher.processes import INIT_SIGNAL_FIRST, status_of
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
    parents = [
        Path(path) for path, _, _ in os.walk(CGROUPS) if os.path.basename(path) == instance_name(state_dir)
    ]
    inits = {
        pid for parent in parents for path in parent.glob("**/job-*/cgroup.procs") for pid in inits_in(path)
    }
    pidfds = []
    for pid in inits:
        with suppress(ProcessLookupError):
            pidfds.append(os.pidfd_open(pid))
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
                throttles.lift(str(directory))


def inits_in(path: Path) -> list[int]:
    """The processes of a cgroup.procs that are PID 1 of a job."""
    try:
        pids = path.read_text().split()
    except OSError:
        # the cgroup has gone
        return []
    # a process that has ended meanwhile has no status, and hides no init behind it
    return [int(pid) for pid in pids if status_of(pid, b"NSpid")[1:] == [b"1"]]


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
