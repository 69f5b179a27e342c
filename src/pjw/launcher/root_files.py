"""Directories whose contents only root decides, and small files there that survive a power cut."""

import os
import stat
from typing import Final

from pjw.errors import ConfigError, KernelError

# processes that may use the files below reach them by a mount, not by way of this directory
_MODE: Final = 0o700


def make_root_s(directory: str, called: str) -> None:
    """Make a directory that only root may enter, if it is not there. Raises KernelError.

    *called* is an operator's name for it.
    """
    try:
        os.makedirs(directory, _MODE, exist_ok=True)
        status = os.lstat(directory)
    except OSError as error:
        raise KernelError(f"make the {called}", directory, error.errno or 0) from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise KernelError(
            f"use the {called}", directory, 0, hint="it must belong to root, and only root may write it"
        )


def require_root_s(directory: str, called: str, remedy: str) -> None:
    """Check that only root can write into the directory, or replace it. Raises ConfigError.

    *directory* is a real path, *called* an operator's name for it, *remedy* how to name another one.
    """
    path = directory
    while True:
        status = os.lstat(path)
        # above it a sticky directory will do, such as /tmp: other users cannot rename root's files there
        safe = status.st_mode & stat.S_ISVTX and path != directory
        if status.st_uid != 0 or (status.st_mode & 0o022 and not safe):
            raise ConfigError(
                f"cannot use the {called} {directory}: others than root may write {path}",
                hint=f"chown root {path} && chmod go-w {path}, or {remedy}",
            )
        if path == "/":
            return
        path = os.path.dirname(path)


# Small files of the launcher that are whole even after a power cut.


def replace_file(path: str, data: bytes) -> None:
    """Write a file that only root can read; a reader sees the old data or the new. Raises OSError.

    It syncs file and directory: after it returns, a power cut does not bring the old data back.
    """
    new = f"{path}.new"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    with open(os.open(new, flags, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.rename(new, path)
    directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
