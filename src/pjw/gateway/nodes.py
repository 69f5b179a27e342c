"""The nodes of a gateway: which are connected, since when the others are silent, and what room each has."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import replace
from enum import StrEnum
from typing import Final, NamedTuple

from pjw.cluster.v1 import cluster_pb2 as pb
from pjw.errors import (
    GpuError,
    ImageNotFoundError,
    InvalidJobError,
    JobStateError,
    MountNotFoundError,
    NodeNotFoundError,
)
from pjw.gateway import placement_rows
from pjw.gateway.placement_rows import NodeRow
from pjw.gateway.skew import require_no_newer
from pjw.model import JobSpec, split_mount
from pjw.worker.slots import Wanting
from pjw.worker.store import JobStore
from pjw.worker.tasks import Background, Flag

# The offers that not every node has: mounts and images of its operator's, names on the network.
#
# A node tells it in its Hello, by names alone. The node knows what it offers to which client, and so has the
# last word: a job that it refuses ends with `start_failed`.

_NAMES: Final = "names on the network"


def offers_of(hello: pb.Hello) -> frozenset[str]:
    """Return what a node offers."""
    names = (_NAMES,) if hello.names else ()
    return frozenset((*map(_mount, hello.mounts), *map(_image, hello.images), *names))


def needs_of(job: Wanting | JobSpec) -> frozenset[str]:
    """Return what a job needs of that."""
    mounts = (_mount(split_mount(each)[0]) for each in job.mounts)
    return frozenset(
        (*mounts, *((_image(job.image),) if job.image else ()), *((_NAMES,) if job.allow else ()))
    )


def _mount(name: str) -> str:
    return f"the mount {name}"


def _image(name: str) -> str:
    return f"the image {name}"


def require_offered(spec: JobSpec, hellos: Iterable[pb.Hello | None]) -> None:
    """Refuse a job that no node offers what it needs; None is a node that has not said yet what it has.

    Raises MountNotFoundError, ImageNotFoundError, GpuError and InvalidJobError.
    """
    needs = needs_of(spec)
    if not needs and not spec.gpus:
        return
    known: list[pb.Hello] = []
    for hello in hellos:
        if hello is None:
            return
        known.append(hello)
    offers = [(offers_of(hello), int(hello.gpus)) for hello in known]
    if not offers or any(needs <= offered and spec.gpus <= gpus for offered, gpus in offers):
        return
    anywhere = frozenset[str]().union(*(offered for offered, _ in offers))
    for mount in spec.mounts:
        if _mount(split_mount(mount)[0]) not in anywhere:
            raise MountNotFoundError(split_mount(mount)[0])
    if spec.image and _image(spec.image) not in anywhere:
        raise ImageNotFoundError(spec.image)
    if spec.allow and _NAMES not in anywhere:
        raise InvalidJobError(f"cannot allow {spec.allow[0]}: no node offers names on the network")
    if spec.gpus > (most := max(gpus for _, gpus in offers)):
        raise GpuError(
            f"the job asks for {spec.gpus} GPU{'s' * (spec.gpus > 1)}, and no node has more than {most}",
            hint="ask for fewer",
        )
    wanted = [*sorted(needs), *((f"{spec.gpus} GPUs",) if spec.gpus else ())]
    raise InvalidJobError(f"no node has all that the job asks for: {', '.join(wanted)}")


# This many messages may wait for a node. After a long absence a node hears of many lost jobs at once.
UNREAD_MAX: Final = 100_000

log: Final = logging.getLogger(__name__)


class Shape(NamedTuple):
    """The part of a node that a job takes, by its limits; 0 is all of the node. And what it needs there."""

    millicores: int
    memory: int
    # the longest that the job may run; 0: for ever
    seconds: int = 0
    gpus: int = 0
    # the offers that not every node has: `Offers`
    needs: frozenset[str] = frozenset()
    # The network that it shares with other jobs of its client: all that have it are on one node. Empty: none.
    link: str = ""
    # the only node that the job may have; empty: any
    node: str = ""
    # of Slurm's; empty: what the operator set
    partition: str = ""
    constraint: str = ""


class NodeState(StrEnum):
    """Whether a node gets jobs."""

    UP = "up"
    DRAINED = "drained"
    # not connected, and its jobs are not lost yet
    AWAY = "away"
    LOST = "lost"


class NodeSession:
    """The session of a connected node, and the messages to it, in their order."""

    def __init__(self, hello: pb.Hello) -> None:
        self.hello: Final = hello
        self.over: Final = Flag()
        self._waiting: Final[deque[pb.SessionResponse]] = deque()
        self._woken: Final = asyncio.Event()

    def say(self, message: pb.SessionResponse) -> None:
        """Tell the node something; does nothing when the session is over.

        A node that reads nothing, but goes on to talk, loses its session.
        """
        if len(self._waiting) >= UNREAD_MAX:
            log.warning("node %s does not read its messages: its session is over", self.hello.node)
            self.close()
        if not self.over.is_set():
            self._waiting.append(message)
            self._woken.set()

    def fence(self, uuid: str) -> None:
        """Have the node end its copy of a job that is lost, as clients know by now."""
        self.say(pb.SessionResponse(fence=pb.Fence(uuid=uuid)))

    def close(self) -> None:
        """End the session."""
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
        self.session: NodeSession | None = None
        # when we last heard of it, by the loop's clock
        self.heard = heard
        # set when it comes or goes, and then replaced
        self.changed = Flag()
        # whether it was drained on its own machine, as it says itself
        self.drained_there = False
        # the jobs that are assigned to it, or that it has claimed, by their uuids: see `take`, `give_back`
        self.jobs: Final[dict[str, Shape]] = {}
        # what it said last of what it has; None: it was not connected since this gateway began
        self.hello: pb.Hello | None = None
        self.offers: frozenset[str] = frozenset()
        # what they take of a node with these processors and this memory; None: not summed yet
        self._used: tuple[int, int, Shape] | None = None
        self.timer: asyncio.TimerHandle | None = None

    @property
    def state(self) -> NodeState:
        """How it is."""
        if self.session is not None:
            return NodeState.DRAINED if self.is_drained else NodeState.UP
        return NodeState.LOST if self.row.is_lost else NodeState.AWAY

    @property
    def gets_jobs(self) -> bool:
        """Whether jobs may be assigned to it."""
        return self.session is not None and not self.is_drained

    @property
    def is_drained(self) -> bool:
        """Whether it gets no jobs, by the will of the operator of the cluster or of its machine."""
        return self.row.drained or self.drained_there

    def take(self, uuid: str, shape: Shape) -> None:
        """Count a job that is assigned to the node."""
        self.jobs[uuid] = shape
        self._used = None

    def give_back(self, uuid: str) -> None:
        """Count a job no more, since it is not there any more."""
        del self.jobs[uuid]
        self._used = None

    def used(self) -> Shape:
        """How much of it its jobs take."""
        size = self.row.cpu_max_millicores, self.row.memory_max_bytes
        if self._used is None or self._used[:2] != size:
            taken = [self._part(shape) for shape in self.jobs.values()]
            used = Shape(sum(each.millicores for each in taken), sum(each.memory for each in taken))
            self._used = *size, used
        return self._used[2]

    def has_room(self, shape: Shape) -> bool:
        """Whether a job of this shape fits next to its jobs; a job that is too large takes the whole node."""
        if not self.could_have(shape) or shape.gpus > self.free_gpus():
            return False
        used, wanted = self.used(), self._part(shape)
        return all(
            not most or there + more <= most
            for there, more, most in (
                (used.millicores, wanted.millicores, self.row.cpu_max_millicores),
                (used.memory, wanted.memory, self.row.memory_max_bytes),
            )
        )

    def could_have(self, shape: Shape) -> bool:
        """Whether it offers what a job of this shape needs, beyond processors and memory."""
        return (
            shape.node in ("", self.row.name)
            and shape.needs <= self.offers
            and (not shape.gpus or shape.gpus <= self.gpus)
        )

    @property
    def gpus(self) -> int:
        """How many GPUs it has for jobs."""
        return 0 if self.hello is None else self.hello.gpus

    def free_gpus(self) -> int:
        """How many GPUs no job has."""
        return self.gpus and self.gpus - sum(shape.gpus for shape in self.jobs.values())

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
        # how many sessions nodes have begun, and how often one was lost
        self.sessions = 0
        self.lost = 0
        # called when a node may get jobs again, or has more room
        self.came: Callable[[], None] = lambda: None
        # called with a node whose session has begun
        self.begun: Callable[[Node], None] = lambda _: None
        # called with a node whose session is over, and with a node that is lost
        self.went: Callable[[Node], None] = lambda _: None
        self.was_lost: Callable[[Node], None] = lambda _: None
        # called with a node that was removed
        self.was_removed: Callable[[Node], None] = lambda _: None

    async def begin(self) -> None:
        """Take over the known nodes: each has as much time to connect as one that has just gone."""
        now = asyncio.get_running_loop().time()
        await self._store.transact(placement_rows.forget_orphans)
        for row in await self._store.transact(placement_rows.nodes):
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

    def free_gpus(self) -> int:
        """How many GPUs one node can give a job now."""
        return max((node.free_gpus() for node in self.known.values() if node.gets_jobs), default=0)

    def of_link(self, link: str) -> Node | None:
        """Return the node of the jobs that share a network; None when there are none."""
        return next(
            (node for node in self.known.values() if any(each.link == link for each in node.jobs.values())),
            None,
        )

    def named(self, name: str) -> Node:
        """Return the node of this name. Raises NodeNotFoundError."""
        try:
            return self.known[name]
        except KeyError:
            raise NodeNotFoundError(name) from None

    async def connected(self, session: NodeSession) -> Node:
        """Take in a node that has said hello. Raises JobStateError when it does not fit the others."""
        hello, now = session.hello, asyncio.get_running_loop().time()
        require_no_newer(hello)
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
            table_id=hello.table_id,
        )
        node = self.known.get(row.name)
        if node is None:
            node = self.known[row.name] = Node(row, now)
        if node.session is not None:
            # it has come back before we saw that it had gone
            self.session_over(node, node.session)
        # before anything is awaited: it is not lost meanwhile
        node.heard = now
        self._watch(node)
        row = replace(row, drained=node.row.drained)
        if node.row.table_id and node.row.table_id != row.table_id:
            log.warning("node %s was set up anew: what it had of earlier jobs is lost", row.name)
            await self._store.transact(placement_rows.lose_copies, row.name)
        await self._store.transact(placement_rows.keep_node, row)
        while node.row.drained != row.drained:
            # an operator has said so meanwhile
            row = replace(row, drained=node.row.drained)
            await self._store.transact(placement_rows.keep_node, row)
        if node.session is not None:
            # two came at once: the later one counts, and the messages to the other wait again
            self.session_over(node, node.session)
        node.row, node.heard = row, now
        node.hello, node.offers = hello, offers_of(hello)
        node.drained_there = hello.drained
        node.session = session
        self.sessions += 1
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
        """Note that a message of a node has arrived."""
        node.heard = asyncio.get_running_loop().time()

    def beat(self, node: Node, heartbeat: pb.Heartbeat) -> None:
        """Note whether a node was drained on its own machine, as it says."""
        if heartbeat.drained != node.drained_there:
            node.drained_there = heartbeat.drained
            log.info(
                "node %s is %s on its machine", node.row.name, "drained" if heartbeat.drained else "resumed"
            )
            self.came()

    def session_over(self, node: Node, session: NodeSession) -> None:
        """Note that a session has ended; the end of an earlier session of the node changes nothing."""
        session.close()
        if node.session is session:
            node.session = None
            log.info("node %s is not connected any more", node.row.name)
            node.has_changed()
            self.went(node)

    async def drain(self, name: str, *, drained: bool) -> Node:
        """Give a node no more jobs, or jobs again.

        Raises NodeNotFoundError, and JobStateError for a node that stays drained on its own machine.
        """
        node = self.named(name)
        node.row = replace(node.row, drained=drained)
        await self._store.transact(placement_rows.keep_node, node.row)
        await self._store.sync()
        self.came()
        if not drained and node.session is not None and node.drained_there:
            raise JobStateError(
                f"node {name} gets no jobs yet: it was drained on its own machine", hint="there: pjwd resume"
            )
        return node

    async def remove(self, name: str) -> None:
        """Forget a node that is gone for good.

        Raises NodeNotFoundError, and JobStateError for a node that is connected or has jobs.
        """
        node = self.named(name)
        if node.session is not None:
            raise JobStateError(
                f"cannot remove node {name}: it is connected",
                hint=f"pjw nodes drain {name}, then stop its pjwd",
            )
        if node.jobs:
            raise JobStateError(
                f"cannot remove node {name}: {len(node.jobs)} of its jobs have not ended",
                hint="they are lost when nothing was heard of it for gateway.lost_after_seconds",
            )
        if node.timer is not None:
            node.timer.cancel()
        # before anything is awaited: if it connects meanwhile, it is a new one
        del self.known[name]
        await self._store.transact(placement_rows.remove_node, name)
        await self._store.sync()
        self.was_removed(node)
        # readers of its output: they find no node, and say so
        node.has_changed()

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
        self.lost += 1
        node.row = replace(node.row, is_lost=True)
        self._background.spawn(self._keep(node))
        if node.session is not None:
            self.session_over(node, node.session)
        node.has_changed()
        self.was_lost(node)

    async def _keep(self, node: Node) -> None:
        await self._store.transact(placement_rows.keep_node, node.row)
