"""The slots of the queue: its running jobs, the sums of their limits, and so whose turn it is.

Only jobs that came out of the queue count. A job that was started at once takes no slot: else a client that
starts long jobs at once would hold up every client's queue.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from pjw.model import Limits
from pjw.worker.host import memory_of, resources
from pjw.worker.settings import WorkerSettings


class Wanting(Protocol):
    """The facts about a job that needs a slot: a `Job` is one, and a `queue_rows.Head`."""

    @property
    def id(self) -> int:
        """Its id."""

    @property
    def client_name(self) -> str:
        """The client that owns the job."""

    @property
    def limits(self) -> Limits:
        """Its limits."""

    @property
    def gpus(self) -> int:
        """How many GPUs it has."""

    @property
    def mounts(self) -> Sequence[str]:
        """The mounts of the operator's that it has, as NAME:PATH."""

    @property
    def allow(self) -> Sequence[str]:
        """The names on the network that it may reach."""

    @property
    def link(self) -> str:
        """The network that it shares with others of its client."""

    @property
    def image(self) -> str:
        """The image that it has."""

    @property
    def chosen_node(self) -> str:
        """The only node of a cluster that it may have; empty: any."""

    @property
    def partition(self) -> str:
        """The partition of Slurm's for its place; empty: the operator's."""

    @property
    def constraint(self) -> str:
        """The feature of Slurm's that its node must have; empty: none."""


@dataclass(slots=True)
class SlotUse:
    """The use of some jobs: their number, and the sums of their limits."""

    jobs: int = 0
    millicores: int = 0
    memory: int = 0

    def add(self, other: "SlotUse", sign: int) -> None:
        """Count other jobs (*sign* 1), or count them no more (-1)."""
        self.jobs += sign * other.jobs
        self.millicores += sign * other.millicores
        self.memory += sign * other.memory

    def room_for(self, other: "SlotUse", most: "SlotUse") -> bool:
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
        self._host: Final = SlotUse(0, resources().cpu_max_millicores, memory_of(settings.sums))
        self._all: Final = SlotUse()
        self._clients: Final[dict[str, SlotUse]] = {}
        # the amounts that each job was counted with: a reload may change these
        self._taken: Final[dict[int, tuple[str, SlotUse]]] = {}

    def take(self, job: Wanting) -> None:
        """Count a job that is about to be started, or runs already."""
        use = self._promise(job.limits)
        self._taken[job.id] = job.client_name, use
        self._all.add(use, 1)
        self._clients.setdefault(job.client_name, SlotUse()).add(use, 1)

    def has(self, job_id: int) -> bool:
        """Whether a job is counted."""
        return job_id in self._taken

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
        most = SlotUse(
            slots.client_running_max, slots.client_cpu_max_millicores, slots.client_memory_max_bytes
        )
        return self._clients.get(client_name, SlotUse()).room_for(self._promise(limits), most)

    def has_room(self, job: Wanting) -> bool:
        """Return whether the slots of all clients have room for a job."""
        return self._all.room_for(self._promise(job.limits), self._most())

    def why_no_room(self) -> str:
        """Say why the job that is next waits."""
        return "is next: waits for a free slot"

    def passed_over(self, job: Wanting) -> str:
        """Say why a job that has no room waits, when others may start first; else nothing."""
        return ""

    def is_hopeless(self, job: Wanting) -> bool:
        """Whether nothing that is there now can ever run a job, though all other jobs end."""
        return False

    def share(self, client_name: str) -> float:
        """Return a client's part of all slots, in the kind it has most of, by its weight."""
        own, most, whole = self._clients.get(client_name, SlotUse()), self._most(), self._whole()
        parts = (
            own.jobs / most.jobs if most.jobs else 0.0,
            own.millicores / (most.millicores or whole.millicores),
            own.memory / (most.memory or whole.memory),
        )
        return max(parts) / self.settings.shares.of(client_name).weight

    def reserve(self, job: Wanting) -> None:
        """Keep the room for a job that was counted and is about to be started, where others could take it."""

    def _whole(self) -> SlotUse:
        """Return the whole that jobs share; never 0."""
        return self._host

    def _most(self) -> SlotUse:
        slots, whole = self.settings.queue, self._whole()
        millicores, memory = slots.cpu_max_millicores, slots.memory_max_bytes
        return SlotUse(
            slots.running_max,
            whole.millicores if millicores is None else millicores,
            whole.memory if memory is None else memory,
        )

    def _promise(self, limits: Limits) -> SlotUse:
        most, whole = self._most(), self._whole()
        millicores, memory = most.millicores or whole.millicores, most.memory or whole.memory
        return SlotUse(
            1,
            min(limits.cpu_max_millicores or millicores, millicores),
            min(limits.memory_max_bytes or memory, memory),
        )
