"""Scratch directories: one for each running job, in a directory that only root may write.

So a hostile server cannot put a link where the launcher is about to make a directory.
"""

import os
from typing import Final

from pjw.errors import KernelError
from pjw.launcher.cgroup.files import job_ids_in

# a job reaches its own directory by a bind mount, not by way of this one
_PARENT_MODE: Final = 0o700
RM_PROGRAM: Final = "/bin/rm"


class Scratch:
    """The directory of all scratch directories of one pjw."""

    def __init__(self, state_dir: str) -> None:
        """Make the directory if need be. Raises KernelError."""
        self._path: Final = os.path.join(state_dir, "scratch")
        try:
            os.makedirs(self._path, _PARENT_MODE, exist_ok=True)
            status = os.lstat(self._path)
        except OSError as error:
            raise KernelError("make the scratch directory", self._path, error.errno or 0) from error
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise KernelError(
                "use the scratch directory",
                self._path,
                0,
                hint="it must belong to root, and only root may write it",
            )

    def path(self, job_id: int) -> str:
        """Where the scratch directory of a job is."""
        return os.path.join(self._path, str(job_id))

    def job_ids(self) -> set[int]:
        """The jobs that have a directory; other names there are not ours. Raises KernelError."""
        return job_ids_in(self._path, prefix="")

    def create(self, job_id: int) -> str:
        """Make the directory of a job, still root's. Raises KernelError."""
        path = self.path(job_id)
        try:
            os.mkdir(path, 0o700)
        except OSError as error:
            raise KernelError("make the scratch directory", path, error.errno or 0) from error
        return path

    def give_to(self, job_id: int, uid: int) -> None:
        """Make the directory of a job its owner's alone. Raises KernelError."""
        path = self.path(job_id)
        try:
            os.chown(path, uid, uid, follow_symlinks=False)
        except OSError as error:
            raise KernelError("give away the scratch directory", path, error.errno or 0) from error

    def remove_if_empty(self, job_id: int) -> bool:
        """Remove the directory unless something is in it: then false."""
        try:
            os.rmdir(self.path(job_id))
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True

    def spawn_removal(self, job_id: int) -> int:
        """Begin to remove all of a job's directory; give the pid of the process that does.

        Its own process, since a job may leave millions of files, and the launcher has one
        thread. rm(1) walks by directory descriptors, follows no link and, with
        --one-file-system, enters no mount.
        """
        argv = ["rm", "-rf", "--one-file-system", "--", self.path(job_id)]
        return os.posix_spawn(RM_PROGRAM, argv, {})
