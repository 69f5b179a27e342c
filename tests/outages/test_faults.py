"""The table of faults in docs/cluster.md, each during a live follow: what is told, and how long a gap is."""

import json
import signal
import time
from collections.abc import Callable
from typing import Final

import pytest

from pjw.v1 import job_worker_pb2 as pb
from tests.outages.cluster import MachineCluster, NodeOnMachine
from tests.outages.conftest import Measured
from tests.outages.follow import COUNT, Follow, numbered
from tests.outages.slurm import SlurmMachineCluster
from tests.outages.tables import assert_none_ran_twice, rows_of
from tests.support.cluster import LOST_AFTER_SECONDS
from tests.support.service import Service, wait_for

SHORT_SECONDS: Final = 3.0
LINES: Final = 10


def kill_gateway(cluster: MachineCluster, _: NodeOnMachine) -> None:
    """It starts again at once."""
    cluster.gateway.stop(signal.SIGKILL)
    cluster.gateway.start()


def kill(what: str) -> Callable[[MachineCluster, NodeOnMachine], None]:
    """kill -9 of a node's processes; pjwd starts again at once."""

    def cause(_: MachineCluster, node: NodeOnMachine) -> None:
        node.kill(what)
        node.start()

    return cause


def pulled(_: MachineCluster, node: NodeOnMachine) -> None:
    """A node has no link for a while."""
    node.machine.pull()
    time.sleep(SHORT_SECONDS)
    node.machine.plug()


def muted(_: MachineCluster, node: NodeOnMachine) -> None:
    """Nothing comes through to a node for a while."""
    node.machine.mute()
    time.sleep(SHORT_SECONDS)
    node.machine.unmute()


def gateway_pulled(cluster: MachineCluster, _: NodeOnMachine) -> None:
    """The gateway has no link for a while."""
    cluster.gateway.machine.pull()
    time.sleep(SHORT_SECONDS)
    cluster.gateway.machine.plug()


def gateway_power(cluster: MachineCluster, _: NodeOnMachine) -> None:
    """The gateway's machine boots again."""
    cluster.gateway.cut_power()
    cluster.whole()


def kill_slurmd(cluster: MachineCluster, node: NodeOnMachine) -> None:
    """kill -9 of a node's slurmd, which starts again."""
    assert isinstance(cluster, SlurmMachineCluster)
    cluster.kill_slurm(f"slurmd-{node.name}")
    cluster.whole()


SURVIVED: Final[dict[str, Callable[[MachineCluster, NodeOnMachine], None]]] = {
    "kill -9 of the gateway, which starts again": kill_gateway,
    "no power for the gateway's machine, which boots again": gateway_power,
    "kill -9 of a node's server": kill("server"),
    "kill -9 of a node's launcher": kill("launcher"),
    "kill -9 of both": kill("both"),
    f"a node's link is down for {SHORT_SECONDS:g} s": pulled,
    f"the switch drops a node's packets for {SHORT_SECONDS:g} s": muted,
    "kill -9 of a node's slurmd": kill_slurmd,
    f"the gateway's link is down for {SHORT_SECONDS:g} s": gateway_pulled,
}


# in which an engine may have a part; the others are made with the pool alone
OF_SLURM: Final = ("kill -9 of a node's slurmd",)
WITH_SLURM: Final = (
    *OF_SLURM,
    "kill -9 of the gateway, which starts again",
    "kill -9 of both",
    f"a node's link is down for {SHORT_SECONDS:g} s",
    "a node's link is down for longer",
    "a node has no power",
)


@pytest.fixture
def fault(request: pytest.FixtureRequest, made: MachineCluster) -> str:
    """A fault that this engine is to stand."""
    name = str(request.param)
    if name not in WITH_SLURM if made.engine == "slurm" else name in OF_SLURM:
        pytest.skip("made with the other engine")
    return name


@pytest.mark.parametrize("fault", SURVIVED, indirect=True)
def test_what_a_follow_survives(cluster: MachineCluster, measured: Measured, fault: str) -> None:
    """The job goes on, and its follower has every byte once, in its order."""
    gateway = cluster.gateway
    job_id = gateway.start_job(COUNT)
    node = cluster.node_of(job_id)
    follow = Follow(gateway, job_id)
    follow.await_lines(LINES)
    SURVIVED[fault](cluster, node)
    # what was written meanwhile came first
    follow.await_lines(LINES)
    gateway.ok("stop", str(job_id))
    assert follow.end() == (0, "")
    assert numbered(follow.data)
    assert follow.data.endswith(b"\nend\n")
    done = gateway.job(job_id)
    assert (done.exit_code, done.output_bytes, done.node) == (0, len(follow.data), node.name)
    assert_none_ran_twice(cluster)
    measured(fault, f"{cluster.engine}: whole", gap=follow.gap)


def test_slurmctld_is_killed(cluster: MachineCluster, measured: Measured) -> None:
    """The next one goes on with what it has saved; a place that it does not know is taken back, and told."""
    if not isinstance(cluster, SlurmMachineCluster):
        pytest.skip("made with the other engine")
    gateway = cluster.gateway
    job_id = gateway.start_job(COUNT)
    cluster.node_of(job_id)
    follow = Follow(gateway, job_id)
    follow.await_lines(LINES)
    cluster.kill_slurm("slurmctld")
    cluster.whole()
    gateway.ok("stop", str(job_id))
    assert follow.end() == (0, "")
    assert numbered(follow.data)
    assert follow.data.endswith(b"\nend\n")
    reason = gateway.job(job_id).reason
    assert reason in (pb.END_REASON_STOPPED, pb.END_REASON_REVOKED)
    assert_none_ran_twice(cluster)
    then = "the job is revoked" if reason == pb.END_REASON_REVOKED else "the job goes on"
    measured("kill -9 of slurmctld", f"slurm: whole; {then}", gap=follow.gap)


# of a copy that lived on, "stopped" by its fence
LATE_ENDS: Final = {"a node has no power": "END_REASON_HOST_RESTARTED"}
LOST: Final[dict[str, Callable[[NodeOnMachine], None]]] = {
    "a node's link is down for longer": lambda node: node.machine.pull(),
    "the switch drops a node's packets for longer": lambda node: node.machine.mute(),
    "a node has no power": lambda node: node.cut_power(),
}


@pytest.mark.parametrize("fault", LOST, indirect=True)
def test_what_a_node_is_lost_by(cluster: MachineCluster, measured: Measured, fault: str) -> None:
    """Its job is told lost, with the number of the byte; nothing happens to the job of another node."""
    gateway = cluster.gateway
    # each takes most of a node
    lost, other = (int(gateway.ok("start", "--cpus", "2", COUNT)) for _ in range(2))
    node = cluster.node_of(lost)
    assert cluster.node_of(other) is not node
    follow, beside = Follow(gateway, lost), Follow(gateway, other)
    for each in (follow, beside):
        each.await_lines(LINES)
    began = time.monotonic()
    LOST[fault](node)
    code, said = follow.end()
    told = time.monotonic() - began
    place = len(follow.data)
    assert f"the output of job {lost} ends here, at byte {place}: node {node.name} is lost" in said
    assert (code, numbered(follow.data)) == (1, True)
    assert LOST_AFTER_SECONDS - 1 < told < LOST_AFTER_SECONDS + 3
    assert _end_of(gateway.job(lost)) == (pb.JOB_STATE_LOST, pb.END_REASON_NODE_LOST)
    assert cluster.states()[node.name] == "lost"

    cluster.whole()
    # a copy that lived on is ended, and the gateway has kept how; what it wrote can be read
    wait_for(lambda: late_end_of(cluster, lost))
    wait_for(lambda: not node.job_cgroups())
    kept = follow_to_end(gateway, lost)
    assert kept.startswith(follow.data)
    assert numbered(kept)
    assert _end_of(gateway.job(lost)) == (pb.JOB_STATE_LOST, pb.END_REASON_NODE_LOST)
    assert json.loads(late_end_of(cluster, lost))["reason"] == LATE_ENDS.get(fault, "END_REASON_STOPPED")

    beside.await_lines(LINES)
    gateway.ok("stop", str(other))
    assert beside.end() == (0, "")
    assert numbered(beside.data)
    assert beside.gap < 2
    assert_none_ran_twice(cluster)
    measured(fault, f"{cluster.engine}: its place is told", told=told, gap=told)


def follow_to_end(gateway: Service, job_id: int) -> bytes:
    """All output of a job that has ended."""
    return gateway.pjw("logs", str(job_id)).stdout


def _end_of(job: pb.Job) -> tuple[int, int]:
    return job.state, job.reason


def late_end_of(cluster: MachineCluster, job_id: int) -> str:
    """How the copy of a lost job has ended, as the gateway keeps it; empty when it has not heard of that."""
    [(text,)] = rows_of(cluster.gateway.state, f"SELECT late_end FROM placements WHERE job_id = {job_id:d}")  # noqa: S608
    return str(text)
