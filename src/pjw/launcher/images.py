"""The root of a job with an image: what init makes an overlay of, whose upper layer is in the job's scratch.

An image of the operator's is root's on the disk. In the job it is the job's user's: by a mount that maps
root to that user (MOUNT_ATTR_IDMAP), so a job may write to its /etc and needs no privilege for it. A client's
own image is that user's already. Where the kernel cannot map, the job's root is read-only.
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

# A user namespace is a descriptor, and some KiB of the kernel's.
_NAMESPACES_MAX: Final = 16
# what a kernel says that cannot do it at all
_CANNOT: Final = frozenset({errno.EINVAL, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS})


class Trees:
    """Makes mounts of images for users."""

    def __init__(self) -> None:
        # by the users that they map to, the one that was used last at the end
        self._namespaces: Final[OrderedDict[int, int]] = OrderedDict()

    def close(self) -> None:
        """Close the descriptors."""
        while self._namespaces:
            os.close(self._namespaces.popitem()[1])

    def of(self, directory: int, uid: int) -> list[int]:
        """Mounts of an open directory that are mounted nowhere, read-only; the caller's. Raises OSError.

        Where it is not the user's already: one that maps root to the user, if the kernel can, and behind it
        one that does not.
        """
        # loads ctypes, which is no small thing in a process of root's
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


def close_all(descriptors: list[int]) -> None:
    """Close them."""
    for descriptor in descriptors:
        os.close(descriptor)


class Images:
    """Those of the operator and of clients, for jobs."""

    def __init__(self, store: ImageStore, workspaces: Workspaces, scratch: Scratch) -> None:
        self._store: Final = store
        self._workspaces: Final = workspaces
        self._scratch: Final = scratch
        self._trees: Final = Trees()

    def close(self) -> None:
        """Close the descriptors."""
        self._trees.close()

    def trees(self, job_id: int, image: str, uid: int) -> list[int]:
        """Mounts of an image for a job, whose scratch directory is there: see `Trees.of`.

        Raises InvalidJobError where there is no such image, JobStateError for one of another user, and
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
        """The directory of an image. The mark of the job is made by now: see ImageStore."""
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

    def sweep(self) -> list[int]:
        """Begin to remove the operator's images that nobody has any more; the pids of those that do."""
        pids: list[int] = []
        # somebody else, or the next one, removes them
        with suppress(OSError, KernelError):
            self._store.sweep(lambda path: pids.append(spawn_removal(path)), wait=False)
        return pids
