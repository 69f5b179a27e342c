"""Starts: from a request to the executed command, or back to nothing; one for each request id."""

import asyncio
import math
import os
from contextlib import AsyncExitStack
from functools import partial
from signal import SIGKILL
from typing import Final

from pjw.errors import JobNotFoundError, LauncherGoneError, PjwError
from pjw.launcher.protocol import Launch
from pjw.model import Job, JobSpec, Limits
from pjw.output import Inotify
from pjw.worker.background import Background, log_bug
from pjw.worker.descriptors import Descriptors
from pjw.worker.endings import Endings
from pjw.worker.job import LiveJob
from pjw.worker.launch_turns import LaunchTurns
from pjw.worker.launcher_client import LauncherClient, LaunchLeftError, RunningInit
from pjw.worker.logs import live_job
from pjw.worker.quota import RunningJobs, StoredBytes
from pjw.worker.state_dir import StateDir
from pjw.worker.stopping import Stopping
from pjw.worker.store import AlreadyStartedError
from pjw.worker.users import Users

# a client's name, and what it called its request
_Request = tuple[str, str]


class Starts:
    """The starts of one worker, and those that are under way."""

    def __init__(
        self,
        state: StateDir,
        launcher: LauncherClient,
        inotify: Inotify,
        live: dict[int, LiveJob],
        running: RunningJobs,
        stored: StoredBytes,
        endings: Endings,
        stopping: Stopping,
        users: Users,
        background: Background,
    ) -> None:
        self._state: Final = state
        self._launcher: Final = launcher
        self._inotify: Final = inotify
        self._live: Final = live
        self._running: Final = running
        self._stored: Final = stored
        self._endings: Final = endings
        self._stopping: Final = stopping
        self._users: Final = users
        self._background: Final = background
        self._descriptors: Final = Descriptors()
        self._turns: Final = LaunchTurns()
        self._tasks: Final[set[asyncio.Task[Job]]] = set()
        self._requests: Final[dict[_Request, asyncio.Task[Job]]] = {}

    async def over(self) -> None:
        """Wait until none is under way."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def start(self, spec: JobSpec, client_name: str, limits: Limits) -> Job:
        """Start a job, as `Worker.start` says, with all of its limits."""
        self._require_launcher()
        request = (client_name, spec.request_id) if spec.request_id else None
        task = self._requests.get(request) if request is not None else None
        if task is None:
            task = self._begin(spec, client_name, limits, request)
        # Shielded from its first step on: the table has a thread of its own, so a row may be
        # written although whoever asked for it was cancelled.
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(log_bug)
            if request is None:
                task.add_done_callback(self._undo)
            raise

    def _require_launcher(self) -> None:
        if self._launcher.gone.is_set():
            raise LauncherGoneError("the launcher has gone; running jobs go on")

    def _begin(
        self, spec: JobSpec, client_name: str, limits: Limits, request: _Request | None
    ) -> asyncio.Task[Job]:
        task = asyncio.ensure_future(self._start_once(spec, client_name, limits))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if request is not None:
            self._requests[request] = task
            task.add_done_callback(partial(self._request_over, request))
        return task

    def _request_over(self, request: _Request, task: asyncio.Task[Job]) -> None:
        del self._requests[request]
        # whoever asked may have gone, and then nobody looks at how it went
        if not task.cancelled():
            task.exception()

    async def _start_once(self, spec: JobSpec, client_name: str, limits: Limits) -> Job:
        if self._turns.is_busy(client_name) and (known := await self._known(spec, client_name)) is not None:
            # not behind launches that may take long, for an answer that is there
            return known
        async with AsyncExitStack() as turn:
            try:
                uid = await self._take_room(client_name, limits, turn)
            except PjwError:
                # A job that the same request has started before is the answer, whatever holds for new ones.
                # To look for it before each start would cost all the others, which are nearly all that come.
                if (known := await self._known(spec, client_name)) is None:
                    raise
                return known
            descriptors: list[int] = []
            try:
                job = await self._state.store.add(
                    client_name, spec, limits, partial(self._make_files, spec, descriptors)
                )
            except AlreadyStartedError as before:
                self._running.give_back(client_name, limits)
                return await self._job(before.job_id)
            except BaseException:
                self._running.give_back(client_name, limits)
                raise
            # The row is there, so whatever happens to us, the next worker can find the process. Its
            # way to the disk and the launch go side by side.
            synced = asyncio.ensure_future(self._state.store.sync())
            try:
                job = await self._launch(job, spec, uid, descriptors)
            finally:
                # the next one need not wait for this row
                await turn.aclose()
                await asyncio.wait({synced})
                unsynced = synced.exception()
        if unsynced is not None:
            self._background.spawn(self._end_and_discard(job.id))
            raise unsynced
        return job

    async def _known(self, spec: JobSpec, client_name: str) -> Job | None:
        """The job that the same request has started before; None when it has started none."""
        if not spec.request_id:
            return None
        job_id = await self._state.store.of_request(client_name, spec.request_id)
        return None if job_id is None else await self._job(job_id)

    async def _job(self, job_id: int) -> Job:
        live = self._live.get(job_id)
        job = live.job if live is not None else await self._state.store.get(job_id)
        if job is None:
            raise JobNotFoundError(job_id)
        return job

    async def _take_room(self, client_name: str, limits: Limits, turn: AsyncExitStack) -> int:
        """Count a job that is to be started, and wait for its turn; the user id that it has.

        Raises LimitReachedError, InvalidJobError without room for its memory ever, and LauncherGoneError.
        """
        self._running.take(client_name, limits)
        try:
            # before the row, so that ids are launched in their order, as the launcher guesses
            await turn.enter_async_context(self._turns.turn(client_name))
            self._require_launcher()
            await self._stored.check(client_name)
            return await self._users.of(client_name)
        except BaseException:
            self._running.give_back(client_name, limits)
            raise

    def _make_files(self, spec: JobSpec, descriptors: list[int], job: Job) -> None:
        """Make the command for init and the files of the job; add their descriptors, for the launcher.

        In the thread of the table: to make a file may take as long as the disk likes.
        """
        self._descriptors.require()
        command = _command_file(spec)
        try:
            descriptors += [command, *self._state.create_job(job)]
        except BaseException:
            os.close(command)
            raise

    async def _launch(self, job: Job, spec: JobSpec, uid: int, descriptors: list[int]) -> Job:
        live = self._live[job.id] = live_job(self._state, self._inotify, job)
        try:
            init, started_ns = await self._ask_for_launch(job, spec, uid, descriptors)
        except LauncherGoneError:
            # Whether it was launched, nobody can tell now; the next worker will.
            raise
        except LaunchLeftError as error:
            # Without this, a client with a stuck file system could collect inits that no limit counts.
            self._background.spawn(self._give_back_when_departed(job))
            await self._forget(job.id)
            raise error.refusal from None
        except BaseException:
            self._running.give_back(job.client_name, job.limits)
            await self._forget(job.id)
            raise
        finally:
            live.launch_over.set()
        live.exec_seen(started_ns)
        self._endings.watch(live, init)
        return live.job

    async def _forget(self, job_id: int) -> None:
        """Remove a job that was not launched."""
        del self._live[job_id]
        await asyncio.to_thread(self._state.remove_job, job_id)
        await self._state.store.discard(job_id)

    async def _give_back_when_departed(self, job: Job) -> None:
        await self._launcher.request_departed(job.id)
        self._running.give_back(job.client_name, job.limits)

    async def _ask_for_launch(
        self, job: Job, spec: JobSpec, uid: int, descriptors: list[int]
    ) -> tuple[RunningInit, int]:
        try:
            settings = self._running.settings
            share = settings.shares.of(job.client_name)
            grace = max(1, math.ceil(settings.stop_grace_seconds))
            request = Launch(job.id, uid, job.limits, job.split_stderr, job.input, share, grace)
            return await self._launcher.request_launch(request, spec, descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _undo(self, launch: asyncio.Future[Job]) -> None:
        if not launch.cancelled() and launch.exception() is None:
            self._background.spawn(self._end_and_discard(launch.result().id))

    async def _end_and_discard(self, job_id: int) -> None:
        live = self._live.get(job_id)
        if live is not None:
            self._stopping.begin(live, 0, SIGKILL)
            await live.ended.wait()
        await asyncio.to_thread(self._state.remove_job, job_id)
        await self._state.store.discard(job_id)


def _command_file(spec: JobSpec) -> int:
    """What init is to run, in a file of memory that the launcher never reads: strings, each ended by NUL.

    The working directory; what is added to the environment; an empty one; the argv.
    """
    strings = (spec.workdir, *(f"{name}={value}" for name, value in spec.env.items()), "", *spec.argv)
    left = memoryview(b"".join(string.encode() + b"\0" for string in strings))
    descriptor = os.memfd_create("pjw-command", os.MFD_CLOEXEC)
    try:
        while left:
            left = left[os.write(descriptor, left) :]
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
