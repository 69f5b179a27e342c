"""The state directory: its files, and the owner of each.

STATE/               root, 0711
jobs.sqlite        root's, 0600: the job table; opened before privilege is dropped
jobs/sessions/     the server's own: the files of sessions, see session_files.py
jobs/secrets/      the server's own, 0700: the secrets of jobs in the queue, see secret_files.py
jobs/uploads/      the server's own, 0700: files for jobs before their start, see uploads.py
jobs/ID/           the server's own, 0700: `output`, `status`, `times` and `usage` of each job, where stderr
                   is kept apart `stderr` and `stderr_times` as well, where it has input `input`,
                   with a terminal `control`, with files that are kept `artifacts` (artifacts.py); when
                   it has ended no `status` and no `input`, and nothing but `usage` when it wrote no output
scratch/ID/        made by the launcher: the job's own, while it runs; elsewhere with `scratch_dir`
job-users          the launcher's: the range of user ids that jobs have
scratch-dirs       the launcher's: where jobs have their scratch directories, or had them before that changed
launcher.lock      held by the launcher
backup.sock        root's, 0600: where `pjwd backup` asks for a copy of the table
drained            root's: there while the operator has drained this machine (`pjwd drain`)
drain.sock         root's, 0600: where `pjwd drain` and `pjwd resume` tell pjwd to look

STATE and every directory above it can be written by root alone: a user that may rename one of them, or
put a link in its place, decides where root makes files and directories.
"""

import asyncio
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Final, ParamSpec, TypeVar

from pjw.errors import RESOURCE_ERRNOS, ConfigError, KernelError, LimitReachedError, describe_errno
from pjw.given import require_value
from pjw.launcher.root_files import require_root_s
from pjw.model import Job, JobSpec, TerminalSize, UsageSample
from pjw.output import describe_job_file, is_cut_short
from pjw.worker.orders import create_orders
from pjw.worker.secret_files import SecretFiles
from pjw.worker.status_record import RECORD_BYTES
from pjw.worker.store import JobStore
from pjw.worker.usage import append_sample, read_samples

# SQLite takes a path of 512 bytes, including its own suffixes for files ("-journal")
PATH_BYTES_MAX: Final = 512 - len("/jobs.sqlite-journal")
JOBS: Final = "jobs"
TABLE: Final = "jobs.sqlite"
DRAINED: Final = "drained"
# of every job; of one whose stderr is kept apart; and of one with input while it runs
_FILES: Final = ("output", "status", "times")
_STDERR_FILES: Final = ("stderr", "stderr_times")
_INPUT: Final = "input"
# of one with a terminal
_CONTROL: Final = "control"
# of one with files that are kept after its end
_ARTIFACTS: Final = "artifacts"

# the mode of the status of a job that is ended for its use of the disk
_ENDED_FOR_DISK: Final = 0o700

# The mode of a file that is whole and is not written any more; init/archive.c sets it as well.
WHOLE_MODE: Final = 0o400

# kept for a job that has written nothing as well
_USAGE: Final = "usage"
# All files of an ended job, and the status, which has the end of a job a moment before the table.
BACKED_UP: Final = ("output", "times", "stderr", "stderr_times", "status", _USAGE, _ARTIFACTS)

_P = ParamSpec("_P")
_R = TypeVar("_R")


class StateDir:
    """An open state directory. Opened as root; used on after privilege was dropped."""

    def __init__(self, path: str, owner: int) -> None:
        """Make or open the directory, for user *owner*. Raises ConfigError."""
        require_value("the path of the state directory", path)
        self.path: Final = os.path.realpath(path)
        if (size := len(os.fsencode(self.path))) > PATH_BYTES_MAX:
            raise ConfigError(
                f"cannot use the state directory {path}: its path is {size} bytes long",
                hint=f"give one of {PATH_BYTES_MAX} bytes at most with --state-dir: SQLite takes no more",
            )
        jobs = os.path.join(self.path, JOBS)
        try:
            os.makedirs(self.path, 0o711, exist_ok=True)
            require_root_s(self.path, "state directory", "give another directory with --state-dir")
            os.makedirs(jobs, 0o700, exist_ok=True)
            self._jobs_fd: Final = os.open(jobs, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            os.fchown(self._jobs_fd, owner, owner)
        except OSError as error:
            raise ConfigError(
                f"cannot use the state directory {path}: {describe_errno(error.errno or 0)}",
                hint="give a directory on a local disk that root can write with --state-dir",
            ) from error
        # Of its own: calls here that wait for a disk must not hold up readers of output.
        self._threads: Final = ThreadPoolExecutor(max_workers=2, thread_name_prefix="pjw-disk")
        # By descriptor: its owner perhaps cannot reach it by name (a parent of mode 0700).
        self._jobs: Final = f"/proc/self/fd/{self._jobs_fd}"
        try:
            self.store: Final = JobStore(_private_file(os.path.join(self.path, TABLE)))
            self.store.secrets = SecretFiles(self._jobs)
        except BaseException as error:
            os.close(self._jobs_fd)
            if isinstance(error, KernelError | LimitReachedError):
                raise ConfigError(str(error), hint="is the disk writable and not full?") from error
            raise

    def close(self) -> None:
        """Close all open files, when the threads have released them."""
        self._threads.shutdown(cancel_futures=True)
        self.store.close()
        os.close(self._jobs_fd)

    @property
    def descriptor(self) -> int:
        """An open directory of it."""
        return self._jobs_fd

    @property
    def jobs_path(self) -> str:
        """The directory of the directories of jobs, for this process alone."""
        return self._jobs

    def output_paths(self, job_id: int, *, stderr: bool = False) -> tuple[str, str]:
        """Return the paths of a job's output (or stderr) and its times, for this process alone."""
        output, times = ("stderr", "stderr_times") if stderr else ("output", "times")
        return f"{self._jobs}/{job_id}/{output}", f"{self._jobs}/{job_id}/{times}"

    def input_path(self, job_id: int) -> str:
        """Return the path of the input of a job that has not ended, for this process alone."""
        return f"{self._jobs}/{job_id}/{_INPUT}"

    def control_path(self, job_id: int) -> str:
        """Return the path of a job's orders to its terminal, for this process alone."""
        return f"{self._jobs}/{job_id}/{_CONTROL}"

    def status_path(self, job_id: int) -> str:
        """Return the path of a job's status record, for this process alone."""
        return f"{self._jobs}/{job_id}/status"

    def create_job(self, job: Job, terminal: TerminalSize | None = None) -> list[int]:
        """Make a job's directory; give descriptors of its files, in their order, the caller's to close.

        Raises LimitReachedError when the disk is full, and KernelError; nothing stays behind then.
        """
        directory = str(job.id)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        descriptors: list[int] = []
        # When another process cuts an output short, the next bytes follow the rest, without a hole.
        appended = ("output", "stderr")
        try:
            try:
                os.mkdir(directory, 0o700, dir_fd=self._jobs_fd)
            except FileExistsError:
                # Of a start that a power cut took: its row was not on the disk, and its id was never told.
                self.remove_job(job.id)
                os.mkdir(directory, 0o700, dir_fd=self._jobs_fd)
            for name in _names_of(job):
                # one by one, so that the first is closed when the second cannot be made
                more = os.O_APPEND if name in appended else 0
                path = f"{directory}/{name}"
                descriptors.append(os.open(path, flags | more, 0o600, dir_fd=self._jobs_fd))
            os.posix_fallocate(descriptors[1], 0, RECORD_BYTES)
            if terminal is not None:
                descriptors.append(create_orders(self.control_path(job.id), terminal))
            if job.input:
                descriptors.append(create_input(self.input_path(job.id)))
            if job.artifacts is not None:
                path = f"{directory}/{_ARTIFACTS}"
                descriptors.append(os.open(path, flags, 0o600, dir_fd=self._jobs_fd))
        except OSError as error:
            for descriptor in descriptors:
                os.close(descriptor)
            self.remove_job(job.id)
            raise disk_error("make the directory of", f"job {job.id}", error) from error
        return descriptors

    def read_status(self, job_id: int) -> bytes:
        """Return the status record; empty when there is none."""
        try:
            descriptor = os.open(f"{job_id}/status", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._jobs_fd)
            try:
                return os.read(descriptor, RECORD_BYTES)
            finally:
                os.close(descriptor)
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise KernelError("read the status of", f"job {job_id}", error.errno or 0) from error

    def note_end_for_disk(self, job_id: int) -> None:
        """Note that a job is about to be ended for its use of the disk.

        The note outlives the kill of any process. It is a mode, since that takes no space.
        """
        try:
            os.chmod(f"{self._jobs}/{job_id}/status", _ENDED_FOR_DISK)
        except FileNotFoundError:
            pass  # it has ended
        except OSError as error:
            raise KernelError("note the end of", f"job {job_id}", error.errno or 0) from error

    def is_ended_for_disk(self, job_id: int) -> bool:
        """Return whether that end was noted."""
        try:
            status = os.stat(f"{job_id}/status", dir_fd=self._jobs_fd)
            return stat.S_IMODE(status.st_mode) == _ENDED_FOR_DISK
        except FileNotFoundError:
            return False
        except OSError as error:
            raise KernelError("look at the status of", f"job {job_id}", error.errno or 0) from error

    def output_size(self, job: Job) -> int:
        """Return the bytes of output of a job, stderr included; 0 without a file."""
        return sum(self._size(path) for path in self.outputs(job))

    def outputs(self, job: Job) -> list[str]:
        """Return the paths of the files of a job's output, for use in this process only."""
        return [
            self.output_paths(job.id, stderr=stderr)[0]
            for stderr in ((False, True) if job.split_stderr else (False,))
        ]

    def input_size(self, job: Job) -> int:
        """Return the bytes of input that are kept for a job; 0 without a file."""
        return self._size(self.input_path(job.id)) if job.input else 0

    @staticmethod
    def _size(path: str) -> int:
        try:
            return os.stat(path).st_size
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise KernelError("look at", describe_job_file(path), error.errno or 0) from error

    def remove_input(self, job_id: int) -> None:
        """Remove the input of a job, which is not read any more. Takes the kernel long when it is large."""
        try:
            with suppress(FileNotFoundError):
                os.unlink(self.input_path(job_id))
        except OSError as error:
            raise KernelError("remove the input of", f"job {job_id}", error.errno or 0) from error

    def artifacts_path(self, job_id: int) -> str:
        """Return the path of the artifacts of a job, for this process alone."""
        return f"{self._jobs}/{job_id}/{_ARTIFACTS}"

    def artifacts_size(self, job: Job) -> int:
        """Return the bytes of artifacts of a job, whole or not; 0 without a file."""
        return self._size(self.artifacts_path(job.id)) if job.artifacts is not None else 0

    def whole_artifacts(self, job_id: int) -> int | None:
        """Return the size of the artifacts of a job whose init has ended; None when they are not whole."""
        try:
            status = os.stat(self.artifacts_path(job_id))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise KernelError("look at the artifacts of", f"job {job_id}", error.errno or 0) from error
        return status.st_size if stat.S_IMODE(status.st_mode) == WHOLE_MODE else None

    def remove_artifacts(self, job_id: int) -> None:
        """Remove a job's artifacts, whole or not."""
        try:
            self._unlink(f"{job_id}/{_ARTIFACTS}")
        except OSError as error:
            raise KernelError("remove the artifacts of", f"job {job_id}", error.errno or 0) from error

    def settle(self, job: Job) -> None:
        """Bring the output of a job whose end was written down to the disk; the record of that is not kept.

        Blocks for as long as the disk takes. The times of the output reach the disk when the kernel likes.
        """
        # keep a file that was cut short, even an empty one: its mode tells readers
        if not job.output_bytes and not any(is_cut_short(path) for path in self.outputs(job)):
            self._remove_silent(job)
            return
        try:
            for path in self.outputs(job):
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fsync(descriptor)  # not fdatasync(2): this brings the file's name along
                finally:
                    os.close(descriptor)
            os.unlink(f"{self._jobs}/{job.id}/status")
        except FileNotFoundError:
            pass  # it was removed meanwhile
        except OSError as error:
            raise KernelError("sync the output of", f"job {job.id}", error.errno or 0) from error

    def append_usage(self, job_id: int, sample: UsageSample) -> None:
        """Add a sample to a job's history. Raises LimitReachedError (the disk is full) or KernelError."""
        try:
            append_sample(f"{self._jobs}/{job_id}/{_USAGE}", sample)
        except FileNotFoundError:
            pass  # the job has just been removed
        except OSError as error:
            raise disk_error("write the usage of", f"job {job_id}", error) from error

    def read_usage(self, job_id: int) -> Sequence[UsageSample]:
        """Return the samples of a job's history."""
        try:
            return read_samples(f"{self._jobs}/{job_id}/{_USAGE}")
        except OSError as error:
            raise KernelError("read the usage of", f"job {job_id}", error.errno or 0) from error

    def remove_job(self, job_id: int) -> None:
        """Remove a job's directory, if there is one, with all that is in it. Raises KernelError."""
        directory = str(job_id)
        try:
            # that of a job without output went at its end
            if self._remove_directory(directory):
                return
            for name in os.listdir(f"{self._jobs}/{directory}"):
                self._unlink(f"{directory}/{name}")
            if not self._remove_directory(directory):
                raise OSError(errno.ENOTEMPTY, "")
        except FileNotFoundError:
            pass  # it was removed meanwhile: `settle` may be at it too
        except OSError as error:
            raise _removal_error(job_id, error) from error

    def _remove_silent(self, job: Job) -> None:
        """Remove the remains of an ended job without output, but for its history with the directory."""
        try:
            for name in (*_names_of(job), *((_INPUT,) if job.input else ())):
                self._unlink(f"{job.id}/{name}")
            # of one with a terminal, or with a history that stays
            if not self._remove_directory(str(job.id)):
                self._unlink(f"{job.id}/{_CONTROL}")
                self._remove_directory(str(job.id))
        except OSError as error:
            raise _removal_error(job.id, error) from error

    def _unlink(self, path: str) -> None:
        # one by one, as one may be gone
        with suppress(FileNotFoundError):
            os.unlink(path, dir_fd=self._jobs_fd)

    def _remove_directory(self, directory: str) -> bool:
        """Remove an empty directory; False when there is something in it."""
        try:
            os.rmdir(directory, dir_fd=self._jobs_fd)
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise
            return False
        return True

    async def keep_secrets(self, specs: Sequence[JobSpec]) -> dict[int, str]:
        """Store the secrets of jobs for the queue; return the name of each one's file, by its place.

        Raises LimitReachedError (the disk is full) and KernelError; nothing stays behind then.
        """
        if not any(spec.secrets for spec in specs):
            return {}
        try:
            return await self.in_thread(self.store.secrets.keep, specs)
        except OSError as error:
            raise disk_error("store the secrets of", "a job", error) from error

    async def in_thread(self, function: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """Call a function that waits for the disk without holding the event loop up."""
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, partial(function, *args, **kwargs)
        )


def _names_of(job: Job) -> Sequence[str]:
    """Return the files that a job has from its start on, in addition to its input."""
    return (*_FILES, *_STDERR_FILES) if job.split_stderr else _FILES


def _removal_error(job_id: int, error: OSError) -> KernelError:
    return KernelError("remove the directory of", f"job {job_id}", error.errno or 0)


def create_input(path: str) -> int:
    """Make an input; give a descriptor for its reader, whose lock tells `InputWriter` that there is one."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor


def _private_file(path: str) -> str:
    # sqlite would make it as the umask allows; its journal takes after it. A file that is there is
    # not opened: to close it again would end the locks that another worker in this process has on it.
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    return path


def disk_error(operation: str, subject: str, error: OSError) -> KernelError | LimitReachedError:
    """Return the error for a failed write: full disks and quotas are the caller's to retry."""
    failed = KernelError(operation, subject, error.errno or 0)
    if failed.errno in RESOURCE_ERRNOS:
        return LimitReachedError(str(failed))
    return failed
