"""Opens the operator's files as they are now: root gave their paths in the greeting.

The server that asks is no longer root, so the way to a file must be root's alone. Could the server's user
exchange a directory or a link on it, it would be handed any file of the host. A sticky directory such as /tmp
may be on the way, as for the state directory: other users can neither move a directory of root's there nor
make one. When root's directory is gone, for example because a cleaner of /tmp removed it, others can put only
a directory of their own in its place, or move there a directory of root's that they may write to. We refuse
both, and also a file or a link in the sticky directory itself. This module only opens files; it never reads
them.
"""

import errno
import os
import stat
from typing import Final

from pjw.errors import ConfigError, KernelError

# As many symbolic links as the kernel itself follows.
MAX_LINKS: Final = 40

_DIRECTORY: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: a FIFO in the file's place must not hang us
_FILE: Final = os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ: Final = os.O_RDONLY | _FILE
_APPEND: Final = os.O_WRONLY | os.O_APPEND | os.O_CREAT | _FILE


def open_operator_file(path: str) -> int:
    """Open the regular file that is at *path* now, for reading; return its descriptor.

    Raises KernelError, and ConfigError for another kind of file, or a directory on the way that others than
    root may write to.
    """
    try:
        return _walk(path, _READ)
    except OSError as error:
        raise KernelError("open", path, error.errno or 0) from error


def open_audit_log(path: str) -> int:
    """Open the regular file at *path* for appending; if it is missing, make it for root alone.

    Raises the errors of `open_operator_file`, and KernelError for a link in the place of the file.
    """
    try:
        return _walk(path, _APPEND)
    except OSError as error:
        raise KernelError("open", path, error.errno or 0) from error


def _walk(path: str, flags: int) -> int:
    # Step by step, each from the checked directory: with one open() of the whole path, the directories on its
    # way could be others than the checked ones.
    here = os.open("/", _DIRECTORY)
    steps = path.split("/")[::-1]
    links = 0
    try:
        while True:
            step = steps.pop() or "."
            sticky = _check_directory(here, path)
            # for appending we follow no link to the file
            target = _link(step, here) if steps or flags == _READ else None
            if sticky and (target is not None or not steps):
                raise _changeable(here, path)
            if target is not None:
                links += 1
                if links > MAX_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                steps += target.split("/")[::-1]
                if not target.startswith("/"):
                    continue
                step = "/"
            elif not steps:
                return _opened(step, here, path, flags)
            there = os.open(step, _DIRECTORY, dir_fd=here)
            os.close(here)
            here = there
    finally:
        os.close(here)


def _check_directory(descriptor: int, path: str) -> bool:
    """Return whether others may add files to it. Raises ConfigError if they may change files in it."""
    status = os.fstat(descriptor)
    # of an access control list too: its mask is the group's bits
    writable = bool(status.st_mode & 0o022)
    if status.st_uid != 0 or (writable and not status.st_mode & stat.S_ISVTX):
        raise _changeable(descriptor, path)
    return writable


def _changeable(descriptor: int, path: str) -> ConfigError:
    return ConfigError(
        f"cannot open {path} again: others than root may change what is in"
        f" {os.readlink(f'/proc/self/fd/{descriptor}')}",
        hint="give root a directory of its own for these files, or restart pjwd to have them read",
    )


def _link(name: str, directory: int) -> str | None:
    try:
        return os.readlink(name, dir_fd=directory)
    except OSError as error:
        if error.errno == errno.EINVAL:  # it is there, and no link
            return None
        raise


def _opened(name: str, directory: int, path: str, flags: int) -> int:
    descriptor = os.open(name, flags, 0o600, dir_fd=directory)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise ConfigError(f"cannot open {path}: it is not a regular file")
