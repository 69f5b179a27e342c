"""The engine `pool`: the first connected node, by its name, that has room for the oldest job.

It is for a handful of machines, and no scheduler: it has no fair share, no priorities and no reservations.
Smaller jobs pass a job that fits nowhere now. The pool is in memory alone: the table of placements has the
waiting jobs, and the gateway submits them again when it begins.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heapreplace
from typing import Final

from pjw.cluster.v1 import cluster_pb2 as pb
from pjw.gateway.nodes import Node, Nodes, Shape
from pjw.gateway.room import Room
from pjw.gateway.waiting import Kind, Waiting

# A node that could not start a job gets none for so long; each further failure doubles the pause.
FIRST_PAUSE_SECONDS: Final = 1.0
LONGEST_PAUSE_SECONDS: Final = 60.0


class Pool:
    """The jobs that wait for a node, in their order, and the jobs of each node."""

    def __init__(self, nodes: Nodes, running_max: Callable[[], int]) -> None:
        self._nodes: Final = nodes
        # how many jobs of a client may be on nodes at once; 0: any number
        self._running_max: Final = running_max
        # After each change no job waits that could have a node. So a look is at what has changed alone.
        self._waiting: Final = Waiting()
        self._room: Final = Room(nodes, self._gets_jobs)
        # why jobs wait that may have any node; None: to be looked up
        self._why: str | None = None
        # the node of each job that a node has, or may claim
        self._placed: Final[dict[str, tuple[str, Node]]] = {}
        self._claimed: Final[set[str]] = set()
        self._of_client: Final[Counter[str]] = Counter()
        # the nodes that could not start a job: until when they get none, and how long that is
        self._paused: Final[dict[str, tuple[float, float]]] = {}

    def submit(self, uuid: str, client_name: str, shape: Shape) -> None:
        """See `Engine`."""
        self._release(uuid)
        self._why = None
        kind = Kind(client_name, shape)
        self._waiting.add(uuid, kind)
        self._look([kind])

    def cancel(self, uuid: str) -> None:
        """See `Engine`."""
        self._waiting.discard(uuid)
        self._release(uuid)

    def claimed(self, uuid: str, client_name: str, node: Node, shape: Shape) -> None:
        """See `Engine`."""
        self._waiting.discard(uuid)
        if uuid not in self._placed:
            self._take(uuid, client_name, node, shape)
        self._claimed.add(uuid)

    def may_claim(self, uuid: str, node: Node) -> bool:
        """See `Engine`."""
        placed = self._placed.get(uuid)
        return placed is not None and placed[1] is node

    def started(self, node: Node) -> None:
        """See `Engine`."""
        if self._paused.pop(node.row.name, None) is not None:
            self.look()

    def refused(self, uuid: str, node: Node) -> None:
        """See `Engine`."""
        _, before = self._paused.get(node.row.name, (0.0, 0.0))
        pause = min(2 * before or FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS)
        loop = asyncio.get_running_loop()
        self._paused[node.row.name] = loop.time() + pause, pause
        loop.call_later(pause, self.look)
        self._why = None

    def why(self, uuid: str) -> str:
        """See `Engine`."""
        if uuid in self._placed:
            return f"node {self._placed[uuid][1].row.name} is about to start it"
        kind, most = self._waiting.of(uuid), self._running_max()
        if kind is not None and most and self._of_client[kind.client_name] >= most:
            return f"waits: {most} jobs of {kind.client_name} have a node, and no more may"
        if kind is not None and kind.shape.node:
            return f"waits for node {kind.shape.node}: {self._why_node(kind.shape.node)}"
        if self._why is None:
            self._why = self._why_any()
        return self._why

    def _why_any(self) -> str:
        nodes = self._nodes.known.values()
        if not any(node.session for node in nodes):
            return "waits: no node is connected"
        if not any(node.gets_jobs for node in nodes):
            drained = sorted(node.row.name for node in nodes if node.session)
            return f"waits: nodes drained: {', '.join(drained)}"
        if not any(self._gets_jobs(node) for node in nodes):
            return "waits: no node can start a job now; they are tried again soon"
        return "waits: no node has room for it now"

    def _why_node(self, name: str) -> str:
        node = self._nodes.known.get(name)
        if node is None or node.session is None:
            return "it is not connected"
        if node.row.drained:
            return "it is drained"
        return "it has no room for it now" if self._gets_jobs(node) else "it cannot start a job now"

    def session_over(self, node: Node) -> None:
        """See `Engine`."""
        back = {
            uuid: Kind(self._placed[uuid][0], shape)
            for uuid, shape in node.jobs.items()
            if uuid not in self._claimed
        }
        for uuid in back:
            self._drop(uuid)
        # these jobs are older than those that have come since
        self._waiting.put_back(back)
        self.look()

    def look(self) -> None:
        """See `Engine`."""
        self._why = None
        self._room.forget()
        self._look()

    def _look(self, kinds: Sequence[Kind] | None = None, only: Node | None = None) -> None:
        """Give jobs of *kinds* (None: of all) nodes, or *only* this one, the oldest job first."""
        if kinds is None:
            heads = list(self._waiting.heads())
        else:
            heads = [(first[0], kind) for kind in kinds if (first := self._waiting.first(kind))]
        most = self._running_max()
        heapify(heads)
        while heads:
            _, kind = heads[0]
            client_name, shape = kind
            node = None
            if not most or self._of_client[client_name] < most:
                node = self._room.find(shape) if only is None else self._if_room(only, shape)
            if node is None:
                # if a job does not fit now, another one of its kind does not fit either
                heappop(heads)
                continue
            first = self._waiting.first(kind)
            assert first is not None
            assert node.session is not None
            self._waiting.discard(first[1])
            self._take(first[1], client_name, node, shape)
            node.session.say(pb.SessionResponse(assign=pb.Assign(uuid=first[1])))
            following = self._waiting.first(kind)
            if following is None:
                heappop(heads)
            else:
                heapreplace(heads, (following[0], kind))

    def _if_room(self, node: Node, shape: Shape) -> Node | None:
        return node if self._room.fits(node, shape) else None

    def _gets_jobs(self, node: Node) -> bool:
        until, _ = self._paused.get(node.row.name, (0.0, 0.0))
        return node.gets_jobs and asyncio.get_running_loop().time() >= until

    def _take(self, uuid: str, client_name: str, node: Node, shape: Shape) -> None:
        self._placed[uuid] = client_name, node
        self._of_client[client_name] += 1
        node.take(uuid, shape)

    def _drop(self, uuid: str) -> tuple[str, Node] | None:
        placed = self._placed.pop(uuid, None)
        self._claimed.discard(uuid)
        if placed is not None:
            client_name, node = placed
            node.give_back(uuid)
            self._of_client[client_name] -= 1
            if not self._of_client[client_name]:
                del self._of_client[client_name]
        return placed

    def _release(self, uuid: str) -> None:
        """A job has no node any more: others may have the room."""
        if (placed := self._drop(uuid)) is None:
            return
        client_name, node = placed
        most = self._running_max()
        if most and self._of_client[client_name] + 1 >= most:
            # its client had as many as it may have, and can have one more anywhere
            self._room.more(node)
            self._look()
        else:
            self._look(only=node)
            self._room.more(node)
