"""The nodes of a gateway: which are connected, since when the others are silent, and what room each has."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import Final, NamedTuple

from pjw.cluster.v1 import cluster_pb2 as pb
from pjw.errors import JobStateError, NodeNotFoundError
from pjw.gateway import rows
from pjw.gateway.rows import NodeRow
from pjw.worker.background import Background
from pjw.worker.flag import Flag
from pjw.worker.store import JobStore

log: Final = logging.getLogger(__name__)


class Shape(NamedTuple):
    """The part of a node that a job takes, by its limits; 0 is all of the node."""

    millicores: int
    memory: int
    # the longest that the job may run; 0: for ever
    seconds: int = 0


class Session:
    """The session of a connected node, and the messages to it, in their order."""

    def __init__(self, hello: pb.Hello) -> None:
        self.hello: Final = hello
        self.over: Final = Flag()
        self._waiting: Final[deque[pb.SessionResponse]] = deque()
        self._woken: Final = asyncio.Event()

    def say(self, message: pb.SessionResponse) -> None:
        """Tell the node something; does nothing when the session is over."""
        if not self.over.is_set():
            self._waiting.append(message)
            self._woken.set()

    def fence(self, uuid: str) -> None:
        """Have the node end its copy of a job that clients were told is lost."""
        self.say(pb.SessionResponse(fence=pb.Fence(uuid=uuid)))

    def close(self) -> None:
        """The session is over."""
        self.over.set()
        self._woken.set()

    async def messages(self) -> AsyncGenerator[pb.SessionResponse, None]:
        """All messages to the node, until the session is over."""
        while not self.over.is_set():
            while self._waiting:
                yield self._waiting.popleft()
            self._woken.clear()
            if not self.over.is_set():
                await self._woken.wait()


class Node:
    """A node: its facts, its session while it is connected, and its jobs."""

    def __init__(self, row: NodeRow, heard: float) -> None:
        self.row = row
        self.session: Session | None = None
        # when we last heard of it, by the loop's clock
        self.heard = heard
        # set when it comes or goes, and then replaced
        self.changed = Flag()
        # the jobs that are assigned to it, or that it has claimed, by their uuids
        self.jobs: Final[dict[str, Shape]] = {}
        self.timer: asyncio.TimerHandle | None = None

    @property
    def gets_jobs(self) -> bool:
        """Whether jobs may be assigned to it."""
        return self.session is not None and not self.row.drained

    def used(self) -> Shape:
        """How much of it its jobs take."""
        taken = [self._part(shape) for shape in self.jobs.values()]
        return Shape(sum(each.millicores for each in taken), sum(each.memory for each in taken))

    def has_room(self, shape: Shape) -> bool:
        """Whether a job of this shape fits beside its jobs; a job that is too large takes the whole node."""
        used, wanted = self.used(), self._part(shape)
        return all(
            not most or there + more <= most
            for there, more, most in (
                (used.millicores, wanted.millicores, self.row.cpu_max_millicores),
                (used.memory, wanted.memory, self.row.memory_max_bytes),
            )
        )

    def _part(self, shape: Shape) -> Shape:
        millicores, memory = self.row.cpu_max_millicores, self.row.memory_max_bytes
        return Shape(
            min(shape.millicores or millicores, millicores or shape.millicores),
            min(shape.memory or memory, memory or shape.memory),
        )

    def has_changed(self) -> None:
        """Wake all tasks that wait for it to come or go."""
        before, self.changed = self.changed, Flag()
        before.set()


class Nodes:
    """All nodes that this gateway has seen."""

    def __init__(
        self, store: JobStore, background: Background, heartbeat_seconds: float, lost_after_seconds: float
    ) -> None:
        self._store: Final = store
        self._background: Final = background
        self.heartbeat_seconds: Final = heartbeat_seconds
        self.lost_after_seconds: Final = lost_after_seconds
        self.known: Final[dict[str, Node]] = {}
        # called when a node may get jobs again, or has more room
        self.came: Callable[[], None] = lambda: None
        # called with a node whose session is over, and with a node that is lost
        self.went: Callable[[Node], None] = lambda _: None
        self.was_lost: Callable[[Node], None] = lambda _: None

    async def begin(self) -> None:
        """Take over the known nodes: each has as much time to connect as one that has just gone."""
        now = asyncio.get_running_loop().time()
        for row in await self._store.transact(rows.nodes):
            node = self.known[row.name] = Node(row, now)
            if not row.is_lost:
                self._watch(node)

    def close(self) -> None:
        """End all sessions."""
        for node in self.known.values():
            if node.timer is not None:
                node.timer.cancel()
            if node.session is not None:
                node.session.close()

    @property
    def uid_count(self) -> int:
        """How many clients can have jobs on the nodes; 0 while no node is known."""
        return min((node.row.uid_count for node in self.known.values()), default=0)

    def named(self, name: str) -> Node:
        """The node of this name. Raises NodeNotFoundError."""
        try:
            return self.known[name]
        except KeyError:
            raise NodeNotFoundError(name) from None

    async def connected(self, session: Session) -> Node:
        """A node has said hello. Raises JobStateError for a node that does not fit the others."""
        hello, now = session.hello, asyncio.get_running_loop().time()
        self._require_same_users(hello)
        row = NodeRow(
            hello.node,
            hello.address,
            hello.version,
            hello.boot_id,
            hello.cpu_max_millicores,
            hello.memory_max_bytes,
            hello.uid_first,
            hello.uid_count,
        )
        node = self.known.get(row.name)
        if node is None:
            node = self.known[row.name] = Node(row, now)
        if node.session is not None:
            # it has come back before we saw that it had gone
            self.session_over(node, node.session)
        row = replace(row, drained=node.row.drained)
        await self._store.transact(rows.keep_node, row)
        node.row, node.heard = row, now
        node.session = session
        self._watch(node)
        log.info("node %s is connected", row.name)
        return node

    def _require_same_users(self, hello: pb.Hello) -> None:
        for name, node in self.known.items():
            row = node.row
            if name != hello.node and (row.uid_first, row.uid_count) != (hello.uid_first, hello.uid_count):
                raise JobStateError(
                    f"node {hello.node} gives its jobs {hello.uid_count} user ids from {hello.uid_first} on,"
                    f" and node {name} {row.uid_count} from {row.uid_first} on",
                    hint="set the same uid_first and uid_count below [job_users] on all nodes",
                )

    def heard(self, node: Node) -> None:
        """A message of a node has arrived."""
        node.heard = asyncio.get_running_loop().time()

    def session_over(self, node: Node, session: Session) -> None:
        """A session has ended; the end of an earlier session of the node changes nothing."""
        session.close()
        if node.session is session:
            node.session = None
            log.info("node %s is not connected any more", node.row.name)
            node.has_changed()
            self.went(node)

    async def drain(self, name: str, *, drained: bool) -> Node:
        """Give a node no more jobs, or jobs again. Raises NodeNotFoundError."""
        node = self.named(name)
        node.row = replace(node.row, drained=drained)
        await self._store.transact(rows.keep_node, node.row)
        await self._store.sync()
        self.came()
        return node

    def _watch(self, node: Node) -> None:
        if node.timer is not None:
            node.timer.cancel()
        loop = asyncio.get_running_loop()
        node.timer = loop.call_at(node.heard + self.lost_after_seconds, self._look_after, node)

    def _look_after(self, node: Node) -> None:
        if asyncio.get_running_loop().time() - node.heard < self.lost_after_seconds:
            self._watch(node)
            return
        log.warning(
            "node %s was not heard of for %g s: its jobs are lost", node.row.name, self.lost_after_seconds
        )
        node.timer = None
        node.row = replace(node.row, is_lost=True)
        self._background.spawn(self._keep(node))
        if node.session is not None:
            self.session_over(node, node.session)
        node.has_changed()
        self.was_lost(node)

    async def _keep(self, node: Node) -> None:
        await self._store.transact(rows.keep_node, node.row)
