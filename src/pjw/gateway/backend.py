"""GatewayBackend: answers clients from the gateway's table, and by the nodes that have the jobs.

The gateway commits a job before anybody hears of it. From then on it owns the job's id, name and end. `Start`
answers at once, with a job that is QUEUED: if its command cannot be executed, the job ends with a reason.
This is a `pjw.server.backend.Backend`.
"""

import asyncio
import os
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from signal import SIGTERM
from typing import Final

from pjw.arrays import Element
from pjw.errors import (
    CopyError,
    GpuError,
    ImageNotFoundError,
    InvalidJobError,
    JobNotFoundError,
    JobStateError,
    KernelError,
    LimitRangeError,
    LimitReachedError,
    MountNotFoundError,
    NotAllowedError,
    OutputLostError,
    PjwError,
)
from pjw.gateway import placement_rows
from pjw.gateway.answers import check_spec, in_our_words, not_yet
from pjw.gateway.archive import OutputArchive
from pjw.gateway.archiving import Archiver
from pjw.gateway.dial import Dial
from pjw.gateway.engine import Engine
from pjw.gateway.metrics import series_of
from pjw.gateway.node_calls import NoReading, OnNode, ProxyReading
from pjw.gateway.nodes import Node, Nodes, require_offered
from pjw.gateway.placement_states import PlacementState
from pjw.gateway.placements import Placed, Placements, lost_words
from pjw.gateway.pool import Pool
from pjw.gateway.slots import ClusterSlots
from pjw.gateway.state import GatewayState
from pjw.gateway.stops import Stops
from pjw.gateway.usage import nodes_quota, usage_now, with_usage
from pjw.gateway.within import NodeConnection, Within
from pjw.model import (
    NO_SUMS,
    Archive,
    ClientQuota,
    Image,
    ImageConfig,
    Job,
    JobSpec,
    JobState,
    Limits,
    QueueSpec,
    Session,
    TerminalSize,
    UsageSample,
    Workspace,
    are_for,
)
from pjw.rpc.convert import sample_from_message
from pjw.server.backend import Reading, Written
from pjw.v1 import job_worker_pb2 as pb
from pjw.worker import Part, WorkerSettings
from pjw.worker.artifacts import require_kept
from pjw.worker.changes import Batch, Changes, Watched
from pjw.worker.egress import Connection
from pjw.worker.input import Inputs
from pjw.worker.metrics import ClientNumbers, WorkerNumbers
from pjw.worker.pages import ALL_JOBS, JobFilter, Page
from pjw.worker.queue import Queue
from pjw.worker.queue_calls import QueueCalls
from pjw.worker.queue_rows import WaitingJob
from pjw.worker.quota import StoredBytes
from pjw.worker.retention import BATCH, Pruner
from pjw.worker.store import NotQueuedError
from pjw.worker.tasks import Background, Flag, first_of
from pjw.worker.uploads import Uploads
from pjw.worker.worker import ALL_CHANGES, LOCAL_CLIENT, PAGE_MAX, SIGNAL_MAX, require_no_array

# A node removes so many jobs at a time that were removed here.
_REMOVED_AT_ONCE: Final = 20
_ALL_OUTPUT: Final = Part()
# Of an upload, for a node.
_PIECE_BYTES: Final = 1024 * 1024


class GatewayBackend(QueueCalls):
    """The jobs of a cluster. It is the queue's backend, too: it finds nodes for jobs whose turn has come."""

    def __init__(
        self,
        state: GatewayState,
        settings: WorkerSettings,
        nodes: Nodes,
        dial: Dial,
        background: Background,
        engine_of: Callable[[Nodes, Callable[[], int]], Engine] = Pool,
        choose_node: Sequence[str] = (),
    ) -> None:
        """*engine_of* makes the engine, from the nodes and the most jobs that a client may have there.

        The jobs of the clients in *choose_node* may have a node of their choice.
        """
        self._choose_node: Final = choose_node
        self._state: Final = state
        self._store: Final = state.store
        self._settings = settings
        self._nodes: Final = nodes
        self._dial: Final = dial
        self._background: Final = background
        self.engine: Final = engine_of(nodes, lambda: self._settings.quotas.running_max)
        self.placements: Final = Placements(state.store, self.engine)
        self._slots: Final = ClusterSlots(settings, nodes, self.engine)
        self._queue = Queue(state.store, self, background, settings, self._slots)
        self._stops: Final = Stops(dial, background)
        self._pruner: Final = Pruner(state, settings.retention)
        self._changes: Final = Changes(state.store, background, Flag(), self._shown)
        self._within: Final = Within(dial, self.placements, self.get, self._where, self._queue.change_of)
        # what the nodes have of jobs counts when it is known: at their ends
        self._stored: Final = StoredBytes(state, {}, {}, settings.quotas)
        self._inputs: Final = Inputs(self._stored, settings.quotas.input_bytes_max)
        self._uploads: Final = Uploads(state, self._stored, self._inputs)
        self._stored.uploads = self._uploads.bytes_of
        self.placements.settled = self._job_settled
        self._removing: Final[set[str]] = set()
        self._archive: OutputArchive | None = None
        self.archiver: Archiver | None = None
        self.placements.retried.append(self._queue.retried)
        self.placements.ended.append(self._queue.job_ended)
        self.placements.ended.append(lambda _: self._pruner.job_ended())
        self._pruner.removed.append(self._remove_on_nodes)
        self.engine.freed = self._queue.room_was_made
        self._queue.free_gpus = nodes.free_gpus
        nodes.came = self._node_came
        nodes.begun = self._node_begun
        nodes.went = self._node_went
        nodes.was_lost = self._node_lost
        nodes.was_removed = lambda node: background.spawn(dial.drop(node))

    def keep_in(self, archive: OutputArchive) -> None:
        """Have the archive keep copies of the output of jobs that end."""
        self._archive = archive
        self.archiver = Archiver(archive, self._store, self._dial, self._background)
        self.placements.ended.append(self._to_archive)

    def _to_archive(self, job: Job) -> None:
        if self.archiver is not None and (node := self._nodes.known.get(job.node)) is not None:
            self.archiver.look_at(node)

    def keeps_on_node(self, node: Node, job_id: int, uuid: str, job: Job) -> bool:
        """Whether a node is to keep an ended job, until the archive has its output."""
        return (
            self.archiver is not None and bool(job.output_bytes) and self.archiver.holds(node, job_id, uuid)
        )

    async def begin(self) -> None:
        """Take over the jobs and nodes that the gateway before us has left."""
        await self._nodes.begin()
        await self._store.forget_secrets()
        await self.placements.begin(self._nodes.known)
        for node in self._nodes.known.values():
            if node.row.is_lost:
                # the gateway before us may have been killed before it had told all of its jobs to be lost
                await self.placements.lose(node, lost_words(node))
        await self._uploads.adopt()
        await self._queue.begin([placed.job for placed in self.placements.live.values()])
        self._background.keep("removal of ended jobs", self._pruner.run())
        self._background.keep("removal of uploads", self._uploads.run())
        self._background.keep("queue", self._queue.run())

    # --- nodes

    def _node_came(self) -> None:
        self._slots.measure()
        self.engine.look()
        self._queue.room_was_made()

    def _node_begun(self, node: Node) -> None:
        self._begin_removal(node)
        if self.archiver is not None:
            self.archiver.look_at(node)

    def _node_went(self, node: Node) -> None:
        self._slots.measure()
        self.engine.session_over(node)
        # a job that waits for what this node alone has holds up no others any more
        self._queue.room_was_made()

    def _node_lost(self, node: Node) -> None:
        self._background.spawn(self._lose(node))

    async def _lose(self, node: Node) -> None:
        await self._dial.drop(node)
        await self.placements.lose(node, lost_words(node))
        if node.session is not None:
            # the node came back meanwhile
            for each in await self._store.transact(placement_rows.to_fence, node.row.name):
                node.session.fence(each)

    def run_here(self, placed: Placed, node: Node) -> None:
        """Tell a node that runs a job of a stop, which it perhaps does not know yet."""
        self._stops.tell(placed, node)

    def revoke(self, uuid: str) -> None:
        """Have a node stop a job whose place the engine took back. The node perhaps does not know that."""
        placed = self.placements.of(uuid)
        node = self._nodes.known.get(placed.placement.node) if placed is not None else None
        if placed is not None and node is not None:
            self._stops.revoke(placed, node)

    # --- start

    async def start(self, spec: JobSpec, client_name: str = LOCAL_CLIENT) -> Job:
        """Commit a job, and return it while it waits for a node. Raises as `submit`."""
        [job] = await self.submit([spec], client_name)
        return job

    async def submit(self, specs: Sequence[JobSpec], client_name: str = LOCAL_CLIENT) -> Sequence[Job]:
        """Commit jobs, all or none; each gets a node when its turn has come, and one has room.

        Raises as `Worker.submit`, and InvalidJobError for a job that does not work through a gateway yet.
        """
        for spec in specs:
            check_spec(spec)
            self.engine.check(spec)
            self._require_node(spec, client_name)
            await self._require_offered(spec, client_name)
        asked = [(replace(spec, queue=spec.queue or QueueSpec()), self._limits_of(spec)) for spec in specs]
        number, most = await self._store.client_number(client_name), self._nodes.uid_count
        if most and number >= most:
            raise LimitReachedError(
                f"all {most} user ids for clients are taken",
                hint="the operator can configure a larger range, the same on all nodes",
            )
        for spec in specs:
            await self._require_upload(spec, client_name)
        return await asyncio.shield(self._submit(asked, client_name))

    async def _require_upload(self, spec: JobSpec, client_name: str) -> None:
        """Raise CopyError for an upload that there is not."""
        if not spec.upload:
            return
        try:
            await self._uploads.renew(client_name, spec.upload)
        except CopyError:
            if not await self._made_before(spec, client_name):
                raise

    async def _require_offered(self, spec: JobSpec, client_name: str) -> None:
        try:
            require_offered(spec, [node.hello for node in self._nodes.known.values()])
        except (GpuError, ImageNotFoundError, InvalidJobError, MountNotFoundError):
            if not await self._made_before(spec, client_name):
                raise

    async def _made_before(self, spec: JobSpec, client_name: str) -> bool:
        """Whether the same request has made a job before, which may have had what is missing now."""
        return (
            bool(spec.request_id) and await self._store.of_request(client_name, spec.request_id) is not None
        )

    def _require_node(self, spec: JobSpec, client_name: str) -> None:
        if not spec.node:
            return
        if not are_for(self._choose_node, client_name):
            raise NotAllowedError(
                f"{client_name} may not choose a node",
                hint="the operator can allow it with gateway.choose_node",
            )
        if spec.node not in self._nodes.known:
            raise InvalidJobError(f"no node {spec.node}", hint="the operator knows the nodes: pjw nodes")

    async def _submit(self, asked: Sequence[tuple[JobSpec, Limits]], client_name: str) -> Sequence[Job]:
        # times of a job are cut to microseconds
        before = time.time_ns() - 1000
        specs = [spec for spec, _ in asked]
        tokens = (
            await asyncio.to_thread(self._store.secrets.keep, specs)
            if any(spec.secrets for spec in specs)
            else {}
        )
        return await self._enqueue(self._store, client_name, asked, self._settings.quotas, tokens, before)

    def _limits_of(self, spec: JobSpec) -> Limits:
        limits = self._settings.default_limits.with_overrides(spec.limits)
        if above := limits.first_above(self._settings.ceiling):
            most, value = getattr(self._settings.ceiling, above), getattr(limits, above)
            raise LimitRangeError(
                f"limit {above} must be at most {most} on this server, not {value or 'unlimited'}",
                limit=above,
                value=value,
                most=most,
            )
        return limits

    # --- for the queue

    async def start_queued(self, waiting: WaitingJob) -> Job:
        """Find a node for a job whose turn has come; the job, which a node has, or which has ended.

        Only the queue calls this, see queue.Backend.
        """
        placed = await self.placements.add(waiting.job, new_uuid())
        while placed.placement.state is PlacementState.QUEUED and not placed.over.is_set():
            await first_of(placed.changed, placed.over)
        if placed.over.is_set() and not placed.ended.is_set():
            raise NotQueuedError
        return placed.job

    async def ended(self, job_id: int) -> bool:
        """Return when a job has ended, or waits again; whether it waits. Only the queue calls this."""
        placed = self.placements.live.get(job_id)
        if placed is None:
            job = await self._store.get(job_id)
            return job is not None and not job.state.final
        await placed.over.wait()
        return not placed.ended.is_set()

    async def _withdraw(self, job_ids: Sequence[int]) -> None:
        for job_id in job_ids:
            await self.placements.withdraw(job_id)

    # --- look

    async def get(self, job_id: int | Element, owner: str | None = None) -> Job:
        """One job as it is now. Raises JobNotFoundError."""
        if isinstance(job_id, Element):
            element = await self._store.element(job_id, owner) if job_id.array_id < 2**63 else None
            if element is None:
                raise JobNotFoundError(str(job_id))
            return self._shown(element)
        placed = self._live_of(job_id, owner)
        if placed is not None:
            return self._shown(placed.job)
        job = await self._store.get(job_id, owner) if 0 < job_id < 2**63 else None
        if job is None:
            raise JobNotFoundError(job_id)
        return self._shown(job)

    async def get_with_usage(self, job_id: int | Element, owner: str | None = None) -> Job:
        """One job as it is now, with its usage if its node answers at once."""
        job = await self.get(job_id, owner)
        placed = self.placements.live.get(job.id)
        if placed is None or placed.placement.state is not PlacementState.RUNNING:
            return job
        return await with_usage(self._dial, self._nodes, placed, job)

    async def page(
        self,
        owner: str | None = None,
        after: int = 0,
        count: int = PAGE_MAX,
        wanted: JobFilter = ALL_JOBS,
        *,
        newest_first: bool = False,
    ) -> Page:
        """Jobs behind id *after* that fit."""
        page = await self._store.page(owner, after, count, wanted, newest_first=newest_first)
        jobs = [self._shown(job) for job in page.jobs]
        if wanted.states:
            jobs = [job for job in jobs if job.state in wanted.states]
        return Page(jobs, page.next_after)

    def _live_of(self, job_id: int, owner: str | None) -> Placed | None:
        placed = self.placements.live.get(job_id)
        return placed if placed is not None and owner in (None, placed.job.client_name) else None

    def _shown(self, job: Job) -> Job:
        """Return a job of the table as it is now; if it waits, with the reason."""
        placed = self.placements.live.get(job.id)
        if placed is None:
            return self._queue.shown(job)
        shown = placed.shown
        if shown.state is JobState.QUEUED:
            return replace(shown, detail=self.engine.why(placed.placement.uuid))
        node = self._nodes.known.get(placed.placement.node)
        if node is not None and node.session is None:
            return replace(shown, detail=f"node {node.row.name} is not connected now; the job goes on there")
        return shown

    # --- wait, stop, delete

    async def _wait_for(self, *flags: Flag) -> None:
        await first_of(*flags)

    async def _wait_for_end(self, job_id: int, owner: str | None, *, or_stuck: bool) -> Job:
        while True:
            # whatever comes from here on is heard
            change = self._queue.change_of(job_id)
            placed = self._live_of(job_id, owner)
            if placed is not None:
                await placed.over.wait()
                if placed.ended.is_set():
                    return placed.job
                continue
            job = await self.get(job_id, owner)
            if job.state.final:
                return job
            if job_id not in self.placements.live:
                await change.wait()

    async def stop(
        self,
        job_id: int | Element,
        grace_seconds: float | None = None,
        owner: str | None = None,
        signal: int = SIGTERM,
    ) -> Job:
        """End a job; its final snapshot. A node that is not connected hears of the stop when it is back."""
        if not 1 <= signal <= SIGNAL_MAX:
            raise InvalidJobError(f"a job is stopped with a signal from 1 to {SIGNAL_MAX}, not {signal}")
        if isinstance(job_id, Element):
            return await self._stop_element(job_id, grace_seconds, owner, signal)
        while True:
            job = await self.get(job_id, owner)
            if job.state.final:
                # it has ended, and may go on as another one
                following = job.retried_as
                return await self.stop(following, grace_seconds, owner, signal) if following else job
            if job.array is not None:
                # to its end, though the caller be cancelled
                return await asyncio.shield(self._stop_array(job_id, grace_seconds, signal))
            if (placed := self.placements.live.get(job_id)) is not None:
                await self._stop_placed(placed, grace_seconds, signal)
                if placed.ended.is_set() and placed.job.retried_as is None:
                    return placed.job
            elif (cancelled := await self._queue.cancel(job_id)) is not None:
                return cancelled

    async def _stop_placed(self, placed: Placed, grace_seconds: float | None, signal: int) -> None:
        """Stop a job that has a node, or will get one; return when it has ended, or waits in the queue."""
        if placed.placement.state is PlacementState.QUEUED:
            await self.placements.cancel(placed)
        if not placed.over.is_set():
            await self.placements.ask_stop(placed, signal, grace_seconds)
            if (node := self._nodes.known.get(placed.placement.node)) is not None:
                self._stops.tell(placed, node, again=True)
        await placed.over.wait()

    async def delete(self, job_id: int | Element, owner: str | None = None) -> None:
        """Forget an ended job; its node removes it when the node is connected."""
        job = await self.get(job_id, owner)
        if not job.state.final:
            raise JobStateError(f"cannot remove job {job_id}: it has not ended", hint=f"pjw stop {job_id}")
        if not job.id:
            # an element that never had a row: its array remembers it
            return
        if job.array is not None:
            while elements := await self._store.elements(job.id, BATCH):
                for element in elements:
                    await self._forget(element)
        await self._forget(job.id)

    async def _forget(self, job_id: int) -> None:
        await self._queue.settle(job_id)
        await self._pruner.remove(job_id)

    def _remove_on_nodes(self) -> None:
        self._background.spawn(self._remove_everywhere())

    async def _remove_everywhere(self) -> None:
        try:
            names = await self._store.transact(placement_rows.nodes_to_remove)
        except PjwError:
            # we try again when jobs are removed, or a node connects again
            return
        for name in names:
            if (node := self._nodes.known.get(name)) is not None:
                self._begin_removal(node)

    def _begin_removal(self, node: Node) -> None:
        if node.session is not None and node.row.name not in self._removing:
            self._removing.add(node.row.name)
            self._background.spawn(self._remove_on(node))

    async def _remove_on(self, node: Node) -> None:
        try:
            while node.session is not None:
                found = await self._store.transact(placement_rows.to_remove, node.row.name, _REMOVED_AT_ONCE)
                if not found:
                    return
                await asyncio.gather(*(self._remove_copy(node, placement) for placement in found))
                await self._store.transact(placement_rows.forget, [placement.job_id for placement in found])
                if self.archiver is not None:
                    self.archiver.let_go(node, [placement.job_id for placement in found])
        except PjwError:
            # we try again when the node is connected again
            return
        finally:
            self._removing.discard(node.row.name)

    async def _remove_copy(self, node: Node, placement: placement_rows.Placement) -> None:
        if placement.node_job_id <= 0:
            return
        request = pb.DeleteRequest(id=placement.node_job_id)
        try:
            await self._dial.call(node, "Delete", request, placement.client_name, 60)
        except (JobNotFoundError, JobStateError):
            # the node removed it before; or it is a copy that we gave up, and that has not ended
            return

    # --- output

    async def read_logs(
        self, job_id: int | Element, part: Part = _ALL_OUTPUT, owner: str | None = None
    ) -> Reading:
        """Read a part of a job's output, from its node."""
        if part.session:
            if isinstance(job_id, Element):
                raise JobNotFoundError(str(job_id))
            there = await self._within.of_session(job_id, part.session, owner)
            return await self._reading(there.job.id, part)
        if isinstance(job_id, Element):
            job = await (self._drawn if part.follow else self.get)(job_id, owner)
        else:
            job = await self.get(job_id, owner)
        if part.artifacts:
            require_kept(job)
            return await self._reading(job.id, part)
        require_no_array(job)
        if part.stderr and not job.split_stderr:
            raise JobStateError(
                f"cannot read the stderr of job {job.id} alone: the job was started without keeping it apart,"
                " so it is in the output"
            )
        if not job.id or (job.state is JobState.QUEUED and not part.follow):
            return NoReading(part.offset)
        if (archived := await self._in_archive(job.id, part)) is not None:
            return archived
        return await self._reading(job.id, part)

    async def _reading(self, job_id: int, part: Part) -> ProxyReading:
        reading = ProxyReading(
            self._dial, lambda: self._where(job_id), lambda part: self._in_archive(job_id, part), part
        )
        await reading.seek()
        return reading

    async def _in_archive(self, job_id: int, part: Part) -> Reading | None:
        """Read a part of the output of a job, from the archive; None when it is not there."""
        if self._archive is None or part.session or part.artifacts or job_id in self.placements.live:
            return None
        placement = await self._store.transact(placement_rows.find, job_id)
        if placement is None or placement.archived != placement_rows.ARCHIVED:
            return None
        job = await self._store.get(job_id)
        return None if job is None else await self._archive.reading(job, part)

    async def _where(self, job_id: int) -> OnNode | None:
        """Where a job is, once a node runs it; None when it ended without that."""
        while True:
            change = self._queue.change_of(job_id)
            if (placed := self.placements.live.get(job_id)) is not None:
                placement = placed.placement
                node = self._nodes.known.get(placement.node)
                if node is not None and placement.node_job_id:
                    return OnNode(placed.job, node, placement.node_job_id)
                await first_of(placed.changed, placed.over)
                continue
            job = await self._store.get(job_id)
            if job is None or job.state.final:
                break
            if job_id not in self.placements.live:
                await change.wait()
        placement_row = await self._store.transact(placement_rows.find, job_id)
        if job is None:
            raise JobNotFoundError(job_id)
        if placement_row is None:
            # it ended before its turn came
            return None
        node = self._nodes.known.get(placement_row.node)
        if not placement_row.node_job_id:
            return None
        if node is None or placement_row.node_job_id == placement_rows.COPY_LOST:
            what = "was removed from the cluster" if node is None else "was set up anew"
            raise OutputLostError(f"what job {job_id} left is lost: its node {placement_row.node} {what}")
        return OnNode(job, node, placement_row.node_job_id)

    # --- within jobs: see within.py

    def write_input(
        self, job_id: int, owner: str | None = None, session: int = 0
    ) -> AbstractAsyncContextManager[Written]:
        """Write to the input of a job, or of a session of it."""
        return self._within.write_input(job_id, owner, session)

    async def exec(
        self, job_id: int, spec: JobSpec, client_name: str = LOCAL_CLIENT, *, detached: bool = False
    ) -> Session:
        """Start another command in a job."""
        return await self._within.exec(job_id, spec, client_name, detached=detached)

    async def archive(
        self, job_id: int, archive: Archive, client_name: str = LOCAL_CLIENT, *, request_id: str = ""
    ) -> Session:
        """Pack or unpack files in a job."""
        return await self._within.archive(job_id, archive, client_name, request_id)

    async def wait_session(self, job_id: int, number: int, owner: str | None = None) -> Session:
        """Wait until a session has ended."""
        return await self._within.wait_session(job_id, number, owner)

    async def stop_session(self, job_id: int, number: int, owner: str | None = None) -> Session:
        """Hang a session up."""
        return await self._within.stop_session(job_id, number, owner)

    async def resize(
        self, job_id: int, size: TerminalSize, owner: str | None = None, session: int = 0
    ) -> None:
        """Give a terminal another size."""
        await self._within.resize(job_id, size, owner, session)

    async def connect(self, job_id: int, port: int, client_name: str = LOCAL_CLIENT) -> NodeConnection:
        """Connect to a TCP port within a job."""
        return await self._within.connect(job_id, port, client_name)

    def write_upload(
        self, name: str, client_name: str = LOCAL_CLIENT
    ) -> AbstractAsyncContextManager[Written]:
        """Write an archive of files for the start of a job; see `Uploads.writer`."""
        return self._uploads.writer(client_name, name, first_of)

    async def read_upload(self, placed: Placed, offset: int) -> bytes:
        """Read the next piece of the files for a job; empty at their end. Raises CopyError."""
        return await self._state.in_thread(self._read_piece, placed.job.client_name, placed.upload, offset)

    def _read_piece(self, client_name: str, name: str, offset: int) -> bytes:
        # opened for each piece: a thread goes on when its node has gone, and must not meet a closed file
        descriptor = self._uploads.open(client_name, name)
        try:
            return os.pread(descriptor, _PIECE_BYTES, offset)
        except OSError as error:
            raise KernelError("read", f"upload {name} of {client_name}", error.errno or 0) from error
        finally:
            os.close(descriptor)

    def _job_settled(self, placed: Placed) -> None:
        """Let go of the files that were sent for a job: it has begun or ended, and needs them no more."""
        if placed.upload:
            self._background.spawn(self._uploads.release(placed.job.client_name, placed.upload))

    # --- usage

    async def usage_history(self, job_id: int, owner: str | None = None) -> tuple[Job, Sequence[UsageSample]]:
        """Return a job, and from its node what the job had used at moments of its life."""
        job = await self.get(job_id, owner)
        if job.state is JobState.QUEUED or job.array is not None:
            return job, ()
        there = await self._where(job.id)
        if there is None:
            return job, ()
        if there.node.session is None:
            raise JobStateError(
                f"node {there.node.row.name}, which has the usage of job {job.id}, is not connected"
            )
        request = pb.GetUsageHistoryRequest(id=there.node_job_id)
        try:
            answer = await self._dial.call(there.node, "GetUsageHistory", request, job.client_name, 60)
        except PjwError as error:
            raise in_our_words(error, there.node.row.name, there.node_job_id, job.id) from None
        return await self.get(job_id, owner), [sample_from_message(each) for each in answer.samples]

    async def usage_now(
        self, owner: str | None = None, fresh_seconds: float = 1, within_seconds: float = 1
    ) -> Sequence[tuple[Job, UsageSample | None]]:
        """Return the jobs that nodes have, and what each uses."""
        placed = [
            each
            for each in self.placements.live.values()
            if owner in (None, each.job.client_name) and each.placement.state is not PlacementState.QUEUED
        ]
        samples = await usage_now(self._dial, self._nodes, placed, within_seconds)
        return [(self._shown(each.job), samples.get(each.job.id)) for each in placed]

    async def queued_now(self, owner: str | None = None, most: int = PAGE_MAX) -> tuple[int, Sequence[Job]]:
        """How many jobs wait for a node, and the oldest of them."""
        by_client = await self._store.queued_of_clients()
        count = sum(by_client.values()) if owner is None else by_client.get(owner, 0)
        if not count:
            return 0, ()
        return count, (await self.page(owner, 0, most, JobFilter(frozenset({JobState.QUEUED})))).jobs

    def watch_jobs(
        self,
        owner: str | None = None,
        watched: Watched = ALL_CHANGES,
        since: int | None = None,
        *,
        snapshot: bool = True,
        follow: bool = True,
    ) -> AsyncGenerator[Batch, None]:
        """Yield changes of the states of jobs, as `Worker.watch_jobs`."""
        return self._changes.watch(owner, watched, since, snapshot=snapshot, follow=follow)

    async def quota(self, client_name: str = LOCAL_CLIENT) -> ClientQuota:
        """Return a client's limits and jobs, and what its nodes say of their use, and have for it."""
        settings = self._settings
        use, mounts, gpus = await nodes_quota(self._dial, self._nodes, client_name)
        own = [
            placed
            for placed in self.placements.live.values()
            if placed.job.client_name == client_name and placed.placement.state is not PlacementState.QUEUED
        ]
        weight = settings.shares.of(client_name).weight
        return ClientQuota(
            client_name=client_name,
            defaults=settings.default_limits,
            ceilings=settings.ceiling,
            sums=NO_SUMS,
            weight=weight,
            total_weight=weight,
            running=len(own),
            running_max=settings.quotas.running_max,
            memory_promised_bytes=sum(placed.job.limits.memory_max_bytes for placed in own),
            memory_promised_max_bytes=0,
            stored_bytes=await self._stored.of(client_name),
            stored_bytes_max=settings.quotas.stored_bytes_max,
            use=use,
            queued=(await self._store.queued_of_clients()).get(client_name, 0),
            queued_max=settings.quotas.queued_max,
            mounts=mounts,
            gpus=gpus,
        )

    # --- methods that do not work through a gateway yet

    async def workspaces(
        self, owner: str | None = LOCAL_CLIENT, after: tuple[str, str] = ("", ""), count: int = -1
    ) -> Sequence[Workspace]:
        """None: they do not work through a gateway yet."""
        return ()

    async def remove_workspace(self, name: str, client_name: str = LOCAL_CLIENT) -> None:
        """Refused."""
        raise not_yet("a workspace")

    async def load_image(
        self,
        name: str,
        upload: str,
        config: ImageConfig | None = None,
        digest: str = "",
        client_name: str = LOCAL_CLIENT,
    ) -> Image:
        """Refused."""
        raise not_yet("an image")

    async def images(self, owner: str | None = LOCAL_CLIENT) -> Sequence[Image]:
        """None: they do not work through a gateway yet."""
        return ()

    async def remove_image(self, name: str, client_name: str = LOCAL_CLIENT) -> None:
        """Refused."""
        raise not_yet("an image")

    # --- of the server

    async def reload_mounts(self) -> None:
        """Nothing: a gateway mounts nothing."""

    def on_connection(self, tell: Callable[[Connection], None]) -> None:
        """Nothing: jobs connect on their nodes."""

    @property
    def live_count(self) -> int:
        """How many jobs have not ended."""
        return len(self.placements.live)

    @property
    def drained(self) -> bool:
        """Never: a gateway starts no jobs itself, and each node is drained by itself."""
        return False

    async def numbers(self) -> WorkerNumbers:
        """How much of everything there is."""
        totals = {name: (jobs, stored) for name, jobs, stored in await self._store.totals()}
        # not `shown`, which makes a copy of each
        states = [(placed.state, placed.job.client_name) for placed in self.placements.live.values()]
        begun = Counter(name for state, name in states if state is not JobState.QUEUED)
        queued = Counter(await self._store.waiting_of_clients())
        oldest_ns = await self._store.oldest_ready_ns()
        disk = os.fstatvfs(self._state.descriptor)
        return WorkerNumbers(
            live=Counter(state for state, _ in states if state is not JobState.QUEUED),
            ends=dict(self.placements.by_reason),
            clients={
                name: ClientNumbers(begun[name], *totals.get(name, (0, 0)), queued[name])
                for name in sorted(totals.keys() | begun.keys())
            },
            disk_bytes=disk.f_frsize * disk.f_blocks,
            disk_free_bytes=disk.f_frsize * disk.f_bavail,
            output_held=0,
            launcher_up=True,
            admissions=self._queue.admissions,
            oldest_queued_seconds=0.0 if oldest_ns is None else max(0.0, (time.time_ns() - oldest_ns) / 1e9),
            more=series_of(self._nodes, self.placements, self.archiver),
        )

    async def answers(self) -> None:
        """Return at once: a gateway needs nobody else."""

    async def gone(self) -> None:
        """Never return: a gateway has no launcher."""
        await asyncio.Event().wait()

    async def failed(self) -> None:
        """Return when a bug has killed a task that the gateway needs all along."""
        await self._background.failed.wait()

    def reconfigure(self, settings: WorkerSettings) -> None:
        """Take other limits, retention and quotas."""
        self._settings = settings
        self._pruner.reconfigure(settings)
        self._stored.reconfigure(settings)
        self._inputs.reconfigure(settings)
        self._queue.reconfigure(settings)
        self.engine.look()

    async def give_shares(self) -> Sequence[str]:
        """Nothing: the nodes give shares."""
        return ()

    async def open_operator_file(self, place: int) -> int:
        """One of the operator's files, which the gateway's own user can read."""
        return self._state.open_operator_file(place)

    async def open_audit_log(self) -> int:
        """Open the audit log for appending, and return its descriptor."""
        return self._state.open_audit_log()


def new_uuid() -> str:
    """Return a new name for a job, which no job of any cluster has."""
    return str(uuid.uuid4())
