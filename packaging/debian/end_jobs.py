#!/usr/lib/pjw/bin/python3 -I
"""End the jobs that run, as `pjw stop` would, when the package is removed and its service has been stopped.

Each init is told to, and records how its job ended: a later installation finds the jobs `stopped`.
"""

import os
import select
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from pjw.launcher.policy import instance_name

STATE: Final = "/var/lib/pjw"
CGROUPS: Final = Path("/sys/fs/cgroup")
GRACE_SECONDS: Final = 10
KILL_SECONDS: Final = 10


def main() -> int:
    """Do it; the exit code."""
    parents = [
        Path(path) for path, _, _ in os.walk(CGROUPS) if os.path.basename(path) == instance_name(STATE)
    ]
    inits = {
        pid for parent in parents for path in parent.glob("job-*/cgroup.procs") for pid in inits_in(path)
    }
    pidfds = []
    for pid in inits:
        with suppress(ProcessLookupError):
            pidfds.append(os.pidfd_open(pid))
    if pidfds:
        print(f"pjw: ending jobs that run: {len(pidfds)}")
    # init passes SIGTERM on to every process of its job; for SIGQUIT it kills them
    for number, seconds in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGQUIT, KILL_SECONDS)):
        pidfds = end(pidfds, number, seconds)
    if pidfds:
        print(f"pjw: error: cannot end all jobs: {len(pidfds)} still run", file=sys.stderr)
        return 1
    for parent in parents:
        for path, _, _ in os.walk(parent, topdown=False):
            os.rmdir(path)
        # that of another pjwd with jobs stays
        with suppress(OSError):
            parent.parent.rmdir()
    return 0


def inits_in(path: Path) -> list[int]:
    """Those of the processes in a cgroup.procs that are PID 1 of a job."""
    found = []
    with suppress(FileNotFoundError, ProcessLookupError):
        for pid in path.read_text().split():
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            [numbers] = [line.split()[1:] for line in lines if line.startswith("NSpid:")]
            if numbers[1:] == ["1"]:
                found.append(int(pid))
    return found


def end(pidfds: list[int], number: signal.Signals, seconds: float) -> list[int]:
    """Send a signal; those that have not ended after so long."""
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


if __name__ == "__main__":
    sys.exit(main())
