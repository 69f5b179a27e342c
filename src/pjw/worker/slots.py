"""The slots of the queue: its running jobs, the sums of their limits, and so whose turn it is.

Only jobs that came out of the queue count. A job that was started at once takes no slot: else a client that
starts long jobs at once would hold up every client's queue.
"""

from dataclasses import dataclass
from typing import Final

from pjw.model import Limits
from pjw.worker.host import memory_of, resources
from pjw.worker.settings import WorkerSettings


@dataclass(slots=True)
class _Use:
    """The use of some jobs: their number, and the sums of their limits."""

    jobs: int = 0
    millicores: int = 0
    memory: int = 0

    def add(self, other: "_Use", sign: int) -> None:
        self.jobs += sign * other.jobs
        self.millicores += sign * other.millicores
        self.memory += sign * other.memory

    def room_for(self, other: "_Use", most: "_Use") -> bool:
        """Return whether both are within *most*, where 0 is no limit. A larger job takes all of it."""
        return all(
            not bound or there + min(more, bound) <= bound
            for there, more, bound in (
                (self.jobs, other.jobs, most.jobs),
                (self.millicores, other.millicores, most.millicores),
                (self.memory, other.memory, most.memory),
            )
        )


class Slots:
    """Counts the jobs of the queue from before their start to after their end.

    New settings change the bounds, not the counts.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        self._host: Final = _Use(0, resources().cpu_max_millicores, memory_of(settings.sums))
        self._all: Final = _Use()
        self._clients: Final[dict[str, _Use]] = {}
        # the amounts that each job was counted with: a reload may change these
        self._taken: Final[dict[int, tuple[str, _Use]]] = {}

    def take(self, job_id: int, client_name: str, limits: Limits) -> None:
        """Count a job that is about to be started, or runs already."""
        use = self._promise(limits)
        self._taken[job_id] = client_name, use
        self._all.add(use, 1)
        self._clients.setdefault(client_name, _Use()).add(use, 1)

    def give_back(self, job_id: int) -> None:
        """Free the slots of a job that has ended, or was not started."""
        client_name, use = self._taken.pop(job_id)
        self._all.add(use, -1)
        own = self._clients[client_name]
        own.add(use, -1)
        if not own.jobs:
            del self._clients[client_name]

    def has_room_of_own(self, client_name: str, limits: Limits) -> bool:
        """Return whether a client's slots have room for a job of it."""
        slots = self.settings.queue
        most = _Use(slots.client_running_max, slots.client_cpu_max_millicores, slots.client_memory_max_bytes)
        return self._clients.get(client_name, _Use()).room_for(self._promise(limits), most)

    def has_room(self, limits: Limits) -> bool:
        """Return whether the slots of all clients have room for a job."""
        return self._all.room_for(self._promise(limits), self._most())

    def share(self, client_name: str) -> float:
        """Return a client's part of all slots, in the kind it has most of, by its weight."""
        own, most = self._clients.get(client_name, _Use()), self._most()
        parts = (
            own.jobs / most.jobs if most.jobs else 0.0,
            own.millicores / (most.millicores or self._host.millicores),
            own.memory / (most.memory or self._host.memory),
        )
        return max(parts) / self.settings.shares.of(client_name).weight

    def _most(self) -> _Use:
        slots = self.settings.queue
        millicores, memory = slots.cpu_max_millicores, slots.memory_max_bytes
        return _Use(
            slots.running_max,
            self._host.millicores if millicores is None else millicores,
            self._host.memory if memory is None else memory,
        )

    def _promise(self, limits: Limits) -> _Use:
        most = self._most()
        millicores, memory = most.millicores or self._host.millicores, most.memory or self._host.memory
        return _Use(
            1,
            min(limits.cpu_max_millicores or millicores, millicores),
            min(limits.memory_max_bytes or memory, memory),
        )
