"""The slots of the queue: how many of its jobs run, what their limits promise, and whose turn that makes it.

Only jobs that came out of the queue count. A job that was started at once takes no slot: who starts long jobs
at once would hold up everybody's queue.
"""

from dataclasses import dataclass
from typing import Final

from pjw.model import Limits
from pjw.worker.host import memory_of, resources
from pjw.worker.settings import WorkerSettings


@dataclass(slots=True)
class _Use:
    """What some jobs have: their number, and what their limits promise."""

    jobs: int = 0
    millicores: int = 0
    memory: int = 0

    def add(self, other: "_Use", sign: int) -> None:
        self.jobs += sign * other.jobs
        self.millicores += sign * other.millicores
        self.memory += sign * other.memory

    def room_for(self, other: "_Use", most: "_Use") -> bool:
        """Whether both together are within *most*, where 0 is no limit. What is above that takes it all."""
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

    New settings change the bounds, not what is counted.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        self._host: Final = _Use(0, resources().cpu_max_millicores, memory_of(settings.sums))
        self._all: Final = _Use()
        self._clients: Final[dict[str, _Use]] = {}
        # what each job was counted as: a reload may change what it would be counted as
        self._taken: Final[dict[int, tuple[str, _Use]]] = {}

    def take(self, job_id: int, client_name: str, limits: Limits) -> None:
        """Count a job that is about to be started, or runs already."""
        use = self._promise(limits)
        self._taken[job_id] = client_name, use
        self._all.add(use, 1)
        self._clients.setdefault(client_name, _Use()).add(use, 1)

    def give_back(self, job_id: int) -> None:
        """A job has ended, or did not come to be."""
        client_name, use = self._taken.pop(job_id)
        self._all.add(use, -1)
        own = self._clients[client_name]
        own.add(use, -1)
        if not own.jobs:
            del self._clients[client_name]

    def has_room_of_own(self, client_name: str, limits: Limits) -> bool:
        """Whether a client's slots have room for a job of it."""
        slots = self.settings.queue
        most = _Use(slots.client_running_max, slots.client_cpu_max_millicores, slots.client_memory_max_bytes)
        return self._clients.get(client_name, _Use()).room_for(self._promise(limits), most)

    def has_room(self, limits: Limits) -> bool:
        """Whether the slots of all clients have room for a job."""
        return self._all.room_for(self._promise(limits), self._most())

    def share(self, client_name: str) -> float:
        """What a client has of all slots, of that of which it has most, by its weight."""
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
