"""NodeService: the news of nodes about their jobs, and the claims by which they get jobs."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Final

import grpc
from google.protobuf.json_format import MessageToJson

from pjw.cluster.v1 import cluster_pb2 as pb
from pjw.errors import InvalidJobError, JobStateError, NotAllowedError
from pjw.gateway import placement_rows
from pjw.gateway.engine import Engine
from pjw.gateway.node_guard import NodeGuard
from pjw.gateway.nodes import Node, Nodes, NodeSession
from pjw.gateway.placement_states import PlacementEvent, PlacementState
from pjw.gateway.placements import Placed, Placements
from pjw.model import Job
from pjw.rpc.convert import job_from_message, spec_to_message
from pjw.v1 import job_worker_pb2 as pjw_pb
from pjw.worker.job_rows import to_ns
from pjw.worker.queue_rows import WaitingJob
from pjw.worker.store import JobStore

NODE_SERVICE: Final = pb.DESCRIPTOR.services_by_name["NodeService"].full_name
# The most uuids in one question.
_ASKED_AT_ONCE: Final = 1000
# More than a job can have stored; the sums of thousands of jobs fit into the table.
_BYTES_MAX: Final = 2**48

log: Final = logging.getLogger(__name__)


class NodeSessions:
    """The sessions of all nodes."""

    def __init__(
        self,
        store: JobStore,
        nodes: Nodes,
        placements: Placements,
        engine: Engine,
        run_here: Callable[[Placed, Node], None],
        read_upload: Callable[[Placed, int], Awaitable[bytes]],
        keeps: Callable[[Node, int, str, Job], bool] = lambda *_: False,
    ) -> None:
        self._store: Final = store
        self._nodes: Final = nodes
        self._placements: Final = placements
        self._engine: Final = engine
        # called with a job that a node runs: there may be a stop to tell the node of
        self._run_here: Final = run_here
        # called with a job and an offset in its upload
        self._read_upload: Final = read_upload
        # called with a node, an ended job's id, uuid and end: whether the node is to keep the job for now
        self._keeps: Final = keeps

    def handlers(self, guard: NodeGuard) -> grpc.GenericRpcHandler:
        """Return the table of methods, each behind the guard of nodes."""
        return grpc.method_handlers_generic_handler(
            NODE_SERVICE,
            {
                "Session": guard.bidi(self.session, pb.SessionRequest),
                "Claim": guard.unary(self.claim, pb.ClaimRequest),
                "FetchUpload": guard.stream(self.fetch_upload, pb.FetchUploadRequest),
            },
        )

    # --- claims

    async def claim(self, request: pb.ClaimRequest, name: str) -> pb.ClaimResponse:
        """Give a job to the node that it was assigned to."""
        node = self._of_session(name, request.session)
        claimed = await self._placements.claim(request.uuid, node, request.session, request.hold)
        if claimed is None:
            raise JobStateError(f"node {name} cannot claim job {request.uuid}")
        placed, waiting = claimed
        return await self._granted(placed, waiting)

    def _of_session(self, name: str, session: str) -> Node:
        """Return the node whose session this is. Raises JobStateError for a session that is over."""
        node = self._nodes.known.get(name)
        if node is None or node.session is None or node.session.hello.session != session:
            raise JobStateError("the session of this claim is over")
        return node

    async def _granted(self, placed: Placed, waiting: WaitingJob) -> pb.ClaimResponse:
        job = placed.job
        start = spec_to_message(waiting.spec())
        for limit, value in job.limits.items():
            setattr(start.limits, limit, value)
        # names at this gateway: on the node a job from another life of the gateway may still have them
        start.name, start.request_id, start.node = "", "", ""
        start.partition = start.constraint = ""
        return pb.ClaimResponse(
            uuid=placed.placement.uuid,
            client_name=job.client_name,
            client_number=await self._store.client_number(job.client_name),
            start=start,
        )

    async def fetch_upload(
        self, request: pb.FetchUploadRequest, name: str
    ) -> AsyncGenerator[pb.FetchUploadResponse, None]:
        """Send the files of a job to the node that has claimed it."""
        offset = 0
        while True:
            # again for each piece: the session may be over meanwhile, and the job lost
            self._of_session(name, request.session)
            placed = self._placements.of(request.uuid)
            if placed is None or not placed.has_files_for(name, request.session):
                raise JobStateError(f"node {name} has claimed no job {request.uuid} with files")
            data = await self._read_upload(placed, offset)
            if not data:
                return
            yield pb.FetchUploadResponse(data=data)
            offset += len(data)

    # --- sessions

    async def session(
        self, requests: AsyncIterator[pb.SessionRequest], name: str, admit: Callable[[], None]
    ) -> AsyncGenerator[pb.SessionResponse, None]:
        """Hear a node and tell it things, until one of the two ends the session."""
        first = await anext(requests, None)
        if first is None or not first.HasField("hello"):
            raise JobStateError("the first message of a session is Hello")
        if first.hello.node != name:
            raise NotAllowedError(f"the certificate is that of node {name}, which is not {first.hello.node}")
        session = NodeSession(first.hello)
        node = await self._nodes.connected(session)
        hearing = asyncio.ensure_future(self._hear_all(requests, node, session, admit))
        hearing.add_done_callback(lambda _: session.close())
        try:
            yield pb.SessionResponse(
                welcome=pb.Welcome(
                    heartbeat_ms=round(self._nodes.heartbeat_seconds * 1000),
                    lost_after_ms=round(self._nodes.lost_after_seconds * 1000),
                )
            )
            await self._begin(node, session)
            async for message in session.messages():
                yield message
            if hearing.done():
                # raise the reason for its end, if there is one
                hearing.result()
        finally:
            hearing.cancel()
            self._nodes.session_over(node, session)

    async def _begin(self, node: Node, session: NodeSession) -> None:
        """Ask about jobs that were claimed before this session, and have the node end the lost ones."""
        uuids = [
            placed.placement.uuid
            for placed in self._placements.on(node)
            if placed.placement.session != session.hello.session
        ]
        for start in range(0, len(uuids), _ASKED_AT_ONCE):
            session.say(pb.SessionResponse(ask=pb.Ask(uuids=uuids[start : start + _ASKED_AT_ONCE])))
        for uuid in await self._store.transact(placement_rows.to_fence, node.row.name):
            session.fence(uuid)
        node.has_changed()
        self._nodes.came()
        self._nodes.begun(node)

    async def _hear_all(
        self,
        requests: AsyncIterator[pb.SessionRequest],
        node: Node,
        session: NodeSession,
        admit: Callable[[], None],
    ) -> None:
        async for request in requests:
            if session.over.is_set():
                return
            self._nodes.heard(node)
            match request.WhichOneof("message"):
                case "heartbeat":
                    # a session outlives the handshake: its certificate may have expired, or been revoked
                    admit()
                    self._nodes.beat(node, request.heartbeat)
                    session.say(pb.SessionResponse(heartbeat=pb.Heartbeat()))
                case "started":
                    await self._started(request.started, node, session)
                case "failed":
                    await self._failed(request.failed, node)
                case "ended":
                    await self._ended(request.ended, node, session)
                case "unknown":
                    await self._unknown(request.unknown.uuid, node)
                case "hold":
                    self._engine.hold_here(node, request.hold)
                case "hold_gone":
                    self._engine.hold_gone(node, request.hold_gone.id)
                case _:
                    pass

    def _of(self, uuid: str, node: Node) -> Placed | None:
        """Return a job that this node has; never a job of another node, whatever this one says."""
        placed = self._placements.of(uuid)
        return placed if placed is not None and placed.placement.node == node.row.name else None

    async def _started(self, message: pb.Started, node: Node, session: NodeSession) -> None:
        placed = self._of(message.uuid, node)
        if placed is None:
            await self._fence_if_lost(message.uuid, node, session)
            return
        job = _told(message.job, node)
        if to_ns(job.start) <= 0:
            raise InvalidJobError(f"node {node.row.name} tells the start of a job without a time")
        await self._placements.started(placed, node, job)
        self._run_here(placed, node)

    async def _failed(self, message: pb.Failed, node: Node) -> None:
        placed = self._of(message.uuid, node)
        if placed is None:
            return
        if message.again:
            log.warning("node %s cannot start job %d: %s", node.row.name, placed.job.id, message.detail)
            await self._placements.put_back(placed, node, PlacementEvent.PUT_BACK)
        else:
            await self._placements.start_failed(placed, message.detail)

    async def _ended(self, message: pb.Ended, node: Node, session: NodeSession) -> None:
        job = _told(message.job, node)
        if not job.state.final:
            raise InvalidJobError(f"node {node.row.name} tells the end of a job that is {job.state}")
        if (placed := self._of(message.uuid, node)) is not None:
            await self._placements.end(placed, job)
            held = self._keeps(node, placed.job.id, message.uuid, job)
        else:
            # the node has told it before and heard no answer; or it is the late end of a lost job
            placement = await self._store.transact(placement_rows.by_uuid, message.uuid)
            held = False
            if placement is not None and placement.node == node.row.name:
                held = (
                    placement.state is PlacementState.ENDED
                    and not placement.archived
                    and self._keeps(node, placement.job_id, message.uuid, job)
                )
                await self._store.transact(
                    placement_rows.keep_late_end,
                    placement.job_id,
                    message.job.id,
                    MessageToJson(message.job, indent=None),
                )
                await self._store.sync()
        if not held:
            session.say(pb.SessionResponse(ack=pb.Ack(uuid=message.uuid)))

    async def _unknown(self, uuid: str, node: Node) -> None:
        if (placed := self._of(uuid, node)) is not None:
            await self._placements.unknown(placed, node)
            return
        placement = await self._store.transact(placement_rows.by_uuid, uuid)
        if placement is not None and placement.node == node.row.name:
            await self._store.transact(placement_rows.keep_late_end, placement.job_id, 0, "unknown")

    async def _fence_if_lost(self, uuid: str, node: Node, session: NodeSession) -> None:
        placement = await self._store.transact(placement_rows.by_uuid, uuid)
        if (
            placement is not None
            and placement.node == node.row.name
            and placement.state is PlacementState.LOST
        ):
            session.fence(uuid)


def _told(message: pjw_pb.Job, node: Node) -> Job:
    """Read a job from its node. Raises InvalidJobError for numbers that would break sums in the table."""
    try:
        job = job_from_message(message)
    except (ValueError, OverflowError) as error:
        raise InvalidJobError(f"node {node.row.name} tells of a job that cannot be: {error}") from None
    stored = (job.output_bytes or 0, job.artifacts.bytes if job.artifacts else 0)
    if job.id <= 0 or not all(0 <= each <= _BYTES_MAX for each in stored):
        raise InvalidJobError(f"node {node.row.name} tells of a job {job.id} that has {sum(stored)} bytes")
    return job
