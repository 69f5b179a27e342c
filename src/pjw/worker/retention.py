"""Removes ended jobs: on request, and when there are more than the operator keeps."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Protocol

from pjw.errors import PjwError
from pjw.worker.settings import Retention, WorkerSettings
from pjw.worker.store import JobStore

# So many in one transaction: the table is free for others again within milliseconds.
BATCH: Final = 100
# One look is for all jobs that end within so long: to look after each would cost a fifth of its own end.
_PAUSE_SECONDS: Final = 0.5
# Nothing tells when a failing disk works again.
_RETRY_SECONDS: Final = 60

log: Final = logging.getLogger(__name__)


class EndedJobs(Protocol):
    """The store of kept jobs: `StateDir` is one."""

    @property
    def store(self) -> JobStore:
        """Their rows."""

    def in_thread(self, function: Callable[[int], None], job_id: int, /) -> Awaitable[None]:
        """Call a function that waits for the disk."""

    def remove_job(self, job_id: int) -> None:
        """Remove the files of a job."""


class Pruner:
    """Row first, then files: a job that is shown has its output, and a crash in between leaves a note."""

    def __init__(self, state: EndedJobs, retention: Retention) -> None:
        self._state: Final = state
        self._retention = retention
        self._due: Final = asyncio.Event()
        # called when jobs have been removed
        self.removed: Final[list[Callable[[], None]]] = []

    def job_ended(self) -> None:
        """Note that there is one more job to keep, or one more that may be removed."""
        self._due.set()

    def reconfigure(self, settings: WorkerSettings) -> None:
        """Apply the retention of other settings from now on."""
        self._retention = settings.retention
        self._due.set()

    async def remove(self, job_id: int) -> None:
        """Remove an ended job, its row and its files. Raises LimitReachedError or KernelError."""
        await self._state.store.remove(job_id)
        await self._remove_files([job_id])

    async def run(self) -> None:
        """Prune for ever: after each end of a job, and when one has become too old."""
        leftover = True
        while True:
            self._due.clear()
            try:
                if leftover:
                    # removals that a worker before us had begun
                    await self._remove_files(await self._state.store.removals())
                    leftover = False
                while pruned := await self._state.store.prune(self._retention, time.time_ns(), BATCH):
                    await self._remove_files(pruned)
                wait_seconds = await self._seconds_to_next()
            except PjwError as error:
                log.error("cannot remove ended jobs: %s", error)
                leftover, wait_seconds = True, _RETRY_SECONDS
            try:
                async with asyncio.timeout(wait_seconds):
                    await self._due.wait()
            except TimeoutError:
                continue
            await asyncio.sleep(_PAUSE_SECONDS)

    async def _seconds_to_next(self) -> float | None:
        if not self._retention.age_seconds:
            return None
        first_ns = await self._state.store.first_end_ns(told=self._retention.keeps_untold)
        if first_ns is None:
            return None
        # A second late rather than an instant early; and a clock that was set is noticed in a day.
        left = first_ns / 1e9 + self._retention.age_seconds - time.time() + 1
        return min(max(left, 1.0), 86_400.0)

    async def _remove_files(self, job_ids: Sequence[int]) -> None:
        if not job_ids:
            return
        # Or a power cut could bring a row back whose files are gone.
        await self._state.store.sync()
        # In a thread: to unlink gigabytes takes a while.
        for job_id in job_ids:
            await self._state.in_thread(self._state.remove_job, job_id)
        await self._state.store.removed(job_ids)
        for each in self.removed:
            each()
