"""Sessions: other commands in jobs that run. Each survives the server and the launcher, as its job does.

Only its start needs the launcher: a session's output is in files, its end is a record in one, its orders go
into another, and a lock shows that it lives (session_files.py). A session whose client has gone is hung up
after a while, unless it was detached: abandoned shells would fill the machine.
"""

import asyncio
import logging
import math
import os
import socket
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Final

from pjw.errors import JobStateError, LauncherGoneError, LimitReachedError, PjwError, SessionNotFoundError
from pjw.launcher.protocol import SESSIONS_MAX, Exec
from pjw.model import EndReason, ExitStatus, JobSpec, JobState, Session, TerminalSize
from pjw.output import Inotify, OutputLog
from pjw.output.inotify import IN_CLOSE_WRITE
from pjw.worker.host import Descriptors
from pjw.worker.input import Inputs, InputWriter
from pjw.worker.job import LiveJob
from pjw.worker.job_rows import from_ns
from pjw.worker.orders import command_file
from pjw.worker.parts import Parts
from pjw.worker.reading import Output, Part
from pjw.worker.session_files import Key, SessionFiles, SessionRequest, describe
from pjw.worker.settings import WorkerSettings
from pjw.worker.status_record import parse_record
from pjw.worker.stopping import within
from pjw.worker.tasks import Flag, log_bug

# After so long without a call that looks at it, a session is hung up; one that has ended is forgotten.
LEASE_SECONDS: Final = 120.0
# Each needs an inotify instance of the client's.
PER_CLIENT_MAX: Final = 64
# The kernel ends the sessions of a job before it; how long we wait for the news of the job's end.
_JOB_ENDS_SECONDS: Final = 10.0

log: Final = logging.getLogger(__name__)


@contextmanager
def _or_ended(job: LiveJob) -> Iterator[None]:
    """Raise JobStateError for any failure in a job that has ended: the end caused it."""
    try:
        yield
    except LauncherGoneError:
        raise
    except PjwError:
        if job.ended.is_set():
            raise JobStateError(f"job {job.job.id} has ended") from None
        raise


class LiveSession:
    """One session until it is forgotten. `session` is always a whole snapshot."""

    def __init__(
        self,
        session: Session,
        client_name: str,
        asked: SessionRequest,
        output: OutputLog,
        stderr: OutputLog | None,
    ) -> None:
        self.session = session
        self.client_name: Final = client_name
        self.asked: Final = asked
        self.output: Final = output
        self.stderr: Final = stderr
        self.ended: Final = Flag()
        # the calls that look at it
        self.users = 0
        self.lease: asyncio.TimerHandle | None = None
        self.watch = -1

    @property
    def key(self) -> Key:
        """The number of its job, and its own."""
        return self.session.job_id, self.session.number

    def logs(self) -> Iterator[OutputLog]:
        """Yield its outputs."""
        yield self.output
        if self.stderr is not None:
            yield self.stderr


class Sessions:
    """The sessions of one worker's jobs."""

    def __init__(self, parts: Parts, inputs: Inputs) -> None:
        """Begin without sessions. Raises KernelError."""
        self._parts: Final = parts
        self._files: Final = SessionFiles(parts.state)
        # of its own: a follower watches other files, for other changes
        self._ends: Final = Inotify(IN_CLOSE_WRITE)
        self._inputs: Final = inputs
        self._descriptors: Final = Descriptors()
        self._lease_seconds: Final = LEASE_SECONDS
        self._sessions: Final[dict[Key, LiveSession]] = {}
        # starts that are under way, of each job
        self._starting: Final[list[LiveJob]] = []
        self._tasks: Final[set[asyncio.Future[LiveSession]]] = set()
        self._requests: Final[dict[tuple[int, str], asyncio.Future[LiveSession]]] = {}

    # --- after a restart, and at the end

    async def adopt(self) -> None:
        """Find the sessions of the worker before us, after their jobs were found."""
        for key in await self._parts.state.in_thread(lambda: list(self._files.found())):
            asked = await self._parts.state.in_thread(self._files.read_asked, key)
            job = await self._parts.state.store.get(key[0])
            record = parse_record(await self._parts.state.in_thread(self._files.read_status, key))
            alive = await self._parts.state.in_thread(self._files.is_alive, key)
            if asked is None or job is None or (record.started_ns is None and not alive):
                # no client knows of a session whose command was not executed
                await self._parts.state.in_thread(self._files.hang_up, key)
                await self._parts.state.in_thread(self._files.remove, key)
                continue
            self._add(key, asked, job.client_name, record.started_ns or asked.start_ns)

    def close(self) -> None:
        """Release all; they go on."""
        for live in self._sessions.values():
            self._end_lease(live)
            for output in live.logs():
                output.abandon()
        self._ends.close()

    async def over(self) -> None:
        """Wait until no start is under way."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- start

    async def start(
        self, job: LiveJob, spec: JobSpec, settings: WorkerSettings, *, detached: bool, archive: bool = False
    ) -> Session:
        """Start a command in a job; return when it was executed. Two with the same request id are one.

        The command of an *archive* is that of the launcher's own program for them.

        Raises as `Worker.exec` does. It goes on when the caller is cancelled: its lease ends it then.
        """
        key = (job.job.id, spec.request_id)
        task = self._requests.get(key) if spec.request_id else None
        if task is None and (known := self._known(*key)) is not None:
            return known.session
        if task is None:
            work = self._start(job, spec, settings, detached=detached, archive=archive)
            task = asyncio.ensure_future(work)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            if spec.request_id:
                self._requests[key] = task
                task.add_done_callback(lambda _: self._requests.pop(key))
        try:
            return (await asyncio.shield(task)).session
        except asyncio.CancelledError:
            task.add_done_callback(log_bug)
            raise

    async def connect(self, job: LiveJob, port: int) -> socket.socket:
        """Connect to a port within a job; see `Worker.connect`."""
        client_name = job.job.client_name
        async with self._parts.turns.turn(client_name):
            self._descriptors.require()
            uid = await self._parts.users.of(client_name)
            with _or_ended(job):
                descriptor = await self._parts.launcher.request_connect(job.job.id, uid, port)
        return socket.socket(fileno=descriptor)

    def _known(self, job_id: int, request_id: str) -> LiveSession | None:
        if not request_id:
            return None
        own = (live for live in self._sessions.values() if live.session.job_id == job_id)
        return next((live for live in own if live.asked.request_id == request_id), None)

    async def _start(
        self, job: LiveJob, spec: JobSpec, settings: WorkerSettings, *, detached: bool, archive: bool
    ) -> LiveSession:
        self._require_room(job)
        self._starting.append(job)
        try:
            with _or_ended(job):
                return await self._start_in_turn(job, spec, settings, detached=detached, archive=archive)
        finally:
            self._starting.remove(job)

    async def _start_in_turn(
        self, job: LiveJob, spec: JobSpec, settings: WorkerSettings, *, detached: bool, archive: bool
    ) -> LiveSession:
        client_name = job.job.client_name
        async with self._parts.turns.turn(client_name):
            await self._parts.stored.check(client_name)
            uid = await self._parts.users.of(client_name)
            asked = SessionRequest(
                spec.display,
                time.time_ns(),
                spec.request_id,
                spec.input,
                split_stderr=spec.terminal is None,
                detached=detached,
                terminal=spec.terminal is not None,
                archive=archive,
            )
            self._descriptors.require()
            made = await self._parts.state.in_thread(self._files.create, job.job.id, asked, spec.terminal)
            try:
                started_ns = await self._ask(job, spec, uid, settings, made.descriptors, archive=archive)
            except LauncherGoneError:
                # It is unknown now whether it was started; the next worker will know.
                raise
            except BaseException:
                await self._parts.state.in_thread(self._files.remove, made.key)
                raise
        try:
            return self._add(made.key, asked, client_name, started_ns)
        except PjwError:
            # no client would see its end
            await self._parts.state.in_thread(self._files.hang_up, made.key)
            raise

    def _require_room(self, job: LiveJob) -> None:
        job_id, client_name = job.job.id, job.job.client_name
        alive = [live for live in self._sessions.values() if not live.ended.is_set()]
        of_job = sum(live.session.job_id == job_id for live in alive) + self._starting.count(job)
        of_client = sum(live.client_name == client_name for live in alive)
        of_client += sum(other.job.client_name == client_name for other in self._starting)
        for count, most, words in (
            (of_job, SESSIONS_MAX, f"job {job_id} has"),
            (of_client, PER_CLIENT_MAX, f"jobs of {client_name} have"),
        ):
            if count >= most:
                raise LimitReachedError(
                    f"{words} {count} sessions, and no more than {most} may be", hint="end one first"
                )

    async def _ask(
        self,
        job: LiveJob,
        spec: JobSpec,
        uid: int,
        settings: WorkerSettings,
        descriptors: list[int],
        *,
        archive: bool,
    ) -> int:
        files = list(descriptors)
        try:
            files.insert(0, command_file(spec, job.job))
            grace = max(1, math.ceil(settings.stop_grace_seconds))
            request = Exec(
                job.job.id,
                uid,
                job.job.limits.output_max_bytes,
                split_stderr=spec.terminal is None,
                input=spec.input,
                grace_seconds=grace,
                terminal=spec.terminal is not None,
                archive=archive,
            )
            return await self._parts.launcher.request_exec(request, spec, files)
        finally:
            # of those that were not handed over
            for descriptor in files:
                os.close(descriptor)

    def _add(self, key: Key, asked: SessionRequest, client_name: str, started_ns: int) -> LiveSession:
        session = Session(
            job_id=key[0],
            number=key[1],
            command=asked.command,
            state=JobState.RUNNING,
            start=from_ns(started_ns),
            input=asked.input,
            detached=asked.detached,
            terminal=asked.terminal,
        )
        live = LiveSession(
            session,
            client_name,
            asked,
            OutputLog(self._files.path(key, "output"), self._parts.inotify, ended=False),
            OutputLog(self._files.path(key, "stderr"), self._parts.inotify, ended=False)
            if asked.split_stderr
            else None,
        )
        live.watch = self._ends.watch(self._files.path(key, "status"), lambda: self._look(live))
        self._sessions[key] = live
        self._begin_lease(live)
        # it may have ended before we looked
        self._look(live)
        return live

    # --- the end

    def _look(self, live: LiveSession) -> None:
        if live.watch < 0 or self._files.is_alive(live.key):
            return
        self._ends.unwatch(live.watch)
        live.watch = -1
        self._parts.background.spawn(self._finish(live))

    async def _finish(self, live: LiveSession) -> None:
        record = parse_record(await self._parts.state.in_thread(self._files.read_status, live.key))
        if record.end is not None:
            live.session = replace(
                live.session,
                state=JobState.EXITED,
                end=from_ns(record.end.ended_ns),
                exit_status=record.end.exit_status,
                reason=record.end.reason,
            )
        else:
            live.session = await self._unrecorded(live.session)
        for output in live.logs():
            output.mark_ended()
        live.ended.set()
        self._begin_lease(live)

    async def _unrecorded(self, session: Session) -> Session:
        """Return a session whose end was not recorded: it ended with its job, or else in an unknown way."""
        job = self._parts.jobs.live.get(session.job_id)
        if job is not None:
            await within(_JOB_ENDS_SECONDS, job.ended)
        now = from_ns(time.time_ns())
        row = job.job if job is not None else await self._parts.state.store.get(session.job_id)
        if row is not None and row.state is JobState.EXITED:
            # its init, or the kernel, has sent SIGKILL to all that was left
            status = ExitStatus(signal=9)
            return replace(
                session, state=JobState.EXITED, end=now, exit_status=status, reason=EndReason.STOPPED
            )
        return replace(session, state=JobState.LOST, end=now, reason=EndReason.LOST)

    # --- the lease

    @contextmanager
    def attached(self, live: LiveSession) -> Iterator[None]:
        """Count a call as a reader of a session for as long as the context lasts."""
        live.users += 1
        self._end_lease(live)
        try:
            yield
        finally:
            live.users -= 1
            self._begin_lease(live)

    def _end_lease(self, live: LiveSession) -> None:
        if live.lease is not None:
            live.lease.cancel()
            live.lease = None

    def _begin_lease(self, live: LiveSession) -> None:
        self._end_lease(live)
        ended = live.ended.is_set()
        if live.users or (live.asked.detached and not ended):
            return
        end = partial(self._forget, live) if ended else partial(self._hang_up, live)
        live.lease = asyncio.get_running_loop().call_later(self._lease_seconds, end)

    def _hang_up(self, live: LiveSession) -> None:
        log.info("%s is hung up: its client has not come back", describe(live.key))
        self._parts.background.spawn(self._parts.state.in_thread(self._files.hang_up, live.key))

    def _forget(self, live: LiveSession) -> None:
        del self._sessions[live.key]
        self._parts.background.spawn(self._parts.state.in_thread(self._files.remove, live.key))

    # --- sessions as calls see them

    def find(self, job_id: int, number: int, owner: str | None) -> LiveSession:
        """Return a session of a client's job. Raises SessionNotFoundError."""
        live = self._sessions.get((job_id, number))
        if live is None or owner not in (None, live.client_name):
            raise SessionNotFoundError(job_id, number)
        return live

    async def wait(self, live: LiveSession, wait_for: Callable[..., Awaitable[None]]) -> Session:
        """Wait for the end of a session."""
        with self.attached(live):
            await wait_for(live.ended)
            return live.session

    async def resize(self, live: LiveSession, size: TerminalSize) -> None:
        """Give the terminal of a session another size. Raises JobStateError where there is none."""
        if not live.asked.terminal:
            raise JobStateError(f"{describe(live.key)} has no terminal")
        await self._parts.state.in_thread(self._files.resize, live.key, size)

    async def stop(self, live: LiveSession, wait_for: Callable[..., Awaitable[None]]) -> Session:
        """Have a session end, and wait for that."""
        await self._parts.state.in_thread(self._files.hang_up, live.key)
        ended = await self.wait(live, wait_for)
        # it may be as large as a disk, and the client that stops it wants no more of it
        if live.asked.archive and not live.users and live.key in self._sessions:
            self._end_lease(live)
            self._forget(live)
        return ended

    def input_of(
        self, live: LiveSession, wait_for: Callable[..., Awaitable[None]]
    ) -> AbstractAsyncContextManager[InputWriter]:
        """Write to the input of a session: see `Worker.write_input`."""
        if not live.asked.input:
            raise JobStateError(
                f"{describe(live.key)} takes no input", hint="it has to be started with input"
            )
        path = self._files.path(live.key, "input")
        writer = self._inputs.writer_of(
            describe(live.key), path, live.client_name, lambda: wait_for(live.ended)
        )
        return self._attached_to(live, writer)

    @asynccontextmanager
    async def _attached_to(
        self, live: LiveSession, writer: AbstractAsyncContextManager[InputWriter]
    ) -> AsyncGenerator[InputWriter, None]:
        with self.attached(live):
            async with writer as opened:
                yield opened

    def output_of(self, live: LiveSession, part: Part) -> Output:
        """Return a stream of its output. Raises JobStateError for a stderr that is not kept apart."""
        if part.stderr and live.stderr is None:
            raise JobStateError(f"cannot read the stderr of {describe(live.key)} alone: it is in the output")
        return Output(live.stderr if part.stderr and live.stderr is not None else live.output)

    def bytes_of(self, job_id: int) -> int:
        """Return the bytes that the sessions of a job have stored."""
        return sum(self._files.size(key) for key in self._sessions if key[0] == job_id)
