"""The work after a job's init has ended: its end is written down, told, and its traces removed."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Final

from pjw.errors import LauncherGoneError, PjwError
from pjw.launcher import protocol
from pjw.model import EndReason, Job, JobState, Usage
from pjw.worker.artifacts import Keeping
from pjw.worker.disk import DiskSampler
from pjw.worker.held import HeldOutputs
from pjw.worker.job import LiveJob
from pjw.worker.launcher_client import Ended, RunningInit
from pjw.worker.parts import Parts
from pjw.worker.retention import Pruner
from pjw.worker.status_record import Record, parse_record
from pjw.worker.stopping import Stopping
from pjw.worker.tasks import log_bug
from pjw.worker.usage_sampler import UsageSampler

_SAVE_RETRY_SECONDS: Final = 2
# Seconds for which the remains of jobs without output wait to be removed together: waking a thread for each
# of them cost more than the removal.
_TOGETHER_SECONDS: Final = 0.05

log: Final = logging.getLogger(__name__)


class Endings:
    """The way of a job from the end of its init to a row in the table."""

    def __init__(
        self,
        parts: Parts,
        pruner: Pruner,
        sampler: UsageSampler,
        disk: DiskSampler,
        stopping: Stopping,
        held: HeldOutputs,
        keeping: Keeping,
    ) -> None:
        self._parts: Final = parts
        self._pruner: Final = pruner
        self._sampler: Final = sampler
        self._disk: Final = disk
        self._stopping: Final = stopping
        self._held: Final = held
        self._keeping: Final = keeping
        # called when the room that a job had is free again
        self.ended: Final[list[Callable[[Job], None]]] = []
        # called with a job that has ended, and its next attempt
        self.retried: Final[list[Callable[[Job, Job], None]]] = []
        # jobs without output that have ended, and whose files are still there
        self._silent: list[Job] = []
        self._silent_timer: asyncio.TimerHandle | None = None
        # jobs that have ended since this worker began
        self.by_reason: Final[Counter[EndReason]] = Counter()

    def watch(self, live: LiveJob, init: RunningInit) -> None:
        """Finish a job when its init ends; take samples until then."""
        self._parts.state.store.note(live.job)
        live.hold(init.pidfd)
        init.ended.add_done_callback(partial(self._on_end, live))
        if live.job.limits.time_max_seconds:
            self._stopping.watch_time_limit(live)
        self._held.add(live)
        if live.job.artifacts is not None:
            self._keeping.add(live)
        self._sampler.add(live)
        self._disk.job_began()

    def _on_end(self, live: LiveJob, ended: Ended) -> None:
        if ended.cancelled():
            # The launcher has gone. The next worker finishes the job; its followers still get all output.
            live.watch()
        else:
            live.let_go()
            self._parts.background.spawn(self.finish(live, ended.result()))

    async def finish(
        self, live: LiveJob, ended: protocol.Ended | None = None, *, rebooted: bool = False
    ) -> None:
        """Write the end of a job down and tell it, when its init, and so all its processes, have ended.

        *ended* is the launcher's report; None for a job that ended while no worker was there. *rebooted*: the
        host went down since the job was started.
        """
        job_id = live.job.id
        self._held.remove(job_id)
        self._keeping.remove(job_id)
        record = parse_record(self._parts.state.read_status(job_id))
        try:
            usage = await self._usage_of(job_id, ended, record)
        except LauncherGoneError:
            # The next worker finds the record, and the cgroup with its accounts. The output is whole.
            live.mark_output_ended()
            return
        await self._keeping.settle(live, record.kept, usage)
        was_stopped = live.job.state is JobState.STOPPING
        self._apply_end(live, record, usage, rebooted=rebooted)
        if live.job.input:
            await self._remove_input(job_id)
        if live.job.reason is not None:
            self.by_reason[live.job.reason] += 1
        # Row before removal, where the launcher has left that to us: the accounts may be only in the cgroup.
        # And a client that hears of an end can rely on it, so the row is synced before that. But not the
        # removal: no process is left, and the job's files may be many. Where nothing is left to remove, row
        # and sync are one step.
        is_removed = ended is not None and ended.removed
        is_synced = is_removed and not live.job.attempt
        if not await self._save(live, was_stopped=was_stopped, synced=is_synced):
            is_synced = False
            # callers do not wait for a disk, but they do wait for the decision about another attempt
            if not live.job.attempt:
                live.announce_end()
                live.removed.set()
            await self._save_later(live, was_stopped=was_stopped)
        removal = None if is_removed else asyncio.ensure_future(self.remove_traces(job_id))
        if removal is not None:
            removal.add_done_callback(log_bug)
        if not is_synced:
            await self._sync(job_id)
        self._parts.jobs.end(live)
        for each in self.ended:
            each(live.job)
        live.announce_end()
        self._pruner.job_ended()
        self._settle(live.job)
        if removal is not None:
            await removal
        live.removed.set()

    async def _usage_of(self, job_id: int, ended: protocol.Ended | None, record: Record) -> Usage | None:
        """Return the usage of an ended job; None when it is unknown. Raises LauncherGoneError."""
        if ended is not None and ended.known:
            return ended.usage
        if record.usage is not None:
            # And not the number of its cgroup: a crash may have left a part of that.
            return record.usage
        try:
            return await self._parts.launcher.request_account(job_id)
        except LauncherGoneError:
            raise
        except PjwError as error:
            log.error("cannot read the usage of job %d: %s", job_id, error)
            return None

    def _apply_end(self, live: LiveJob, record: Record, usage: Usage | None, *, rebooted: bool) -> None:
        output_bytes = self._parts.state.output_size(live.job)
        live.disk_limit = self._parts.state.is_ended_for_disk(live.job.id)
        if record.end is not None:
            if live.job.state is JobState.STARTING:
                live.exec_seen(record.started_ns)
            live.end_seen(record.end, usage, output_bytes)
        elif live.init_killed:
            live.killed_unrecorded(usage, output_bytes)
        elif rebooted:
            live.end_unknown(EndReason.HOST_RESTARTED, usage, output_bytes)
        elif record.started_ns is None:
            live.end_unknown(EndReason.LAUNCH_INTERRUPTED, usage, output_bytes)
        else:
            live.end_unknown(EndReason.LOST, usage, output_bytes)

    async def _remove_input(self, job_id: int) -> None:
        # Before the row, or a crash in between would leave it for as long as the job is kept. Not among the
        # threads that wait for a disk, as the end waits for this.
        try:
            await asyncio.to_thread(self._parts.state.remove_input, job_id)
        except PjwError as error:
            log.error("%s", error)

    async def _save(self, live: LiveJob, *, was_stopped: bool, synced: bool = False) -> bool:
        """Write the end down, *synced* if there is no next attempt; return whether that was possible."""
        try:
            if live.job.attempt:
                await self._save_attempt(live, was_stopped=was_stopped)
            elif not synced:
                await self._parts.state.store.finish(live.job)
            elif (unsynced := await self._parts.state.store.finish_and_sync(live.job)) is not None:
                self._say_unsynced(live.job.id, unsynced)
        except PjwError as error:
            log.error("cannot write down the end of job %d: %s", live.job.id, error)
            return False
        return True

    async def _save_attempt(self, live: LiveJob, *, was_stopped: bool) -> None:
        following = await self._parts.state.store.finish_attempt(live.job, was_stopped=was_stopped)
        if following is not None:
            live.job = replace(live.job, retried_as=following.id)
            for each in self.retried:
                each(live.job, following)

    async def _save_later(self, live: LiveJob, *, was_stopped: bool) -> None:
        # Until then the job is held in memory, and the record of its end is safe in its status
        # file. A timer, since nothing tells when space returns to a disk.
        while not await self._save(live, was_stopped=was_stopped):  # noqa: ASYNC110
            await asyncio.sleep(_SAVE_RETRY_SECONDS)

    async def _sync(self, job_id: int) -> None:
        try:
            await self._parts.state.store.sync()
        except PjwError as error:
            self._say_unsynced(job_id, error)

    @staticmethod
    def _say_unsynced(job_id: int, error: PjwError) -> None:
        log.error("the end of job %d might not survive a power cut: %s", job_id, error)

    async def remove_traces(self, job_id: int) -> None:
        """Have the launcher remove the remains of a job, or of a failed launch; log a failure."""
        try:
            await self._parts.launcher.request_remove(job_id)
        except LauncherGoneError:
            pass  # the next worker removes them
        except PjwError as error:
            log.error("cannot remove what job %d left: %s", job_id, error)

    def _settle(self, job: Job) -> None:
        # After the announcement, since syncing gigabytes takes seconds. A loss by a power cut until then is
        # noticed: the row has the number of bytes.
        if job.output_bytes:
            self._parts.background.spawn(self._settle_all([job]))
            return
        if not self._silent:
            loop = asyncio.get_running_loop()
            self._silent_timer = loop.call_later(_TOGETHER_SECONDS, self._settle_silent)
        self._silent.append(job)

    def _settle_silent(self) -> None:
        jobs, self._silent = self._silent, []
        self._parts.background.spawn(self._settle_all(jobs))

    async def _settle_all(self, jobs: Sequence[Job]) -> None:
        await self._parts.state.in_thread(self._settle_each, jobs)

    def _settle_each(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            try:
                self._parts.state.settle(job)
            except PjwError as error:
                log.error("%s", error)

    def close(self) -> None:
        """Remove the remains that still wait for that; call this before the background ends.

        Blocks for as long as the disk takes.
        """
        if self._silent_timer is not None:
            self._silent_timer.cancel()
        jobs, self._silent = self._silent, []
        self._settle_each(jobs)
