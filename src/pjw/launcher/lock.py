"""One pjwd for one state directory at a time."""

import fcntl
import os
import signal
from typing import Final, Never

from pjw.errors import ConfigError, KernelError

# A launcher whose server was killed ends as soon as it sees that; its successor may be
# started before that.
WAIT_SECONDS: Final = 5


def hold_lock(state_dir: str) -> None:
    """Lock the state directory until this process ends. Raises ConfigError when another has it.

    The file lies in a directory that only root may write. Its descriptor stays open, close
    on exec, so that no job inherits the lock.
    """
    path = os.path.join(state_dir, "launcher.lock")
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise KernelError("open", path, error.errno or 0) from error
    # flock(2) has no deadline of its own; a handler that raises ends the wait
    former = signal.signal(signal.SIGALRM, _on_alarm)
    signal.alarm(WAIT_SECONDS)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except TimeoutError:
        holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
        raise ConfigError(
            f"the state directory {state_dir} is in use by another pjwd (its launcher is process {holder})",
            hint="stop that one, or give this one another --state-dir",
        ) from None
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)


def _on_alarm(number: int, frame: object) -> Never:
    raise TimeoutError
