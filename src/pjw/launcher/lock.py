"""One pjwd for one state directory at a time."""

import fcntl
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from pjw.errors import ConfigError, KernelError
from pjw.launcher.processes import say, send_signal, status_of, within

# A launcher whose server was killed ends as soon as it sees that; its successor may be
# started before that.
WAIT_SECONDS: Final = 5
LOCK_NAME: Final = "launcher.lock"


def hold_lock(state_dir: str) -> None:
    """Lock the state directory until this process ends. Raises ConfigError when another has it.

    The file lies in a directory that only root may write, and says which launcher has the lock, and which
    server that has. Its descriptor stays open, close on exec, so that no job inherits the lock.
    """
    path = os.path.join(state_dir, LOCK_NAME)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise KernelError("open", path, error.errno or 0) from error

    def lock() -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX)

    with suppress(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _note_holder(descriptor)
        return
    # tell the operator, at a terminal or in the log, why the start takes so long
    say(f"the state directory {state_dir} is in use by another pjwd; waiting {WAIT_SECONDS} s for its end")
    if not wait_for_lock(lock):
        launcher, _, server = os.pread(descriptor, 64, 0).decode("ascii", "replace").strip().partition(" ")
        if not (_end_orphan(descriptor, launcher, server) and wait_for_lock(lock)):
            raise ConfigError(
                f"the state directory {state_dir} is in use by another pjwd"
                f" (its launcher is process {launcher})",
                hint="stop that one, or give this one another --state-dir",
            )
    _note_holder(descriptor)


def is_locked(state_dir: str) -> bool:
    """Return whether a launcher, and so a pjwd, holds the state directory."""
    path = os.path.join(state_dir, LOCK_NAME)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _note_holder(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, b"%d %d\n" % (os.getpid(), os.getppid()), 0)


def wait_for_lock(lock: Callable[[], None]) -> bool:
    """Call a function that waits for a lock; return whether it came within WAIT_SECONDS."""
    return within(WAIT_SECONDS, lock)


def _end_orphan(descriptor: int, launcher: str, server: str) -> bool:
    """Kill the launcher that has the lock, if its server is gone: it hangs, or would have ended.

    No job notices (docs/reliability.md).
    """
    try:
        pidfd = os.pidfd_open(int(launcher))
    except ProcessLookupError:
        return True
    except ValueError:
        # one that has the lock, and has not said so yet
        return False
    try:
        # Looked at behind the pidfd: it is of the process that we read of, or of none.
        parent = status_of(launcher, b"PPid")
        if not server or parent == [server.encode()] or not _has_lock(launcher, descriptor):
            return False
        send_signal(pidfd, signal.SIGKILL)
    finally:
        os.close(pidfd)
    say(f"killed launcher {launcher}, which hung without its server")
    return True


def _has_lock(pid: str, descriptor: int) -> bool:
    # as in `1: FLOCK  ADVISORY  WRITE 3641 fe:00:1573 0 EOF`
    inode = os.fstat(descriptor).st_ino
    with open("/proc/locks", encoding="ascii") as file:
        locks = [line.split() for line in file]
    return any(lock[1] == "FLOCK" and lock[4] == pid and lock[5].endswith(f":{inode}") for lock in locks)
