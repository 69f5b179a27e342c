"""The counters of a worker, at one moment."""

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pjw.model import EndReason, JobState
from pjw.worker.job import LiveJob
from pjw.worker.launcher_client import LauncherClient
from pjw.worker.queue import Queue
from pjw.worker.state_dir import StateDir


@dataclass(frozen=True, slots=True)
class ClientNumbers:
    """The counters of one client."""

    running: int = 0
    stored_jobs: int = 0
    stored_bytes: int = 0
    queued: int = 0


@dataclass(frozen=True, slots=True)
class Series:
    """A metric that only some pjwd have: values by a label, or else a total that only grows."""

    name: str
    text: str
    label: str = ""
    values: Mapping[str, float] = field(default_factory=dict)
    total: float = 0


@dataclass(frozen=True, slots=True)
class WorkerNumbers:
    """The counters of jobs and of space, for monitoring.

    Jobs by state, ends by reason since the start, the counters of each client, the state directory's disk,
    the number of jobs whose output waits for that disk. Of the queue: the number of jobs that were started
    from it, and how long (in seconds) the oldest job has waited that waits only for its turn. In the queue
    each element of an array counts.

    Bytes are the output of ended jobs: that of running jobs is known when they have ended.
    """

    live: Mapping[JobState, int]
    ends: Mapping[EndReason, int]
    clients: Mapping[str, ClientNumbers]
    disk_bytes: int
    disk_free_bytes: int
    output_held: int
    launcher_up: bool
    admissions: int = 0
    oldest_queued_seconds: float = 0.0
    # of jobs, to names on the network, by their results
    connections: Mapping[str, int] = field(default_factory=dict)
    # of a gateway, or of the node of one
    more: Sequence[Series] = ()
    drained: bool = False


async def count_all(
    state: StateDir,
    live: Mapping[int, LiveJob],
    ends: Mapping[EndReason, int],
    held: int,
    launcher: LauncherClient,
    queue: Queue,
    connections: Mapping[str, int],
    more: Sequence[Series],
    *,
    drained: bool,
) -> WorkerNumbers:
    """Count; it costs the same however many jobs are kept."""
    totals = {name: (jobs, stored) for name, jobs, stored in await state.store.totals()}
    disk = os.fstatvfs(state.descriptor)
    jobs = [each.job for each in live.values()]
    running = Counter(job.client_name for job in jobs)
    queued = Counter(await state.store.waiting_of_clients())
    oldest_ns = await state.store.oldest_ready_ns()
    return WorkerNumbers(
        live=Counter(job.state for job in jobs),
        ends=dict(ends),
        clients={
            name: ClientNumbers(running[name], *totals.get(name, (0, 0)), queued[name])
            for name in sorted(totals.keys() | running.keys())
        },
        disk_bytes=disk.f_frsize * disk.f_blocks,
        disk_free_bytes=disk.f_frsize * disk.f_bavail,
        output_held=held,
        launcher_up=not launcher.gone.is_set(),
        admissions=queue.admissions,
        oldest_queued_seconds=0.0 if oldest_ns is None else max(0.0, (time.time_ns() - oldest_ns) / 1e9),
        connections=dict(connections),
        more=more,
        drained=drained,
    )
