"""The interface that answers the calls of clients: this machine's jobs (`pjw.worker.Worker`), or many's.

The guard, the service, quotas and the lists of watchers know this alone. `Worker` has this interface; mypy
checks it where serve.py hands the worker over.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import Protocol

from pjw.arrays import Element
from pjw.model import (
    Archive,
    ClientQuota,
    Image,
    ImageConfig,
    Job,
    JobSpec,
    Session,
    TerminalSize,
    UsageSample,
    Workspace,
)
from pjw.output import FramePrefix
from pjw.v1 import job_worker_pb2 as pb
from pjw.worker import Part, WorkerSettings
from pjw.worker.changes import Batch, Watched
from pjw.worker.egress import Connection
from pjw.worker.metrics import WorkerNumbers
from pjw.worker.pages import JobFilter, Page


class Written(Protocol):
    """Input that is being written: `worker.input.InputWriter` is one."""

    @property
    def offset(self) -> int:
        """The number of bytes so far."""

    @property
    def ended(self) -> bool:
        """Whether no more bytes follow."""

    async def write(self, offset: int, data: bytes, *, end: bool = False) -> None:
        """Add bytes, and the end. Raises OffsetError for a gap."""


class Reading(Protocol):
    """A part of a job's output that is about to be read: `worker.reading.Reading` is one."""

    @property
    def offset(self) -> int:
        """The first byte to read."""

    def chunks(self, head: FramePrefix = ...) -> AsyncGenerator[bytes, None]:
        """Yield its bytes, as they come, each chunk behind the head that *head* makes from its length."""

    def timed(self) -> AsyncGenerator[tuple[bytes, datetime | None], None]:
        """Yield its bytes, each piece with the time at which the job wrote it; None if that is not known."""


class FarConnection(Protocol):
    """A connection to a port within a job on another machine."""

    async def carry(
        self,
        first: pb.ForwardRequest,
        requests: AsyncIterator[pb.ForwardRequest],
        answer: Callable[[pb.ForwardResponse], Awaitable[None]],
    ) -> None:
        """Carry it, as `server.forward.carry` does."""


class JobCalls(Protocol):
    """The calls of clients: see the methods of `Worker`, which list their errors."""

    async def start(self, spec: JobSpec, client_name: str = ...) -> Job:
        """Start a job."""

    async def submit(self, specs: Sequence[JobSpec], client_name: str = ...) -> Sequence[Job]:
        """Put jobs into the queue, all or none."""

    async def hold(self, job_id: int | Element, owner: str | None = ...) -> Job:
        """Keep a job from being started."""

    async def release(self, job_id: int | Element, owner: str | None = ...) -> Job:
        """Let a held job be started."""

    def write_input(
        self, job_id: int, owner: str | None = ..., session: int = ...
    ) -> AbstractAsyncContextManager[Written]:
        """Write to the input of a job, or of a session of it."""

    def write_upload(self, name: str, client_name: str = ...) -> AbstractAsyncContextManager[Written]:
        """Write an archive of files for the start of a job."""

    async def exec(
        self, job_id: int, spec: JobSpec, client_name: str = ..., *, detached: bool = ...
    ) -> Session:
        """Start another command in a job."""

    async def archive(
        self, job_id: int, archive: Archive, client_name: str = ..., *, request_id: str = ...
    ) -> Session:
        """Pack or unpack files in a job."""

    async def resize(
        self, job_id: int, size: TerminalSize, owner: str | None = ..., session: int = ...
    ) -> None:
        """Give a terminal another size."""

    async def connect(self, job_id: int, port: int, client_name: str = ...) -> socket.socket | FarConnection:
        """Connect to a TCP port within a job."""

    async def get_with_usage(self, job_id: int | Element, owner: str | None = ...) -> Job:
        """Return one job as it is now, with its usage."""

    async def page(
        self,
        owner: str | None = ...,
        after: int = ...,
        count: int = ...,
        wanted: JobFilter = ...,
        *,
        newest_first: bool = ...,
    ) -> Page:
        """Return jobs behind an id that fit."""

    async def wait(self, job_id: int | Element, owner: str | None = ..., *, or_stuck: bool = ...) -> Job:
        """Wait until a job has ended."""

    async def wait_session(self, job_id: int, number: int, owner: str | None = ...) -> Session:
        """Wait until a session has ended."""

    async def stop(
        self,
        job_id: int | Element,
        grace_seconds: float | None = ...,
        owner: str | None = ...,
        signal: int = ...,
    ) -> Job:
        """End a job."""

    async def stop_session(self, job_id: int, number: int, owner: str | None = ...) -> Session:
        """Hang a session up."""

    async def read_logs(self, job_id: int | Element, part: Part = ..., owner: str | None = ...) -> Reading:
        """Return a part of a job's output."""

    async def delete(self, job_id: int | Element, owner: str | None = ...) -> None:
        """Forget an ended job."""

    async def usage_history(self, job_id: int, owner: str | None = ...) -> tuple[Job, Sequence[UsageSample]]:
        """Return a job, and its usage at moments of its life."""

    async def usage_now(
        self, owner: str | None = ..., fresh_seconds: float = ..., within_seconds: float = ...
    ) -> Sequence[tuple[Job, UsageSample | None]]:
        """Return the jobs that have not ended, and the usage of each."""

    async def queued_now(self, owner: str | None = ..., most: int = ...) -> tuple[int, Sequence[Job]]:
        """Return the number of waiting jobs, and the oldest of them."""

    def watch_jobs(
        self,
        owner: str | None = ...,
        watched: Watched = ...,
        since: int | None = ...,
        *,
        snapshot: bool = ...,
        follow: bool = ...,
    ) -> AsyncGenerator[Batch, None]:
        """Yield changes of the states of jobs."""

    async def quota(self, client_name: str = ...) -> ClientQuota:
        """Return the limits, use and share of a client."""

    async def workspaces(
        self, owner: str | None = ..., after: tuple[str, str] = ..., count: int = ...
    ) -> Sequence[Workspace]:
        """Return workspaces."""

    async def remove_workspace(self, name: str, client_name: str = ...) -> None:
        """Remove a workspace."""

    async def load_image(
        self,
        name: str,
        upload: str,
        config: ImageConfig | None = ...,
        digest: str = ...,
        client_name: str = ...,
    ) -> Image:
        """Make an image of a client's own."""

    async def images(self, owner: str | None = ...) -> Sequence[Image]:
        """Return the images that jobs of a client can have."""

    async def remove_image(self, name: str, client_name: str = ...) -> None:
        """Take the name from an image."""


class Backend(JobCalls, Protocol):
    """The calls of clients, and those of the server itself: health, numbers, reloads."""

    @property
    def live_count(self) -> int:
        """The number of jobs that have not ended."""

    @property
    def drained(self) -> bool:
        """Whether the operator has jobs started no more."""

    async def numbers(self) -> WorkerNumbers:
        """Return the counters for monitoring."""

    async def answers(self) -> None:
        """Return when all that jobs need has answered a question. Raises LauncherGoneError."""

    async def gone(self) -> None:
        """Return when the processes that jobs need have gone, so that no job can be started or stopped."""

    async def failed(self) -> None:
        """Return when a bug has killed a task that is needed all along."""

    def reconfigure(self, settings: WorkerSettings) -> None:
        """Take other settings. Raises ConfigError, and takes nothing then."""

    async def reload_mounts(self) -> None:
        """Take the operator's mounts from the configuration. Raises KernelError or ConfigError."""

    def on_connection(self, tell: Callable[[Connection], None]) -> None:
        """Have *tell* hear of each connection that a job has made to a name on the network."""

    async def give_shares(self) -> Sequence[str]:
        """Set the share of each client with jobs again; return, in words, the shares that failed."""

    async def open_operator_file(self, place: int) -> int:
        """Open one of the operator's files, by its place among those named at the start."""

    async def open_audit_log(self) -> int:
        """Open the audit log, for appending."""
