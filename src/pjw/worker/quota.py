"""The bounds of one client at once: running jobs, the memory of their limits, and bytes on the disk."""

import asyncio
import math
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Final, Protocol

from pjw.amounts import exact_size
from pjw.errors import InvalidJobError, LimitReachedError
from pjw.model import TOO_DEEP, Job, Limits, Sums
from pjw.worker.disk import TreeUse
from pjw.worker.host import memory_of
from pjw.worker.job import LiveJob
from pjw.worker.settings import Quotas, WorkerSettings
from pjw.worker.store import JobStore

# The input that a client may write between two looks at the stored bytes, unless its quota leaves less. A
# look asks the table, and the kernel about each running job; in between input is counted, and output is not.
LOOK_BYTES: Final = 64 * 1024**2
LOOK_SECONDS: Final = 1
# The remainders of more clients than these are forgotten: that costs each a look.
_LEFT_MAX: Final = 1000


class RunningJobs:
    """Counts jobs, and the memory that their limits promise, from before their start to after their end.

    So no burst of starts gets past the bounds. New settings change the bounds, not the counts.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        self._whole_memory: Final = memory_of(settings.sums)
        self._running: Final[Counter[str]] = Counter()
        self._memory: Final[Counter[str]] = Counter()

    def reconfigure(self, settings: WorkerSettings) -> None:
        """Apply the bounds of other settings to later starts."""
        self.settings = settings

    def take(self, client_name: str, limits: Limits) -> None:
        """Count a job before its start.

        Raises LimitReachedError at a quota or without room for its memory; InvalidJobError without room ever.
        """
        quotas = self.settings.quotas
        most, total = quotas.running_max, quotas.running_total_max
        if most and self._running[client_name] >= most:
            raise LimitReachedError(
                f"{most} jobs of {client_name} are running, and no more may",
                hint="wait for one to end, or stop one; the operator sets clients.running_max",
                limit="running_max",
                most=most,
            )
        if total and self._running.total() >= total:
            raise LimitReachedError(
                f"{total} jobs are running on this server, and no more may",
                hint="try again later; the operator sets clients.running_total_max",
                limit="running_total_max",
                most=total,
            )
        self.require_possible(client_name, limits)
        own, every = self.memory_max(client_name)
        wanted = self._promise(limits)
        promised = self._memory[client_name]
        if own and promised + wanted > own:
            raise _no_room(
                f"{_in_words(wanted, limits)}: running jobs of {client_name} have {exact_size(promised)}"
                f" of the {exact_size(own)} that they may have together",
                own,
            )
        # do not tell a client about the jobs of others
        if every and self._memory.total() + wanted > every:
            raise _no_room(f"{_in_words(wanted, limits)}: this server has no room for that now")
        self.adopt(client_name, limits)

    def require_possible(self, client_name: str, limits: Limits) -> None:
        """Check that there can ever be room for a job's memory. Raises InvalidJobError."""
        own, every = self.memory_max(client_name)
        wanted = self._promise(limits)
        for most, whose in ((own, f"jobs of {client_name}"), (every, "jobs of this server")):
            if most and wanted > most:
                raise InvalidJobError(
                    f"cannot start the job with {_in_words(wanted, limits)}: all {whose} together may have"
                    f" {exact_size(most)}",
                    hint="ask for less memory; the operator sets memory_overcommit",
                )

    def _promise(self, limits: Limits) -> int:
        return limits.memory_max_bytes or self._whole_memory

    def memory_max(self, client_name: str) -> tuple[int, int]:
        """Return the most that the memory limits of a client's running jobs, and of all, may be; 0 is any."""
        factor = self.settings.memory_overcommit
        own = self.settings.shares.of(client_name).sums.memory_max_bytes
        return int(factor * own), int(factor * self._whole_memory)

    def adopt(self, client_name: str, limits: Limits) -> None:
        """Count a job that runs already, even above a bound that was set since."""
        self._running[client_name] += 1
        self._memory[client_name] += self._promise(limits)

    def give_back(self, client_name: str, limits: Limits) -> None:
        """Stop counting a job that has ended, or was not started."""
        self._running[client_name] -= 1
        self._memory[client_name] -= self._promise(limits)
        if not self._running[client_name]:
            del self._running[client_name], self._memory[client_name]

    def clients(self) -> list[str]:
        """Return the clients that have running jobs."""
        return list(self._running)

    def of(self, client_name: str) -> tuple[int, int]:
        """Return the number of a client's running jobs, and the sum of their memory limits in bytes."""
        return self._running[client_name], self._memory[client_name]


def _in_words(wanted: int, limits: Limits) -> str:
    return f"a memory limit of {exact_size(wanted)}" if limits.memory_max_bytes else "no memory limit"


def _no_room(why: str, most: int | None = None) -> LimitReachedError:
    return LimitReachedError(
        f"cannot start the job with {why}",
        hint="ask for less memory, or wait for a job to end; the operator sets memory_overcommit",
        limit="memory_overcommit",
        most=most,
    )


def most_of_one_job(ceiling: Limits, sums: Sums, memory_promised_max_bytes: int) -> Limits:
    """Return the limits that a job can have at most: no more than all jobs of its client together."""
    together = dict(sums.items())
    together["memory_max_bytes"] = min(
        filter(None, (sums.memory_max_bytes, memory_promised_max_bytes)), default=0
    )
    return ceiling.with_overrides(
        {
            name: min(filter(None, (getattr(ceiling, name), most)), default=0)
            for name, most in together.items()
        }
    )


class JobFiles(Protocol):
    """The bytes that jobs have stored: `StateDir` is one."""

    @property
    def store(self) -> JobStore:
        """Their rows."""

    def output_size(self, job: Job, /) -> int:
        """How many bytes of output a job has."""

    def input_size(self, job: Job, /) -> int:
        """How many bytes of input are kept for a job."""

    def artifacts_size(self, job: Job, /) -> int:
        """How many bytes of artifacts a job has, whole or not."""


class StoredBytes:
    """Knows the bytes that clients have stored, running jobs too, and bounds those they store as input."""

    def __init__(
        self,
        state: JobFiles,
        live: Mapping[int, LiveJob],
        scratch: Mapping[int, TreeUse],
        quotas: Quotas,
    ) -> None:
        self._state: Final = state
        self._live: Final = live
        # as it was last counted
        self._scratch: Final = scratch
        self._quotas = quotas
        # the bytes of the sessions of a job, by its id
        self.sessions: Callable[[int], int] = lambda _: 0
        # the bytes of the uploads of a client, or with None of all
        self.uploads: Callable[[str | None], int] = lambda _: 0
        # the bytes that may be written until the next look: by each client, and by all
        self._left: Final[Counter[str]] = Counter()
        self._left_of_all = 0
        # the last look at each client's bytes for mere information, and its result
        self._looks: Final[dict[str, tuple[float, int]]] = {}
        # bytes whose write is under way, and that are perhaps not in the files yet
        self._under_way: Final[Counter[str]] = Counter()

    def reconfigure(self, settings: WorkerSettings) -> None:
        """Apply the quotas of other settings from now on."""
        self._quotas = settings.quotas
        self._left.clear()

    async def check(self, client_name: str) -> None:
        """Check that neither a client nor all of them have reached their bytes. Raises LimitReachedError."""
        if self.bounded:
            check_bytes(self._quotas, client_name, *await self._look(client_name))

    @asynccontextmanager
    async def taken(self, client_name: str, count: int) -> AsyncGenerator[None, None]:
        """Count bytes of input while they are written. Raises LimitReachedError when they are too many."""
        if not self.bounded:
            yield
            return
        if count > min(self._left[client_name], self._left_of_all):
            own, total = await self._look(client_name)
            # no await from here on: bytes that another call has taken meanwhile are in this look
            check_bytes(self._quotas, client_name, own, total, count)
            if len(self._left) > _LEFT_MAX:
                self._left.clear()
            self._left[client_name] = min(_room(self._quotas.stored_bytes_max, own), LOOK_BYTES)
            self._left_of_all = _room(self._quotas.stored_bytes_total_max, total)
        self._left[client_name] -= count
        self._left_of_all -= count
        self._under_way[client_name] += count
        try:
            yield
        finally:
            self._under_way[client_name] -= count
            if not self._under_way[client_name]:
                del self._under_way[client_name]

    async def check_kept(self, live: LiveJob) -> None:
        """Check that the artifacts of an ended job may be stored. Raises LimitReachedError.

        Its other files, except its output, are removed with it.
        """
        if not self.bounded:
            return
        own, total = await self._look(live.job.client_name)
        scratch = self._scratch.get(live.job.id)
        goes = self._state.input_size(live.job) + (0 if scratch is None else scratch.bytes)
        check_bytes(self._quotas, live.job.client_name, own - goes, total - goes, 0)

    @property
    def bounded(self) -> bool:
        """Whether there is a quota."""
        return bool(self._quotas.stored_bytes_max or self._quotas.stored_bytes_total_max)

    async def of(self, client_name: str) -> int:
        """Return the bytes a client has stored, at most LOOK_SECONDS ago: each look costs."""
        now = asyncio.get_running_loop().time()
        looked, own = self._looks.get(client_name, (-math.inf, 0))
        if now - looked > LOOK_SECONDS:
            own, _ = await self._look(client_name)
            if len(self._looks) > _LEFT_MAX:
                self._looks.clear()
            self._looks[client_name] = now, own
        return own

    async def _look(self, client_name: str) -> tuple[int, int]:
        """Return the bytes of one client, and those of all where there is a quota for them."""
        own, total = await self._state.store.ended_bytes(client_name)
        own += self._under_way[client_name] + self.uploads(client_name)
        total += self._under_way.total() + self.uploads(None)
        for live in self._live.values():
            if self._quotas.stored_bytes_total_max or live.job.client_name == client_name:
                size = self._state.output_size(live.job) + self._state.input_size(live.job)
                size += self._state.artifacts_size(live.job) + self.sessions(live.job.id)
                if (scratch := self._scratch.get(live.job.id)) is not None:
                    size += scratch.bytes
                # a tree too deep to be counted counts only for its client
                total += size if size < TOO_DEEP else 0
                own += size if live.job.client_name == client_name else 0
        return own, total


def _room(most: int, there: int) -> int:
    return most - there if most else sys.maxsize


def check_bytes(
    quotas: Quotas, client_name: str, own_bytes: int, total_bytes: int, more_bytes: int = 1
) -> None:
    """Check that so many bytes more may be stored, by the client and by all. Raises LimitReachedError."""
    most, total = quotas.stored_bytes_max, quotas.stored_bytes_total_max
    if most and own_bytes + more_bytes > most:
        raise LimitReachedError(
            f"the jobs of {client_name} have {exact_size(own_bytes)} of output, artifacts, input, scratch,"
            f" workspaces and images, and at most {exact_size(most)} may be stored",
            hint="remove ended jobs (pjw rm ID) or workspaces (pjw workspace rm NAME); the operator sets"
            " clients.stored_bytes_max",
            limit="stored_bytes_max",
            most=most,
        )
    if total and total_bytes + more_bytes > total:
        raise LimitReachedError(
            "this server has no room for more output, artifacts, input, scratch, workspaces and images now",
            hint="remove ended jobs: pjw rm ID; the operator sets clients.stored_bytes_total_max",
            limit="stored_bytes_total_max",
            most=total,
        )
