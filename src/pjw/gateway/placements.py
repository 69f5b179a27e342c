"""The jobs of the gateway that have not ended: each change of a placement, in the table first, then here.

The gateway writes a node's news into the table before it acts on them, and syncs them before it tells others.
Old news change nothing: the table decides that (rows.py), not the order in which news arrive.
"""

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from pjw.errors import PjwError
from pjw.gateway import placement_rows
from pjw.gateway.engine import Engine
from pjw.gateway.nodes import Node, NodeSession, Shape, needs_of
from pjw.gateway.placement_rows import Placement
from pjw.gateway.placement_states import PlacementEvent, PlacementState
from pjw.model import EndReason, Job, JobState
from pjw.worker.queue_rows import STOPPED_BEFORE_START, WaitingJob
from pjw.worker.slots import Wanting
from pjw.worker.store import JobStore, NotQueuedError
from pjw.worker.tasks import Flag

log: Final = logging.getLogger(__name__)


class Placed:
    """A job, and where it is."""

    def __init__(self, placement: Placement, job: Job) -> None:
        self.placement = placement
        self.job = job
        # set when the placement has changed, and then replaced
        self.changed = Flag()
        self.ended: Final = Flag()
        # set when it has ended, or waits in the queue again: then this object is of no more use
        self.over: Final = Flag()
        # the session in which we told its node to stop it
        self.stop_told: NodeSession | None = None
        # the files that were sent for it, once a node has claimed it
        self.upload = ""

    def has_files_for(self, node_name: str, session: str) -> bool:
        """Whether this node has claimed the job in this session, and needs files for its start."""
        placement = self.placement
        return (
            placement.state is PlacementState.CLAIMED
            and (placement.node, placement.session) == (node_name, session)
            and bool(self.upload)
        )

    @property
    def state(self) -> JobState:
        """The state of the job as clients see it."""
        if self.placement.state is PlacementState.RUNNING and not self.job.state.final:
            return JobState.STOPPING if self.placement.stop_signal is not None else JobState.RUNNING
        return self.job.state

    @property
    def shown(self) -> Job:
        """The job as clients see it, without the reason why it waits."""
        return self.job if self.state is self.job.state else replace(self.job, state=self.state)


def shape_of(job: Wanting) -> Shape:
    """How much of a node a job takes, and what it needs there."""
    return Shape(
        job.limits.cpu_max_millicores,
        job.limits.memory_max_bytes,
        seconds=job.limits.time_max_seconds,
        gpus=job.gpus,
        needs=needs_of(job),
        link=f"{job.client_name}/{job.link}" if job.link else "",
        node=job.chosen_node,
        partition=job.partition,
        constraint=job.constraint,
    )


def lost_words(node: Node) -> str:
    """Why the jobs of a node are lost."""
    return f"nothing was heard of node {node.row.name} for too long"


class Placements:
    """All placements that have not ended, by the ids of their jobs and by their uuids."""

    def __init__(self, store: JobStore, engine: Engine) -> None:
        self._store: Final = store
        self._engine: Final = engine
        self.live: Final[dict[int, Placed]] = {}
        self._by_uuid: Final[dict[str, Placed]] = {}
        # those that have a node, by its name and their ids
        self._of_node: Final[defaultdict[str, dict[int, Placed]]] = defaultdict(dict)
        # jobs that have ended since this gateway began
        self.by_reason: Final[Counter[EndReason]] = Counter()
        self.claims = 0
        # called with a job that has ended, and its next attempt; then the job has ended for `ended`, too
        self.retried: Final[list[Callable[[Job, Job], None]]] = []
        # called when a job has ended
        self.ended: Final[list[Callable[[Job], None]]] = []
        # called when a job was executed, or has ended: what was kept for its start is not needed any more
        self.settled: Callable[[Placed], None] = lambda _: None

    async def begin(self, nodes: dict[str, Node]) -> None:
        """Take over the jobs with a node that the gateway before us has left.

        Those that wait are the queue's. If they have a placement, they keep its uuid.
        """
        await self._store.transact(placement_rows.forget_unneeded)
        for placement, job in await self._store.transact(placement_rows.alive):
            if placement.state is PlacementState.QUEUED:
                continue
            placed = self._hold(placement, job)
            if (node := nodes.get(placement.node)) is not None:
                self._engine.claimed(placement.uuid, job.client_name, node, shape_of(job), placement.hold)
            else:
                await self._lose(placed, PlacementEvent.NODE_LOST, "its node was forgotten")

    async def add(self, job: Job, uuid: str) -> Placed:
        """Find a node for a job of the queue whose turn it is. Raises NotQueuedError."""
        placement = await self._store.transact(placement_rows.place, job.id, uuid)
        if placement is None:
            raise NotQueuedError
        placed = self._hold(placement, job)
        self._engine.unreserve(job.id)
        self._engine.submit(placement.uuid, job.client_name, shape_of(job))
        return placed

    async def withdraw(self, job_id: int) -> None:
        """Withdraw a job of the queue, which may not be started now. A claim that came first stays."""
        placed = self.live.get(job_id)
        if placed is not None and await self._store.transact(placement_rows.withdraw, job_id):
            self._drop(placed)

    def _drop(self, placed: Placed) -> None:
        """Forget a job that has ended, or waits in the queue."""
        self.live.pop(placed.job.id, None)
        self._by_uuid.pop(placed.placement.uuid, None)
        self._of_node[placed.placement.node].pop(placed.job.id, None)
        self._engine.cancel(placed.placement.uuid)
        placed.over.set()

    def _hold(self, placement: Placement, job: Job) -> Placed:
        placed = self.live[job.id] = self._by_uuid[placement.uuid] = Placed(placement, job)
        self._of_node[placement.node][job.id] = placed
        return placed

    def of(self, uuid: str) -> Placed | None:
        """Return the job with a uuid that has not ended; None when it has, or never was."""
        return self._by_uuid.get(uuid)

    def on(self, node: Node) -> list[Placed]:
        """Return the jobs that a node has claimed, and that have not ended."""
        there = self._of_node.get(node.row.name, {})
        return [each for each in there.values() if each.placement.state is not PlacementState.QUEUED]

    # --- what happens

    async def claim(
        self, uuid: str, node: Node, session: str, hold: str = ""
    ) -> tuple[Placed, WaitingJob] | None:
        """Give a node a job, with its command; None when the job must not go to that node.

        *hold*: the engine's place for it, where the engine gives places. The claim is on the disk then, so
        the node may start the job as soon as it has the answer.
        """
        placed = self._by_uuid.get(uuid)
        if placed is None or not self._engine.may_claim(uuid, node, hold):
            return None
        placement = placed.placement
        try:
            waiting = await self._store.waiting(placement.job_id)
        except NotQueuedError:
            return None
        job = await self._store.transact(
            placement_rows.claim, placement, placed.job.limits, node.row.name, session, time.time_ns(), hold
        )
        if job is None:
            return None
        self.claims += 1
        self._engine.claimed(uuid, job.client_name, node, shape_of(job), hold)
        self._moved(
            placed,
            job,
            state=PlacementState.CLAIMED,
            node=node.row.name,
            session=session,
            hold=hold,
            attempt=placement.attempt + 1,
        )
        placed.upload = waiting.upload
        await self._store.sync()
        if node.row.is_lost:
            # it was lost while we looked into the table
            await self.lose(node, lost_words(node))
        return placed, waiting

    async def started(self, placed: Placed, node: Node, node_job: Job) -> None:
        """Record that a node has executed a command; the node may say so more than once."""
        job = await self._store.transact(placement_rows.started, placed.placement.job_id, node_job)
        if job is not None:
            self._engine.started(node)
            self._moved(placed, job, state=PlacementState.RUNNING, node_job_id=node_job.id)
            self.settled(placed)

    async def put_back(self, placed: Placed, node: Node, event: PlacementEvent) -> None:
        """Take back a job that its node does not start, perhaps since it heard no answer to its claim.

        The queue turns to the job again.
        """
        job = await self._store.transact(
            placement_rows.put_back, placed.placement.job_id, event, time.time_ns()
        )
        if job is None:
            return
        if event is PlacementEvent.PUT_BACK:
            self._engine.refused(placed.placement.uuid, node)
        if job.state.final:
            # an element of an array that was stopped meanwhile
            await self._end(placed, job, PlacementState.ENDED)
            return
        self._moved(placed, job, state=PlacementState.QUEUED, node="", session="", hold="")
        if placed.placement.stop_signal is not None:
            await self.cancel(placed)
        else:
            self._drop(placed)

    async def cancel(self, placed: Placed) -> Job | None:
        """End a job that no node has; None when one was first."""
        job = await self._store.transact(
            placement_rows.cancelled, placed.placement.job_id, STOPPED_BEFORE_START, time.time_ns()
        )
        return await self._end(placed, job, PlacementState.ENDED)

    async def start_failed(self, placed: Placed, detail: str) -> None:
        """End a job whose command can never be executed, as its node says."""
        job = await self._store.transact(
            placement_rows.start_failed, placed.placement.job_id, detail, time.time_ns()
        )
        await self._end(placed, job, PlacementState.ENDED)

    async def end(self, placed: Placed, node_job: Job) -> None:
        """End a job as its node says."""
        placement = placed.placement
        if placement.hold and placement.stop_signal is None and node_job.reason is EndReason.STOPPED:
            # no client asked for that: it was the node, for a place that it has no longer
            why = f"Slurm took its place on node {placement.node} back (Slurm's job {placement.hold})"
            node_job = replace(node_job, reason=EndReason.REVOKED, detail=why)
        job = await self._store.transact(placement_rows.ended, placement.job_id, node_job, time.time_ns())
        await self._end(placed, job, PlacementState.ENDED, node_job.id)

    async def lose(self, node: Node, why: str) -> None:
        """All jobs of a node are lost."""
        for placed in self.on(node):
            await self._lose(placed, PlacementEvent.NODE_LOST, why)

    async def unknown(self, placed: Placed, node: Node) -> None:
        """Decide what becomes of a job that its node says it does not have."""
        if placed.placement.state is PlacementState.CLAIMED:
            await self.put_back(placed, node, PlacementEvent.UNKNOWN)
        else:
            why = f"node {node.row.name} knows nothing of it any more"
            await self._lose(placed, PlacementEvent.UNKNOWN, why)

    async def _lose(self, placed: Placed, event: PlacementEvent, why: str) -> None:
        job = await self._store.transact(
            placement_rows.lost, placed.placement.job_id, event, why, time.time_ns()
        )
        await self._end(placed, job, PlacementState.LOST)

    async def ask_stop(self, placed: Placed, signal: int, grace: float | None) -> None:
        """Note that a node is to stop a job."""
        await self._store.transact(placement_rows.ask_stop, placed.placement.job_id, signal, grace)
        await self._store.sync()
        self._moved(placed, placed.job, stop_signal=signal, stop_grace=grace)

    # --- consequences

    async def _end(
        self, placed: Placed, job: Job | None, state: PlacementState, node_job_id: int = 0
    ) -> Job | None:
        if job is None:
            return None
        try:
            await self._store.sync()
        except PjwError as error:
            log.error("the end of job %d might not survive a power cut: %s", job.id, error)
        following = None if job.retried_as is None else await self._store.get(job.retried_as)
        if job.reason is not None:
            self.by_reason[job.reason] += 1
        changes = {"node_job_id": node_job_id} if node_job_id else {}
        self._moved(placed, job, state=state, **changes)
        placed.ended.set()
        self.settled(placed)
        self._drop(placed)
        if following is not None:
            for each_retried in self.retried:
                each_retried(job, following)
        for each in self.ended:
            each(job)
        return job

    def _moved(self, placed: Placed, job: Job, **changes: Any) -> None:  # noqa: ANN401  of a Placement
        self._of_node[placed.placement.node].pop(job.id, None)
        placed.job = job
        placed.placement = replace(placed.placement, **changes)
        if not placed.placement.state.final:
            self._of_node[placed.placement.node][job.id] = placed
        before, placed.changed = placed.changed, Flag()
        before.set()
