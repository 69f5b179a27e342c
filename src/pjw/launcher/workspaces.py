"""Workspaces: directories of clients that outlive jobs, in a directory that only root may enter.

So are the images that clients have loaded, by names that no workspace can have.

Each client's are in a directory of the client's number, which is never another's. A request names a workspace
by a user id and a word, and never by a path. A job reaches its workspace by a mount of that directory alone,
so nothing in it leads anywhere else, and neither the launcher nor the server ever looks into it by a path.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Final

from pjw.errors import JobStateError, KernelError
from pjw.launcher.policy import instance_name
from pjw.launcher.protocol import MAX_WORKSPACES
from pjw.launcher.root_files import make_root_s
from pjw.launcher.scratch import find_quotas, spawn_removal
from pjw.launcher.scratch_use import spawn_counter
from pjw.model import is_image_key, is_workspace

# in the state directory, where files last
NAME: Final = "workspaces"
_MODE: Final = 0o700
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Workspaces:
    """Those of the clients of one pjw."""

    def __init__(self, state_dir: str, uid_first: int, bytes_max: int = 0) -> None:
        """Make the directory of all of them if need be. *bytes_max* is for each client; 0 is no limit.

        Raises KernelError.
        """
        self._path: Final = os.path.join(state_dir, NAME)
        make_root_s(self._path, "directory of workspaces")
        self._uid_first: Final = uid_first
        self._bytes_max: Final = bytes_max
        self._instance: Final = instance_name(state_dir)

    def tree(self, uid: int, name: str) -> int:
        """Return a descriptor of a detached mount of a workspace, which is made if it is missing.

        It lets no job gain privilege or reach a device. Raises KernelError, and JobStateError for a directory
        that is another user's.
        """
        path = self.path(uid, name)
        try:
            with suppress(FileExistsError):
                os.mkdir(os.path.dirname(path), _MODE)
            with suppress(FileExistsError):
                os.mkdir(path, _MODE)
            # by descriptors from here on; both directories above are root's alone
            directory = os.open(path, _DIRECTORY)
        except OSError as error:
            raise KernelError("make the workspace", path, error.errno or 0) from error
        try:
            self._give_to(directory, path, uid)
            # loads ctypes, which is no small thing in a process of root's
            from pjw.launcher.mount_tree import clone

            return clone(directory)
        except OSError as error:
            raise KernelError("mount the workspace", path, error.errno or 0) from error
        finally:
            os.close(directory)

    def _give_to(self, directory: int, path: str, uid: int) -> None:
        status = os.fstat(directory)
        if status.st_uid not in (0, uid):
            raise JobStateError(
                f"the workspace {os.path.basename(path)} belongs to user id {status.st_uid}, and its client"
                f" has {uid} now",
                hint="the operator has changed job_users; remove the workspace: pjw workspace rm",
            )
        quotas = find_quotas(directory, self._instance)
        if quotas is not None:
            quotas.begin_client(uid, directory, path, self._bytes_max)
        # a launcher that was killed may have left it without its owner, and a job without its mode
        os.fchmod(directory, _MODE)
        os.fchown(directory, uid, uid)

    def path(self, uid: int, name: str) -> str:
        """Return the path of a workspace, whether it exists or not."""
        return os.path.join(self._path, str(uid - self._uid_first), name)

    def page(self, after: str) -> tuple[str, ...]:
        """Return at most MAX_WORKSPACES behind one, as `WorkspacePage` has them. Raises KernelError."""
        try:
            return tuple(sorted(found for found in self._found() if found > after)[:MAX_WORKSPACES])
        except OSError as error:
            raise KernelError("list", self._path, error.errno or 0) from error

    def _found(self) -> Iterator[str]:
        # other names are not ours
        for number in os.listdir(self._path):
            if number.isascii() and number.isdigit() and str(int(number)) == number:
                for name in os.listdir(os.path.join(self._path, number)):
                    if is_workspace(name) or is_image_key(name):
                        yield f"{self._uid_first + int(number)}/{name}"

    def remove_if_empty(self, uid: int, name: str) -> bool:
        """Remove a workspace unless something is in it: then false."""
        try:
            os.rmdir(self.path(uid, name))
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True

    def spawn_removal(self, uid: int, name: str) -> int:
        """Begin to remove all of a workspace; give the pid of the process that does."""
        return spawn_removal(self.path(uid, name))

    def spawn_count(self, uid: int, name: str) -> tuple[int, int]:
        """Begin to count a workspace's files; return the pid of the counter, and a pipe of its words.

        They are a line with bytes and inodes. Raises OSError.
        """
        return spawn_counter("pjw.launcher.workspace_use", self.path(uid, name))
