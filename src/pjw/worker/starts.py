"""Starts: from a request to the executed command, or back to nothing; one for each request id."""

import asyncio
import logging
import math
import os
from collections.abc import Awaitable, Callable
from functools import partial
from signal import SIGKILL
from typing import Final

from pjw.errors import (
    CopyError,
    GpuError,
    ImageNotFoundError,
    InvalidJobError,
    JobNotFoundError,
    KernelError,
    LauncherGoneError,
    LimitReachedError,
    PjwError,
)
from pjw.launcher.protocol import Launch
from pjw.model import EndReason, Job, JobSpec, Limits, is_image_key, offered
from pjw.worker.artifacts import patterns_file
from pjw.worker.endings import Endings
from pjw.worker.gpus import Gpus
from pjw.worker.host import Admission, Descriptors
from pjw.worker.images import ImageReplacedError, Images
from pjw.worker.job_rows import AlreadyStartedError
from pjw.worker.jobs import Room
from pjw.worker.launch_turns import Turn
from pjw.worker.launcher_client import LaunchBrokenOffError, RunningInit
from pjw.worker.orders import command_file
from pjw.worker.parts import Parts
from pjw.worker.queue_rows import SERVER_FAILED
from pjw.worker.quota import RunningJobs
from pjw.worker.reading import live_job
from pjw.worker.status_record import parse_record
from pjw.worker.stopping import Stopping
from pjw.worker.tasks import log_bug
from pjw.worker.uploads import Uploads

log: Final = logging.getLogger(__name__)

# a client's name, and what it called its request
_Request = tuple[str, str]
# Removes what exists of a job whose launch failed for a reason.
_Undo = Callable[[Job, BaseException], Awaitable[None]]


class Starts:
    """The starts of one worker, and those that are under way."""

    def __init__(
        self,
        parts: Parts,
        running: RunningJobs,
        endings: Endings,
        stopping: Stopping,
        images: Images,
        uploads: Uploads,
        gpus: Gpus,
        admission: Admission,
    ) -> None:
        self._parts: Final = parts
        self._running: Final = running
        self._endings: Final = endings
        self._stopping: Final = stopping
        self._images: Final = images
        self._uploads: Final = uploads
        self._gpus: Final = gpus
        self._admission: Final = admission
        # called when a start is over, whatever became of it
        self.settled: Callable[[], None] = lambda: None
        self._descriptors: Final = Descriptors()
        self._tasks: Final[set[asyncio.Task[Job]]] = set()
        self._requests: Final[dict[_Request, asyncio.Task[Job]]] = {}

    @property
    def under_way(self) -> int:
        """How many starts are not over."""
        return len(self._tasks)

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
        # Shielded from its first step on: the table has its own thread, so a row may be
        # written although its caller was cancelled.
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(log_bug)
            if request is None:
                task.add_done_callback(self._undo)
            raise

    async def start_queued(self, job_id: int, spec: JobSpec, client_name: str, limits: Limits) -> Job:
        """Start a job of the queue, as `queue.Backend` says, with all of its limits."""
        self._require_launcher()
        task = asyncio.ensure_future(self._start_queued(job_id, spec, client_name, limits))
        self._tasks.add(task)
        task.add_done_callback(self._task_over)
        # the launch goes on when the queue ends with its worker, and the job is the next worker's
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(log_bug)
            raise

    def _require_launcher(self) -> None:
        if self._parts.launcher.gone.is_set():
            raise LauncherGoneError("the launcher has gone; running jobs go on")

    def _begin(
        self, spec: JobSpec, client_name: str, limits: Limits, request: _Request | None
    ) -> asyncio.Task[Job]:
        task = asyncio.ensure_future(self._start_once(spec, client_name, limits))
        self._tasks.add(task)
        task.add_done_callback(self._task_over)
        if request is not None:
            self._requests[request] = task
            task.add_done_callback(partial(self._request_over, request))
        return task

    def _task_over(self, task: asyncio.Task[Job]) -> None:
        self._tasks.discard(task)
        self.settled()

    def _request_over(self, request: _Request, task: asyncio.Task[Job]) -> None:
        del self._requests[request]
        # the caller may have gone, and then nobody looks at the result
        if not task.cancelled():
            task.exception()

    async def _start_once(self, spec: JobSpec, client_name: str, limits: Limits) -> Job:
        if (
            self._parts.turns.is_busy(client_name)
            and (known := await self._known(spec, client_name)) is not None
        ):
            # not behind launches that may take long, for an answer that is there
            return known
        try:
            while True:
                turn = self._parts.turns.turn(client_name)
                try:
                    async with self._images.taken(client_name, spec) as (executed, image):
                        return await self._start_in_turn(executed, client_name, limits, turn, image)
                except ImageReplacedError:
                    # with the image that the operator has imported by this name meanwhile
                    continue
                finally:
                    turn.end()
        finally:
            if spec.upload:
                await self._uploads.release(client_name, spec.upload)

    async def _start_in_turn(
        self, spec: JobSpec, client_name: str, limits: Limits, turn: Turn, image: str
    ) -> Job:
        try:
            uid, room = await self._take_room(spec, client_name, limits, turn)
        except PjwError:
            # A job that the same request has started before is the answer, whatever holds for new ones.
            # To look for it before each start would cost all the others, which are nearly all that come.
            if (known := await self._known(spec, client_name)) is None:
                raise
            return known
        descriptors: list[int] = []
        try:
            if spec.gpus:
                spec = await self._gpus.with_variables(spec, room.gpus)
            made = partial(self._make_files, spec, image, descriptors)
            job = await self._parts.state.store.add(client_name, spec, limits, made, room.gpus.names)
        except AlreadyStartedError as before:
            self._parts.jobs.give_back(room)
            return await self._job(before.job_id)
        except BaseException:
            self._parts.jobs.give_back(room)
            raise
        self._parts.jobs.settle(room, job.id)
        self._images.begun(client_name, image, job.id)
        # The row is there, so after any end of ours the next worker can find the process. Its
        # way to the disk and the launch go side by side.
        synced = self._parts.state.store.sync()
        try:
            job = await self._launch(job, spec, uid, descriptors, self._discard)
        finally:
            # the next one need not wait for this row
            turn.end()
            # which is there by now, nearly always
            if not synced.done():
                await asyncio.wait({synced})
            unsynced = synced.exception()
        if unsynced is not None:
            self._parts.background.spawn(self._end_and_discard(job.id))
            raise unsynced
        return job

    async def _start_queued(self, job_id: int, spec: JobSpec, client_name: str, limits: Limits) -> Job:
        try:
            while True:
                try:
                    async with self._images.taken(client_name, spec) as (executed, image):
                        return await self._start_admitted(job_id, executed, client_name, limits, image)
                except ImageReplacedError:
                    # it is in the queue again
                    continue
        except ImageNotFoundError as error:
            # it may have been removed since the job was submitted, and is not expected back
            raise InvalidJobError(str(error)) from None

    async def _start_admitted(
        self, job_id: int, spec: JobSpec, client_name: str, limits: Limits, image: str
    ) -> Job:
        job, uid, room = await self._admit(job_id, spec, client_name, limits)
        self._parts.jobs.settle(room, job_id)
        self._images.begun(client_name, image, job_id)
        descriptors: list[int] = []
        ended: Job | None = None

        async def undo(job: Job, error: BaseException) -> None:
            nonlocal ended
            is_replaced = isinstance(error, InvalidJobError) and await self._images.is_replaced(
                client_name, spec.image, image
            )
            ended = await self._put_back_or_end(job, error, can_be_tried=is_replaced)

        turn = self._parts.turns.turn(client_name)
        try:
            try:
                # Before the launch, not during it: after a power cut nothing that was executed may be queued.
                await self._parts.state.store.sync()
                await turn.begin()
                self._require_launcher()
                if spec.gpus:
                    spec = await self._gpus.with_variables(spec, room.gpus)
                await self._parts.state.store.in_turn(
                    partial(self._make_files, spec, image, descriptors, job)
                )
            except LauncherGoneError:
                # the next worker puts it back
                raise
            except (CopyError, GpuError) as error:
                # its files are gone, and do not come again; a GPU is gone, or nobody can tell
                self._parts.jobs.give_back(room)
                ended = await self._parts.state.store.end_without_start(
                    job_id, EndReason.START_FAILED, str(error)
                )
                if ended is None:
                    raise
                return ended
            except BaseException:
                self._parts.jobs.give_back(room)
                await self._parts.state.store.put_back(job_id)
                raise
            try:
                job = await self._launch(job, spec, uid, descriptors, undo)
            except PjwError:
                if ended is None:
                    raise
                return ended
        finally:
            turn.end()
        try:
            await self._parts.state.store.settled(job_id)
        except PjwError as error:
            # the next worker sees that it was executed
            log.error("%s", error)
        if spec.upload:
            await self._uploads.release(client_name, spec.upload)
        return job

    async def _admit(
        self, job_id: int, spec: JobSpec, client_name: str, limits: Limits
    ) -> tuple[Job, int, Room]:
        """Take a job out of the queue, and room for it; the job, its user id, and the room."""
        room = await self._parts.jobs.take(client_name, spec, limits)
        try:
            await self._parts.stored.check(client_name)
            uid = await self._parts.users.of(client_name)
            return await self._parts.state.store.admit(job_id, limits, room.gpus.names), uid, room
        except BaseException:
            self._parts.jobs.give_back(room)
            raise

    async def _put_back_or_end(self, job: Job, error: BaseException, *, can_be_tried: bool) -> Job | None:
        """Put a job whose launch failed back into the queue, if it can be started later; else its end.

        It can be when its command was certainly not executed, and the reason is not the job's own.
        """
        was_executed = parse_record(self._parts.state.read_status(job.id)).started_ns is not None
        await self._remove(job.id)
        is_of_the_host = isinstance(error, LimitReachedError | KernelError | asyncio.CancelledError)
        if (is_of_the_host or can_be_tried) and not was_executed:
            await self._parts.state.store.put_back(job.id)
            return None
        why = error.refusal if isinstance(error, LaunchBrokenOffError) else error
        is_internal = not isinstance(why, PjwError) or (isinstance(why, KernelError) and not why.for_client)
        detail = SERVER_FAILED if is_internal else str(why)
        return await self._parts.state.store.end_without_start(job.id, EndReason.START_FAILED, detail)

    async def _known(self, spec: JobSpec, client_name: str) -> Job | None:
        """Return the job that the same request has started before; None when it has started none."""
        if not spec.request_id:
            return None
        job_id = await self._parts.state.store.of_request(client_name, spec.request_id)
        return None if job_id is None else await self._job(job_id)

    async def _job(self, job_id: int) -> Job:
        live = self._parts.jobs.live.get(job_id)
        job = live.job if live is not None else await self._parts.state.store.get(job_id)
        if job is None:
            raise JobNotFoundError(job_id)
        return job

    async def _take_room(
        self, spec: JobSpec, client_name: str, limits: Limits, turn: Turn
    ) -> tuple[int, Room]:
        """Take room for a job, and wait for its turn; the user id of the job, and the room.

        Raises LimitReachedError, InvalidJobError without room for its memory ever, WorkspaceBusyError,
        GpuError, MountNotFoundError and LauncherGoneError.
        """
        self._admission.require()
        if spec.gpus:
            await self._gpus.check(client_name, spec.gpus)
        offered(self._running.settings.mounts, client_name, spec.mounts)
        room = await self._parts.jobs.take(client_name, spec, limits)
        try:
            # before the row, so that ids are launched in their order, as the launcher guesses
            await turn.begin()
            self._require_launcher()
            await self._parts.stored.check(client_name)
            return await self._parts.users.of(client_name), room
        except BaseException:
            self._parts.jobs.give_back(room)
            raise

    def _make_files(self, spec: JobSpec, image: str, descriptors: list[int], job: Job) -> None:
        """Make the command for init and the files of the job; add their descriptors, for the launcher.

        In the thread of the table: to make a file may take as long as the disk likes.
        """
        self._descriptors.require()
        sent: list[int] = []
        command = -1
        try:
            if spec.upload:
                sent.append(self._uploads.open(job.client_name, spec.upload))
            if spec.outputs:
                sent.append(patterns_file(tuple(spec.outputs)))
            command = command_file(spec, job)
            if image:
                # before the launch: the next worker must know what the job has
                self._parts.state.store.have_image(job.id, image)
            descriptors += [command, *self._parts.state.create_job(job, spec.terminal), *sent]
        except BaseException:
            for descriptor in (*sent, *((command,) if command >= 0 else ())):
                os.close(descriptor)
            raise

    async def _launch(self, job: Job, spec: JobSpec, uid: int, descriptors: list[int], undo: _Undo) -> Job:
        live = live_job(self._parts.state, self._parts.inotify, job)
        self._parts.jobs.add(live)
        try:
            init, started_ns = await self._ask_for_launch(job, spec, uid, descriptors)
        except LauncherGoneError:
            # Whether it was launched, nobody can tell now; the next worker will.
            raise
        except LaunchBrokenOffError as error:
            if error.is_left:
                # Without this, a client with a stuck file system could collect inits that no limit counts.
                self._parts.background.spawn(self._give_back_when_departed(job))
            else:
                self._parts.jobs.give_back_of(job)
            await undo(job, error)
            raise error.refusal from None
        except BaseException as error:
            self._parts.jobs.give_back_of(job)
            if isinstance(error, CopyError):
                # what was unpacked before that failed: no other launch leaves files
                await self._endings.remove_traces(job.id)
            await undo(job, error)
            raise
        finally:
            live.launch_over.set()
        live.exec_seen(started_ns)
        self._endings.watch(live, init)
        return live.job

    async def _discard(self, job: Job, _: BaseException) -> None:
        """Remove a job that was not launched."""
        await self._remove(job.id)
        await self._parts.state.store.discard(job.id)

    async def _remove(self, job_id: int) -> None:
        """Remove all of a job that was not launched but its row."""
        self._parts.jobs.drop(job_id)
        await asyncio.to_thread(self._parts.state.remove_job, job_id)

    async def _give_back_when_departed(self, job: Job) -> None:
        await self._parts.launcher.request_departed(job.id)
        self._parts.jobs.give_back_of(job)

    async def _ask_for_launch(
        self, job: Job, spec: JobSpec, uid: int, descriptors: list[int]
    ) -> tuple[RunningInit, int]:
        settings = self._running.settings
        share = settings.shares.of(job.client_name)
        grace = max(1, math.ceil(settings.stop_grace_seconds))
        terminal = spec.terminal is not None
        # it reads the upload as its input, and the program that unpacks it is its command
        loads = is_image_key(job.workspace)
        request = Launch(
            job.id,
            uid,
            job.limits,
            job.split_stderr,
            job.input or loads,
            share,
            grace,
            terminal,
            upload=bool(spec.upload) and not loads,
            workspace=job.workspace,
            artifacts=bool(spec.outputs),
            archive=loads,
            image=self._images.of(job.id),
            read_only=job.read_only,
            mounts=tuple(spec.mounts),
            client_name=job.client_name if spec.mounts or job.allow or spec.gpus else "",
            allow=tuple(job.allow),
            link=job.link,
            gpus=self._gpus.names_of(job.id) if spec.gpus else (),
        )
        return await self._parts.launcher.request_launch(request, spec, descriptors)

    def _undo(self, launch: asyncio.Future[Job]) -> None:
        if not launch.cancelled() and launch.exception() is None:
            self._parts.background.spawn(self._end_and_discard(launch.result().id))

    async def _end_and_discard(self, job_id: int) -> None:
        live = self._parts.jobs.live.get(job_id)
        if live is not None:
            self._stopping.begin(live, 0, SIGKILL)
            await live.ended.wait()
        await asyncio.to_thread(self._parts.state.remove_job, job_id)
        await self._parts.state.store.discard(job_id)
