"""The engine `slurm` without a Slurm: what is asked for, who gets a place, what Slurm's programs print."""

import asyncio
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pjw.cluster.v1 import cluster_pb2 as pb
from pjw.errors import InvalidJobError, NotAllowedError
from pjw.gateway.nodes import Node, Nodes, NodeSession, Shape
from pjw.gateway.placement_rows import NodeRow
from pjw.gateway.slurm import SUBMITTED_AT_ONCE, Kind, Slurm, kind_of
from pjw.gateway.slurm_port import SlurmRefusedError
from pjw.model import JobSpec
from pjw.server.config import GatewaySlurm
from pjw.slurm.programs import Commands, SlurmError
from pjw.worker.tasks import Background
from tests.support.seen import told

SMALL = Shape(1000, 512 * 1024**2)
# its place has room for pjw-hold too
WORDS = Kind(1, 528, 0, "", "").words
UUID = "0d9e3c1c-54a5-4d2c-9d7f-0123456789ab"


class Port:
    """What is asked of Slurm, which has whatever a test says."""

    def __init__(self) -> None:
        self.submitted: list[str] = []
        self.cancelled: list[str] = []
        self.has: list[dict[str, str]] = []
        self.fault = ""
        self.refusal = ""
        self.snapshots = 0
        # sbatch has ended
        self.answers = asyncio.Event()
        self.answers.set()

    async def submit(self, uuid: str, shape: str, *_: object) -> str:
        """Number them."""
        if self.refusal:
            raise SlurmRefusedError(self.refusal)
        self.submitted.append(uuid)
        await self.answers.wait()
        number = str(len(self.submitted))
        self.has.append(
            {"id": number, "uuid": uuid, "shape": shape, "state": "PENDING", "reason": "Priority"}
        )
        return number

    async def cancel(self, ids: Sequence[str]) -> None:
        """Forget them."""
        self.cancelled += ids
        self.has = [each for each in self.has if each["id"] not in ids]

    async def jobs(self) -> list[dict[str, str]]:
        """What there is."""
        self.snapshots += 1
        if self.fault:
            raise SlurmRefusedError(self.fault)
        return list(self.has)

    async def nodes(self) -> dict[str, tuple[str, str]]:
        """Two, one of which is bad."""
        return {"n1": ("idle", ""), "n2": ("drained", "bad disk")}


class Cluster:
    """Nodes that are connected without a network, and the engine."""

    def __init__(self, running_max: int = 0, **settings: Any) -> None:
        # neither table nor tasks are asked
        nothing: Any = None
        self.nodes = Nodes(nothing, nothing, 5, 60)
        self.port = Port()
        self.background = Background()
        port: Any = self.port
        self.engine = Slurm(self.nodes, lambda: running_max, port, GatewaySlurm(**settings), self.background)
        self.revoked: list[str] = []
        self.engine.revoked = self.revoked.append
        self.nodes.went = self.engine.session_over

    def node(self, name: str) -> Node:
        """A node that is connected."""
        node = self.nodes.known[name] = Node(NodeRow(name, f"{name}:1", "1", "boot", 2000, 4096, 1, 1), 0.0)
        node.session = NodeSession(pb.Hello(node=name, session=name))
        return node

    def here(self, node: Node, number: str, job: str = "") -> None:
        """A place of the small kind has come."""
        self.engine.hold_here(node, pb.Hold(id=number, shape=WORDS, job=job))

    async def settle(self) -> None:
        """Have what is under way done, without a snapshot."""
        for _ in range(10):
            await asyncio.sleep(0)

    async def sample(self) -> None:
        """Take a snapshot, as the sampler does."""
        await self.engine.sample()
        await self.settle()

    @staticmethod
    def said(node: Node) -> list[tuple[str, str]]:
        """What a node was told: (hold, uuid), or (hold, "") to let it go."""
        assert node.session is not None
        return [
            (message.assign.hold, message.assign.uuid)
            if message.HasField("assign")
            else (message.release.hold, "")
            for message in told(node.session)
        ]


async def test_no_more_than_16_are_asked_for_and_places_go_to_the_oldest() -> None:
    """Nothing before the first snapshot; a place takes the next job of its kind when its job has ended."""
    cluster = Cluster()
    node = cluster.node("n1")
    names = [f"j{number}" for number in range(20)]
    for name in names:
        cluster.engine.submit(name, "alice", SMALL)
    await cluster.settle()
    assert cluster.port.submitted == []
    await cluster.sample()
    assert cluster.port.submitted == names[:16]
    cluster.here(node, "7")
    assert cluster.said(node) == [("7", "j0")]
    assert cluster.engine.may_claim("j0", node, "7")
    assert not cluster.engine.may_claim("j0", node, "8")
    assert not cluster.engine.may_claim("j1", node, "7")
    cluster.engine.claimed("j0", "alice", node, SMALL, "7")
    await cluster.settle()
    # the place that was asked for j6 went to the oldest
    assert cluster.port.submitted == [*names[:16], "j6"]
    cluster.engine.cancel("j0")
    assert cluster.said(node) == [("7", "j1")]


async def test_what_is_not_needed_is_taken_back() -> None:
    """Of what waits in Slurm, the newest; a place that came is let go after a while without a job."""
    cluster = Cluster(warm_seconds=0)
    node = cluster.node("n1")
    await cluster.sample()
    for name in "abc":
        cluster.engine.submit(name, "alice", SMALL)
    await cluster.settle()
    cluster.engine.cancel("a")
    cluster.engine.cancel("b")
    await cluster.sample()
    assert cluster.port.cancelled == ["3", "2"]
    cluster.here(node, "1")
    assert cluster.said(node) == [("1", "c")]
    cluster.engine.cancel("c")
    await asyncio.sleep(0.01)
    assert cluster.said(node) == [("1", "")]


async def test_a_place_is_not_warm_for_ever() -> None:
    """An old one gets no more jobs, so that others of Slurm's users have a turn."""
    cluster = Cluster(hold_max_seconds=60)
    node = cluster.node("n1")
    cluster.engine.submit("a", "alice", SMALL)
    cluster.engine.hold_here(node, pb.Hold(id="1", shape=WORDS, age_seconds=61))
    await asyncio.sleep(0.01)
    assert cluster.said(node) == [("1", "")]


async def test_what_slurm_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it began: it is asked again, after a pause. With a job in it: the job is stopped."""
    monkeypatch.setattr("pjw.gateway.slurm.FIRST_PAUSE_SECONDS", 0.05)
    cluster = Cluster()
    node = cluster.node("n1")
    await cluster.sample()
    cluster.engine.submit("a", "alice", SMALL)
    cluster.engine.submit("b", "alice", SMALL)
    await cluster.settle()
    cluster.here(node, "1")
    cluster.engine.claimed("a", "alice", node, SMALL, "1")
    cluster.port.has[0]["state"] = "RUNNING"
    await cluster.sample()
    cluster.port.has.clear()
    await cluster.sample()
    # its node has the place
    assert cluster.revoked == []
    assert node.session is not None
    cluster.nodes.session_over(node, node.session)
    node.session = NodeSession(pb.Hello(node="n1", session="again"))
    await cluster.sample()
    assert cluster.revoked == ["a"]
    assert cluster.engine.why("b") == (
        "waits: Slurm gave no place, or one on a node without a pjwd of this gateway; n2 drained: bad disk"
    )
    assert cluster.port.submitted == ["a", "b"]
    await asyncio.sleep(0.1)
    assert cluster.port.submitted == ["a", "b", "b"]
    await cluster.sample()
    assert cluster.engine.why("b") == "waits: Slurm says Priority; n2 drained: bad disk"


async def test_a_gateway_that_is_new_finds_its_places() -> None:
    """In Slurm and on nodes: none is asked for twice, and one that had a job has it still."""
    cluster = Cluster()
    node = cluster.node("n1")
    cluster.port.has = [
        {"id": "5", "uuid": "a", "shape": WORDS, "state": "RUNNING", "reason": ""},
        {"id": "6", "uuid": "b", "shape": WORDS, "state": "PENDING", "reason": "Resources"},
    ]
    cluster.engine.claimed("a", "alice", node, SMALL, "5")
    cluster.engine.submit("b", "alice", SMALL)
    await cluster.sample()
    assert cluster.port.submitted == []
    assert cluster.engine.why("b").startswith("waits: Slurm says Resources")
    cluster.here(node, "5", "a")
    assert cluster.said(node) == []
    cluster.engine.cancel("a")
    assert cluster.said(node) == [("5", "b")]


async def test_a_node_that_goes_takes_its_places_along() -> None:
    """What was only assigned waits again, before others; the places are told of again when it is back."""
    cluster = Cluster()
    node = cluster.node("n1")
    assert node.session is not None
    cluster.engine.submit("a", "alice", SMALL)
    cluster.here(node, "1")
    cluster.engine.submit("b", "alice", SMALL)
    cluster.nodes.session_over(node, node.session)
    assert not cluster.engine.may_claim("a", node, "1")
    node.session = NodeSession(pb.Hello(node="n1", session="again"))
    cluster.here(node, "1", "a")
    assert cluster.said(node) == [("1", "a")]


async def test_a_place_that_ends_before_its_job_was_claimed() -> None:
    """The job waits again. A place that another node has already is refused."""
    cluster = Cluster()
    first, second = cluster.node("n1"), cluster.node("n2")
    cluster.engine.submit("a", "alice", SMALL)
    cluster.here(first, "1")
    cluster.here(second, "1")
    assert cluster.said(second) == [("1", "")]
    cluster.engine.hold_gone(second, "1")
    assert cluster.engine.may_claim("a", first, "1")
    cluster.engine.hold_gone(first, "1")
    assert not cluster.engine.may_claim("a", first, "1")
    cluster.here(second, "2")
    assert cluster.said(second) == [("2", "a")]


async def test_a_client_has_no_more_jobs_on_nodes_than_it_may() -> None:
    """And Slurm is asked for no more places."""
    cluster = Cluster(running_max=1)
    await cluster.sample()
    for uuid, client in (("a", "alice"), ("b", "alice"), ("c", "bob")):
        cluster.engine.submit(uuid, client, SMALL)
    await cluster.settle()
    assert cluster.port.submitted == ["a", "c"]


async def test_why_slurm_does_not_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """In its words, and it is tried again."""
    monkeypatch.setattr("pjw.gateway.slurm.FIRST_PAUSE_SECONDS", 0.05)
    cluster = Cluster()
    await cluster.sample()
    cluster.port.refusal = "sbatch: Batch job submission failed: Invalid account"
    cluster.engine.submit("a", "alice", SMALL)
    await cluster.settle()
    assert "Slurm does not take it: sbatch: Batch job submission failed: Invalid account" in (
        cluster.engine.why("a")
    )
    # which holds up no job of another kind
    cluster.port.refusal = ""
    cluster.engine.submit("b", "alice", SMALL._replace(constraint="fast"))
    cluster.engine.submit("c", "alice", SMALL)
    await cluster.settle()
    assert cluster.port.submitted == ["b"]
    await asyncio.sleep(0.1)
    assert cluster.port.submitted == ["b", "a", "c"]
    assert "does not take it" not in cluster.engine.why("a")


async def test_what_a_job_may_name() -> None:
    """What the operator allows, and nothing by default."""
    engine = Cluster(partitions=("debug", "gpu*"), constraints=("fast",)).engine
    for allowed in (
        JobSpec("true", partition="debug"),
        JobSpec("true", partition="gpu-2", constraint="fast"),
    ):
        engine.check(allowed)
    for refused, what in (
        (JobSpec("true", partition="long"), "partition long"),
        (JobSpec("true", partition="debugger"), "partition debugger"),
        (JobSpec("true", constraint="fast2"), "constraint fast2"),
    ):
        with pytest.raises(NotAllowedError, match=f"no job may name the {what}") as caught:
            engine.check(refused)
        assert str(caught.value.hint).startswith("the operator can allow it with gateway.slurm.")
    with pytest.raises(NotAllowedError):
        Cluster().engine.check(JobSpec("true", partition="debug"))
    for bad in ("a,b", "a&b", "a b", "x" * 61, "*"):
        with pytest.raises(InvalidJobError, match="is no partition: up to 60"):
            JobSpec("true", partition=bad)
        with pytest.raises(InvalidJobError, match="is no constraint: up to 60"):
            JobSpec("true", constraint=bad)


async def test_a_warm_place_is_for_jobs_of_its_partition_and_feature() -> None:
    """And for no others."""
    cluster = Cluster()
    node = cluster.node("n1")
    await cluster.sample()
    special = SMALL._replace(partition="debug", constraint="fast")
    cluster.engine.hold_here(node, pb.Hold(id="1", shape="1:528:0:debug::fast"))
    for uuid, shape in (("a", SMALL), ("b", SMALL._replace(partition="debug")), ("c", special)):
        cluster.engine.submit(uuid, "alice", shape)
    await cluster.settle()
    assert cluster.said(node) == [("1", "c")]
    assert cluster.port.submitted == ["a", "b"]


async def test_what_kind_a_job_is_of() -> None:
    """Rounded up, and with time for the jobs that its place may take later; 0 is left to Slurm."""
    cluster = Cluster(hold_max_seconds=600, partition="long", account="physics")
    await cluster.sample()
    for shape, kind in (
        (Shape(1500, 100 * 1024**2, 90), Kind(2, 116, 13, "long", "physics")),
        (Shape(0, 0), Kind(0, 0, 0, "long", "physics")),
        (Shape(0, 0, partition="debug", constraint="fast"), Kind(0, 0, 0, "debug", "physics", "fast")),
    ):
        cluster.engine.submit(str(kind), "alice", shape)
        await cluster.settle()
        assert cluster.port.has[-1]["shape"] == kind.words


def test_kinds_and_their_words() -> None:
    """Back and forth; what is no kind is none."""
    kind = Kind(2, 528, 61, "long", "physics-2")
    assert kind_of(kind.words) == kind
    # as a gateway that knew no constraint has written it
    assert kind.words == "2:528:61:long:physics-2"
    fast = kind._replace(constraint="fast")
    assert fast.words == "2:528:61:long:physics-2:fast"
    assert kind_of(fast.words) == fast
    for words in ("", "1:2", "a:b:c::", "1:2:3::;rm", "1:2:3:: ", "-1:2:3::", "1:2:3:::", "1:2:3:::a|b"):
        assert kind_of(words) is None, words


# --- Slurm's programs


def program(directory: Path, name: str, script: str) -> None:
    """Have Slurm's program of this name do this."""
    path = directory / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def commands(directory: Path) -> Commands:
    """Those that a test has made."""
    return Commands(str(directory), "/slurm.conf", "", "/opt/it's/pjw-hold", "/run/hold.sock")


async def test_how_a_place_is_asked_for(tmp_path: Path) -> None:
    """The uuid and the size go to Slurm, from an environment that has nothing of ours."""
    program(
        tmp_path,
        "sbatch",
        f'echo "$*" >{tmp_path}/said; env >>{tmp_path}/said; cat >{tmp_path}/in; echo "12;c"',
    )
    made = await commands(tmp_path).submit(
        UUID, "2:528:0:long::fast", 2, 528, 0, ["n1", "n2"], "long", "fast"
    )
    assert made == "12"
    said = (tmp_path / "said").read_text()
    assert f"--job-name=pjw-{UUID} --comment=2:528:0:long::fast --cpus-per-task=2 --mem=528M" in said
    assert "--partition=long --constraint=fast --exclude=n1,n2" in said
    assert "--time" not in said and "--account" not in said
    names = {line.partition("=")[0] for line in said.splitlines()[1:]}
    assert names <= {"PATH", "LC_ALL", "HOME", "SLURM_CONF", "PWD", "_", "SHLVL", "OLDPWD"}
    assert (tmp_path / "in").read_text() == (
        f"#!/bin/sh\nexec '/opt/it'\\''s/pjw-hold' '/run/hold.sock' 2:528:0:long::fast {UUID}\n"
    )
    for bad in (
        {"uuid": "x; rm -rf /"},
        {"shape": "a b"},
        {"exclude": ["n1,n2 --wrap"]},
        {"partition": "long,short"},
        {"constraint": "fast|slow"},
    ):
        given: dict[str, Any] = {
            "uuid": UUID,
            "shape": "1",
            "cpus": 1,
            "megabytes": 1,
            "minutes": 1,
            "exclude": [],
            "partition": "",
            "constraint": "",
        }
        with pytest.raises(SlurmError):
            await commands(tmp_path).submit(**{**given, **bad})


async def test_what_slurm_says_of_jobs_and_nodes(tmp_path: Path) -> None:
    """Strictly; jobs of our user that are not of this program are passed over."""
    lines = [
        f"7\\037pjw-{UUID}\\037PENDING\\0371:528:0::\\037(Nodes required for job are DOWN, DRAINED)",
        f"8\\037pjw-{UUID}\\037RUNNING\\0371:528:0::\\037n1",
        "9\\037interactive\\037RUNNING\\037(null)\\037n1",
    ]
    printed = "\\n".join(lines)
    program(tmp_path, "squeue", f"printf '{printed}\\n'")
    program(tmp_path, "sinfo", r"printf 'n1\037idle*\037none\nn2\037drained\037bad disk\n'")
    found = await commands(tmp_path).jobs()
    assert [(each["id"], each["state"], each["reason"]) for each in found] == [
        ("7", "PENDING", "Nodes required for job are DOWN, DRAINED"),
        ("8", "RUNNING", ""),
    ]
    assert await commands(tmp_path).nodes() == {"n1": ("idle", ""), "n2": ("drained", "bad disk")}
    program(tmp_path, "sinfo", "echo something else")
    with pytest.raises(SlurmError, match="sinfo printed a line that pjw does not understand"):
        await commands(tmp_path).nodes()


async def test_which_of_slurm_s_words_are_told(tmp_path: Path) -> None:
    """One line; a program that is missing, and one that hangs."""
    program(
        tmp_path,
        "scancel",
        "echo 'scancel: error: If munged is up, restart with --num-threads=10' >&2;"
        " echo 'scancel: error: Munge encode failed: Failed to access socket' >&2;"
        " echo 'slurm_load_jobs error: Protocol authentication error' >&2; exit 1",
    )
    with pytest.raises(SlurmError) as caught:
        await commands(tmp_path).cancel(["1"])
    assert str(caught.value) == "scancel: Munge encode failed: Failed to access socket"
    with pytest.raises(SlurmError, match=r"cannot execute .*/squeue: No such file or directory"):
        await commands(tmp_path).jobs()


async def test_a_program_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the others have their turn."""
    monkeypatch.setattr("pjw.slurm.programs.ANSWER_SECONDS", 0.2)
    program(tmp_path, "squeue", "exec sleep 300")
    with pytest.raises(SlurmError, match=r"squeue did not answer for 0\.2 s"):
        await commands(tmp_path).jobs()


async def test_what_slurm_never_takes_holds_up_no_other_kind() -> None:
    """A client may ask for more than any node of Slurm's has: the jobs of others are submitted at once."""
    cluster = Cluster()
    await cluster.sample()
    cluster.port.refusal = "sbatch: Memory specification can not be satisfied"
    cluster.engine.submit("huge", "mallory", Shape(1000, 2**60))
    await cluster.settle()
    cluster.port.refusal = ""
    cluster.engine.submit("small", "alice", SMALL)
    cluster.engine.submit("more", "mallory", Shape(1000, 2**60))
    await cluster.settle()
    assert cluster.port.submitted == ["small"]
    assert cluster.engine.why("more").startswith("waits: Slurm does not take it: sbatch: Memory")
    assert cluster.engine.why("small") == "waits: Slurm was asked for a place; n2 drained: bad disk"


async def test_a_job_that_is_cancelled_while_sbatch_runs_leaves_nothing_in_slurm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Though nothing else is there: the sampler sees what came of it, and takes it back."""
    monkeypatch.setattr("pjw.gateway.slurm.SAMPLE_SECONDS", 0.01)
    cluster = Cluster()
    sampler = asyncio.ensure_future(cluster.engine.run())
    await cluster.settle()
    cluster.port.answers.clear()
    cluster.engine.submit("a", "alice", SMALL)
    await cluster.settle()
    cluster.engine.cancel("a")
    # the sampler has nothing to see, and rests
    snapshots = -1
    while snapshots != cluster.port.snapshots:
        snapshots = cluster.port.snapshots
        await asyncio.sleep(0.05)
    assert cluster.port.submitted == ["a"]
    cluster.port.answers.set()
    async with asyncio.timeout(10):
        while cluster.port.cancelled != ["1"]:
            await asyncio.sleep(0.01)
    sampler.cancel()


async def test_jobs_for_a_node_that_is_away_hold_up_no_others_of_their_kind() -> None:
    """Nor do those that need what no free node has: each has a window of its own."""
    cluster = Cluster()
    await cluster.sample()
    elsewhere = SMALL._replace(node="n9")
    for number in range(SUBMITTED_AT_ONCE):
        cluster.engine.submit(f"j{number}", "mallory", elsewhere)
    await cluster.settle()
    assert len(cluster.port.submitted) == SUBMITTED_AT_ONCE
    assert not cluster.engine.has_room(elsewhere)
    assert cluster.engine.has_room(SMALL)
    cluster.engine.submit("other", "alice", SMALL)
    await cluster.settle()
    assert cluster.port.submitted[-1] == "other"
    await cluster.sample()
    assert cluster.port.cancelled == []
