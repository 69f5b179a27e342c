"""Worker: start, stop, get, list, logs. It depends on no network, and jobs depend on no worker."""

import asyncio
import logging
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Final, Self

from pjw.errors import (
    InvalidJobError,
    JobNotFoundError,
    JobStateError,
    LauncherGoneError,
    LimitReachedError,
    OutputLostError,
    PjwError,
)
from pjw.model import Job, JobSpec, Limits
from pjw.output import Head, Inotify, OutputLog, follow, no_head
from pjw.worker.background import Background
from pjw.worker.endings import Endings
from pjw.worker.job import LiveJob
from pjw.worker.launcher_client import LauncherClient, readable
from pjw.worker.launcher_process import LauncherProcess, require_root, start_launcher
from pjw.worker.numbers import WorkerNumbers, count_all
from pjw.worker.quota import RunningJobs, check_stored_bytes
from pjw.worker.record import parse_record
from pjw.worker.retention import Pruner
from pjw.worker.settings import WorkerSettings
from pjw.worker.state_dir import StateDir

LOCAL_CLIENT: Final = "local"
PAGE_MAX: Final = 1000
# From SIGKILL to every process until init itself is killed: long, since only a command
# stuck in the kernel comes so far.
LAST_RESORT_SECONDS: Final = 5
# A launch takes milliseconds.
LAUNCH_SECONDS: Final = 30

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
        self._settings = settings
        self._launcher: Final = LauncherClient(launcher)
        self._inotify: Final = Inotify()
        self._live: Final[dict[int, LiveJob]] = {}
        self._running: Final = RunningJobs(settings.quotas)
        self._pruner: Final = Pruner(state, settings.retention)
        self._background: Final = Background()
        self._endings: Final = Endings(
            state, self._launcher, self._live, self._running, self._pruner, self._background
        )
        self._launches: Final[set[asyncio.Task[Job]]] = set()
        # a client's user never changes
        self._uids: Final[dict[str, int]] = {}

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
        self._launcher.close()
        # launches under way end by that, and may still want the table
        await self._background.close()
        await asyncio.gather(*self._launches, return_exceptions=True)
        try:
            await self._state.store.sync()
        except PjwError as error:
            log.error("%s", error)
        await self._launcher.join()
        self._inotify.close()
        self._state.close()

    @property
    def live_count(self) -> int:
        """How many jobs have not ended."""
        return len(self._live)

    def reconfigure(self, settings: WorkerSettings) -> None:
        """Take other default limits, grace period, retention and quotas; the rest the launcher was told."""
        self._settings = settings
        self._running.quotas = settings.quotas
        self._pruner.keep(settings.retention)

    async def launcher_answers(self) -> None:
        """Return when the launcher has answered a question. Raises LauncherGoneError when it cannot."""
        await self._launcher.request_nothing()

    async def numbers(self) -> WorkerNumbers:
        """How much of everything there is, for who watches over it."""
        return await count_all(self._state, self._live, self._endings.by_reason, self._launcher)

    async def launcher_gone(self) -> None:
        """Return when the launcher has died; nothing can be started or stopped then."""
        await self._launcher.gone.wait()

    async def open_operator_file(self, place: int) -> int:
        """A file that the launcher was told of at its start, open for reading; the caller owns it."""
        return await self._launcher.request_open_file(place)

    # --- start

    async def start(self, spec: JobSpec, client_name: str = LOCAL_CLIENT) -> Job:
        """Start a job; return when its command was executed.

        Its row is on the disk then: not even a power cut makes pjw forget a job that was told of.
        Raises InvalidJobError, LaunchError (no such program, not executable),
        LimitReachedError (a quota, no space, no processes) or KernelError; then no job came to be.
        A caller who is cancelled before the answer gets no job either. LauncherGoneError may come
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
        self._running.take(client_name)
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
        try:
            await self._check_stored_bytes(client_name)
            uid = await self._uid_of(client_name)
            job = await self._state.store.add(client_name, spec, limits)
        except BaseException:
            self._running.give_back(client_name)
            raise
        # The row is there, so whatever happens to us, the next worker can find the process. Its
        # way to the disk and the launch go side by side.
        synced = asyncio.ensure_future(self._state.store.sync())
        try:
            job = await self._launch(job, spec, uid)
        finally:
            await asyncio.wait({synced})
            unsynced = synced.exception()
        if unsynced is not None:
            self._background.spawn(self._end_and_discard(job.id))
            raise unsynced
        return job

    async def _check_stored_bytes(self, client_name: str) -> None:
        quotas = self._settings.quotas
        if not quotas.stored_bytes_max and not quotas.stored_bytes_total_max:
            return
        own, total = await self._state.store.ended_bytes(client_name)
        for live in self._live.values():
            if quotas.stored_bytes_total_max or live.job.client_name == client_name:
                size = self._state.output_size(live.job.id)
                total += size
                own += size if live.job.client_name == client_name else 0
        check_stored_bytes(quotas, client_name, own, total)

    async def _uid_of(self, client_name: str) -> int:
        if client_name not in self._uids:
            number = await self._state.store.client_number(client_name)
            if number >= self._settings.uid_count:
                raise LimitReachedError(
                    f"all {self._settings.uid_count} user ids for clients are taken",
                    hint="the operator can configure a larger range",
                )
            self._uids[client_name] = self._settings.uid_first + number
        return self._uids[client_name]

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
            self._running.give_back(job.client_name)
            self._state.remove_job(job.id)
            await self._state.store.discard(job.id)
            raise
        finally:
            live.launch_over.set()
        live.exec_seen(started_ns)
        self._watch(live, pidfd)
        return live.job

    def _watch(self, live: LiveJob, pidfd: int) -> None:
        live.watch(pidfd, lambda: self._background.spawn(self._endings.finish(live)))

    async def _ask_for_launch(self, job: Job, spec: JobSpec, uid: int) -> tuple[int, int]:
        self._launcher.require_descriptors()
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
            self._background.spawn(self._end_and_discard(launch.result().id))

    async def _end_and_discard(self, job_id: int) -> None:
        await self._launcher.request_kill(job_id)
        live = self._live.get(job_id)
        if live is not None:
            await live.ended.wait()
        self._state.remove_job(job_id)
        await self._state.store.discard(job_id)

    # --- stop

    async def stop(self, job_id: int, grace_seconds: float | None = None, owner: str | None = None) -> Job:
        """End a job: SIGTERM to all its processes, after the grace period SIGKILL.

        Returns the final snapshot when nothing is left of the job but its row and its output; a
        job that has ended already is success. Goes on when the caller is cancelled. Raises JobNotFoundError.
        """
        live = await self._launched(job_id, owner)
        if live is None or live.ended.is_set():
            return await self.get(job_id, owner)
        if not live.job.state.final:
            live.stop_asked()
        grace = self._settings.stop_grace_seconds if grace_seconds is None else grace_seconds
        self._background.spawn(self._escalate(live, grace))
        await self._wait_for(live.ended)
        await self._wait_for(live.removed)
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

    async def delete(self, job_id: int, owner: str | None = None) -> None:
        """Forget an ended job, with its output; who reads it right now may read on.

        Raises JobNotFoundError, and JobStateError for a job that has not ended.
        """
        job = await self.get(job_id, owner)
        if job_id in self._live or not job.state.final:
            raise JobStateError(f"cannot remove job {job_id}: it has not ended", hint=f"pjw stop {job_id}")
        await self._pruner.remove(job_id)

    # --- look

    async def get(self, job_id: int, owner: str | None = None) -> Job:
        """One job as it is now. Raises JobNotFoundError."""
        live = self._live_of(job_id, owner)
        if live is not None:
            return live.job
        job = await self._state.store.get(job_id, owner) if 0 < job_id < 2**63 else None
        if job is None:
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
        await self._wait_for(live.ended)
        return live.job

    async def logs(
        self, job_id: int, offset: int = 0, owner: str | None = None, head: Head = no_head
    ) -> AsyncGenerator[bytes, None]:
        """Yield a job's output from byte *offset* on, as it comes; end when the job has ended.

        *head* makes what each chunk begins with from how many bytes it has.

        Raises JobNotFoundError; OffsetError for an offset beyond what is there; and, at the end of
        what is there, OutputLostError when the host went down before the disk had all of it.
        """
        live = await self._launched(job_id, owner)
        lost: OutputLostError | None = None
        if live is not None:
            output = live.output
        else:
            job = await self.get(job_id, owner)
            if not job.state.final:
                # its row is there, and its start is just about to be
                raise JobNotFoundError(job_id)
            size, expected = self._state.output_size(job_id), job.output_bytes or 0
            if size < expected:
                lost = OutputLostError(
                    f"the output of job {job_id} is cut short: the host went down, and of {expected} bytes"
                    f" {size} were on its disk"
                )
            output = OutputLog(self._state.output_path(job_id), self._inotify, ended=True)
        # aclosing: a generator that is left to the garbage collector would keep its watch
        async with aclosing(follow(output, offset, head)) as chunks:
            async for chunk in chunks:
                yield chunk
        if lost:
            raise lost

    def _live_of(self, job_id: int, owner: str | None) -> LiveJob | None:
        # Another's is none, here as well as in the table, and looked for there like one that never was.
        live = self._live.get(job_id)
        return live if live is not None and owner in (None, live.job.client_name) else None

    async def _launched(self, job_id: int, owner: str | None) -> LiveJob | None:
        """The owner's live job, once its launch is over; None when there is none (any more)."""
        live = self._live_of(job_id, owner)
        if live is None:
            return None
        await live.launch_over.wait()
        return self._live_of(job_id, owner)

    async def _wait_for(self, event: asyncio.Event) -> None:
        happened = asyncio.ensure_future(event.wait())
        gone = asyncio.ensure_future(self._launcher.gone.wait())
        try:
            await asyncio.wait({happened, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            happened.cancel()
            gone.cancel()
        if not event.is_set():
            raise LauncherGoneError("the launcher has gone; the job goes on")

    # --- after a restart

    async def adopt(self) -> None:
        """Take over the jobs of the worker before us: what still runs, and what ended meanwhile.

        Call it once, before anything else.
        """
        boot_id = _boot_id()
        rebooted = await self._state.store.boot_id() not in (None, boot_id)
        ended: list[LiveJob] = []
        for job in await self._state.store.alive():
            live = LiveJob(job, OutputLog(self._state.output_path(job.id), self._inotify, ended=False))
            live.launch_over.set()
            self._live[job.id] = live
            self._running.adopt(job.client_name)
            _, pidfd = await self._launcher.request_adopt(job.id)
            if pidfd is None:
                ended.append(live)
                continue
            live.exec_seen(parse_record(self._state.read_status(job.id)).started_ns)
            self._watch(live, pidfd)
        await asyncio.gather(*(self._endings.finish(live, rebooted=rebooted) for live in ended))
        for job_id in await self._launcher.request_job_ids():
            if job_id not in self._live:
                await self._remove_stray(job_id)
        # Only now: whoever is killed before this has not told yet which jobs the last boot took.
        await self._state.store.set_boot_id(boot_id)
        self._background.spawn(self._pruner.run())

    async def _remove_stray(self, job_id: int) -> None:
        # A cgroup or scratch directory without an unfinished row: its job ended and was written
        # down, and only the removal is missing (or a power cut undid it); or the table was taken
        # away, and then nobody can ask for the job.
        _, pidfd = await self._launcher.request_adopt(job_id)
        if pidfd is not None:
            await self._launcher.request_kill(job_id, init_too=True)
            with os.fdopen(pidfd, "rb", closefd=True):
                await readable(pidfd)
        await self._launcher.request_remove(job_id)


def _boot_id() -> str:
    """Which boot of the host this is (random(4)): a new one each time."""
    return Path("/proc/sys/kernel/random/boot_id").read_bytes().decode().strip()


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
