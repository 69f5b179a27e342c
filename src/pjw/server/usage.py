"""Streams the usage of running jobs. Without watchers nothing is measured; many watchers cost no more."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Final

from pjw.errors import InvalidJobError
from pjw.model import Job, UsageSample
from pjw.rpc.convert import job_to_message, sample_to_message
from pjw.server.backend import JobCalls
from pjw.v1 import job_worker_pb2 as pb

INTERVAL_SECONDS: Final = 2.0
INTERVAL_SECONDS_MIN: Final = 1.0
INTERVAL_SECONDS_MAX: Final = 60.0
# A screen should not be empty for long.
FIRST_SECONDS: Final = 0.3
# All watchers together may take a twentieth of a processor for their messages: with thousands of jobs, or
# watchers, snapshots are further apart than requested.
_SHARE: Final = 20
# A reader has no use for more waiting jobs than these.
_WAITING_MAX: Final = 50
# So many jobs are converted before others get their turn.
_JOBS_AT_ONCE: Final = 50
# Of commands and labels there is only so much in a snapshot, which has to fit into the 4 MiB that gRPC's
# clients take; and of each job no more than a screen shows.
_CHARACTERS: Final = 256 * 1024
_CHARACTERS_OF_JOB: Final = 256


class UsageWatchers:
    """The watchers of usage on one server."""

    def __init__(self, worker: JobCalls) -> None:
        self._worker: Final = worker
        self._count = 0

    async def watch(
        self, request: pb.WatchUsageRequest, owner: str | None
    ) -> AsyncGenerator[pb.WatchUsageResponse, None]:
        """Yield snapshots of the jobs of *owner*, or of all clients, for ever. Raises InvalidJobError."""
        interval = _interval_of(request)
        loop = asyncio.get_running_loop()
        within = FIRST_SECONDS
        self._count += 1
        try:
            while True:
                began = loop.time()
                # half: a sample that another watcher has just asked for is as good as one of our own
                usages = await self._worker.usage_now(owner, interval / 2, within)
                snapshot, taken = await _snapshot(usages)
                snapshot.queued, waiting = await self._worker.queued_now(owner, _WAITING_MAX)
                snapshot.waiting.extend(_cut(job, _CHARACTERS_OF_JOB) for job in waiting)
                yield snapshot
                within = interval
                await asyncio.sleep(began + max(interval, taken * _SHARE * self._count) - loop.time())
        finally:
            self._count -= 1


def _interval_of(request: pb.WatchUsageRequest) -> float:
    if not request.HasField("interval"):
        return INTERVAL_SECONDS
    seconds = request.interval.seconds + request.interval.nanos / 1e9
    if not INTERVAL_SECONDS_MIN <= seconds <= INTERVAL_SECONDS_MAX:
        raise InvalidJobError(
            f"the interval must be from {INTERVAL_SECONDS_MIN:g} to {INTERVAL_SECONDS_MAX:g} seconds"
        )
    return seconds


async def _snapshot(usages: Sequence[tuple[Job, UsageSample | None]]) -> tuple[pb.WatchUsageResponse, float]:
    """Return the message, and the seconds of processor time that it took."""
    characters = min(_CHARACTERS_OF_JOB, _CHARACTERS // max(1, len(usages)))
    snapshot, taken = pb.WatchUsageResponse(), 0.0
    for start in range(0, len(usages), _JOBS_AT_ONCE):
        began = time.thread_time()
        snapshot.jobs.extend(
            _job_usage(job, sample, characters) for job, sample in usages[start : start + _JOBS_AT_ONCE]
        )
        taken += time.thread_time() - began
        await asyncio.sleep(0)
    return snapshot, taken


def _job_usage(job: Job, sample: UsageSample | None, characters: int) -> pb.JobUsage:
    message = _cut(job, characters)
    return pb.JobUsage(job=message, sample=sample_to_message(sample) if sample is not None else None)


def _cut(job: Job, characters: int) -> pb.Job:
    message = job_to_message(job)
    message.command = message.command[:characters]
    if sum(len(key) + len(value) for key, value in job.labels.items()) > characters:
        message.labels.clear()
    return message
