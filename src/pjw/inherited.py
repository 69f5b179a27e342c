"""Settings that a program inherits by execve(2): each program sets those it relies on at its start.

docs/architecture.md, "What a program inherits", lists all of them, and says why the others stay. pjw-init has
its own code for it: init/inherited.c.
"""

import os
import signal
import sys
from typing import Final

# Each of these limits of `resource` would end or hinder a service in the middle of its work.
_LIFTED: Final = ("RLIMIT_AS", "RLIMIT_CPU", "RLIMIT_DATA", "RLIMIT_FSIZE", "RLIMIT_NPROC", "RLIMIT_RTTIME")


def open_standard_descriptors() -> None:
    """Open those of descriptors 0 to 2 that are closed, so that no other file gets their numbers."""
    for _ in range(3):
        # open(2) gives the lowest free number
        if (descriptor := os.open(os.devnull, os.O_RDWR)) > 2:
            os.close(descriptor)
            break
    if sys.stderr is None:
        # otherwise print(file=sys.stderr) would write to stdout
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  for as long as the process lives


def unblock_signals() -> None:
    """Unblock every signal: a blocked one, such as Ctrl-C, would wait for ever."""
    # Windows blocks none
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_SETMASK, ())


def set_for_service() -> None:
    """Set the inherited settings of server and launcher: signals, limits, umask, directory. Needs root."""
    unblock_signals()
    # if it were ignored, the kernel would collect our children before we know how they ended (wait(2))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # otherwise a log line stops pjwd in the background of a terminal with `stty tostop`
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    for limit in _LIFTED:
        _lift(limit)
    os.umask(0o077)
    # the root directory always exists, and keeps no other file system busy
    os.chdir("/")


def _lift(name: str) -> None:
    # not at the top: the client imports this module on systems that lack `resource`, too
    import resource

    limit = getattr(resource, name)
    hard = resource.getrlimit(limit)[1]
    for value in (resource.RLIM_INFINITY, hard):
        try:
            resource.setrlimit(limit, (value, value))
        except (PermissionError, ValueError):
            # raising a hard limit takes CAP_SYS_RESOURCE, which a container may lack
            continue
        return
