"""The slots of a cluster: whether there is room for the job that is next, as its engine and its nodes say.

The `[queue]` of the gateway's configuration bounds the jobs of the cluster, and of each client. Where it says
nothing, the nodes bound them.
"""

from typing import Final

from pjw.gateway.engine import Engine
from pjw.gateway.nodes import Nodes
from pjw.gateway.placements import shape_of
from pjw.model import Limits
from pjw.worker.settings import WorkerSettings
from pjw.worker.slots import Slots, SlotUse, Wanting


class ClusterSlots(Slots):
    """Counts the jobs that have a node, or are about to have one."""

    def __init__(self, settings: WorkerSettings, nodes: Nodes, engine: Engine) -> None:
        super().__init__(settings)
        self._nodes: Final = nodes
        self._engine: Final = engine
        self._cluster = SlotUse(0, 1, 1)
        self._largest = SlotUse()

    def measure(self) -> None:
        """Nodes have come or gone."""
        rows = [node.row for node in self._nodes.known.values() if node.session is not None]
        cpus, memory = [row.cpu_max_millicores for row in rows], [row.memory_max_bytes for row in rows]
        self._cluster = SlotUse(0, max(sum(cpus), 1), max(sum(memory), 1))
        self._largest = SlotUse(1, max(cpus, default=0), max(memory, default=0))

    def has_room_of_own(self, client_name: str, limits: Limits) -> bool:
        """See `Slots`."""
        most = self.settings.quotas.running_max
        if most and self._clients.get(client_name, SlotUse()).jobs >= most:
            return False
        return super().has_room_of_own(client_name, limits)

    def has_room(self, job: Wanting) -> bool:
        """See `Slots`."""
        slots, total = self.settings.queue, self.settings.quotas.running_total_max
        jobs = min(filter(None, (slots.running_max, total)), default=0)
        most = SlotUse(jobs, slots.cpu_max_millicores or 0, slots.memory_max_bytes or 0)
        return self._all.room_for(self._promise(job.limits), most) and self._engine.has_room(shape_of(job))

    def reserve(self, job: Wanting) -> None:
        """See `Slots`."""
        self._engine.reserve(job.id, job.client_name, shape_of(job))

    def give_back(self, job_id: int) -> None:
        """See `Slots`."""
        super().give_back(job_id)
        self._engine.unreserve(job_id)

    def why_no_room(self) -> str:
        """See `Slots`."""
        return self._engine.why("") or super().why_no_room()

    def passed_over(self, job: Wanting) -> str:
        """See `Slots`: a job that not every node can run; what becomes free elsewhere is for others."""
        shape = shape_of(job)
        if why := self._engine.passed_over(shape):
            return why
        if shape.node:
            return f"waits for node {shape.node}: {self._why_not_there(shape.node)}"
        nodes = [node for node in self._nodes.known.values() if node.gets_jobs]
        able = [node for node in nodes if node.could_have(shape)]
        if nodes and not able:
            gpus = (f"{shape.gpus} GPU{'s' * (shape.gpus > 1)}",) if shape.gpus else ()
            return f"waits: no node that gets jobs now has {' and '.join((*sorted(shape.needs), *gpus))}"
        if shape.link and (node := self._nodes.of_link(shape.link)) is not None:
            return f"waits for room on node {node.row.name}, where others have its link {job.link}"
        if len(able) < len(nodes):
            return f"waits for room on {', '.join(sorted(node.row.name for node in able))}"
        return ""

    def is_hopeless(self, job: Wanting) -> bool:
        """See `Slots`: the nodes that could are away or drained, and what others have is not for this one."""
        shape = shape_of(job)
        return not any(node.gets_jobs and node.could_have(shape) for node in self._nodes.known.values())

    def _why_not_there(self, name: str) -> str:
        node = self._nodes.known.get(name)
        if node is None or node.session is None:
            return "it is not connected"
        return "it is drained" if node.is_drained else "it has no room for it now"

    def _whole(self) -> SlotUse:
        return self._cluster

    def _promise(self, limits: Limits) -> SlotUse:
        """Return what a job may use; without a limit, or above the largest node's, that is all of a node."""
        most = self._largest
        return SlotUse(
            1,
            min(limits.cpu_max_millicores or most.millicores, most.millicores or limits.cpu_max_millicores),
            min(limits.memory_max_bytes or most.memory, most.memory or limits.memory_max_bytes),
        )
