"""The state directory of a gateway: its job table, and the secrets of jobs that no node has yet.

STATE/             belongs to the gateway's own user, 0700
jobs.sqlite        the jobs, their placements, and the nodes
secrets/           of jobs that wait for a node, see worker/secret_files.py
uploads/           files for jobs that wait for a node, see worker/uploads.py
gateway.lock       held by the gateway

It has no output: the nodes have that, and the archive if there is one (archive.py).
"""

import asyncio
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Final, ParamSpec, TypeVar

from pjw.errors import ConfigError, KernelError, LimitReachedError, describe_errno
from pjw.gateway.archive import OutputArchive
from pjw.model import Job
from pjw.worker.secret_files import SecretFiles
from pjw.worker.store import JobStore

_TABLE: Final = "jobs.sqlite"
_P = ParamSpec("_P")
_R = TypeVar("_R")


class GatewayState:
    """An open state directory. Root may have opened it; the gateway uses it after it dropped privilege."""

    def __init__(
        self, path: str, files: Sequence[str] = (), audit_log: str | None = None, uid: int | None = None
    ) -> None:
        """Open the directory, which `make` has made for user *uid*. Raises ConfigError.

        *files* are the operator's, which a reload reads again; *audit_log* is the path of the audit log.
        """
        self.path: Final = os.path.realpath(path)
        self.archive: OutputArchive | None = None
        self._files: Final = files
        self._audit_log: Final = audit_log
        table = os.path.join(self.path, _TABLE)
        try:
            # before SQLite makes the file, with a mode of its choice
            os.close(os.open(table, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise _unusable(path, error) from error
        try:
            self.store: Final = JobStore(table)
            # By descriptor: its owner perhaps cannot reach it by name (a parent of mode 0700).
            self.descriptor: Final = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self.jobs_path: Final = f"/proc/self/fd/{self.descriptor}"
            self.store.secrets = SecretFiles(self.jobs_path)
            for name in os.listdir(self.descriptor):
                if uid is not None and name.startswith(_TABLE):
                    os.chown(name, uid, uid, dir_fd=self.descriptor, follow_symlinks=False)
        except (KernelError, LimitReachedError) as error:
            raise ConfigError(str(error), hint="is the disk writable and not full?") from error

    def close(self) -> None:
        """Write pending changes and close."""
        self.store.close()
        os.close(self.descriptor)

    async def in_thread(self, function: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """Call a function that waits for the disk."""
        # a copy that is just becoming whole is removed after that
        removes = self.archive is not None and function == self.remove_job
        async with self.archive.turn if self.archive is not None and removes else nullcontext():
            return await asyncio.to_thread(function, *args, **kwargs)

    def remove_job(self, job_id: int) -> None:
        """Remove the copy of a job's output. The table notes which jobs nodes have to remove."""
        if self.archive is not None:
            self.archive.remove(job_id)

    def output_size(self, _: Job) -> int:
        """Nothing, as for the next two: the nodes have what jobs store."""
        return 0

    input_size = artifacts_size = output_size

    def open_operator_file(self, place: int) -> int:
        """One of the operator's files, open for reading. Raises ConfigError."""
        path = self._files[place]
        try:
            return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {describe_errno(error.errno or 0)}") from error

    def open_audit_log(self) -> int:
        """Open the audit log for appending, and return its descriptor. Raises ConfigError."""
        path = self._audit_log or ""
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            return os.open(path, flags, 0o600)
        except OSError as error:
            raise ConfigError(
                f"cannot open the audit log {path}: {describe_errno(error.errno or 0)}"
            ) from error


def make(path: str, uid: int | None) -> None:
    """Make the directory where it is missing, for user *uid* (None: our own). Raises ConfigError."""
    try:
        os.makedirs(path, 0o700, exist_ok=True)
        status = os.stat(path)
        wanted = os.geteuid() if uid is None else uid
        if not stat.S_ISDIR(status.st_mode) or status.st_mode & 0o077:
            raise ConfigError(
                f"cannot use the state directory {path}: others may enter it", hint=f"chmod 700 {path}"
            )
        if status.st_uid != wanted:
            if os.geteuid() != 0 or os.listdir(path):
                raise ConfigError(
                    f"cannot use the state directory {path}: it belongs to user {status.st_uid}, and the"
                    f" gateway is user {wanted}"
                )
            os.chown(path, wanted, wanted)
    except OSError as error:
        raise _unusable(path, error) from error


def _unusable(path: str, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot use the state directory {path}: {describe_errno(error.errno or 0)}",
        hint="give a directory on a local disk with --state-dir",
    )
