"""Takes samples of the usage of running jobs: for their histories, and more while there are watchers.

However many jobs run, the cost stays the same: with more of them samples are further apart.
"""

import asyncio
import errno
import heapq
import logging
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Final

from pjw.errors import KernelError, LauncherGoneError, PjwError
from pjw.launcher.protocol import MAX_MEASURED
from pjw.model import Job, UsageSample
from pjw.worker.held import HeldOutputs
from pjw.worker.job import LiveJob
from pjw.worker.launcher_client import LauncherClient
from pjw.worker.state_dir import StateDir
from pjw.worker.usage import interval_seconds

# Of all jobs together, for their histories; each takes about 0.2 ms of processor time, the launcher included.
HISTORY_PER_SECOND: Final = 10
# The same while there are watchers, and for requests for single jobs.
WATCHED_PER_SECOND: Final = 500
# Jobs that were started within so long share a request.
_PAUSE_SECONDS: Final = 0.1
# For a request for one job: how old its sample may be, and how long the answer may wait for a new one.
_FRESH_SECONDS: Final = 1.0
_WITHIN_SECONDS: Final = 0.2
# Nothing tells when a disk has space again.
_RETRY_SECONDS: Final = 60

log: Final = logging.getLogger(__name__)


class UsageSampler:
    """Samples the jobs of one worker, from their start or their adoption to their end."""

    def __init__(
        self, state: StateDir, launcher: LauncherClient, live: Mapping[int, LiveJob], held: HeldOutputs
    ) -> None:
        self._state: Final = state
        self._held: Final = held
        self._launcher: Final = launcher
        self._live: Final = live
        # (when a job is due, its id, when it began), the first one first; ended ones go when they are due
        self._due: Final[list[tuple[float, int, float]]] = []
        self._sleeps_until = math.inf
        self._earlier: Final = asyncio.Event()
        self._one_at_a_time: Final = asyncio.Lock()
        self._rested_at = 0.0
        self._single_rested_at = 0.0

    def add(self, live: LiveJob) -> None:
        """Sample a job from now on."""
        age = max(0.0, (datetime.now(UTC) - live.job.start).total_seconds())
        now = asyncio.get_running_loop().time()
        self._push(live.job.id, now - age, now)

    def _push(self, job_id: int, began: float, now: float) -> None:
        # by the monotonic clock, which is never set
        due = now + interval_seconds(now - began)
        heapq.heappush(self._due, (due, job_id, began))
        if due < self._sleeps_until:
            self._earlier.set()

    async def run(self) -> None:
        """Sample for ever, each job when it is due."""
        while True:
            if batch := self._take_due():
                wait_seconds = max(_PAUSE_SECONDS, len(batch) / HISTORY_PER_SECOND)
                failed = 0
                try:
                    await self._write_samples(batch)
                except LauncherGoneError:
                    raise
                except PjwError as error:
                    log.error("%s", error)
                    wait_seconds = _RETRY_SECONDS
                    failed = error.errno if isinstance(error, KernelError) else 0
                # after an error of the disk, ext4 may refuse writes without a read-only flag
                self._held.set_read_only(self, read_only=failed == errno.EROFS)
                await asyncio.sleep(wait_seconds)
            else:
                await self._until_due()

    def _take_due(self) -> list[int]:
        now = asyncio.get_running_loop().time()
        batch: list[int] = []
        while self._due and self._due[0][0] <= now and len(batch) < MAX_MEASURED:
            _, job_id, began = heapq.heappop(self._due)
            if self._running(job_id) is not None:
                batch.append(job_id)
                self._push(job_id, began, now)
        return batch

    def _running(self, job_id: int) -> LiveJob | None:
        # one that has ended is live until its row is on the disk
        live = self._live.get(job_id)
        return None if live is None or live.job.state.final else live

    async def _until_due(self) -> None:
        self._earlier.clear()
        # Not for each one of a thousand that are due within a second, and have ended long ago.
        soonest = asyncio.get_running_loop().time() + _PAUSE_SECONDS
        self._sleeps_until = max(self._due[0][0], soonest) if self._due else math.inf
        try:
            async with asyncio.timeout_at(self._sleeps_until if self._due else None):
                await self._earlier.wait()
        except TimeoutError:
            pass
        self._sleeps_until = -math.inf

    async def _write_samples(self, job_ids: Sequence[int]) -> None:
        await self._measure(job_ids)
        await self._state.in_thread(self._append, job_ids)

    def _append(self, job_ids: Sequence[int]) -> None:
        for job_id in job_ids:
            # Looked at now, since the disk may have let us wait: of one that has ended nothing is written,
            # for it may be removed.
            live = self._running(job_id)
            if live is not None and live.sample is not None:
                self._state.append_usage(job_id, live.sample)

    async def _measure(self, job_ids: Sequence[int]) -> None:
        found = await self._launcher.request_measure(job_ids)
        now = asyncio.get_running_loop().time()
        for job_id in job_ids:
            live = self._live.get(job_id)
            if live is not None:
                # tried, whether there was something to measure or not
                live.sampled_at = now
                live.sample = found.get(job_id, live.sample)

    async def of_job(self, job_id: int) -> UsageSample | None:
        """Return the usage of one job, at most a second old; None when it has ended or is not measurable.

        The sample is older when the launcher is busy, or when requests for single jobs come too fast: a
        question about a job hardly waits for its usage.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        live = self._running(job_id)
        if (
            live is not None
            and live.sampled_at < now - _FRESH_SECONDS
            and self._single_rested_at < now + _PAUSE_SECONDS
        ):
            self._single_rested_at = max(now, self._single_rested_at) + 1 / WATCHED_PER_SECOND
            try:
                async with asyncio.timeout(_WITHIN_SECONDS):
                    await self._measure([job_id])
            except TimeoutError:
                # It is busy, and will answer this one all the same: more would only keep it from the rest.
                self._single_rested_at = loop.time() + _FRESH_SECONDS
            except PjwError as error:
                log.debug("cannot measure job %d: %s", job_id, error)
        return None if live is None else live.sample

    async def now(
        self, owner: str | None, fresh_seconds: float, within_seconds: float
    ) -> list[tuple[Job, UsageSample | None]]:
        """Return the unfinished jobs of *owner* (None: of all clients), with the usage of each.

        A sample that is *fresh_seconds* old will do, whichever call it was taken for. After *within_seconds*
        also an older one, or none: the next call goes on with the oldest. Raises KernelError.
        """
        loop = asyncio.get_running_loop()
        fresh_from, deadline = loop.time() - fresh_seconds, loop.time() + within_seconds
        stale = sorted(
            (live.sampled_at, job_id)
            for job_id, live in self._live.items()
            if owner in (None, live.job.client_name) and live.sampled_at < fresh_from
        )
        for start in range(0, len(stale), MAX_MEASURED):
            async with self._one_at_a_time:
                if max(loop.time(), self._rested_at) > deadline:
                    break
                # others may have asked for them while we waited
                batch = [
                    job_id
                    for _, job_id in stale[start : start + MAX_MEASURED]
                    if job_id in self._live and self._live[job_id].sampled_at < fresh_from
                ]
                if batch:
                    await asyncio.sleep(self._rested_at - loop.time())
                    self._rested_at = loop.time() + len(batch) / WATCHED_PER_SECOND
                    await self._measure(batch)
        return [
            (live.job, live.sample)
            for live in self._live.values()
            if owner in (None, live.job.client_name) and not live.job.state.final
        ]
