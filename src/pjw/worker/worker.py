"""Worker: start, stop, get, list, logs. It depends on no network, and jobs depend on no worker."""

import asyncio
import logging
import os
import socket
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from signal import SIGKILL, SIGTERM
from typing import Final, Self

from pjw.arrays import Element
from pjw.errors import (
    ConfigError,
    CopyError,
    GpuError,
    InvalidJobError,
    JobNotFoundError,
    JobStateError,
    KernelError,
    LauncherGoneError,
    LimitRangeError,
    LimitReachedError,
    MountNotFoundError,
    PjwError,
)
from pjw.model import (
    Archive,
    ClientQuota,
    GroupUse,
    Image,
    ImageConfig,
    Job,
    JobSpec,
    JobState,
    Limits,
    Session,
    TerminalSize,
    UsageSample,
    Workspace,
    check_port,
    offered,
)
from pjw.output import Inotify
from pjw.worker.adoption import adopt
from pjw.worker.artifacts import Keeping
from pjw.worker.changes import Batch, Changes, Watched
from pjw.worker.disk import DiskSampler, TreeUse
from pjw.worker.egress import Connection, Connections
from pjw.worker.endings import Endings
from pjw.worker.gpus import Gpus
from pjw.worker.held import HeldOutputs
from pjw.worker.host import Admission
from pjw.worker.images import Images
from pjw.worker.input import Inputs, InputWriter, ended_error, require_input
from pjw.worker.job import LiveJob
from pjw.worker.jobs import Jobs
from pjw.worker.launch_turns import LaunchTurns
from pjw.worker.launcher_client import LauncherClient
from pjw.worker.launcher_process import LauncherProcess, check_limits, require_root, start_launcher
from pjw.worker.metrics import Series, WorkerNumbers, count_all
from pjw.worker.orders import order_size
from pjw.worker.pages import ALL_JOBS, JobFilter, Page
from pjw.worker.parts import Parts
from pjw.worker.queue import Queue
from pjw.worker.queue_calls import QueueCalls
from pjw.worker.queue_rows import WaitingJob
from pjw.worker.quota import RunningJobs, StoredBytes, most_of_one_job
from pjw.worker.reading import ALL_OUTPUT, Output, Part, Reading, artifacts_of, check_stream, output_of_ended
from pjw.worker.retention import BATCH, Pruner
from pjw.worker.sessions import Sessions
from pjw.worker.settings import NO_LIMIT_ONLY, DiskMarks, WorkerSettings
from pjw.worker.starts import Starts
from pjw.worker.state_dir import StateDir
from pjw.worker.stopping import Stopping
from pjw.worker.store import Users
from pjw.worker.tasks import Background, Flag, first_of
from pjw.worker.uploads import Uploads
from pjw.worker.usage import with_end
from pjw.worker.usage_sampler import UsageSampler
from pjw.worker.workspaces import Workspaces

LOCAL_CLIENT: Final = "local"
PAGE_MAX: Final = 1000
# the last one before the real-time signals
SIGNAL_MAX: Final = 31
ALL_CHANGES: Final = Watched()

log: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Offers:
    """An operator's offers to jobs beyond processors and memory, without the clients that may have them."""

    gpus: int
    mounts: Sequence[str]
    images: Sequence[str]
    # whether there are names on the network that jobs of some client may reach
    names: bool


class Worker(QueueCalls):
    """Runs jobs on this machine.

    Methods that take an `owner` know only that client's jobs; None is all of them. Those that take an Element
    know an element of an array by its index, also before it has an id. Close it with `close()`, or use it as
    an async context manager; jobs go on, and the next worker on the same state directory finds them.

    Every coroutine may raise LauncherGoneError when the launcher has died or the worker was closed,
    JobTableError when the table of jobs cannot be read or written, and LimitReachedError when the disk is
    full.
    """

    def __init__(self, state: StateDir, launcher: LauncherProcess, settings: WorkerSettings) -> None:
        """Take over an open state directory and a launcher; `open` does it all."""
        self._state: Final = state
        self._settings = settings
        self._ready: Final = launcher.ready
        self._launcher: Final = LauncherClient(launcher)
        self._inotify: Final = Inotify()
        self._background: Final = Background()
        self._users: Final = Users(state.store, launcher.ready.uid_first, settings.uid_count)
        self._workspaces: Final = Workspaces(
            state.store, self._launcher, self._users, settings, self._background
        )
        self._images: Final = Images(
            state.store, self._launcher, self._workspaces, settings, self._background
        )
        self._gpus: Final = Gpus(state.store, self._launcher, settings)
        self._running: Final = RunningJobs(settings)
        self._jobs: Final = Jobs(self._running, self._workspaces, self._gpus)
        self._live: Final = self._jobs.live
        scratch_used: dict[int, TreeUse] = {}
        self._stored: Final = StoredBytes(state, self._live, scratch_used, settings.quotas)
        self._parts: Final = Parts(
            state,
            self._launcher,
            self._inotify,
            self._background,
            self._users,
            self._jobs,
            self._stored,
            LaunchTurns(),
        )
        parts = self._parts
        self._inputs: Final = Inputs(self._stored, settings.quotas.input_bytes_max)
        self._tails: Final = asyncio.Lock()
        self._pruner: Final = Pruner(state, settings.retention)
        # of jobs, to names on the network
        self.connections: Final = Connections()
        # of the user of this worker, reported with its own
        self.more_numbers: Callable[[], Sequence[Series]] = lambda: ()
        self._stopping: Final = Stopping(self._launcher, self._background, state.store.note)
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
        self._disk.counts = lambda: self._stored.bounded
        self._disk.growing = self._workspaces.growing
        self._admission: Final = Admission()
        # set when fewer jobs run or are being started than before
        self._fewer: Final = Flag()
        self._endings: Final = Endings(
            parts,
            self._pruner,
            self._sampler,
            self._disk,
            self._stopping,
            self._held,
            Keeping(state, self._inotify, self._stored),
        )
        self._sessions: Final = Sessions(parts, self._inputs)
        self._stored.sessions = self._sessions.bytes_of
        self._uploads: Final = Uploads(state, self._stored, self._inputs)
        self._stored.uploads = self._uploads.bytes_of
        self._starts: Final = Starts(
            parts,
            self._running,
            self._endings,
            self._stopping,
            self._images,
            self._uploads,
            self._gpus,
            self._admission,
        )
        self._queue = Queue(state.store, self, self._background, settings)
        self._changes: Final = Changes(state.store, self._background, self._launcher.gone, self._queue.shown)
        self._endings.ended.append(self._queue.job_ended)
        self._endings.retried.append(self._queue.retried)
        self._pruner.removed.append(self._queue.room_was_made)
        self._queue.busy, self._queue.holder = self._workspaces.busy, self._workspaces.holder
        self._workspaces.freed.append(self._queue.workspace_freed)
        self._workspaces.counted.append(self._queue.room_was_made)
        self._queue.free_gpus = lambda: self._gpus.free
        self._gpus.freed.append(self._queue.gpus_freed)
        self._queue.admits = lambda: not self._admission.drained
        self._admission.changed.append(self._queue.room_was_made)
        self._endings.ended.append(lambda _: self._fewer.set())
        self._starts.settled = self._queue.settled = self._fewer.set

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
        """Take over the jobs of the worker before us. Call it once, before anything else; `open` does.

        Raises KernelError when the state directory or a job's cgroup cannot be read.
        """
        if self._settings.network.offered:
            await self.connections.begin(self._launcher)
        await adopt(self._parts, self._endings, self._gpus, self._settings.network)
        await self._workspaces.begin(self._ready.uid_first)
        for job_id, client_name, key in await self._images.begin():
            self._background.spawn(self._give_up_load(job_id, client_name, key))
        await self._sessions.adopt()
        await self._uploads.adopt()
        await self._queue.begin([live.job for live in self._live.values()])
        for words in await self.give_shares():
            log.warning("%s", words)
        self._background.keep("removal of ended jobs", self._pruner.run())
        self._background.keep("samples of running jobs", self._sampler.run())
        self._background.keep("marks of free space", self._disk.run())
        self._background.keep("queue", self._queue.run())
        self._background.keep("removal of uploads", self._uploads.run())
        self._background.keep("workspaces", self._workspaces.run())
        self._background.keep("images", self._images.run())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close everything. Jobs go on; callers that wait for one or follow it get LauncherGoneError."""
        for live in self._live.values():
            live.let_go()
            live.abandon_output()
        self._sessions.close()
        self.connections.close()
        self._launcher.close()
        self._endings.close()
        # launches under way end by that, and may still want the table
        await self._background.close()
        await self._starts.over()
        await self._sessions.over()
        await self._workspaces.over()
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
        """The space of each file system that jobs write to that stays free."""
        return self._disk.marks

    @property
    def live_count(self) -> int:
        """The number of jobs that have not ended."""
        return len(self._live)

    @property
    def admission(self) -> Admission:
        """Whether jobs are started, which the operator decides."""
        return self._admission

    @property
    def drained(self) -> bool:
        """Whether the operator has drained this machine."""
        return self._admission.drained

    async def emptied(self) -> None:
        """Return when no job runs or is being started. Raises LauncherGoneError when nobody can tell."""
        while self._live or self._starts.under_way or self._queue.starting:
            self._fewer.clear()
            await self._wait_for(self._fewer)

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
        for each in (
            self._running, self._stored, self._disk, self._inputs, self._pruner,
            self._workspaces, self._images, self._queue,
        ):  # fmt: skip
            each.reconfigure(settings)

    async def give_shares(self) -> list[str]:
        """Set the share of each client with jobs again; return in words the parts that could not be set.

        One of them may have more processor time (v1), or too much memory is in use. Raises LauncherGoneError.
        """
        not_set: list[str] = []
        for client_name in self._running.clients():
            share = self._settings.shares.of(client_name)
            try:
                uid = await self._users.of(client_name)
                words = await self._launcher.request_set_share(uid, share)
            except (KernelError, LimitReachedError) as error:
                # a fault that concerns one client, not the others
                words = (str(error),)
            not_set += [f"share of {client_name}: {each}" for each in words]
        return not_set

    async def answers(self) -> None:
        """Return when the launcher has answered a question. Raises LauncherGoneError when it cannot."""
        await self._launcher.request_nothing()

    async def numbers(self) -> WorkerNumbers:
        """Return the counters for monitoring (docs/monitoring.md).

        Raises only the errors of every coroutine.
        """
        return await count_all(
            self._state,
            self._live,
            self._endings.by_reason,
            len(self._held),
            self._launcher,
            self._queue,
            self.connections.counts,
            self.more_numbers(),
            drained=self.drained,
        )

    async def gone(self) -> None:
        """Return when the launcher has died; nothing can be started or stopped then."""
        await self._launcher.gone.wait()

    @property
    def uid_first(self) -> int:
        """The first of the user ids of jobs, one for each client."""
        return self._ready.uid_first

    async def offers(self) -> Offers:
        """Return the names of the mounts, images and GPUs that the operator offers to jobs here.

        Raises KernelError when the operator's list of images cannot be read.
        """
        return Offers(
            self._gpus.total,
            tuple(each.name for each in self._settings.mounts),
            tuple(each.name for each in await self._images.listed(None) if not each.client_name),
            names=bool(self._settings.network.offered),
        )

    def on_connection(self, tell: Callable[[Connection], None]) -> None:
        """Have *tell* hear of each connection that a job has made to a name on the network."""
        self.connections.told.append(tell)

    def on_end(self, tell: Callable[[Job], None]) -> None:
        """Have *tell* called with each job that has ended from now on, when its end was written down."""
        self._endings.ended.append(tell)

    def end_was_told(self) -> None:
        """Hear that a gateway has written an end down, so that retention may remove the job."""
        self._pruner.job_ended()

    async def failed(self) -> None:
        """Return when a bug has killed a task that this worker needs all along; the log says which.

        Close it then, and open another: jobs go on meanwhile.
        """
        await self._background.failed.wait()

    async def reload_mounts(self) -> None:
        """Have the launcher take the operator's mounts from the configuration as it is now.

        Raises KernelError or ConfigError when it cannot; then it keeps those that it has.
        """
        await self._launcher.request_reload_mounts()

    async def open_operator_file(self, place: int) -> int:
        """Open a file of those named to the launcher at its start, for reading; the caller owns it.

        *place* is its number, in the order of the launcher's greeting. Raises KernelError when it cannot be
        opened, InvalidJobError for a number beyond the last, and ConfigError for a file that is not a regular
        one, or that another user could change.
        """
        return await self._launcher.request_open_file(place)

    async def open_audit_log(self) -> int:
        """Open the audit log that the launcher's policy names, for appending; the caller owns it.

        Raises KernelError when it cannot be opened, ConfigError when it is not a regular file, and
        InvalidJobError when the policy names none.
        """
        return await self._launcher.request_audit_log()

    # --- start

    async def start(self, spec: JobSpec, client_name: str = LOCAL_CLIENT) -> Job:
        """Start a job; return when its command was executed.

        Its row is on the disk then: not even a power cut makes pjw forget a job that a caller knows of. A
        caller that is cancelled before the answer gets no job, unless the spec has a request id, with which
        it will ask again: that gets the job of the first time. A spec with a `queue` is submitted, as by
        `submit`.

        Raises LaunchError for a command that is not executable (execve(2)), WorkdirError, InvalidJobError,
        LimitRangeError for a limit that the operator does not allow, LimitReachedError (a quota, no space, no
        processes), NameTakenError, WorkspaceBusyError, ImageNotFoundError, MountNotFoundError, MountError,
        GpuError, CopyError for an upload that is not there or cannot be unpacked, JobStateError for an image
        that cannot be used or a `link` whose network is in use, or KernelError; then no job came to be.
        LauncherGoneError may come when the job was started: the next worker knows.
        """
        if spec.queue is not None:
            [job] = await self.submit([spec], client_name)
            return job
        if spec.allow:
            self._settings.network.require(client_name, spec.allow)
        limits = self._limits_of(spec)
        return await self._starts.start(spec, client_name, limits)

    def _limits_of(self, spec: JobSpec) -> Limits:
        """Return all limits of a requested job. Raises InvalidJobError for one that is not allowed."""
        if spec.node:
            raise InvalidJobError(
                "a job has a node through a gateway alone, and this server is one machine",
                hint="leave --node out",
            )
        for what, asked in (("partition", spec.partition), ("constraint", spec.constraint)):
            if asked:
                raise InvalidJobError(
                    f"a job has a {what} through a gateway with Slurm alone, and this server is one machine",
                    hint=f"leave --{what} out",
                )
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
        return limits

    # --- the queue

    async def submit(self, specs: Sequence[JobSpec], client_name: str = LOCAL_CLIENT) -> Sequence[Job]:
        """Put jobs into the queue, all or none: each is started when its turn comes, by any worker.

        They are on the disk when this returns. A caller that is cancelled before the answer may find them in
        the queue all the same. A spec with a request id makes one job.

        Raises InvalidJobError, LimitRangeError, NameTakenError, JobNotFoundError (a job to wait for),
        MountNotFoundError, GpuError, CopyError (an upload), LimitReachedError (the queue takes no more) or
        KernelError; then none came to be.
        """
        for spec in specs:
            self._settings.network.require(client_name, spec.allow)
        asked = [(spec, self._limits_of(spec)) for spec in specs]
        for _, limits in asked:
            self._running.require_possible(client_name, limits)
        await self._users.of(client_name)
        for spec in specs:
            await self._require_what_is_named(spec, client_name)
        # to its end, as a cancelled caller cannot know how far it has come
        return await asyncio.shield(self._submit(asked, client_name))

    async def _submit(self, asked: Sequence[tuple[JobSpec, Limits]], client_name: str) -> Sequence[Job]:
        # times of a job are cut to microseconds
        before = time.time_ns() - 1000
        tokens = await self._state.keep_secrets([spec for spec, _ in asked])
        quotas = self._settings.quotas
        return await self._enqueue(self._state.store, client_name, asked, quotas, tokens, before)

    async def _require_what_is_named(self, spec: JobSpec, client_name: str) -> None:
        """Check uploads, mounts and GPUs. Raises CopyError, MountNotFoundError or GpuError."""
        try:
            offered(self._settings.mounts, client_name, spec.mounts)
            if spec.gpus:
                await self._gpus.check(client_name, spec.gpus)
            if spec.upload:
                await self._uploads.renew(client_name, spec.upload)
        except (CopyError, GpuError, MountNotFoundError):
            # a job that the same request has made before may have had it
            request_id = spec.request_id
            if not request_id or await self._state.store.of_request(client_name, request_id) is None:
                raise

    async def _withdraw(self, job_ids: Sequence[int]) -> None:
        """Do nothing: the table does not let such a job be admitted."""

    async def start_queued(self, waiting: WaitingJob) -> Job:
        """Start a job of the queue; only the queue calls this, see queue.Backend. Raises as `start`."""
        spec, client_name = waiting.spec(), waiting.job.client_name
        # again, as the operator may have changed the offers
        self._settings.network.require(client_name, spec.allow)
        return await self._starts.start_queued(waiting.job.id, spec, client_name, self._limits_of(spec))

    # --- stop

    async def stop(
        self,
        job_id: int | Element,
        grace_seconds: float | None = None,
        owner: str | None = None,
        signal: int = SIGTERM,
    ) -> Job:
        """End a job: *signal* (1 to 31: signal(7)) to all its processes, after the grace period SIGKILL.

        Returns the final snapshot when nothing is left of the job but its row and its output; a job that has
        ended already is success. Goes on when the caller is cancelled. Raises JobNotFoundError,
        InvalidJobError for another signal, and JobStateError for a job that was killed and that the kernel
        cannot end yet. A job that waits in the queue is ended without a start; of an array all elements are
        stopped.
        """
        if not 1 <= signal <= SIGNAL_MAX:
            raise InvalidJobError(f"a job is stopped with a signal from 1 to {SIGNAL_MAX}, not {signal}")
        if isinstance(job_id, Element):
            return await self._stop_element(job_id, grace_seconds, owner, signal)
        if self._jobs.of(job_id, owner) is None:
            job = await self.get(job_id, owner)
            if job.array is not None and not job.state.final:
                # to its end, though the caller be cancelled
                return await asyncio.shield(self._stop_array(job_id, grace_seconds, signal))
        live = await self._begun(job_id, owner, cancel=True)
        if isinstance(live, Job) or live.ended.is_set():
            job = live if isinstance(live, Job) else live.job
            # it has ended, and goes on as another one
            return await self.stop(job.retried_as, grace_seconds, owner, signal) if job.retried_as else job
        grace = self._settings.stop_grace_seconds if grace_seconds is None else grace_seconds
        self._stopping.begin(live, grace, signal)
        await self._wait_for(live.ended, live.stuck)
        if not live.ended.is_set():
            raise JobStateError(f"job {job_id} {live.job.detail}", hint=f"pjw wait {job_id} tells of its end")
        await self._wait_for(live.removed)
        return live.job

    def _end_for_disk(self, live: LiveJob) -> None:
        self._stopping.begin(live, 0, SIGKILL)

    async def delete(self, job_id: int | Element, owner: str | None = None) -> None:
        """Forget an ended job, with its output; a reader that has begun may read on.

        With an array go its elements. Raises JobNotFoundError, and JobStateError for a job that has not
        ended.
        """
        job = await self.get(job_id, owner)
        if job.id in self._live or not job.state.final:
            raise JobStateError(f"cannot remove job {job_id}: it has not ended", hint=f"pjw stop {job_id}")
        if not job.id:
            # an element that never had a row: its array remembers it
            return
        if job.array is not None:
            while elements := await self._state.store.elements(job.id, BATCH):
                for element in elements:
                    await self._forget(element)
        await self._forget(job.id)

    async def _forget(self, job_id: int) -> None:
        await self._queue.settle(job_id)
        await self._pruner.remove(job_id)

    # --- terminals and sessions

    async def resize(
        self, job_id: int, size: TerminalSize, owner: str | None = None, session: int = 0
    ) -> None:
        """Give the terminal of a job, or of a session of it, another size.

        Its programs get SIGWINCH (ioctl_tty(2)). Raises JobNotFoundError, SessionNotFoundError, KernelError,
        and JobStateError where there is no terminal.
        """
        if session:
            await self._sessions.resize(self._sessions.find(job_id, session, owner), size)
            return
        if await self._launched(job_id, owner) is None:
            job = await self.get(job_id, owner)
            raise JobStateError(f"job {job_id} has {'ended' if job.state.final else 'not begun'}")
        path = self._state.control_path(job_id)
        await self._state.in_thread(order_size, path, size, f"job {job_id}")

    async def exec(
        self, job_id: int, spec: JobSpec, client_name: str = LOCAL_CLIENT, *, detached: bool = False
    ) -> Session:
        """Start another command in a client's job that runs; return when it was executed.

        It runs as the job's user and within the limits of the job, ends with that at the latest, and has its
        stderr apart. Of the spec the name, the labels and the limits count for nothing. When no call has
        looked at the session for two minutes it is hung up (SIGHUP, then SIGKILL), unless it is *detached*;
        one that has ended is forgotten then. Raises JobNotFoundError, JobStateError for a job that does not
        run, InvalidJobError, LaunchError (execve(2)), WorkdirError, LimitReachedError for too many sessions,
        and KernelError.
        """
        live = await self._require_running(job_id, client_name)
        # it begins where the job did, if that has a workspace
        spec = replace(spec, workspace=live.job.workspace)
        if self._images.of(job_id):
            config = await self._images.config_of(job_id)
            spec = replace(spec, env={**config.env, **spec.env})
        return await self._sessions.start(live, spec, self._settings, detached=detached)

    async def archive(
        self, job_id: int, archive: Archive, client_name: str = LOCAL_CLIENT, *, request_id: str = ""
    ) -> Session:
        """Pack files of a client's job that runs into an archive, or unpack one: a session, as by `exec`.

        The archive is its output, or the data written to its input. Its stderr has the files left out ("note:
        " begins the line) and the cause of a failure ("error: "). It is forgotten when it is stopped, also
        when that is after its end. Raises JobNotFoundError, JobStateError for a job that does not run,
        LimitReachedError for too many sessions, and KernelError.
        """
        live = await self._require_running(job_id, client_name)
        spec = JobSpec(
            archive.argv, input=archive.unpack, request_id=request_id, workspace=live.job.workspace
        )
        return await self._sessions.start(live, spec, self._settings, detached=False, archive=True)

    async def connect(self, job_id: int, port: int, client_name: str = LOCAL_CLIENT) -> socket.socket:
        """Connect to a TCP port of a client's job that runs, within its network: 127.0.0.1, or else ::1.

        The socket does not block, and is the caller's to close. Raises JobNotFoundError, InvalidJobError for
        a wrong port, JobStateError when nothing listens there or the job does not run, LimitReachedError and
        KernelError.
        """
        check_port(port)
        return await self._sessions.connect(await self._require_running(job_id, client_name), port)

    async def _require_running(self, job_id: int, client_name: str) -> LiveJob:
        live = await self._launched(job_id, client_name)
        job = live.job if live is not None else await self.get(job_id, client_name)
        if live is not None and live.keeping:
            raise JobStateError(f"cannot enter job {job_id}: {job.detail}")
        if live is None or live.ended.is_set() or job.state is not JobState.RUNNING:
            raise JobStateError(f"cannot enter job {job_id}: it is {job.state}")
        return live

    async def wait_session(self, job_id: int, number: int, owner: str | None = None) -> Session:
        """Wait until a session has ended; its final snapshot. Raises SessionNotFoundError."""
        return await self._sessions.wait(self._sessions.find(job_id, number, owner), self._wait_for)

    async def stop_session(self, job_id: int, number: int, owner: str | None = None) -> Session:
        """Hang a session up, and wait for its end; its final snapshot. Raises SessionNotFoundError."""
        return await self._sessions.stop(self._sessions.find(job_id, number, owner), self._wait_for)

    # --- workspaces

    async def workspaces(
        self, owner: str | None = LOCAL_CLIENT, after: tuple[str, str] = ("", ""), count: int = -1
    ) -> Sequence[Workspace]:
        """Return the workspaces of one client, or with None of all, by their clients and names.

        No more than *count*, but for -1, from behind the one with this client and name. Raises only the
        errors of every coroutine.
        """
        return await self._workspaces.listed(owner, after, count)

    async def remove_workspace(self, name: str, client_name: str = LOCAL_CLIENT) -> None:
        """Remove a workspace of a client, with all that is in it; return when it is gone.

        Raises WorkspaceNotFoundError, WorkspaceBusyError while a job uses it or waits in the queue for it,
        and KernelError.
        """
        await self._workspaces.remove(client_name, name)

    # --- images

    async def images(self, owner: str | None = LOCAL_CLIENT) -> Sequence[Image]:
        """Return the images of one client, or with None of all, and the operator's; by clients and names.

        Raises KernelError when the operator's list cannot be read.
        """
        return await self._images.listed(owner)

    async def remove_image(self, name: str, client_name: str = LOCAL_CLIENT) -> None:
        """Take the name from an image of a client's own; its files go with the last job that has it.

        Raises ImageNotFoundError when the client has none of this name.
        """
        await self._images.remove(client_name, name)

    async def load_image(
        self,
        name: str,
        upload: str,
        config: ImageConfig | None = None,
        digest: str = "",
        client_name: str = LOCAL_CLIENT,
    ) -> Image:
        """Make an image of a client's own from an upload, which a job of the client's unpacks.

        The one that had the name goes with the last job that has it. A cancelled caller leaves nothing
        behind. Raises CopyError for an upload that is not there or cannot be unpacked, InvalidJobError for a
        wrong name, LimitReachedError for too many images, and the errors of `start`.
        """
        spec = JobSpec(
            Archive(".", unpack=True).argv,
            labels={"pjw.image": name},
            upload=upload,
            workspace=await self._images.begin_load(client_name, name),
        )
        job: Job | None = None
        try:
            await self._uploads.renew(client_name, upload)
            job = await self.start(spec, client_name)
            job = await self.wait(job.id, client_name)
            if not job.succeeded:
                raise CopyError(f"cannot load the image {name}: {await self._why_not_unpacked(job)}")
            return await self._images.keep(client_name, spec.workspace, name, digest, config or ImageConfig())
        except BaseException:
            if job is None or job.state.final:
                self._images.drop(client_name, spec.workspace)
            else:
                self._background.spawn(self._give_up_load(job.id, client_name, spec.workspace))
            raise

    async def _give_up_load(self, job_id: int, client_name: str, key: str) -> None:
        with suppress(JobNotFoundError):
            await self.stop(job_id, 0, client_name)
        self._images.drop(client_name, key)

    async def _why_not_unpacked(self, job: Job) -> str:
        """Return the job's last words, for the client that loads an image."""
        reading = await self.read_logs(job.id, Part(follow=False, tail_lines=1), job.client_name)
        said = b"".join([piece async for piece in reading.chunks()])
        words = said.decode(errors="replace").strip().removeprefix("error: ")
        if not words:
            return f"job {job.id} ended as {job.reason}"
        return words if words.isprintable() else ascii(words)[1:-1]

    # --- input

    @asynccontextmanager
    async def write_input(
        self, job_id: int, owner: str | None = None, session: int = 0
    ) -> AsyncGenerator[InputWriter, None]:
        """Write to the input of a job that was started with `input`, from where the one before has stopped.

        Leaving the context is no end: the command waits for the rest, from any writer. Raises
        JobNotFoundError; JobStateError for a job without input or that has ended, also in the middle, or when
        another has begun to write to it; LimitReachedError at a quota of stored bytes. With *session* it is
        the input of that session of the job, or raises SessionNotFoundError. A write raises OffsetError for
        an offset, in bytes, that the input has not reached, InvalidJobError for one that it cannot have, and
        KernelError.
        """
        if session:
            found = self._sessions.find(job_id, session, owner)
            await self._stored.check(found.client_name)
            async with self._sessions.input_of(found, self._wait_for) as writer:
                yield writer
            return
        if self._jobs.of(job_id, owner) is None:
            # at once, and not when it has been started
            require_input(await self.get(job_id, owner))
        live = await self._begun(job_id, owner)
        require_input(live if isinstance(live, Job) else live.job)
        if isinstance(live, Job) or live.ended.is_set():
            raise ended_error(f"job {job_id}")
        client_name = live.job.client_name
        await self._stored.check(client_name)
        async with self._inputs.writer_of(
            f"job {job_id}",
            self._state.input_path(job_id),
            client_name,
            lambda: self._wait_for(live.ended),
        ) as writer:
            yield writer

    @asynccontextmanager
    async def write_upload(
        self, name: str, client_name: str = LOCAL_CLIENT
    ) -> AsyncGenerator[InputWriter, None]:
        """Write an archive of files for the start of a client's job, as `write_input` does.

        It goes with the start of the job whose `JobSpec.upload` is its *name*, or a while after it came.
        Raises InvalidJobError, JobStateError when another has begun to write it, LimitReachedError,
        OffsetError as `write_input`, and KernelError.
        """
        async with self._uploads.writer(client_name, name, self._wait_for) as writer:
            yield writer

    # --- look

    async def get(self, job_id: int | Element, owner: str | None = None) -> Job:
        """Return one job as it is now. Raises JobNotFoundError."""
        if isinstance(job_id, Element):
            element = await self._state.store.element(job_id, owner) if job_id.array_id < 2**63 else None
            if element is None:
                raise JobNotFoundError(str(job_id))
            return self._shown(element)
        live = self._jobs.of(job_id, owner)
        if live is not None:
            return live.job
        job = await self._state.store.get(job_id, owner) if 0 < job_id < 2**63 else None
        if job is None:
            raise JobNotFoundError(job_id)
        return self._queue.shown(job)

    async def get_with_usage(self, job_id: int | Element, owner: str | None = None) -> Job:
        """Return one job as it is now, with its usage while its command runs. Raises JobNotFoundError."""
        if isinstance(job_id, Element):
            job = await self.get(job_id, owner)
            return await self.get_with_usage(job.id, owner) if job.id in self._live else job
        live = self._jobs.of(job_id, owner)
        if live is None or live.job.state is JobState.STARTING:
            return await self.get(job_id, owner)
        sample = await self._sampler.of_job(job_id)
        # it may have ended meanwhile
        return live.job if live.job.state.final else replace(live.job, usage_now=sample)

    async def list(self, owner: str | None = None, after: int = 0, count: int = PAGE_MAX) -> Sequence[Job]:
        """Return the jobs behind id *after*, in order of their ids: *count*, or fewer when they are long.

        Raises only the errors of every coroutine.
        """
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
        """Return jobs behind id *after* that fit: at most *count*, perhaps none though a next page exists.

        Raises only the errors of every coroutine.
        """
        page = await self._state.store.page(owner, after, count, wanted, newest_first=newest_first)
        jobs = [self._shown(job) for job in page.jobs]
        if wanted.states:
            jobs = [job for job in jobs if job.state in wanted.states]
        return Page(jobs, page.next_after)

    async def ended(self, job_id: int) -> bool:
        """Return when a job has ended; only the queue calls this, see queue.Backend.

        Raises JobNotFoundError.
        """
        await self._wait_for_end(job_id, None, or_stuck=False)
        return False

    async def _wait_for_end(self, job_id: int, owner: str | None, *, or_stuck: bool) -> Job:
        live = await self._begun(job_id, owner)
        if isinstance(live, Job):
            return live
        await self._wait_for(live.ended, *([live.stuck, live.held] if or_stuck else []))
        return live.job

    async def usage_history(self, job_id: int, owner: str | None = None) -> tuple[Job, Sequence[UsageSample]]:
        """Return a job, and its usage at moments of its life: SAMPLES_MAX at most, and its end.

        Raises JobNotFoundError, and KernelError when its samples cannot be read.
        """
        job = await self.get(job_id, owner)
        return job, with_end(await self._state.in_thread(self._state.read_usage, job_id), job)

    async def usage_now(
        self, owner: str | None = None, fresh_seconds: float = 1, within_seconds: float = 1
    ) -> Sequence[tuple[Job, UsageSample | None]]:
        """Return the unfinished jobs, and the usage of each, measured at most *fresh_seconds* ago.

        Where that takes longer than *within_seconds*, as with thousands of jobs, some samples are older, or
        not there yet. Raises KernelError when cgroups (cgroups(7)) cannot be read.
        """
        return await self._sampler.now(owner, fresh_seconds, within_seconds)

    async def queued_now(self, owner: str | None = None, most: int = PAGE_MAX) -> tuple[int, Sequence[Job]]:
        """Return the number of jobs in the queue, and the oldest of those that wait there.

        Raises only the errors of every coroutine.
        """
        by_client = await self._state.store.queued_of_clients()
        count = sum(by_client.values()) if owner is None else by_client.get(owner, 0)
        if not count:
            return 0, ()
        return count, (await self.page(owner, 0, most, JobFilter(frozenset({JobState.QUEUED})))).jobs

    def watch_jobs(
        self,
        owner: str | None = None,
        watched: Watched = ALL_CHANGES,
        since: int | None = None,
        *,
        snapshot: bool = True,
        follow: bool = True,
    ) -> AsyncGenerator[Batch, None]:
        """Yield changes of the states of jobs in order, for ever, or without *follow* those until now.

        They begin behind the change *since*, without it with the jobs as they are, and without a *snapshot*
        with the next change. A plain start is a change when its command runs. Each is on the disk before it
        is yielded, and numbers go on after a restart. Raises SequenceError when those behind *since* are not
        kept.
        """
        return self._changes.watch(owner, watched, since, snapshot=snapshot, follow=follow)

    async def quota(self, client_name: str = LOCAL_CLIENT) -> ClientQuota:
        """Return the limits, use and share of a client.

        Raises KernelError when its use cannot be measured.
        """
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
            queued=(await self._state.store.queued_of_clients()).get(client_name, 0),
            queued_max=settings.quotas.queued_max,
            mounts=tuple(each.shown for each in settings.mounts if each.is_for(client_name)),
            gpus=self._gpus.of(client_name),
            drained=self.drained,
        )

    async def logs(
        self, job_id: int | Element, part: Part = ALL_OUTPUT, owner: str | None = None
    ) -> AsyncGenerator[bytes, None]:
        """Yield a part of a job's output, as it comes; end when the job has ended.

        Raises the errors of `read_logs`; OffsetError for an offset, in bytes, beyond the end, and
        OutputLostError after the last byte of an output that the host lost.
        """
        reading = await self.read_logs(job_id, part, owner)
        async with aclosing(reading.chunks()) as chunks:
            async for chunk in chunks:
                yield chunk

    async def read_logs(
        self, job_id: int | Element, part: Part = ALL_OUTPUT, owner: str | None = None
    ) -> Reading:
        """Return a part of a job's output that is about to be read: where it begins is known.

        Raises JobNotFoundError, and JobStateError for a stderr that is not kept apart, for an array, and for
        a time to begin at when the job's output has no times; with a session, SessionNotFoundError. Of
        artifacts, JobStateError before the end, and CopyError when there are none. KernelError when a file
        cannot be read.
        """
        if part.artifacts:
            job = await self.get(job_id, owner)
            return await artifacts_of(self._state, self._inotify, job).reading(part, self._tails)
        if isinstance(job_id, Element):
            job = await (self._drawn if part.follow else self.get)(job_id, owner)
            if not job.id:
                output = output_of_ended(self._state, self._inotify, job, stderr=part.stderr)
                return await output.reading(part, self._tails)
            job_id = job.id
        if part.session:
            found = self._sessions.find(job_id, part.session, owner)
            reading = await self._sessions.output_of(found, part).reading(part, self._tails)
            return replace(reading, within=partial(self._sessions.attached, found))
        output = await self._output(job_id, part, owner)
        return await output.reading(part, self._tails)

    async def _output(self, job_id: int, part: Part, owner: str | None) -> Output:
        if self._jobs.of(job_id, owner) is None:
            job = await self.get(job_id, owner)
            require_no_array(job)
            check_stream(job, part)
            if job.state is JobState.QUEUED and not part.follow:
                return output_of_ended(self._state, self._inotify, job, stderr=part.stderr)
        live = await self._begun(job_id, owner)
        if isinstance(live, LiveJob):
            check_stream(live.job, part)
            return Output(live.stderr if part.stderr and live.stderr else live.output)
        if not live.state.final:
            # its row is there, and its start is just about to be
            raise JobNotFoundError(job_id)
        check_stream(live, part)
        return output_of_ended(self._state, self._inotify, live, stderr=part.stderr)

    def _shown(self, job: Job) -> Job:
        """Return a job of the table as it is now."""
        return self._jobs.over(job) if job.id in self._live else self._queue.shown(job)

    async def _begun(self, job_id: int, owner: str | None, *, cancel: bool = False) -> LiveJob | Job:
        """Return the owner's live job, once its launch is over, or the job that has ended.

        One that is in the queue is waited for, or with *cancel* ended there. Raises JobNotFoundError.
        """
        while True:
            if (live := await self._launched(job_id, owner)) is not None:
                return live
            # changes from here on are heard
            change = self._queue.change_of(job_id)
            job = await self.get(job_id, owner)
            if job.state.final:
                return job
            if job.state is JobState.QUEUED and cancel:
                await self._queue.cancel(job_id)
            elif job.state is JobState.QUEUED or job.array is not None or self._queue.is_starting(job):
                await self._wait_for(change)
            elif self._jobs.of(job_id, owner) is None:
                # of a plain start, whose row is there
                return job

    async def _launched(self, job_id: int, owner: str | None) -> LiveJob | None:
        """Return the owner's live job, once its launch is over; None when there is none (any more)."""
        live = self._jobs.of(job_id, owner)
        if live is None:
            return None
        await live.launch_over.wait()
        return self._jobs.of(job_id, owner)

    async def _wait_for(self, *flags: Flag) -> None:
        await first_of(*flags, self._launcher.gone)
        if not any(flag.is_set() for flag in flags):
            raise LauncherGoneError("the launcher has gone; the job goes on")


def require_no_array(job: Job) -> None:
    """Check that a job is no array, whose output is that of its elements. Raises JobStateError."""
    if job.array is not None:
        raise JobStateError(
            f"job {job.id} is an array, and has no output of its own",
            hint=f"name one of its elements, {job.array.indices}: {job.id}_INDEX",
        )
