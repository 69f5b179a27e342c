"""Project quotas: the kernel counts and bounds one job's files, if its file system can (ext4, xfs).

A directory with a project id and the flag "inherit" gives its id to all that is made below it. Files with the
id are counted at once, with or without a name, and never walked. ioctl_xfs_fsgetxattr(2), quotactl(2).

Loaded only where there are some: ctypes is no small thing in a process of root's.
"""

import ctypes
import errno
import fcntl
import os
import struct
from typing import Final, Self

from pjw.errors import KernelError

# Ids of ours, in the upper half, where no tool counts up from 1: so many pjwd, by a hash of their name, and
# so many jobs of each until an id is used again.
FIRST: Final = 2**31
_INSTANCES: Final = 2**6
_JOBS: Final = 2**24
# behind those of jobs: as many clients of each pjwd, less one, as the last id of all is none
_FIRST_OF_CLIENTS: Final = FIRST + _INSTANCES * _JOBS
_CLIENTS: Final = 2**24 - 1

# linux/fs.h: struct fsxattr is flags, extent size, extents, project, extent size of copies, 8 bytes
_FSXATTR: Final = struct.Struct("5I8x")
_FSGETXATTR: Final = 0x801C581F
_FSSETXATTR: Final = 0x401C5820
_PROJECT_INHERIT: Final = 0x200

# linux/quota.h: struct if_dqblk is limit, soft limit and use of space, the same of inodes, two times, and a
# mask of the fields that are set
_DQBLK: Final = struct.Struct("=8QI4x")
_PROJECT: Final = 2
_GETQUOTA: Final = 0x800007 << 8 | _PROJECT
_SETQUOTA: Final = 0x800008 << 8 | _PROJECT
_LIMITS: Final = 1 | 4  # QIF_BLIMITS, QIF_ILIMITS
_BLOCK_BYTES: Final = 1024
# quotactl_fd(2), Linux 5.14: the same number on every architecture
_QUOTACTL_FD: Final = 443


def project_of(instance: str, job_id: int) -> int:
    """Return the project id of a job; *instance* ends in hexadecimal digits."""
    return FIRST + int(instance[-8:], 16) % _INSTANCES * _JOBS + job_id % _JOBS


def project_of_client(instance: str, uid: int) -> int:
    """Return the project id of the workspaces of a client, by its user id."""
    return _FIRST_OF_CLIENTS + int(instance[-8:], 16) % _INSTANCES * _CLIENTS + uid % _CLIENTS


class ProjectQuotas:
    """Those of a file system that has them, for the jobs of one pjw."""

    def __init__(self, descriptor: int, instance: str) -> None:
        """Use them on the file system of a descriptor; `find` looks whether there are any."""
        self._descriptor: Final = descriptor
        self._instance: Final = instance
        self._libc: Final = ctypes.CDLL(None, use_errno=True)

    @classmethod
    def find(cls, descriptor: int, instance: str) -> Self | None:
        """Return the quotas of the file system of a descriptor; None when it has none."""
        found = cls(descriptor, instance)
        try:
            found._call(_GETQUOTA, 0, bytearray(_DQBLK.size))
        except OSError as error:
            # of a file system with quotas that has counted nothing in this project yet
            return found if error.errno == errno.ENOENT else None
        return found

    def _call(self, command: int, project: int, block: bytearray) -> None:
        memory = (ctypes.c_char * len(block)).from_buffer(block)
        arguments = (self._descriptor, ctypes.c_uint(command), ctypes.c_uint(project), memory)
        if self._libc.syscall(_QUOTACTL_FD, *arguments) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def begin(self, job_id: int, path: str, bytes_max: int, inodes_max: int) -> None:
        """Count and bound the future contents of a job's directory, empty until then. Raises KernelError."""
        project = project_of(self._instance, job_id)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                self._join(descriptor, project)
            finally:
                os.close(descriptor)
            self._set(project, bytes_max, inodes_max)
        except OSError as error:
            raise KernelError("set a project quota for", path, error.errno or 0) from error

    def begin_client(self, uid: int, descriptor: int, path: str, bytes_max: int) -> None:
        """Count and bound a client's open workspace; all of them have one bound. Raises KernelError."""
        project = project_of_client(self._instance, uid)
        try:
            self._join(descriptor, project)
            self._set(project, bytes_max, 0)
        except OSError as error:
            raise KernelError("set a project quota for", path, error.errno or 0) from error

    def _join(self, descriptor: int, project: int) -> None:
        flags, *rest = _FSXATTR.unpack(fcntl.ioctl(descriptor, _FSGETXATTR, bytes(_FSXATTR.size)))
        if (rest[2], flags & _PROJECT_INHERIT) == (project, _PROJECT_INHERIT):
            return
        rest[2] = project
        fcntl.ioctl(descriptor, _FSSETXATTR, _FSXATTR.pack(flags | _PROJECT_INHERIT, *rest))

    def _set(self, project: int, bytes_max: int, inodes_max: int) -> None:
        blocks = -(-bytes_max // _BLOCK_BYTES)
        self._call(_SETQUOTA, project, bytearray(_DQBLK.pack(blocks, 0, 0, inodes_max, 0, 0, 0, 0, _LIMITS)))

    def forget(self, job_id: int) -> None:
        """Take the bound away of a job whose directory is gone. Raises KernelError."""
        try:
            self._set(project_of(self._instance, job_id), 0, 0)
        except OSError as error:
            raise KernelError("remove the project quota of", f"job {job_id}", error.errno or 0) from error

    def use(self, job_id: int, path: str) -> tuple[int, int] | None:
        """Return the bytes and inodes of a job; None where its directory has no project of ours."""
        project = project_of(self._instance, job_id)
        block = bytearray(_DQBLK.size)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                attributes = _FSXATTR.unpack(fcntl.ioctl(descriptor, _FSGETXATTR, bytes(_FSXATTR.size)))
            finally:
                os.close(descriptor)
            if attributes[3] != project:
                return None
            self._call(_GETQUOTA, project, block)
        except OSError:
            return None
        used = _DQBLK.unpack(block)
        return used[2], used[5]
