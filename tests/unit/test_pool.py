"""The engine `pool`: who gets which job, and why others wait."""

import asyncio
import time
from collections import Counter
from random import Random
from typing import Any

import pytest

from pjw.cluster.v1 import cluster_pb2 as pb
from pjw.gateway.nodes import Node, Nodes, NodeSession, Shape, offers_of
from pjw.gateway.placement_rows import NodeRow
from pjw.gateway.pool import LONGEST_PAUSE_SECONDS, Pool
from tests.support.seen import told

SMALL = Shape(1000, 512)


class Cluster:
    """Nodes that are connected without a network, and what each was assigned."""

    def __init__(self, running_max: int = 0) -> None:
        # neither table nor tasks are asked
        nothing: Any = None
        self.nodes = Nodes(nothing, nothing, 5, 60)
        self.pool = Pool(self.nodes, lambda: running_max)
        self.nodes.came = self.pool.look
        self.nodes.went = self.pool.session_over

    def node(self, name: str, cpu: int = 2000, memory: int = 4096) -> Node:
        """A node that is connected."""
        row = NodeRow(name, f"{name}:1", "1", "boot", cpu, memory, 1, 1)
        node = self.nodes.known[name] = Node(row, 0.0)
        node.session = NodeSession(pb.Hello(node=name, session=name))
        return node

    @staticmethod
    def assigned(node: Node) -> list[str]:
        """What a node was assigned, and takes."""
        assert node.session is not None
        return [message.assign.uuid for message in told(node.session) if message.HasField("assign")]


async def test_the_first_node_with_room_gets_the_oldest_job() -> None:
    """In the order of the nodes' names; what fits nowhere waits, and goes when there is room."""
    cluster = Cluster()
    first, second = cluster.node("n1"), cluster.node("n2", cpu=1000)
    for uuid in "abcd":
        cluster.pool.submit(uuid, "alice", SMALL)
    assert (cluster.assigned(first), cluster.assigned(second)) == (["a", "b"], ["c"])
    assert cluster.pool.why("d") == "waits: no node has room for it now"
    assert cluster.pool.why("a") == "waits: node n1 is about to start it"
    cluster.pool.cancel("c")
    assert cluster.assigned(second) == ["d"]


async def test_a_smaller_job_passes_a_larger_one() -> None:
    """It is no scheduler; and a job that is larger than any node takes all of one."""
    cluster = Cluster()
    node = cluster.node("n1")
    cluster.pool.submit("half", "alice", SMALL)
    cluster.pool.submit("huge", "alice", Shape(64_000, 0))
    cluster.pool.submit("small", "alice", SMALL)
    assert cluster.assigned(node) == ["half", "small"]
    cluster.pool.cancel("half")
    assert cluster.assigned(node) == []
    cluster.pool.cancel("small")
    assert cluster.assigned(node) == ["huge"]
    assert node.used() == Shape(2000, 4096)


async def test_nobody_claims_what_was_not_assigned() -> None:
    """Neither another node, nor one whose session is over; then the job goes to the next one."""
    cluster = Cluster()
    first = cluster.node("n1")
    cluster.pool.submit("a", "alice", SMALL)
    cluster.pool.submit("b", "alice", SMALL)
    second = cluster.node("n2", cpu=1000)
    assert cluster.pool.may_claim("a", first)
    assert not cluster.pool.may_claim("a", second)
    assert not cluster.pool.may_claim("nothing", first)
    cluster.pool.claimed("a", "alice", first, SMALL)
    assert first.session is not None
    cluster.pool.submit("c", "alice", SMALL)
    assert cluster.assigned(second) == ["c"]
    cluster.nodes.session_over(first, first.session)
    # what was claimed stays, what was only assigned waits
    assert list(first.jobs) == ["a"]
    assert not cluster.pool.may_claim("b", first)
    cluster.pool.cancel("c")
    assert cluster.assigned(second) == ["b"]


async def test_drained_nodes_get_no_jobs() -> None:
    """And the words say so, with their names."""
    cluster = Cluster()
    assert cluster.pool.why("a") == "waits: no node is connected"
    node = cluster.node("n1")
    node.row = NodeRow("n1", "n1:1", "1", "boot", 2000, 4096, 1, 1, drained=True)
    cluster.pool.submit("a", "alice", SMALL)
    assert cluster.assigned(node) == []
    assert cluster.pool.why("a") == "waits: nodes drained: n1"


async def test_a_client_has_no_more_jobs_on_nodes_than_it_may() -> None:
    """Another client's go on."""
    cluster = Cluster(running_max=1)
    node = cluster.node("n1", cpu=8000)
    for uuid, client in (("a", "alice"), ("b", "alice"), ("c", "bob")):
        cluster.pool.submit(uuid, client, SMALL)
    assert cluster.assigned(node) == ["a", "c"]
    assert cluster.pool.why("b") == "waits: 1 jobs of alice have a node, and no more may"
    cluster.pool.cancel("a")
    assert cluster.assigned(node) == ["b"]


async def test_a_node_that_cannot_start_jobs_is_left_alone_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else it would be asked again and again; each time it is left alone for longer."""
    monkeypatch.setattr("pjw.gateway.pool.FIRST_PAUSE_SECONDS", 0.05)
    cluster = Cluster()
    node = cluster.node("n1")
    cluster.pool.submit("a", "alice", SMALL)
    assert cluster.assigned(node) == ["a"]
    for _ in range(7):
        # several that fail together are one failure
        cluster.pool.refused("a", node)
    began = time.monotonic()
    cluster.pool.submit("a", "alice", SMALL)
    assert cluster.assigned(node) == []
    assert cluster.pool.why("a") == "waits: no node can start a job now; they are tried again soon"
    async with asyncio.timeout(10):
        while not (assigned := cluster.assigned(node)):
            await asyncio.sleep(0.01)
    assert assigned == ["a"]
    # seven would be 3 s
    assert time.monotonic() - began < 1.5


async def test_a_job_has_the_node_of_its_choice_or_waits() -> None:
    """Others pass it meanwhile."""
    cluster = Cluster()
    first, second = cluster.node("n1"), cluster.node("n2", cpu=1000)
    mine = Shape(1000, 512, node="n2")
    for uuid, shape in (("a", mine), ("b", mine), ("c", SMALL), ("d", Shape(1, 1, node="n3"))):
        cluster.pool.submit(uuid, "alice", shape)
    assert (cluster.assigned(first), cluster.assigned(second)) == (["c"], ["a"])
    cluster.pool.cancel("c")
    assert cluster.assigned(first) == []
    cluster.pool.cancel("a")
    assert cluster.assigned(second) == ["b"]


@pytest.mark.parametrize("seed", range(30))
async def test_any_order_of_events_is_as_a_look_at_everything(seed: int) -> None:
    """A look at what has changed alone finds the same: nothing waits that could have a node."""
    draw = Random(seed)
    most = draw.choice((0, 3))
    cluster = Cluster(most)
    nodes = [cluster.node(f"n{number}", cpu=draw.choice((1000, 2000, 3000))) for number in range(5)]
    cluster.pool.look()
    shapes = [SMALL, Shape(2000, 0), Shape(0, 100), Shape(1000, 1, node="n2")]
    there: dict[str, tuple[str, Shape]] = {}
    for number in range(150):
        match draw.randrange(4):
            case 0 | 1:
                there[f"j{number}"] = draw.choice("ab"), draw.choice(shapes)
                cluster.pool.submit(f"j{number}", *there[f"j{number}"])
            case 2 if there:
                cluster.pool.cancel(uuid := draw.choice(list(there)))
                del there[uuid]
            case _:
                node = draw.choice(nodes)
                if node.session is None:
                    node.session = NodeSession(pb.Hello(node=node.row.name, session=str(number)))
                    cluster.nodes.came()
                else:
                    cluster.nodes.session_over(node, node.session)
        placed = {uuid: node.row.name for node in nodes for uuid in node.jobs}
        assert len(placed) == sum(len(node.jobs) for node in nodes)
        assert placed.keys() <= there.keys()
        of_client = Counter(there[uuid][0] for uuid in placed)
        for uuid, (client, shape) in there.items():
            if uuid in placed:
                assert cluster.pool.why(uuid) == f"waits: node {placed[uuid]} is about to start it"
                continue
            is_free = not most or of_client[client] < most
            fits = any(node.session and node.has_room(shape) for node in nodes)
            assert not (is_free and fits), (number, uuid)
        for node in nodes:
            assert node.used().millicores <= node.row.cpu_max_millicores


async def test_a_claim_that_outlives_its_session_counts_where_it_was_made() -> None:
    """Another node was about to have the job meanwhile: that one has its room back."""
    cluster = Cluster()
    first, second = cluster.node("n1"), cluster.node("n2", cpu=1000)
    cluster.pool.submit("a", "alice", SMALL)
    assert first.session is not None
    # the gateway looks into its table for the claim
    cluster.nodes.session_over(first, first.session)
    assert cluster.assigned(second) == ["a"]
    cluster.pool.submit("b", "alice", SMALL)
    cluster.pool.claimed("a", "alice", first, SMALL)
    assert list(first.jobs) == ["a"]
    assert not cluster.pool.may_claim("a", second)
    assert cluster.assigned(second) == ["b"]


class Scene:
    """Nodes that come and go with other things to offer, and a look at everything."""

    def __init__(self, seed: int) -> None:
        self.draw = Random(seed)
        self.most = self.draw.choice((0, 4))
        self.cluster = Cluster(self.most)
        self.there: dict[str, tuple[str, Shape]] = {}
        # nodes that could not start a job
        self.paused: set[str] = set()
        self.reserved: dict[int, Shape] = {}
        for number in range(4):
            self.come(f"n{number}")

    def come(self, name: str) -> None:
        """A node connects, perhaps once more, and not as it was."""
        draw = self.draw
        node = self.cluster.nodes.known.get(name)
        if node is None:
            node = self.cluster.node(name)
        node.row = NodeRow(name, "", "1", "boot", draw.choice((0, 1000, 3000)), 4096, 1, 1, node.row.drained)
        mounts = [each for each in ("data", "more") if draw.random() < 0.5]
        node.hello = pb.Hello(node=name, gpus=draw.choice((0, 0, 2)), mounts=mounts)
        node.offers, node.session = offers_of(node.hello), NodeSession(node.hello)
        self.cluster.nodes.came()

    def shape(self) -> Shape:
        """Of a job."""
        draw = self.draw
        return Shape(
            draw.choice((0, 500, 1000, 2000, 9000)),
            draw.choice((0, 100, 512)),
            gpus=draw.choice((0, 0, 0, 1, 2)),
            needs=frozenset(draw.sample(("the mount data", "the mount more"), draw.choice((0, 0, 1, 2)))),
            link=draw.choice(("", "", "alice/net", "bob/net")),
            node=draw.choice(("", "", "", "n1", "n9")),
        )

    def node(self) -> Node:
        """Any node."""
        return self.draw.choice(list(self.cluster.nodes.known.values()))

    def event(self, number: int) -> None:
        """Something happens."""
        draw, pool, nodes, node = self.draw, self.cluster.pool, self.cluster.nodes, self.node()
        name = f"j{number}"
        match draw.randrange(11):
            case 0 | 1 | 2:
                self.submit(name, draw.choice("ab"), self.shape())
            case 3 | 4 if self.there:
                pool.cancel(uuid := draw.choice(list(self.there)))
                del self.there[uuid]
            case 5 if node.session is None:
                self.come(node.row.name)
            case 5 | 6 if node.session is not None:
                nodes.session_over(node, node.session)
            case 6 if not node.jobs and len(nodes.known) > 1:
                del nodes.known[node.row.name]
            case 6:
                self.come(f"n{draw.randrange(12)}")
            case 7:
                node.drained_there = not node.drained_there
                nodes.came()
            case 8 if node.jobs and (uuid := draw.choice(list(node.jobs))) in self.there:
                pool.claimed(uuid, self.there[uuid][0], node, node.jobs[uuid])
                if draw.random() < 0.5:
                    pool.refused(uuid, node)
                    self.paused.add(node.row.name)
                    pool.cancel(uuid)
                    del self.there[uuid]
            case 9:
                pool.started(node)
                self.paused.discard(node.row.name)
            case _ if self.reserved and draw.random() < 0.7:
                job_id, shape = self.reserved.popitem()
                pool.unreserve(job_id)
                if draw.random() < 0.7:
                    self.submit(name, "a", shape)
            case _:
                if pool.has_room(shape := self.shape()):
                    pool.reserve(number, "a", shape)
                    self.reserved[number] = shape

    def submit(self, name: str, client: str, shape: Shape) -> None:
        """A job comes."""
        self.there[name] = client, shape
        self.cluster.pool.submit(name, client, shape)

    def placed(self) -> Counter[str]:
        """The jobs that have a node, by their names."""
        return Counter(uuid for node in self.cluster.nodes.known.values() for uuid in node.jobs)

    def fits(self, shape: Shape) -> bool:
        """Whether a look at every node finds one for a job."""
        nodes = list(self.cluster.nodes.known.values())
        if shape.link and (linked := self.cluster.nodes.of_link(shape.link)) is not None:
            nodes = [linked]
        return any(
            node.gets_jobs and node.row.name not in self.paused and node.has_room(shape) for node in nodes
        )


@pytest.mark.parametrize("seed", range(40))
async def test_what_nodes_offer_changes_nothing_of_that(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links, GPUs, mounts, a chosen node, pauses, drains: nothing waits that could have a node."""
    # no pause is over before its node has started a job
    monkeypatch.setattr("pjw.gateway.pool.FIRST_PAUSE_SECONDS", LONGEST_PAUSE_SECONDS)
    scene = Scene(seed)
    pool = scene.cluster.pool
    for number in range(200):
        scene.event(number)
        placed = scene.placed()
        assert set(placed.values()) <= {1}
        # those without a uuid yet are all of one client
        of_client = Counter(scene.there[uuid][0] if uuid in scene.there else "a" for uuid in placed)
        for uuid, (client, shape) in scene.there.items():
            is_free = not scene.most or of_client[client] < scene.most
            assert uuid in placed or not (is_free and scene.fits(shape)), (number, uuid)
        for _ in range(5):
            shape = scene.shape()
            assert pool.has_room(shape) == scene.fits(shape), (number, shape)
