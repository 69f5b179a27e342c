"""What a client may have at once: running jobs, and bytes of output."""

import sys
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import Final

from pjw.errors import LimitReachedError
from pjw.worker.job import LiveJob
from pjw.worker.settings import Quotas
from pjw.worker.state_dir import StateDir

# So much input a client may write between two looks at what is stored, or as much as its quota leaves. A look
# asks the table, and the kernel about each running job; in between input is counted, and output is not.
LOOK_BYTES: Final = 64 * 1024**2
# What is left to more clients than these is forgotten: that costs each a look.
_LEFT_MAX: Final = 1000


class RunningJobs:
    """Counts jobs from before their start to after their end, so that no burst gets past the quota."""

    def __init__(self, quotas: Quotas) -> None:
        self.quotas = quotas
        self._running: Final[Counter[str]] = Counter()

    def take(self, client_name: str) -> None:
        """Count a job that is to be started. Raises LimitReachedError at a quota."""
        most, total = self.quotas.running_max, self.quotas.running_total_max
        if most and self._running[client_name] >= most:
            raise LimitReachedError(
                f"{most} jobs of {client_name} are running, and no more may",
                hint="wait for one to end, or stop one; the operator sets clients.running_max",
                limit="running_max",
            )
        if total and self._running.total() >= total:
            raise LimitReachedError(
                f"{total} jobs are running on this server, and no more may",
                hint="try again later; the operator sets clients.running_total_max",
                limit="running_total_max",
            )
        self.adopt(client_name)

    def adopt(self, client_name: str) -> None:
        """Count a job that runs already, whatever the quota has become since."""
        self._running[client_name] += 1

    def give_back(self, client_name: str) -> None:
        """A job has ended, or did not come to be."""
        self._running[client_name] -= 1
        if not self._running[client_name]:
            del self._running[client_name]


class StoredBytes:
    """Knows what clients have stored, running jobs too, and bounds what they store as input."""

    def __init__(self, state: StateDir, live: Mapping[int, LiveJob], quotas: Quotas) -> None:
        self._state: Final = state
        self._live: Final = live
        self._quotas = quotas
        # what may be written until the next look: by each client, and by all
        self._left: Final[Counter[str]] = Counter()
        self._left_of_all = 0
        # what is being written, and perhaps not in the files yet
        self._under_way: Final[Counter[str]] = Counter()

    def set_quotas(self, quotas: Quotas) -> None:
        """From now on these."""
        self._quotas = quotas
        self._left.clear()

    async def check(self, client_name: str) -> None:
        """Raises LimitReachedError when a client, or all of them, have stored what they may."""
        if self._bounded:
            check_bytes(self._quotas, client_name, *await self._look(client_name))

    @asynccontextmanager
    async def taken(self, client_name: str, count: int) -> AsyncGenerator[None, None]:
        """Count bytes of input while they are written. Raises LimitReachedError when they are too many."""
        if not self._bounded:
            yield
            return
        if count > min(self._left[client_name], self._left_of_all):
            own, total = await self._look(client_name)
            # no await from here on: what another has taken meanwhile is in what we saw
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

    @property
    def _bounded(self) -> bool:
        return bool(self._quotas.stored_bytes_max or self._quotas.stored_bytes_total_max)

    async def _look(self, client_name: str) -> tuple[int, int]:
        """The bytes of one client, and those of all where there is a quota for them."""
        own, total = await self._state.store.ended_bytes(client_name)
        own += self._under_way[client_name]
        total += self._under_way.total()
        for live in self._live.values():
            if self._quotas.stored_bytes_total_max or live.job.client_name == client_name:
                size = self._state.output_size(live.job) + self._state.input_size(live.job)
                total += size
                own += size if live.job.client_name == client_name else 0
        return own, total


def _room(most: int, there: int) -> int:
    return most - there if most else sys.maxsize


def check_bytes(
    quotas: Quotas, client_name: str, own_bytes: int, total_bytes: int, more_bytes: int = 1
) -> None:
    """Raises LimitReachedError when a client, or all of them, may not store so many bytes more."""
    most, total = quotas.stored_bytes_max, quotas.stored_bytes_total_max
    if most and own_bytes + more_bytes > most:
        raise LimitReachedError(
            f"the jobs of {client_name} have {own_bytes} bytes of output and input, and at most {most}"
            " may be stored",
            hint="remove ended jobs: pjw rm ID; the operator sets clients.stored_bytes_max",
            limit="stored_bytes_max",
        )
    if total and total_bytes + more_bytes > total:
        raise LimitReachedError(
            f"the output and input of all jobs are {total_bytes} bytes, and at most {total} may be stored",
            hint="remove ended jobs: pjw rm ID; the operator sets clients.stored_bytes_total_max",
            limit="stored_bytes_total_max",
        )
