"""Worker: start, stop, get, list, logs. It depends on no network, and jobs depend on no worker."""

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from signal import SIGKILL, SIGTERM
from typing import Final, Self

from pjw.errors import (
    ConfigError,
    InvalidJobError,
    JobNotFoundError,
    JobStateError,
    KernelError,
    LauncherGoneError,
    LimitRangeError,
    LimitReachedError,
    PjwError,
)
from pjw.model import ClientQuota, GroupUse, Job, JobSpec, JobState, UsageSample
from pjw.output import Inotify
from pjw.worker.adoption import adopt
from pjw.worker.background import Background
from pjw.worker.disk import DiskSampler, ScratchUse
from pjw.worker.endings import Endings
from pjw.worker.flag import Flag, first_of
from pjw.worker.held import HeldOutputs
from pjw.worker.input import Inputs, InputWriter, ended_error, require_input
from pjw.worker.job import LiveJob
from pjw.worker.launcher_client import LauncherClient
from pjw.worker.launcher_process import LauncherProcess, check_limits, require_root, start_launcher
from pjw.worker.logs import ALL_OUTPUT, Output, Part, Reading, check_stream, output_of_ended
from pjw.worker.numbers import WorkerNumbers, count_all
from pjw.worker.pages import ALL_JOBS, JobFilter, Page
from pjw.worker.quota import RunningJobs, StoredBytes, most_of_one_job
from pjw.worker.retention import Pruner
from pjw.worker.settings import NO_LIMIT_ONLY, DiskMarks, WorkerSettings
from pjw.worker.starts import Starts
from pjw.worker.state_dir import StateDir
from pjw.worker.stopping import Stopping
from pjw.worker.usage import with_end
from pjw.worker.usage_sampler import UsageSampler
from pjw.worker.users import Users

LOCAL_CLIENT: Final = "local"
PAGE_MAX: Final = 1000
# the last one before the real-time signals
SIGNAL_MAX: Final = 31

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
        self._ready: Final = launcher.ready
        self._launcher: Final = LauncherClient(launcher)
        self._inotify: Final = Inotify()
        self._live: Final[dict[int, LiveJob]] = {}
        self._running: Final = RunningJobs(settings)
        scratch_used: dict[int, ScratchUse] = {}
        self._stored: Final = StoredBytes(state, self._live, scratch_used, settings.quotas)
        self._inputs: Final = Inputs(state, self._stored, settings.quotas.input_bytes_max)
        self._tails: Final = asyncio.Lock()
        self._pruner: Final = Pruner(state, settings.retention)
        self._background: Final = Background()
        self._stopping: Final = Stopping(self._launcher, self._background)
        self._held: Final = HeldOutputs(state)
        self._sampler: Final = UsageSampler(state, self._launcher, self._live, self._held)
        self._disk: Final = DiskSampler(
            state,
            launcher.scratch,
            self._launcher,
            self._live,
            scratch_used,
            settings.disk,
            self._end_for_disk,
            self._held,
        )
        self._disk.counts = self._stored.bounded
        self._endings: Final = Endings(
            state,
            self._launcher,
            self._live,
            self._running,
            self._pruner,
            self._sampler,
            self._disk,
            self._stopping,
            self._held,
            self._background,
        )
        self._users: Final = Users(state.store, launcher.ready.uid_first, settings.uid_count)
        self._starts: Final = Starts(
            state,
            self._launcher,
            self._inotify,
            self._live,
            self._running,
            self._stored,
            self._endings,
            self._stopping,
            self._users,
            self._background,
        )

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

    async def adopt(self) -> None:
        """Take over the jobs of the worker before us. Call it once, before anything else; `open` does."""
        await adopt(
            self._state,
            self._launcher,
            self._inotify,
            self._live,
            self._running,
            self._endings,
            self._background,
        )
        for words in await self.give_shares():
            log.warning("%s", words)
        self._background.keep("removal of ended jobs", self._pruner.run())
        self._background.keep("samples of running jobs", self._sampler.run())
        self._background.keep("marks of free space", self._disk.run())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Let go of everything. Jobs go on; who waits for one or follows it gets LauncherGoneError."""
        for live in self._live.values():
            live.let_go()
            live.abandon_output()
        self._launcher.close()
        # launches under way end by that, and may still want the table
        await self._background.close()
        await self._starts.over()
        try:
            await self._state.store.sync()
        except PjwError as error:
            log.error("%s", error)
        await self._launcher.join()
        self._inotify.close()
        self._held.close()
        self._disk.close()
        self._state.close()

    @property
    def disk_marks(self) -> DiskMarks:
        """How much of each file system that jobs write to stays free."""
        return self._disk.marks

    @property
    def live_count(self) -> int:
        """How many jobs have not ended."""
        return len(self._live)

    def reconfigure(self, settings: WorkerSettings) -> None:
        """Take other limits, grace period, marks, retention, quotas and shares.

        Running jobs have their shares by `give_shares`. The launcher got the rest at its start. Raises
        ConfigError, and takes nothing, for limits of disk IO where there was no disk at the start, and for a
        default limit below the floor of the start.
        """
        check_limits(self._ready, settings.default_limits)
        if below := settings.default_limits.first_below(self._settings.floor):
            raise ConfigError(
                f"the default limit {below} is below the floor that the launcher got at the start",
                hint="restart pjwd",
            )
        self._settings = settings
        self._running.settings = settings
        self._stored.set_quotas(settings.quotas)
        self._disk.marks, self._disk.counts = settings.disk, self._stored.bounded
        self._inputs.set_bytes_max(settings.quotas.input_bytes_max)
        self._pruner.keep(settings.retention)

    async def give_shares(self) -> list[str]:
        """Set the share of each client with jobs again; give in words what could not be set beside them.

        One of them may have more processor time (v1), or too much memory is in use.
        """
        not_set: list[str] = []
        for client_name in self._running.clients():
            share = self._settings.shares.of(client_name)
            try:
                uid = await self._users.of(client_name)
                words = await self._launcher.request_set_share(uid, share)
            except (KernelError, LimitReachedError) as error:
                # one client's trouble, not the others'
                words = (str(error),)
            not_set += [f"share of {client_name}: {each}" for each in words]
        return not_set

    async def launcher_answers(self) -> None:
        """Return when the launcher has answered a question. Raises LauncherGoneError when it cannot."""
        await self._launcher.request_nothing()

    async def numbers(self) -> WorkerNumbers:
        """How much of everything there is, for who watches over it."""
        return await count_all(
            self._state, self._live, self._endings.by_reason, len(self._held), self._launcher
        )

    async def launcher_gone(self) -> None:
        """Return when the launcher has died; nothing can be started or stopped then."""
        await self._launcher.gone.wait()

    async def failed(self) -> None:
        """Return when a bug has killed a task that this worker needs all along; the log says which.

        Close it then, and open another: jobs go on meanwhile.
        """
        await self._background.failed.wait()

    async def open_operator_file(self, place: int) -> int:
        """A file that the launcher was told of at its start, open for reading; the caller owns it."""
        return await self._launcher.request_open_file(place)

    async def open_audit_log(self) -> int:
        """The audit log that the launcher's policy names, open for appending; the caller owns it."""
        return await self._launcher.request_audit_log()

    # --- start

    async def start(self, spec: JobSpec, client_name: str = LOCAL_CLIENT) -> Job:
        """Start a job; return when its command was executed.

        Its row is on the disk then: not even a power cut makes pjw forget a job that was told of.
        Raises InvalidJobError, NameTakenError, LaunchError (no such program, not executable), WorkdirError,
        LimitReachedError (a quota, no space, no processes) or KernelError; then no job came to be.
        A caller who is cancelled before the answer gets no job either, unless the spec has a request id,
        with which it will ask again: that gets the job of the first time. LauncherGoneError may come when
        the job was started: the next worker knows.
        """
        limits = self._settings.default_limits.with_overrides(spec.limits)
        if above := limits.first_above(self._settings.ceiling):
            most, value = getattr(self._settings.ceiling, above), getattr(limits, above)
            raise LimitRangeError(
                f"limit {above} must be at most {most} on this server, not {value or 'unlimited'}",
                limit=above,
                value=value,
                most=most,
            )
        if below := limits.first_below(self._settings.floor):
            least, value = getattr(self._settings.floor, below), getattr(limits, below)
            bound = "0, no limit," if least == NO_LIMIT_ONLY else f"at least {least}"
            raise LimitRangeError(
                f"limit {below} must be {bound} on this server, not {value}",
                limit=below,
                value=value,
                least=least,
            )
        return await self._starts.start(spec, client_name, limits)

    # --- stop

    async def stop(
        self,
        job_id: int,
        grace_seconds: float | None = None,
        owner: str | None = None,
        signal: int = SIGTERM,
    ) -> Job:
        """End a job: *signal* (1 to 31) to all its processes, after the grace period SIGKILL.

        Returns the final snapshot when nothing is left of the job but its row and its output; a
        job that has ended already is success. Goes on when the caller is cancelled. Raises
        JobNotFoundError, InvalidJobError for what is no such signal, and JobStateError for a job that
        was killed and that the kernel cannot end yet.
        """
        if not 1 <= signal <= SIGNAL_MAX:
            raise InvalidJobError(f"a job is stopped with a signal from 1 to {SIGNAL_MAX}, not {signal}")
        live = await self._launched(job_id, owner)
        if live is None or live.ended.is_set():
            return await self.get(job_id, owner)
        grace = self._settings.stop_grace_seconds if grace_seconds is None else grace_seconds
        self._stopping.begin(live, grace, signal)
        await self._wait_for(live.ended, live.stuck)
        if not live.ended.is_set():
            raise JobStateError(f"job {job_id} {live.job.detail}", hint=f"pjw wait {job_id} tells of its end")
        await self._wait_for(live.removed)
        return live.job

    def _end_for_disk(self, live: LiveJob) -> None:
        self._stopping.begin(live, 0, SIGKILL)

    async def delete(self, job_id: int, owner: str | None = None) -> None:
        """Forget an ended job, with its output; who reads it right now may read on.

        Raises JobNotFoundError, and JobStateError for a job that has not ended.
        """
        job = await self.get(job_id, owner)
        if job_id in self._live or not job.state.final:
            raise JobStateError(f"cannot remove job {job_id}: it has not ended", hint=f"pjw stop {job_id}")
        await self._pruner.remove(job_id)

    # --- input

    @asynccontextmanager
    async def write_input(self, job_id: int, owner: str | None = None) -> AsyncGenerator[InputWriter, None]:
        """Write to the input of a job that was started with `input`, from where the one before has stopped.

        To leave it is no end: the command waits for the rest, whoever brings it. Raises JobNotFoundError;
        JobStateError for a job without input or that has ended, also in the middle, or when another has
        begun to write to it; LimitReachedError at a quota of stored bytes.
        """
        live = await self._launched(job_id, owner)
        require_input(live.job if live is not None else await self.get(job_id, owner))
        if live is None or live.ended.is_set():
            raise ended_error(job_id)
        client_name = live.job.client_name
        await self._stored.check(client_name)
        async with self._inputs.writer(job_id, client_name, lambda: self._wait_for(live.ended)) as writer:
            yield writer

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

    async def get_with_usage(self, job_id: int, owner: str | None = None) -> Job:
        """One job as it is now, with its usage while its command runs. Raises JobNotFoundError."""
        live = self._live_of(job_id, owner)
        if live is None or live.job.state is JobState.STARTING:
            return await self.get(job_id, owner)
        sample = await self._sampler.of_job(job_id)
        # it may have ended meanwhile
        return live.job if live.job.state.final else replace(live.job, usage_now=sample)

    async def list(self, owner: str | None = None, after: int = 0, count: int = PAGE_MAX) -> Sequence[Job]:
        """The jobs behind id *after*, in the order of their ids: *count*, or fewer when they are long."""
        return (await self.page(owner, after, count)).jobs

    async def page(
        self,
        owner: str | None = None,
        after: int = 0,
        count: int = PAGE_MAX,
        wanted: JobFilter = ALL_JOBS,
        *,
        newest_first: bool = False,
    ) -> Page:
        """Jobs behind id *after* that fit: *count* at most, and perhaps none though there is a next page."""
        page = await self._state.store.page(owner, after, count, wanted, newest_first=newest_first)
        jobs = [self._live[job.id].job if job.id in self._live else job for job in page.jobs]
        if wanted.states:
            jobs = [job for job in jobs if job.state in wanted.states]
        return Page(jobs, page.next_after)

    async def wait(self, job_id: int, owner: str | None = None, *, or_stuck: bool = False) -> Job:
        """Wait until a job has ended; its final snapshot. Raises JobNotFoundError.

        With *or_stuck* it also returns when the job was killed and does not end, or when its output waits for
        the disk. Its `detail` says which.
        """
        live = await self._launched(job_id, owner)
        if live is None:
            return await self.get(job_id, owner)
        await self._wait_for(live.ended, *([live.stuck, live.held] if or_stuck else []))
        return live.job

    async def usage_history(self, job_id: int, owner: str | None = None) -> tuple[Job, Sequence[UsageSample]]:
        """A job, and what it had used at moments of its life: SAMPLES_MAX at most, and its end.

        Raises JobNotFoundError.
        """
        job = await self.get(job_id, owner)
        return job, with_end(await self._state.in_thread(self._state.read_usage, job_id), job)

    async def usage_now(
        self, owner: str | None = None, fresh_seconds: float = 1, within_seconds: float = 1
    ) -> Sequence[tuple[Job, UsageSample | None]]:
        """The jobs that have not ended, and what each uses, measured at most *fresh_seconds* ago.

        Where that takes longer than *within_seconds*, as with thousands of jobs, some samples are older, or
        not there yet.
        """
        return await self._sampler.now(owner, fresh_seconds, within_seconds)

    async def quota(self, client_name: str = LOCAL_CLIENT) -> ClientQuota:
        """The limits, use and share of a client. Raises KernelError."""
        settings, running = self._settings, self._running
        count, promised = running.of(client_name)
        # a client without jobs need not have a user id
        use = (
            await self._launcher.request_measure_client(await self._users.of(client_name))
            if count
            else GroupUse()
        )
        share = settings.shares.of(client_name)
        sums = share.sums.within(settings.sums)
        promised_max = min(filter(None, running.memory_max(client_name)), default=0)
        weights = [settings.shares.of(name).weight for name in {client_name, *running.clients()}]
        return ClientQuota(
            client_name=client_name,
            defaults=settings.default_limits,
            ceilings=most_of_one_job(settings.ceiling, sums, promised_max),
            sums=sums,
            weight=share.weight,
            total_weight=sum(weights),
            running=count,
            running_max=settings.quotas.running_max,
            memory_promised_bytes=promised,
            memory_promised_max_bytes=promised_max,
            stored_bytes=await self._stored.of(client_name),
            stored_bytes_max=settings.quotas.stored_bytes_max,
            use=use,
        )

    async def logs(
        self, job_id: int, part: Part = ALL_OUTPUT, owner: str | None = None
    ) -> AsyncGenerator[bytes, None]:
        """Yield a part of a job's output, as it comes; end when the job has ended.

        Raises what `read_logs` and a Reading raise.
        """
        reading = await self.read_logs(job_id, part, owner)
        async with aclosing(reading.chunks()) as chunks:
            async for chunk in chunks:
                yield chunk

    async def read_logs(self, job_id: int, part: Part = ALL_OUTPUT, owner: str | None = None) -> Reading:
        """A part of a job's output that is about to be read: where it begins is known.

        Raises JobNotFoundError, and JobStateError for a stderr that is not kept apart.
        """
        output = await self._output(job_id, part, owner)
        return await output.reading(part, self._tails)

    async def _output(self, job_id: int, part: Part, owner: str | None) -> Output:
        live = await self._launched(job_id, owner)
        job = live.job if live is not None else await self.get(job_id, owner)
        if live is None and not job.state.final:
            # its row is there, and its start is just about to be
            raise JobNotFoundError(job_id)
        check_stream(job, part)
        if live is None:
            return output_of_ended(self._state, self._inotify, job, stderr=part.stderr)
        return Output(live.stderr if part.stderr and live.stderr else live.output)

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

    async def _wait_for(self, *flags: Flag) -> None:
        await first_of(*flags, self._launcher.gone)
        if not any(flag.is_set() for flag in flags):
            raise LauncherGoneError("the launcher has gone; the job goes on")
