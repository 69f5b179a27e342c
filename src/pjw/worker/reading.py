"""Reads of a job's output: the stream, the first byte, and the error for a missing end."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractContextManager, aclosing, nullcontext
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from pjw.errors import InvalidJobError, JobStateError, OutputLostError
from pjw.model import Job, JobState
from pjw.output import (
    FramePrefix,
    Inotify,
    OutputLog,
    follow,
    follow_with_times,
    no_head,
    start_of_tail,
    start_of_time,
)
from pjw.worker.artifacts import require_kept
from pjw.worker.job import LiveJob
from pjw.worker.job_rows import from_ns
from pjw.worker.state_dir import StateDir


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a job's output.

    It begins at byte `offset`, `tail_lines` lines before the end of the output so far, or with the output of
    `since_ns` (nanoseconds since 1970), whichever comes last. It ends with the job, or without `follow` at
    the end of the output so far. `stderr` works only for a job that keeps stderr apart.
    """

    offset: int = 0
    tail_lines: int | None = None
    since_ns: int | None = None
    stderr: bool = False
    follow: bool = True
    # of a session of the job instead of the job's own; 0 is the latter
    session: int = 0
    # the artifacts of the job, an archive, instead of its output
    artifacts: bool = False

    def __post_init__(self) -> None:
        if self.artifacts and (self.stderr or self.session or self.is_sought):
            raise InvalidJobError("artifacts are one archive: they begin at a byte, and have no stderr")
        if self.tail_lines is not None and self.tail_lines < 0:
            raise InvalidJobError(f"the number of last lines must be 0 or more, not {self.tail_lines}")

    @property
    def is_sought(self) -> bool:
        """Whether the offset where it begins must be looked up in the output."""
        return self.tail_lines is not None or self.since_ns is not None


ALL_OUTPUT: Final = Part()


@dataclass(frozen=True, slots=True)
class Output:
    """One stream of a job's output, and the error to raise at its end."""

    log: OutputLog
    lost: OutputLostError | None = None

    async def reading(self, part: Part, turns: asyncio.Lock) -> "Reading":
        """Return a part of the output with its beginning looked up; one lookup in *turns* at a time.

        Raises JobStateError for a part that begins at a time when the job's init recorded no times.
        """
        offset = part.offset
        if part.since_ns is not None:
            first = await start_of_time(self.log, part.since_ns)
            if first is None:
                raise JobStateError(
                    "cannot begin at a time: nobody wrote down when the job wrote its output",
                    hint="begin at a byte (--offset), or with the last lines (--tail)",
                )
            offset = max(offset, first)
        if part.tail_lines is not None:
            offset = await start_of_tail(self.log, part.tail_lines, offset, turns)
        return Reading(self, offset, follow=part.follow)


@dataclass(frozen=True, slots=True)
class Reading:
    """A part of a job's output, from the byte `offset` on; it is opened when it is read.

    Both ways to read raise OffsetError for an offset beyond the end, and OutputLostError, at the end of the
    present bytes, when the host went down before the disk had all of it, or when another process cut the file
    short.
    """

    output: Output
    offset: int
    follow: bool
    # a context that lasts as long as the read
    within: Callable[[], AbstractContextManager[None]] = nullcontext

    def chunks(self, head: FramePrefix = no_head) -> AsyncGenerator[bytes, None]:
        """Yield its bytes, as they come. *head* makes the beginning of each chunk from the chunk's length."""
        chunks = follow(self.output.log, self.offset, head, present_only=not self.follow)
        # most are whole, and one more generator is a part of the cost of a line to many followers
        return self._checked(chunks) if self.output.lost or self.within is not nullcontext else chunks

    async def _checked(self, chunks: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        # aclosing: a generator that is left to the garbage collector would keep its watch
        with self.within():
            async with aclosing(chunks):
                async for chunk in chunks:
                    yield chunk
        self._check_whole()

    async def timed(self) -> AsyncGenerator[tuple[bytes, datetime | None], None]:
        """Yield its bytes, each piece with the time at which the job wrote it; None if that is not known."""
        async with aclosing(
            follow_with_times(self.output.log, self.offset, present_only=not self.follow)
        ) as pieces:
            async for data, ns in pieces:
                yield data, None if ns is None else from_ns(ns)
        self._check_whole()

    def _check_whole(self) -> None:
        if self.output.lost:
            raise self.output.lost


def live_job(state: StateDir, inotify: Inotify, job: Job) -> LiveJob:
    """Return a job that has not ended, with its output."""
    stderr = _log_of(state, inotify, job, stderr=True) if job.split_stderr else None
    return LiveJob(job, _log_of(state, inotify, job), stderr)


def _log_of(state: StateDir, inotify: Inotify, job: Job, *, stderr: bool = False) -> OutputLog:
    path, times_path = state.output_paths(job.id, stderr=stderr)
    # of one that waits in the queue there is none yet
    ended = job.state.final or job.state is JobState.QUEUED
    return OutputLog(path, inotify, ended=ended, times_path=times_path)


def output_of_ended(state: StateDir, inotify: Inotify, job: Job, *, stderr: bool) -> Output:
    """Return a stream of the output of a job that has ended. Raises KernelError."""
    size, expected = state.output_size(job), job.output_bytes or 0
    lost = None
    if size < expected:
        lost = OutputLostError(
            f"the output of job {job.id} is cut short: {size} of {expected} bytes are on the server's disk;"
            " the host went down before the disk had the rest, or the file was cut short"
        )
    return Output(_log_of(state, inotify, job, stderr=stderr), lost)


def artifacts_of(state: StateDir, inotify: Inotify, job: Job) -> Output:
    """Return the artifacts of a job, as an archive.

    Raises JobStateError before its end, CopyError when there are none, and KernelError.
    """
    expected = require_kept(job).bytes
    # None: the file was removed, or a backup was restored without it
    size = state.whole_artifacts(job.id)
    lost = None
    if size != expected:
        lost = OutputLostError(
            f"the artifacts of job {job.id} are not whole: {size or 0} of {expected} bytes are on the"
            " server's disk; the file was changed or removed"
        )
    return Output(OutputLog(state.artifacts_path(job.id), inotify, ended=True), lost)


def check_stream(job: Job, part: Part) -> None:
    """Check that a job has the requested stream. Raises JobStateError."""
    if part.stderr and not job.split_stderr:
        raise JobStateError(
            f"cannot read the stderr of job {job.id} alone: the job was started without keeping it apart,"
            " so it is in the output"
        )
