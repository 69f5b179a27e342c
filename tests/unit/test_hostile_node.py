"""What a node that means harm may tell its gateway, which keeps its table, memory and disk whole."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from google.protobuf.message import Message

from pjw.cluster.v1 import cluster_pb2 as cpb
from pjw.errors import InvalidJobError, OutputLostError
from pjw.gateway import archiving
from pjw.gateway import nodes as nodes_module
from pjw.gateway.archive import OutputArchive, open_directory
from pjw.gateway.archiving import Archiver
from pjw.gateway.node_sessions import NodeSessions
from pjw.gateway.nodes import Node, Nodes, NodeSession
from pjw.gateway.placement_rows import NodeRow
from pjw.model import Job, JobState, Limits
from pjw.rpc.convert import job_to_message
from pjw.v1 import job_worker_pb2 as pb
from tests.support.seen import kept_by, told
from tests.unit.test_output_archive import JOB, NOW

NODE = Node(NodeRow("n1", "n1:1", "1", "boot", 2000, 4096, 1, 1), 0.0)


async def say(**message: Message) -> None:
    """Have a node say something that ends its session; it has claimed one job, of which no news comes far."""
    placed = SimpleNamespace(placement=SimpleNamespace(node="n1"))
    placements: Any = SimpleNamespace(of=lambda _: placed, on=lambda _: [])

    async def transact(*_: object) -> list[str]:
        return []

    store: Any = SimpleNamespace(transact=transact, sync=transact)
    nothing: Any = None
    nodes = Nodes(store, nothing, 5, 60)
    sessions = NodeSessions(store, nodes, placements, nothing, nothing, nothing)

    async def requests() -> AsyncIterator[cpb.SessionRequest]:
        yield cpb.SessionRequest(hello=cpb.Hello(node="n1", session="x", uid_count=1))
        yield cpb.SessionRequest(**message)  # type: ignore[arg-type]
        await asyncio.Event().wait()

    try:
        async with asyncio.timeout(10):
            async for _ in sessions.session(requests(), "n1", lambda: None):
                pass
    finally:
        nodes.close()


@pytest.mark.parametrize(
    "job", [pb.Job(id=1, state=pb.JOB_STATE_RUNNING), pb.Job(id=0), pb.Job(id=-1)], ids=["time", "0", "-1"]
)
async def test_a_start_without_a_time_is_refused(job: pb.Job) -> None:
    """In the table the job would wait for its turn once more, and hold up all others for ever."""
    with pytest.raises(InvalidJobError, match="node n1 tells"):
        await say(started=cpb.Started(uuid="u", job=job))


@pytest.mark.parametrize("stored", [-1, 2**63 - 1])
async def test_an_end_with_impossible_numbers_is_refused(stored: int) -> None:
    """The sum of what all jobs have stored would not fit into the table: no gateway could start then."""
    job = job_to_message(Job(7, "alice", "true", JobState.EXITED, Limits(), NOW, NOW))
    job.output_bytes = stored
    with pytest.raises(InvalidJobError, match="node n1 tells of a job 7"):
        await say(ended=cpb.Ended(uuid="u", job=job))
    job.output_bytes, job.end.seconds = 1, 2**62
    with pytest.raises(InvalidJobError, match="node n1 tells of a job that cannot be"):
        await say(ended=cpb.Ended(uuid="u", job=job))


def test_a_node_that_does_not_read_loses_its_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its heartbeats is answered: the answers would fill the gateway's memory."""
    monkeypatch.setattr(nodes_module, "UNREAD_MAX", 5)
    session = NodeSession(cpb.Hello(node="n1", session="x"))
    for _ in range(6):
        session.say(cpb.SessionResponse(heartbeat=cpb.Heartbeat()))
    assert session.over.is_set()
    assert sum(isinstance(each, cpb.SessionResponse) for each in kept_by(session)) == 5


async def test_an_output_without_end_fills_no_archive(tmp_path: Path) -> None:
    """The copy ends with the bytes that the node has told before."""
    archive = OutputArchive(open_directory(str(tmp_path)), str(tmp_path))

    class Endless:
        """The answer of a node."""

        async def __aiter__(self) -> AsyncIterator[bytes]:
            while True:
                yield pb.LogsResponse(data=b"more").SerializeToString()

        def cancel(self) -> None:
            """Nothing."""

    dial: Any = SimpleNamespace(stream=lambda *_: Endless())
    placement: Any = SimpleNamespace(node_job_id=1, client_name="alice")
    nothing: Any = None
    [stream] = archive.begin(JOB)
    with pytest.raises(OutputLostError, match="more than the 10 bytes"):
        await Archiver(archive, nothing, dial, nothing).copy_stream(NODE, placement, stream, 10)
    assert stream.size == 8
    stream.close()
    archive.close()


async def test_two_sessions_at_once_and_a_drain_between() -> None:
    """While the table is slow: the later one counts, the other is over, and the node stays drained."""
    slow = asyncio.Event()

    async def transact(*_: object) -> None:
        await slow.wait()

    store: Any = SimpleNamespace(transact=transact, sync=slow.wait)
    nothing: Any = None
    nodes = Nodes(store, nothing, 5, 60)
    sessions = [NodeSession(cpb.Hello(node="n1", session=each, uid_count=1)) for each in "ab"]
    calls = [asyncio.ensure_future(nodes.connected(each)) for each in sessions]
    await asyncio.sleep(0)
    calls.append(asyncio.ensure_future(nodes.drain("n1", drained=True)))
    await asyncio.sleep(0)
    slow.set()
    await asyncio.gather(*calls)
    node = nodes.named("n1")
    assert [each.over.is_set() for each in sessions] == [True, False]
    assert node.session is sessions[1]
    assert node.is_drained
    nodes.close()


async def test_a_job_that_is_removed_before_it_was_copied_is_held_no_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else a thousand of them would have nodes keep nothing more for the archive."""
    monkeypatch.setattr(archiving, "HELD_MAX", 1)
    nothing: Any = None
    archiver = Archiver(nothing, nothing, nothing, nothing)
    node = Node(NODE.row, 0.0)
    node.session = NodeSession(cpb.Hello(node="n1", session="x"))
    assert [archiver.holds(node, 1, "u"), archiver.holds(node, 2, "v")] == [True, False]
    archiver.let_go(node, [1])
    assert [message.ack.uuid for message in told(node.session)] == ["u"]
    assert archiver.holds(node, 2, "v")
