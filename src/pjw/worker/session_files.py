"""The files of sessions: a directory for each, below that of the jobs, gone soon after the session's end.

jobs/sessions/JOB-NUMBER/   `session` (the request), `status`, `output`, `stderr`, `control`, with
                            input `input`
jobs/JOB/sessions           its size is the number of sessions that the job has had
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from pjw.errors import JobStateError
from pjw.model import TerminalSize
from pjw.worker.orders import create_orders, order_hang_up, order_size
from pjw.worker.sparse_directory import SparseDirectory
from pjw.worker.state_dir import StateDir, create_input, disk_error
from pjw.worker.status_record import RECORD_BYTES

_SESSIONS: Final = "sessions"
_NAME: Final = re.compile(r"([1-9][0-9]*)-([1-9][0-9]*)")

# a job, and which of its sessions
Key = tuple[int, int]


@dataclass(frozen=True, slots=True)
class SessionRequest:
    """The request for a session: it must be known after a restart. `start_ns` is when it came."""

    command: str
    start_ns: int
    request_id: str = ""
    input: bool = False
    split_stderr: bool = True
    detached: bool = False
    terminal: bool = False
    # whether it packs or unpacks files
    archive: bool = False


@dataclass(frozen=True, slots=True)
class Made:
    """A new session: which, and descriptors of its files, in the order of protocol.Exec from `output` on."""

    key: Key
    descriptors: list[int] = field(default_factory=list)


class SessionFiles:
    """Makes, reads and removes the files. Calls that wait for the disk belong in a thread."""

    def __init__(self, state: StateDir) -> None:
        self._jobs: Final = state.jobs_path
        self._all: Final = SparseDirectory(f"{self._jobs}/{_SESSIONS}")

    def path(self, key: Key, name: str) -> str:
        """Return the path of a file of a session, for this process alone."""
        return f"{self._directory(key)}/{name}"

    def _directory(self, key: Key) -> str:
        return f"{self._all.path}/{key[0]}-{key[1]}"

    def create(self, job_id: int, asked: SessionRequest, size: TerminalSize | None) -> Made:
        """Make the files of one more session of a job, whose end its `status` tells: see `is_alive`.

        Raises LimitReachedError (the disk is full) and KernelError; nothing stays behind then.
        """
        made = Made((job_id, 0))
        try:
            with self._all.adding():
                made = Made((job_id, self._next_number(job_id)))
                os.mkdir(self._directory(made.key), 0o700)
            self._fill(made, asked, size)
        except OSError as error:
            for descriptor in made.descriptors:
                os.close(descriptor)
            if made.key[1]:
                self.remove(made.key)
            raise disk_error("make the files of a session of", f"job {job_id}", error) from error
        return made

    def _next_number(self, job_id: int) -> int:
        # As a size it survives a crash, and takes no space on a full disk. A number is given once: a client
        # that comes back must not find another session.
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
        descriptor = os.open(f"{self._jobs}/{job_id}/{_SESSIONS}", flags, 0o600)
        try:
            number = os.fstat(descriptor).st_size + 1
            os.ftruncate(descriptor, number)
        finally:
            os.close(descriptor)
        return number

    def _fill(self, made: Made, asked: SessionRequest, size: TerminalSize | None) -> None:
        directory, descriptors = self._directory(made.key), made.descriptors
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        members = {name: getattr(asked, name) for name in SessionRequest.__dataclass_fields__}
        with open(f"{directory}/session", "x", encoding="utf-8") as file:
            json.dump(members, file)
        descriptors.append(os.open(f"{directory}/output", flags | os.O_APPEND, 0o600))
        descriptors.append(os.open(f"{directory}/status", flags, 0o600))
        os.posix_fallocate(descriptors[-1], 0, RECORD_BYTES)
        fcntl.flock(descriptors[-1], fcntl.LOCK_SH)
        if asked.split_stderr:
            descriptors.append(os.open(f"{directory}/stderr", flags | os.O_APPEND, 0o600))
        descriptors.append(create_orders(f"{directory}/control", size))
        if asked.input:
            descriptors.append(create_input(f"{directory}/input"))

    def found(self) -> Iterator[Key]:
        """Yield the sessions that have a directory, also of jobs that are gone."""
        for name in self._all.names():
            if match := _NAME.fullmatch(name):
                yield int(match[1]), int(match[2])

    def read_asked(self, key: Key) -> SessionRequest | None:
        """Return the request; None where a crash has left it half made."""
        try:
            with open(self.path(key, "session"), encoding="utf-8") as file:
                return SessionRequest(**json.load(file))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def read_status(self, key: Key) -> bytes:
        """Return the record of its beginning and end."""
        with suppress(FileNotFoundError), open(self.path(key, "status"), "rb") as file:
            return file.read(RECORD_BYTES)
        return b""

    def is_alive(self, key: Key) -> bool:
        """Return whether the process that waits for its command is there: its status is locked for it."""
        try:
            descriptor = os.open(self.path(key, "status"), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def hang_up(self, key: Key) -> None:
        """Have a session end: SIGHUP, and SIGKILL after a grace period."""
        # it may have ended, and be gone
        with suppress(JobStateError):
            order_hang_up(self.path(key, "control"), describe(key))

    def resize(self, key: Key, size: TerminalSize) -> None:
        """Give its terminal another size. Raises JobStateError when it is gone."""
        order_size(self.path(key, "control"), size, describe(key))

    def size(self, key: Key) -> int:
        """Return the bytes it has stored: output and input."""
        total = 0
        for name in ("output", "stderr", "input"):
            with suppress(FileNotFoundError):
                total += os.stat(self.path(key, name)).st_size
        return total

    def remove(self, key: Key) -> None:
        """Remove all files of a session."""
        shutil.rmtree(self._directory(key), ignore_errors=True)
        self._all.tidy()


def describe(key: Key) -> str:
    """Return a session in words."""
    return f"session {key[1]} of job {key[0]}"
