"""The root of a job with an image: mounts of which init makes an overlay, with its upper layer in scratch.

On the disk an operator's image belongs to root. In the job it belongs to the job's user, by a mount that maps
root to that user (MOUNT_ATTR_IDMAP). So a job may write to its /etc without privilege. A client's own image
belongs to that user already. If the kernel cannot map, the job's root is read-only.
"""

import errno
import os
from collections import OrderedDict
from contextlib import suppress
from typing import Final

from pjw.errors import InvalidJobError, JobStateError, KernelError
from pjw.launcher.image_store import ImageStore
from pjw.launcher.scratch import Scratch, spawn_removal
from pjw.launcher.workspaces import Workspaces
from pjw.model import is_image_key
from pjw.process import close_all

# A user namespace takes a descriptor, and some KiB of kernel memory.
_NAMESPACES_MAX: Final = 16
# the errors of a kernel that cannot map at all
_CANNOT: Final = frozenset({errno.EINVAL, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS})


class Trees:
    """Makes mounts of images for users."""

    def __init__(self) -> None:
        # by the users that they map to; the most recently used one is last
        self._namespaces: Final[OrderedDict[int, int]] = OrderedDict()

    def close(self) -> None:
        """Close the descriptors."""
        while self._namespaces:
            os.close(self._namespaces.popitem()[1])

    def of(self, directory: int, uid: int) -> list[int]:
        """Read-only mounts of an open directory, mounted nowhere; the caller closes them. Raises OSError.

        If the directory does not belong to the user: first a mount that maps root to the user, if the kernel
        can map. Last, always, a mount that does not map.
        """
        # this loads ctypes, which root's process should not do without need
        from pjw.launcher.mount_tree import clone

        found: list[int] = []
        try:
            if os.fstat(directory).st_uid != uid:
                try:
                    found.append(clone(directory, self._namespace(uid), read_only=True))
                except OSError as error:
                    if error.errno not in _CANNOT:
                        raise
            found.append(clone(directory, read_only=True))
        except BaseException:
            close_all(found)
            raise
        return found

    def _namespace(self, uid: int) -> int:
        from pjw.launcher.mount_tree import user_namespace

        if uid not in self._namespaces:
            if len(self._namespaces) >= _NAMESPACES_MAX:
                os.close(self._namespaces.popitem(last=False)[1])
            self._namespaces[uid] = user_namespace(uid)
        self._namespaces.move_to_end(uid)
        return self._namespaces[uid]


class Images:
    """The images of the operator and of clients, for jobs."""

    def __init__(self, store: ImageStore, workspaces: Workspaces, scratch: Scratch) -> None:
        self._store: Final = store
        self._workspaces: Final = workspaces
        self._scratch: Final = scratch
        self._trees: Final = Trees()
        # directories that are being removed: a sweep finds them again until they are gone
        self._going: Final[set[str]] = set()

    def close(self) -> None:
        """Close the descriptors."""
        self._trees.close()

    def trees(self, job_id: int, image: str, uid: int) -> list[int]:
        """Mounts of an image for a job whose scratch directory exists: see `Trees.of`.

        Raises InvalidJobError when there is no such image, JobStateError when it belongs to another user, and
        KernelError.
        """
        try:
            self._scratch.begin_image(job_id, uid, image)
            directory = self._open(image, uid)
            try:
                return self._trees.of(directory, uid)
            finally:
                os.close(directory)
        except OSError as error:
            raise KernelError("mount the image of", f"job {job_id}", error.errno or 0) from error

    def _open(self, image: str, uid: int) -> int:
        """Open the directory of an image. The job's mark must exist by now: see ImageStore."""
        missing = InvalidJobError("there is no such image any more", hint="pjw image ls")
        if is_image_key(image):
            path = self._workspaces.path(uid, image)
        elif self._store.is_named(image):
            path = self._store.directory(image)
        else:
            raise missing
        try:
            directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            raise missing from None
        if os.fstat(directory).st_uid not in (0, uid):
            os.close(directory)
            raise JobStateError(
                f"the image belongs to another user id, and its client has {uid} now",
                hint="the operator has changed job_users; load the image again: pjw image load",
            )
        return directory

    def sweep(self) -> list[tuple[int, str]]:
        """Begin to remove the operator's unused images: pids of the processes that do, and what they remove.

        The caller tells the end of each by `removed`.
        """
        begun: list[tuple[int, str]] = []

        def begin(path: str) -> None:
            if path not in self._going:
                begun.append((spawn_removal(path), path))
                self._going.add(path)

        # another process, or the next sweep, removes them
        with suppress(OSError, KernelError):
            self._store.sweep(begin, wait=False)
        return begun

    def removed(self, path: str) -> None:
        """Note that the process that was to remove a directory has ended."""
        self._going.discard(path)
