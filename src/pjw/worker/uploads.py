"""Uploads: archives of files for jobs before their start. Only a job's own program reads one.

jobs/uploads/CLIENT-NAME    an archive, 0600, of the client with that hash; 0400 when all of it came

One is there while a client writes it, for a while after that, and as long as a job of the queue needs
it. So nothing has to be undone when a client is gone or a job cancelled: an unwanted upload goes at the end
of its lease, and with the start of the job that had it at once.
"""

import asyncio
import fcntl
import hashlib
import logging
import os
import stat
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final, ParamSpec, Protocol, TypeVar

from pjw.errors import CopyError, KernelError, LimitReachedError, PjwError
from pjw.model import check_upload
from pjw.worker.host import Descriptors
from pjw.worker.input import Inputs, InputWriter
from pjw.worker.quota import StoredBytes
from pjw.worker.sparse_directory import SparseDirectory
from pjw.worker.state_dir import WHOLE_MODE, disk_error
from pjw.worker.store import JobStore
from pjw.worker.tasks import Flag

# Without a call that writes it, or a job that needs it, an upload is removed after this time.
LEASE_SECONDS: Final = 120.0
# seconds between looks
_SWEEP_SECONDS: Final = 30.0
# Each has a place in memory and a file, however small.
PER_CLIENT_MAX: Final = 64
_UPLOADS: Final = "uploads"

_P = ParamSpec("_P")
_R = TypeVar("_R")

log: Final = logging.getLogger(__name__)


class Home(Protocol):
    """Where uploads are kept: `StateDir` is one."""

    @property
    def store(self) -> JobStore:
        """The jobs that need them."""

    @property
    def jobs_path(self) -> str:
        """The directory of the files of jobs."""

    async def in_thread(self, function: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """Call what waits for the disk."""


@dataclass(slots=True)
class _Upload:
    """One upload: its number of writers, and until when it stays without them (time of the loop)."""

    until: float
    writers: int = 0


def _file_name(client_name: str, name: str) -> str:
    """Return the name of an upload's file. Raises InvalidJobError for a wrong name."""
    check_upload(name)
    return f"{_prefix(client_name)}{name}"


def _prefix(client_name: str) -> str:
    return f"{hashlib.sha256(client_name.encode()).hexdigest()[:32]}-"


class Uploads:
    """The uploads of one worker's clients."""

    def __init__(self, state: Home, stored: StoredBytes, inputs: Inputs) -> None:
        self._state: Final = state
        self._stored: Final = stored
        self._inputs: Final = inputs
        self._descriptors: Final = Descriptors()
        self._all: Final = SparseDirectory(f"{state.jobs_path}/{_UPLOADS}")
        self._uploads: Final[dict[str, _Upload]] = {}
        self._some: Final = asyncio.Event()

    async def adopt(self) -> None:
        """Find those of the worker before us."""
        for name in await self._state.in_thread(self._all.names):
            self._uploads[name] = _Upload(self._lease())

    async def run(self) -> None:
        """Remove for ever the uploads that are not wanted any more."""
        while True:
            if not self._uploads:
                self._some.clear()
                await self._some.wait()
            await asyncio.sleep(_SWEEP_SECONDS)
            try:
                await self._sweep()
            except PjwError as error:
                log.error("cannot remove uploads that nobody wants any more: %s", error)

    async def _sweep(self) -> None:
        if not any(map(self._is_over, self._uploads)):
            return
        wanted = {_file_name(*each) for each in await self._state.store.uploads()}
        for name in [name for name in self._uploads if self._is_over(name)]:
            if name in wanted:
                self._uploads[name].until = self._lease()
            else:
                await self._remove(name)

    @staticmethod
    def _lease() -> float:
        return asyncio.get_running_loop().time() + LEASE_SECONDS

    def _is_over(self, name: str) -> bool:
        upload = self._uploads[name]
        return not upload.writers and upload.until <= asyncio.get_running_loop().time()

    @asynccontextmanager
    async def writer(
        self, client_name: str, name: str, wait_for: Callable[..., Awaitable[None]]
    ) -> AsyncGenerator[InputWriter, None]:
        """Write an upload from where the one before has stopped; see `Worker.write_upload`."""
        file_name, subject = _file_name(client_name, name), f"upload {name} of {client_name}"
        await self._stored.check(client_name)
        self._require_room(client_name, file_name)
        self._descriptors.require()
        upload = self._uploads.setdefault(file_name, _Upload(self._lease()))
        upload.writers += 1
        self._some.set()
        try:
            reader = await self._state.in_thread(self._open_to_write, file_name, subject)
            try:
                path = f"{self._all.path}/{file_name}"
                # it has no end but that of all
                async with self._inputs.writer_of(
                    subject, path, client_name, lambda: wait_for(Flag())
                ) as writer:
                    yield writer
            finally:
                os.close(reader)
        finally:
            upload.writers -= 1
            upload.until = self._lease()

    def _require_room(self, client_name: str, file_name: str) -> None:
        own = sum(name.startswith(_prefix(client_name)) for name in self._uploads)
        if file_name not in self._uploads and own >= PER_CLIENT_MAX:
            raise LimitReachedError(
                f"{client_name} has {own} uploads, and no more than {PER_CLIENT_MAX} may be",
                hint=f"one that no job needs is removed after {LEASE_SECONDS:.0f} s",
            )

    def _open_to_write(self, file_name: str, subject: str) -> int:
        """Make it where it is missing; return a descriptor whose lock says that its content is wanted."""
        try:
            with self._all.adding(), suppress(FileExistsError):
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                os.close(os.open(f"{self._all.path}/{file_name}", flags, 0o600))
            descriptor = os.open(f"{self._all.path}/{file_name}", os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        except OSError as error:
            raise disk_error("make", subject, error) from error
        return descriptor

    async def renew(self, client_name: str, name: str) -> None:
        """Have a whole upload stay until the queue has its job. Raises CopyError where there is none."""
        os.close(await self._state.in_thread(self.open, client_name, name))
        if (upload := self._uploads.get(_file_name(client_name, name))) is not None:
            upload.until = self._lease()

    def open(self, client_name: str, name: str) -> int:
        """Open a whole upload for the launcher; the caller closes the descriptor. For any thread.

        Raises CopyError where there is none, or not all of it came.
        """
        file_name = _file_name(client_name, name)
        try:
            descriptor = os.open(f"{self._all.path}/{file_name}", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise CopyError(
                f"cannot unpack the upload: there is none called {name}",
                hint=f"it goes with the start of its job, or {LEASE_SECONDS:.0f} s after it came",
            ) from None
        except OSError as error:
            raise KernelError("open", f"upload {name} of {client_name}", error.errno or 0) from error
        status = os.fstat(descriptor)
        if stat.S_IMODE(status.st_mode) != WHOLE_MODE or file_name not in self._uploads:
            os.close(descriptor)
            raise CopyError(
                f"cannot unpack the upload: it broke off after {status.st_size} bytes",
                hint="send the rest, and its end",
            )
        return descriptor

    async def release(self, client_name: str, name: str) -> None:
        """Remove one whose job was started, or was refused, unless a job of the queue needs it."""
        try:
            file_name = _file_name(client_name, name)
            if file_name in self._uploads and (client_name, name) not in await self._state.store.uploads():
                await self._remove(file_name)
        except PjwError as error:
            log.error("cannot remove upload %s of %s: %s", name, client_name, error)

    async def _remove(self, file_name: str) -> None:
        await self._state.in_thread(self._unlink, file_name)
        self._uploads.pop(file_name, None)

    def _unlink(self, file_name: str) -> None:
        try:
            with suppress(FileNotFoundError):
                os.unlink(f"{self._all.path}/{file_name}")
        except OSError as error:
            raise KernelError("remove", f"upload {file_name}", error.errno or 0) from error
        self._all.tidy()

    def bytes_of(self, client_name: str | None) -> int:
        """Return the bytes that the uploads of a client have stored, or with None those of all."""
        prefix = "" if client_name is None else _prefix(client_name)
        total = 0
        for name in self._uploads:
            if name.startswith(prefix):
                with suppress(FileNotFoundError):
                    total += os.stat(f"{self._all.path}/{name}").st_size
        return total
