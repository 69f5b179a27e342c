"""Worker: start, stop, get, list, logs. It depends on no network, and jobs depend on no worker."""

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, Final, Self

from pjw.errors import (
    InvalidJobError,
    JobNotFoundError,
    LauncherGoneError,
    LimitReachedError,
    PjwError,
)
from pjw.model import Job, JobSpec, JobState, Limits, Usage
from pjw.output import Inotify, OutputLog, follow
from pjw.worker.job import LiveJob
from pjw.worker.launcher_client import LauncherClient, readable
from pjw.worker.launcher_process import LauncherProcess, require_root, start_launcher
from pjw.worker.record import parse_record
from pjw.worker.settings import WorkerSettings
from pjw.worker.state_dir import StateDir

LOCAL_CLIENT: Final = "local"
PAGE_MAX: Final = 1000
# From SIGKILL to every process until init itself is killed: long, since only a command
# stuck in the kernel comes so far.
LAST_RESORT_SECONDS: Final = 5
# A launch takes milliseconds.
LAUNCH_SECONDS: Final = 30
_SAVE_RETRY_SECONDS: Final = 2

log: Final = logging.getLogger(__name__)


class Worker:
    """Runs jobs on this machine.

    Methods that take an `owner` know only that client's jobs; None is all of them. Close it
    with `close()`, or use it as an async context manager; jobs go on, and the next worker on
    the same state directory finds them.
    """

    def __init__(self, state: StateDir, launcher: LauncherProcess, settings: WorkerSettings) -> None:
        """Take over an open state directory and a launcher; `open` does it all."""
        self._state: Final = state
        self._settings: Final = settings
        self._launcher: Final = LauncherClient(launcher)
        self._inotify: Final = Inotify()
        self._live: Final[dict[int, LiveJob]] = {}
        self._tasks: Final[set[asyncio.Task[None]]] = set()
        self._launches: Final[set[asyncio.Task[Job]]] = set()

    @classmethod
    async def open(cls, state_dir: str, settings: WorkerSettings | None = None) -> Self:
        """Open a worker on *state_dir*, and adopt the jobs that still run there. Needs root.

        Raises ConfigError or KernelError when the directory, the settings or the host do not allow it.
        """
        require_root()
        settings = settings or WorkerSettings()
        state = StateDir(state_dir, os.geteuid())
        try:
            launcher = start_launcher(state.path, settings)
        except BaseException:
            state.close()
            raise
        worker = cls(state, launcher, settings)
        try:
            await worker.adopt()
        except BaseException:
            await worker.close()
            raise
        return worker

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Let go of everything. Jobs go on; who waits for one or follows it gets LauncherGoneError."""
        for live in self._live.values():
            live.unwatch()
            live.output.abandon()
        for task in self._tasks:
            task.cancel()
        self._launcher.close()
        # launches under way end by that, and may still want the table
        await asyncio.gather(*self._tasks, *self._launches, return_exceptions=True)
        await self._launcher.join()
        self._inotify.close()
        self._state.close()

    @property
    def live_count(self) -> int:
        """How many jobs have not ended."""
        return len(self._live)

    async def launcher_gone(self) -> None:
        """Return when the launcher has died; nothing can be started or stopped then."""
        await self._launcher.gone.wait()

    # --- start

    async def start(self, spec: JobSpec, client_name: str = LOCAL_CLIENT) -> Job:
        """Start a job; return when its command was executed.

        Raises InvalidJobError, LaunchError (no such program, not executable),
        LimitReachedError (no space, no processes) or KernelError; then no job came to be. A
        caller who is cancelled before the answer gets no job either. LauncherGoneError may come
        when the job was started: the next worker knows.
        """
        limits = self._settings.default_limits.with_overrides(spec.limits)
        if above := limits.first_above(self._settings.ceiling):
            raise InvalidJobError(
                f"limit {above} must be at most {getattr(self._settings.ceiling, above)} on this server,"
                f" not {getattr(limits, above) or 'unlimited'}"
            )
        if self._launcher.gone.is_set():
            raise LauncherGoneError("the launcher has gone; running jobs go on")
        # Shielded from its first step on: the table has a thread of its own, so a row may be
        # written although whoever asked for it was cancelled.
        launch = asyncio.ensure_future(self._add_and_launch(spec, client_name, limits))
        self._launches.add(launch)
        launch.add_done_callback(self._launches.discard)
        try:
            return await asyncio.shield(launch)
        except asyncio.CancelledError:
            launch.add_done_callback(self._undo_start)
            raise

    async def _add_and_launch(self, spec: JobSpec, client_name: str, limits: Limits) -> Job:
        uid = await self._uid_of(client_name)
        job = await self._state.store.add(client_name, spec.display, limits)
        # The row is there, so whatever happens to us, the next worker can find the process.
        return await self._launch(job, spec, uid)

    async def _uid_of(self, client_name: str) -> int:
        number = await self._state.store.client_number(client_name)
        if number >= self._settings.uid_count:
            raise LimitReachedError(
                f"all {self._settings.uid_count} user ids for clients are taken",
                hint="the operator can configure a larger range",
            )
        return self._settings.uid_first + number

    async def _launch(self, job: Job, spec: JobSpec, uid: int) -> Job:
        live = LiveJob(job, OutputLog(self._state.output_path(job.id), self._inotify, ended=False))
        self._live[job.id] = live
        try:
            pidfd, started_ns = await self._ask_for_launch(job, spec, uid)
        except LauncherGoneError:
            # Whether it was launched, nobody can tell now; the next worker will.
            raise
        except BaseException:
            del self._live[job.id]
            self._state.remove_job(job.id)
            await self._state.store.discard(job.id)
            raise
        finally:
            live.launch_over.set()
        live.exec_seen(started_ns)
        live.watch(pidfd, lambda: self._spawn(self._finish(live)))
        return live.job

    async def _ask_for_launch(self, job: Job, spec: JobSpec, uid: int) -> tuple[int, int]:
        descriptors: list[int] = []
        try:
            descriptors.append(_argv_file(spec.argv))
            descriptors.extend(self._state.create_job(job.id))
            launch = asyncio.ensure_future(
                self._launcher.request_launch(job.id, uid, job.limits, spec.argv[0], descriptors)
            )
            done, _ = await asyncio.wait({launch}, timeout=LAUNCH_SECONDS)
            if not done:
                # Stuck in the kernel, for example in the exec of a file on a dead NFS server. With
                # its init killed the launcher answers that the launch failed.
                await self._launcher.request_kill(job.id, init_too=True)
            return await launch
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _undo_start(self, launch: asyncio.Future[Job]) -> None:
        if not launch.cancelled() and launch.exception() is None:
            self._spawn(self._end_and_discard(launch.result().id))

    async def _end_and_discard(self, job_id: int) -> None:
        await self._launcher.request_kill(job_id)
        live = self._live.get(job_id)
        if live is not None:
            await live.ended.wait()
        self._state.remove_job(job_id)
        await self._state.store.discard(job_id)

    # --- end

    async def _finish(self, live: LiveJob) -> None:
        """init has ended, and with it every process of the job; write the end down, then tell it."""
        job_id = live.job.id
        try:
            usage = await self._launcher.request_account(job_id)
        except LauncherGoneError:
            # The next worker finds the record, and the cgroup with its accounts. The output is whole.
            live.output.mark_ended()
            return
        except PjwError as error:
            log.error("cannot read the usage of job %d: %s", job_id, error)
            usage = None
        self._apply_end(live, usage)
        # Row before removal: the accounts are only in the cgroup until then. Removal before
        # announcement: whoever sees the end sees nothing left behind.
        if not await self._save(live.job):
            live.announce_end()
            await self._save_later(live.job)
        try:
            await self._launcher.request_remove(job_id)
        except LauncherGoneError:
            pass  # the next worker removes it
        except PjwError as error:
            log.error("cannot remove what job %d left: %s", job_id, error)
        del self._live[job_id]
        live.announce_end()

    def _apply_end(self, live: LiveJob, usage: Usage | None) -> None:
        record = parse_record(self._state.read_status(live.job.id))
        if record.end is not None:
            if live.job.state is JobState.STARTING:
                live.exec_seen(record.started_ns)
            live.end_seen(record.end, usage)
        elif live.init_killed:
            live.killed_unrecorded(usage)
        else:
            live.end_unknown(usage)

    async def _save(self, job: Job) -> bool:
        try:
            await self._state.store.finish(job)
        except PjwError as error:
            log.error("cannot write down the end of job %d: %s", job.id, error)
            return False
        return True

    async def _save_later(self, job: Job) -> None:
        # Until then the job is held in memory, and the record of its end is safe in its status
        # file. A timer, since nothing tells when space returns to a disk.
        while not await self._save(job):  # noqa: ASYNC110
            await asyncio.sleep(_SAVE_RETRY_SECONDS)

    # --- stop

    async def stop(self, job_id: int, grace_seconds: float | None = None, owner: str | None = None) -> Job:
        """End a job: SIGTERM to all its processes, after the grace period SIGKILL.

        Returns the final snapshot when the job has ended; a job that has ended already is
        success. Goes on when the caller is cancelled. Raises JobNotFoundError.
        """
        live = await self._launched(job_id, owner)
        if live is None or live.ended.is_set():
            return await self.get(job_id, owner)
        if not live.job.state.final:
            live.stop_asked()
        grace = self._settings.stop_grace_seconds if grace_seconds is None else grace_seconds
        self._spawn(self._escalate(live, grace))
        await self._wait_for_end(live)
        return live.job

    async def _escalate(self, live: LiveJob, grace_seconds: float) -> None:
        job_id = live.job.id
        await self._launcher.request_terminate(job_id)
        if await _within(grace_seconds, live.ended):
            return
        await self._launcher.request_kill(job_id)
        if await _within(LAST_RESORT_SECONDS, live.ended):
            return
        live.init_killed = True
        await self._launcher.request_kill(job_id, init_too=True)

    # --- look

    async def get(self, job_id: int, owner: str | None = None) -> Job:
        """One job as it is now. Raises JobNotFoundError."""
        live = self._live_of(job_id, owner)
        if live is not None:
            return live.job
        job = await self._state.store.get(job_id) if 0 < job_id < 2**63 else None
        if job is None or owner not in (None, job.client_name):
            raise JobNotFoundError(job_id)
        return job

    async def list(self, owner: str | None = None, after: int = 0, count: int = PAGE_MAX) -> list[Job]:
        """The jobs behind id *after*, in the order of their ids: *count*, or fewer when they are long.

        `page_is_full` (worker/store.py) tells whether there may be more behind the last one.
        """
        page = await self._state.store.page(owner, after, count)
        return [self._live[job.id].job if job.id in self._live else job for job in page]

    async def wait(self, job_id: int, owner: str | None = None) -> Job:
        """Wait until a job has ended; its final snapshot. Raises JobNotFoundError."""
        live = await self._launched(job_id, owner)
        if live is None:
            return await self.get(job_id, owner)
        await self._wait_for_end(live)
        return live.job

    async def logs(
        self, job_id: int, offset: int = 0, owner: str | None = None
    ) -> AsyncGenerator[bytes, None]:
        """Yield a job's output from byte *offset* on, as it comes; end when the job has ended.

        Raises JobNotFoundError, and OffsetError for an offset beyond what is there.
        """
        live = await self._launched(job_id, owner)
        if live is not None:
            output = live.output
        else:
            job = await self.get(job_id, owner)
            if not job.state.final:
                # its row is there, and its start is just about to be
                raise JobNotFoundError(job_id)
            output = OutputLog(self._state.output_path(job_id), self._inotify, ended=True)
        # aclosing: a generator that is left to the garbage collector would keep its watch
        async with aclosing(follow(output, offset)) as chunks:
            async for chunk in chunks:
                yield chunk

    def _live_of(self, job_id: int, owner: str | None) -> LiveJob | None:
        live = self._live.get(job_id)
        if live is not None and owner not in (None, live.job.client_name):
            raise JobNotFoundError(job_id)
        return live

    async def _launched(self, job_id: int, owner: str | None) -> LiveJob | None:
        """The live job, once its launch is over; None when it is not live (any more)."""
        live = self._live_of(job_id, owner)
        if live is None:
            return None
        await live.launch_over.wait()
        return self._live_of(job_id, owner)

    async def _wait_for_end(self, live: LiveJob) -> None:
        ended = asyncio.ensure_future(live.ended.wait())
        gone = asyncio.ensure_future(self._launcher.gone.wait())
        try:
            await asyncio.wait({ended, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
            gone.cancel()
        if not live.ended.is_set():
            raise LauncherGoneError("the launcher has gone; the job goes on")

    # --- after a restart

    async def adopt(self) -> None:
        """Take over the jobs of the worker before us: what still runs, and what ended meanwhile."""
        for job in await self._state.store.alive():
            live = LiveJob(job, OutputLog(self._state.output_path(job.id), self._inotify, ended=False))
            live.launch_over.set()
            self._live[job.id] = live
            _, pidfd = await self._launcher.request_adopt(job.id)
            if pidfd is None:
                await self._finish(live)
                continue
            live.exec_seen(parse_record(self._state.read_status(job.id)).started_ns)
            live.watch(pidfd, lambda live=live: self._spawn(self._finish(live)))  # type: ignore[misc]
        for job_id in await self._launcher.request_job_ids():
            if job_id not in self._live:
                await self._remove_stray(job_id)

    async def _remove_stray(self, job_id: int) -> None:
        # A cgroup without an unfinished row: its job ended and was written down, and only the
        # removal is missing; or the table was taken away, and then nobody can ask for the job.
        _, pidfd = await self._launcher.request_adopt(job_id)
        if pidfd is not None:
            await self._launcher.request_kill(job_id, init_too=True)
            with os.fdopen(pidfd, "rb", closefd=True):
                await readable(pidfd)
        await self._launcher.request_remove(job_id)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run in the background, held by us and told of when it fails."""
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_end)

    def _on_task_end(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, LauncherGoneError):
            log.error("a background task failed", exc_info=error)


async def _within(seconds: float, event: asyncio.Event) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True


def _argv_file(argv: tuple[str, ...]) -> int:
    """The argv for init, each argument ended by NUL, in a file of memory: the launcher never reads it."""
    descriptor = os.memfd_create("pjw-argv", os.MFD_CLOEXEC)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(b"".join(argument.encode() + b"\0" for argument in argv))
    return descriptor
