"""The engine `pool`: the first connected node, by its name, that has room for the job that is next.

It is simple: it moves no job, and looks at no load. It has no order of its own: the queue asks it for room,
one job after the other. The pool is in memory alone: the table has the waiting jobs, and the queue submits
them.
"""

import asyncio
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from typing import Final, NamedTuple

from pjw.cluster.v1 import cluster_pb2 as pb
from pjw.gateway.answers import not_with
from pjw.gateway.nodes import Node, Nodes, Shape
from pjw.model import JobSpec

# Finds the first node, by its name, that has room for a job, without a look at each node for each job.

# We forget all shapes when there are more: each has to be looked at when a node has more room.
_SHAPES_MAX: Final = 256


class NoRoomBefore:
    """Remembers for each shape before which node there is no room.

    That holds until a node has more room (`more`), or may get jobs again (`forget`).
    """

    def __init__(self, nodes: Nodes, gets_jobs: Callable[[Node], bool]) -> None:
        self._nodes: Final = nodes
        self._gets_jobs: Final = gets_jobs
        self._names: list[str] = []
        self._first: Final[dict[Shape, int]] = {}

    def forget(self) -> None:
        """Nodes may have come, or get jobs again."""
        self._names = sorted(self._nodes.known)
        self._first.clear()

    def fits(self, node: Node, shape: Shape) -> bool:
        """Whether a node may get a job of this shape now."""
        return self._gets_jobs(node) and node.has_room(shape)

    def find(self, shape: Shape) -> Node | None:
        """Return the first node that may get such a job now."""
        if shape.node:
            node = self._nodes.known.get(shape.node)
            return node if node is not None and self.fits(node, shape) else None
        if len(self._names) != len(self._nodes.known):
            self.forget()
        place = self._first.get(shape, 0)
        found = None
        while place < len(self._names):
            node = self._nodes.known.get(self._names[place])
            if node is not None and self.fits(node, shape):
                found = node
                break
            place += 1
        if len(self._first) >= _SHAPES_MAX:
            self._first.clear()
        self._first[shape] = place
        return found

    def more(self, node: Node) -> None:
        """Note that a node has more room than before."""
        place = bisect_left(self._names, node.row.name)
        for shape, first in self._first.items():
            if place < first and self.fits(node, shape):
                self._first[shape] = place


# A node that could not start a job gets none for this time; each further failure doubles the pause.
FIRST_PAUSE_SECONDS: Final = 1.0
LONGEST_PAUSE_SECONDS: Final = 60.0


class _Waiting(NamedTuple):
    client_name: str
    shape: Shape


class Pool:
    """The jobs that wait for a node, in their order, and the jobs of each node."""

    def __init__(self, nodes: Nodes, running_max: Callable[[], int]) -> None:
        self._nodes: Final = nodes
        self._room: Final = NoRoomBefore(nodes, self._gets_jobs)
        # how many jobs of a client may be on nodes at once; 0: any number
        self._running_max: Final = running_max
        self._waiting: Final[dict[str, _Waiting]] = {}
        # the node of each job that a node has, or may claim
        self._placed: Final[dict[str, tuple[str, Node]]] = {}
        self._claimed: Final[set[str]] = set()
        self._of_client: Final[Counter[str]] = Counter()
        # the nodes that could not start a job: until when they get none, and how long that is
        self._paused: Final[dict[str, tuple[float, float]]] = {}
        # see `Engine`
        self.freed: Callable[[], None] = lambda: None

    def has_room(self, shape: Shape) -> bool:
        """See `Engine`."""
        return self._find(shape) is not None

    def check(self, spec: JobSpec) -> None:
        """See `Engine`: it can run any job that a node can, and does not know Slurm's options."""
        for what, asked in (("a partition", spec.partition), ("a constraint", spec.constraint)):
            if asked:
                raise not_with(what, "pool")

    def passed_over(self, shape: Shape) -> str:
        """See `Engine`: what becomes free is for the job that is next."""
        return ""

    def reserve(self, job_id: int, client_name: str, shape: Shape) -> None:
        """See `Engine`."""
        if (node := self._find(shape)) is not None:
            self._take(_reservation(job_id), client_name, node, shape)
            # no message to the node was sent, so it stays when the node goes away
            self._claimed.add(_reservation(job_id))

    def unreserve(self, job_id: int) -> None:
        """See `Engine`."""
        if self._release(_reservation(job_id)):
            self._look()

    def submit(self, uuid: str, client_name: str, shape: Shape) -> None:
        """See `Engine`."""
        self._release(uuid)
        self._waiting[uuid] = _Waiting(client_name, shape)
        self._look()

    def cancel(self, uuid: str) -> None:
        """See `Engine`."""
        self._waiting.pop(uuid, None)
        if self._release(uuid):
            self._look()

    def claimed(self, uuid: str, client_name: str, node: Node, shape: Shape, hold: str = "") -> None:
        """See `Engine`."""
        del hold
        self._waiting.pop(uuid, None)
        placed = self._placed.get(uuid)
        is_elsewhere = placed is not None and placed[1] is not node
        if is_elsewhere:
            # its session was over during the claim, and we have told another node of the job
            self._release(uuid)
        if uuid not in self._placed:
            self._take(uuid, client_name, node, shape)
        self._claimed.add(uuid)
        if is_elsewhere:
            self._look()
            self.freed()

    def may_claim(self, uuid: str, node: Node, hold: str = "") -> bool:
        """See `Engine`."""
        placed = self._placed.get(uuid)
        return placed is not None and placed[1] is node and not hold

    def started(self, node: Node) -> None:
        """See `Engine`."""
        if self._paused.pop(node.row.name, None) is not None:
            self._pause_over()

    def refused(self, uuid: str, node: Node) -> None:
        """See `Engine`."""
        until, before = self._paused.get(node.row.name, (0.0, 0.0))
        loop = asyncio.get_running_loop()
        if loop.time() < until:
            # one of several that failed together
            return
        pause = min(2 * before or FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS)
        self._paused[node.row.name] = loop.time() + pause, pause
        loop.call_later(pause, self._pause_over)

    def _pause_over(self) -> None:
        self.look()
        self.freed()

    def why(self, uuid: str) -> str:
        """See `Engine`."""
        if uuid in self._placed:
            return f"waits: node {self._placed[uuid][1].row.name} is about to start it"
        waiting = self._waiting.get(uuid)
        most = self._running_max()
        if waiting is not None and most and self._of_client[waiting.client_name] >= most:
            return f"waits: {most} jobs of {waiting.client_name} have a node, and no more may"
        nodes = self._nodes.known.values()
        if not any(node.session for node in nodes):
            return "waits: no node is connected"
        if not any(node.gets_jobs for node in nodes):
            drained = sorted(node.row.name for node in nodes if node.session)
            return f"waits: nodes drained: {', '.join(drained)}"
        if not any(self._gets_jobs(node) for node in nodes):
            return "waits: no node can start a job now; they are tried again soon"
        return "waits: no node has room for it now"

    def session_over(self, node: Node) -> None:
        """See `Engine`."""
        back: dict[str, _Waiting] = {}
        for uuid, shape in list(node.jobs.items()):
            if uuid not in self._claimed:
                back[uuid] = _Waiting(self._placed[uuid][0], shape)
                self._release(uuid)
        # these jobs are older than those that have come since
        rest = dict(self._waiting)
        self._waiting.clear()
        self._waiting.update(back | rest)
        self.look()

    def hold_here(self, node: Node, hold: pb.Hold) -> None:
        """See `Engine`."""
        if node.session is not None:
            refused = "this gateway gets no places from Slurm: see gateway.engine"
            node.session.say(pb.SessionResponse(release=pb.Release(hold=hold.id, refused=refused)))

    def hold_gone(self, node: Node, hold: str) -> None:
        """See `Engine`."""

    def look(self) -> None:
        """See `Engine`."""
        self._room.forget()
        self._look()

    def _look(self) -> None:
        if not self._waiting:
            return
        most = self._running_max()
        # if a job does not fit now, one of the same shape does not fit either
        passed_over: set[Shape] = set()
        for uuid, waiting in list(self._waiting.items()):
            if waiting.shape in passed_over or (most and self._of_client[waiting.client_name] >= most):
                continue
            found = self._find(waiting.shape)
            if found is None:
                passed_over.add(waiting.shape)
                continue
            del self._waiting[uuid]
            self._take(uuid, waiting.client_name, found, waiting.shape)
            assert found.session is not None
            found.session.say(pb.SessionResponse(assign=pb.Assign(uuid=uuid)))

    def _find(self, shape: Shape) -> Node | None:
        """Find the node that a job of this shape gets now."""
        if shape.link and (node := self._nodes.of_link(shape.link)) is not None:
            return node if self._room.fits(node, shape) else None
        return self._room.find(shape)

    def _gets_jobs(self, node: Node) -> bool:
        until, _ = self._paused.get(node.row.name, (0.0, 0.0))
        return node.gets_jobs and asyncio.get_running_loop().time() >= until

    def _take(self, uuid: str, client_name: str, node: Node, shape: Shape) -> None:
        self._placed[uuid] = client_name, node
        self._of_client[client_name] += 1
        node.take(uuid, shape)

    def _release(self, uuid: str) -> bool:
        placed = self._placed.pop(uuid, None)
        self._claimed.discard(uuid)
        if placed is None:
            return False
        client_name, node = placed
        node.give_back(uuid)
        self._room.more(node)
        self._of_client[client_name] -= 1
        if not self._of_client[client_name]:
            del self._of_client[client_name]
        return True


def _reservation(job_id: int) -> str:
    """Return the name of a job that has no uuid yet."""
    return f"job {job_id}"
