"""The archive: a directory with copies of the output of ended jobs, perhaps on a shared file system.

ARCHIVE/            belongs to the gateway's own user
ARCHIVE/lock        held by the gateway
ARCHIVE/ID          of one job: output, times, stderr, stderr_times as on its node, and their sha256
ARCHIVE/.ID.part    a copy that is being made

A copy gets its name when all of it is on the disk and was read again. So what has a name is whole.
"""

import asyncio
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from pjw.errors import ConfigError, KernelError, OutputLostError, describe_errno
from pjw.model import Job
from pjw.output import Inotify, OutputLog
from pjw.output.times import RECORD
from pjw.worker.reading import Output, Part, Reading
from pjw.worker.state_dir import disk_error

_LOCK: Final = "lock"
_PART: Final = ".part"
_SUMS: Final = "sha256"
# So much is written at a time.
_WRITE_BYTES: Final = 1024**2
_FLAGS: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW


def open_directory(path: str) -> int:
    """Open the archive's directory, and return the descriptor by which it is used. Raises ConfigError."""
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(
            f"cannot use the archive {path}: {describe_errno(error.errno or 0)}",
            hint="make that directory, and let the gateway's user write there",
        ) from error


class StreamCopy:
    """The copy of one stream of a job's output, while it is made; its methods wait for the disk."""

    def __init__(self, directory: str, name: str, times_name: str) -> None:
        self._path: Final = f"{directory}/{name}"
        self._output: Final = os.open(self._path, _FLAGS, 0o600)
        self._times: Final = os.open(f"{directory}/{times_name}", _FLAGS, 0o600)
        self._sum: Final = hashlib.sha256()
        self._data: Final = bytearray()
        self._records: Final = bytearray()
        self.size = 0
        self.name: Final = name

    def close(self) -> None:
        """Close the files."""
        os.close(self._output)
        os.close(self._times)

    def add(self, data: bytes, time_ns: int | None) -> bool:
        """Take bytes, with the time at which the job wrote them; whether `write` is due."""
        self._data.extend(data)
        self._sum.update(data)
        self.size += len(data)
        if time_ns is not None:
            self._records.extend(RECORD.pack(time_ns, self.size))
        return len(self._data) >= _WRITE_BYTES

    def write(self) -> None:
        """Write what was taken."""
        for descriptor, data in ((self._output, self._data), (self._times, self._records)):
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            view.release()
            data.clear()

    def finish(self) -> str:
        """Write the rest, bring it to the disk and read it again; its SHA-256. Raises OSError.

        A file system that is shared may take bytes, and fail to keep them.
        """
        self.write()
        os.fsync(self._output)
        os.fsync(self._times)
        os.posix_fadvise(self._output, 0, 0, os.POSIX_FADV_DONTNEED)
        with open(self._path, "rb") as file:
            found = hashlib.file_digest(file, "sha256")
        if found.digest() != self._sum.digest():
            raise OSError(errno.EIO, f"{self.name} is not what was written there")
        return found.hexdigest()


class OutputArchive:
    """The directory, by a descriptor: its user perhaps cannot reach it by name."""

    def __init__(self, descriptor: int, path: str) -> None:
        """Take over the descriptor, and the lock; remove what a gateway before us had begun.

        Raises ConfigError.
        """
        self._descriptor: Final = descriptor
        self._directory: Final = f"/proc/self/fd/{descriptor}"
        # One job gets its copy, or loses it, at a time: see `commit` and `remove`.
        self.turn: Final = asyncio.Lock()
        self._tails: Final = asyncio.Lock()
        self._inotify: Final = Inotify()
        try:
            self._lock: Final = os.open(
                f"{self._directory}/{_LOCK}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
            )
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for name in os.listdir(descriptor):
                if name.startswith(".") and name.endswith(_PART):
                    shutil.rmtree(f"{self._directory}/{name}")
        except BlockingIOError:
            self._inotify.close()
            raise ConfigError(
                f"another gateway uses the archive {path}", hint="give each gateway a directory of its own"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"cannot use the archive {path}: {describe_errno(error.errno or 0)}",
                hint="let the gateway's user write there",
            ) from error

    def close(self) -> None:
        """Let go of it."""
        self._inotify.close()
        os.close(self._lock)
        os.close(self._descriptor)

    # --- copies; these wait for the disk

    def begin(self, job: Job) -> Sequence[StreamCopy]:
        """Begin a copy, of one that had been begun too: one for each stream. Raises OSError."""
        directory = self._part(job.id)
        self._remove_tree(directory)
        os.mkdir(directory, 0o700)
        streams = [StreamCopy(directory, "output", "times")]
        if job.split_stderr:
            try:
                streams.append(StreamCopy(directory, "stderr", "stderr_times"))
            except OSError:
                streams[0].close()
                raise
        return streams

    def finish(self, job: Job, streams: Sequence[StreamCopy]) -> None:
        """Bring a copy to the disk, whole. Raises OSError."""
        directory = self._part(job.id)
        sums = "".join(f"{stream.finish()}  {stream.name}\n" for stream in streams)
        with open(os.open(f"{directory}/{_SUMS}", _FLAGS, 0o600), "w") as file:
            file.write(sums)
            file.flush()
            os.fsync(file.fileno())
        _sync_directory(directory)

    def commit(self, job_id: int) -> None:
        """Give a copy its name, within `turn`. Raises OSError."""
        self._remove_tree(self._of(job_id))
        os.rename(self._part(job_id), self._of(job_id))
        os.fsync(self._descriptor)

    def abandon(self, job_id: int) -> None:
        """Remove a copy that is not to be."""
        with suppress(OSError):
            self._remove_tree(self._part(job_id))

    def remove(self, job_id: int) -> None:
        """Remove the copy of a job, if there is one, within `turn`. Raises KernelError."""
        try:
            self._remove_tree(self._of(job_id))
        except OSError as error:
            raise disk_error("remove from the archive", f"job {job_id}", error) from error

    # --- reading

    async def reading(self, job: Job, part: Part) -> Reading:
        """Read a part of the output of an archived job. Raises what `Output.reading` raises."""
        paths = [f"{self._of(job.id)}/{name}" for name in ("output", "stderr")]
        expected, size = job.output_bytes or 0, 0
        for path in paths:
            with suppress(FileNotFoundError):
                size += (await asyncio.to_thread(os.stat, path)).st_size
        lost = None
        if size < expected:
            lost = OutputLostError(
                f"the output of job {job.id} is cut short: {size} of {expected} bytes are in the archive;"
                " the rest has been removed"
            )
        path = paths[1] if part.stderr else paths[0]
        times = f"{self._of(job.id)}/{'stderr_times' if part.stderr else 'times'}"
        log = OutputLog(path, self._inotify, ended=True, times_path=times)
        try:
            return await Output(log, lost).reading(part, self._tails)
        except OSError as error:
            raise KernelError("read the archive of", f"job {job.id}", error.errno or 0) from error

    def _of(self, job_id: int) -> str:
        return f"{self._directory}/{job_id}"

    def _part(self, job_id: int) -> str:
        return f"{self._directory}/.{job_id}{_PART}"

    @staticmethod
    def _remove_tree(path: str) -> None:
        with suppress(FileNotFoundError):
            shutil.rmtree(path)


def _sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
