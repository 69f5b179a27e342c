"""What machines have left on the host, for `scripts/apart`: named, and removed.

    python -m tests.outages.left DIRECTORY

It ends with 1 when there was anything: a process, a mount, or a cgroup.
"""

import os
import sys
from contextlib import suppress
from pathlib import Path

from tests.support.service import end_all, instance_cgroups, wait_for


def processes(directory: Path) -> list[int]:
    """The processes that have *directory* in their environment, or among their words."""
    needle, found = os.fsencode(directory), []
    for path in Path("/proc").glob("[0-9]*"):
        # most end while we look
        with suppress(OSError):
            if needle in (path / "environ").read_bytes() + (path / "cmdline").read_bytes():
                found.append(int(path.name))
    ours = {os.getpid(), os.getppid()}
    return [pid for pid in found if pid not in ours]


def left(directory: Path) -> list[str]:
    """All that is left of the machines in a directory, in words."""
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    return [
        *(f"process {pid}" for pid in processes(directory)),
        *(f"mount {line}" for line in mounts if str(directory) in line),
        *(f"cgroup {path}" for state in states(directory) for path in instance_cgroups(state)),
    ]


def states(directory: Path) -> list[Path]:
    """The state directories of the pjwd that have run there."""
    return [path.parent for path in directory.glob("**/jobs.sqlite")]


def main() -> int:
    """Look, and remove; the exit code."""
    directory = Path(sys.argv[1])
    # the last processes of a namespace may still be about to end
    with suppress(AssertionError):
        wait_for(lambda: not left(directory), 5)
    found = left(directory)
    for each in found:
        print(f"apart: left behind: {each}", file=sys.stderr)
    for state in states(directory):
        end_all(state)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
