"""The contents of one workspace, counted by a process of its own: its tree may be endless."""

import os
import resource
import signal
import sys
import time
from typing import Final

from pjw.launcher.scratch_use import FileCount, print_words, walk

# An endless tree has been counted that far: a count above a quota is enough to know.
SECONDS: Final = 20.0
# then the process ends, if its counts are not read
_LIFE_SECONDS: Final = 60
_NICE: Final = 10


def count(path: str, seconds: float = SECONDS) -> FileCount:
    """Count the files, as far as possible in the time given. No link is followed."""
    deadline = time.monotonic() + seconds
    use = FileCount()
    for number, _ in enumerate(steps := walk(path, use)):
        if number % 1000 == 0 and time.monotonic() > deadline:
            steps.close()
            break
    return use


def main() -> int:
    """Count, and print a line."""
    # by the kernel, whatever call hangs
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_LIFE_SECONDS)
    # jobs may end one after the other
    os.nice(_NICE)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    [path] = sys.argv[1:]
    use = count(path)
    print_words(b"%d %d\n" % (round(use.bytes), round(use.inodes)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
