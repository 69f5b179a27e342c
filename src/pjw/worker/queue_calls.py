"""Calls about jobs of the queue, and elements of arrays, on one machine and in a cluster."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from signal import SIGTERM

from pjw.arrays import Element
from pjw.errors import JobNotFoundError, JobStateError, PjwError
from pjw.model import Job, JobSpec, JobState, Limits
from pjw.worker.job_rows import to_ns
from pjw.worker.queue import Queue
from pjw.worker.settings import Quotas
from pjw.worker.store import JobStore
from pjw.worker.tasks import Flag


class QueueCalls(ABC):
    """The owner of a queue of jobs."""

    _queue: Queue

    @abstractmethod
    async def get(self, job_id: int | Element, owner: str | None = None) -> Job:
        """One job as it is now. Raises JobNotFoundError."""

    @abstractmethod
    async def stop(
        self,
        job_id: int | Element,
        grace_seconds: float | None = None,
        owner: str | None = None,
        signal: int = SIGTERM,
    ) -> Job:
        """End a job; its final snapshot."""

    @abstractmethod
    def _shown(self, job: Job) -> Job:
        """Return a job of the table as it is now."""

    @abstractmethod
    async def _wait_for(self, *flags: Flag) -> None:
        """Wait until one of them is set."""

    @abstractmethod
    async def _wait_for_end(self, job_id: int, owner: str | None, *, or_stuck: bool) -> Job:
        """Wait until a job has ended, though there be another attempt."""

    @abstractmethod
    async def _withdraw(self, job_ids: Sequence[int]) -> None:
        """Jobs that may be on their way from the queue to their start are held, or have ended."""

    async def _enqueue(
        self,
        store: JobStore,
        client_name: str,
        asked: Sequence[tuple[JobSpec, Limits]],
        quotas: Quotas,
        tokens: Mapping[int, str],
        before_ns: int,
    ) -> Sequence[Job]:
        """Put jobs into the queue, all or none; they are on the disk then. *before_ns*: when this began."""
        jobs, awaited = await store.enqueue(client_name, asked, quotas, tokens)
        self._queue.awaits(awaited)
        try:
            await store.sync()
        except PjwError:
            # no caller knows of them, except of one of an earlier request
            await store.unqueue([job.id for job in jobs if to_ns(job.asked) >= before_ns])
            raise
        self._queue.added(jobs)
        return [self._shown(job) for job in jobs]

    async def hold(self, job_id: int | Element, owner: str | None = None) -> Job:
        """Keep a job from being started until `release`: of an array all elements that wait.

        Raises JobNotFoundError, JobStateError for a job that does not wait in the queue, and
        LimitReachedError when too many elements are held one by one.
        """
        job = await self.get(job_id, owner)
        if isinstance(job_id, Element):
            if not job.id and (held := await self._queue.hold_element(job_id)) is not None:
                return self._shown(held)
            job = await self._with_id(job_id, owner, "hold")
        held = await self._queue.hold(job.id)
        await self._withdraw((job.id, *self._queue.elements(job.id)))
        return self._shown(held)

    async def release(self, job_id: int | Element, owner: str | None = None) -> Job:
        """Let a held job be started: of an array all its elements, also those that were held one by one.

        Raises as `hold`.
        """
        job = await self.get(job_id, owner)
        if isinstance(job_id, Element) and not job.id and job.state is JobState.QUEUED:
            # nobody holds it by itself
            return job
        if isinstance(job_id, Element):
            job = await self._with_id(job_id, owner, "release")
        return self._shown(await self._queue.release(job.id))

    async def wait(self, job_id: int | Element, owner: str | None = None, *, or_stuck: bool = False) -> Job:
        """Wait until a job has ended; its final snapshot. Raises JobNotFoundError.

        Of a job that is tried again it is the newest attempt that has to end. With *or_stuck* it also returns
        when the job was killed and does not end, or when its output waits for the disk. Its `detail` says
        which.
        """
        if isinstance(job_id, Element):
            job = await self._drawn(job_id, owner)
            if not job.id:
                return job
            job_id = job.id
        job = await self._wait_for_end(job_id, owner, or_stuck=or_stuck)
        while job.retried_as is not None:
            job = await self._wait_for_end(job.retried_as, owner, or_stuck=or_stuck)
        return job

    # --- elements of arrays

    async def _with_id(self, element: Element, owner: str | None, verb: str) -> Job:
        """Return an element that has an id. Raises JobStateError for one that never gets any."""
        job = await self.get(element, owner)
        if not job.id:
            raise JobStateError(f"cannot {verb} job {element}: it was never started")
        return job

    async def _drawn(self, element: Element, owner: str | None) -> Job:
        """Return an element, when it has an id or gets none any more. Raises JobNotFoundError."""
        while True:
            change = self._queue.change_of(element)
            job = await self.get(element, owner)
            if job.id or job.state.final:
                return job
            await self._wait_for(change)

    async def _stop_element(
        self, element: Element, grace_seconds: float | None, owner: str | None, signal: int
    ) -> Job:
        while True:
            job = await self.get(element, owner)
            if job.id:
                return await self.stop(job.id, grace_seconds, owner, signal)
            if job.state.final:
                return job
            if (cancelled := await self._queue.cancel_element(element)) is not None:
                return cancelled

    async def _stop_array(self, array_id: int, grace_seconds: float | None, signal: int) -> Job:
        await self._queue.cancel_array(array_id)
        await self._withdraw(self._queue.elements(array_id))
        stops = (self.stop(job_id, grace_seconds, None, signal) for job_id in self._queue.elements(array_id))
        for each in await asyncio.gather(*stops, return_exceptions=True):
            # one that has been forgotten has ended
            if isinstance(each, BaseException) and not isinstance(each, JobNotFoundError):
                raise each
        return await self._wait_for_end(array_id, None, or_stuck=False)
