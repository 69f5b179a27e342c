"""Directories in which root alone decides what is where."""

import os
import stat

from pjw.errors import ConfigError


def require_root_s(directory: str, called: str, remedy: str) -> None:
    """Raises ConfigError when anybody but root can put something into the directory, or in its place.

    *directory* is a real path, *called* what an operator calls it, *remedy* how to name another one.
    """
    path = directory
    while True:
        status = os.lstat(path)
        # above it a sticky directory will do, such as /tmp: nobody else renames there what is root's
        safe = status.st_mode & stat.S_ISVTX and path != directory
        if status.st_uid != 0 or (status.st_mode & 0o022 and not safe):
            raise ConfigError(
                f"cannot use the {called} {directory}: others than root may write {path}",
                hint=f"chown root {path} && chmod go-w {path}, or {remedy}",
            )
        if path == "/":
            return
        path = os.path.dirname(path)
