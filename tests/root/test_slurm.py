"""A gateway whose places a real Slurm gives: what it takes back, what it forgets, and what dies meanwhile."""

import json
import signal
import time
from collections.abc import Iterator

import pytest

from pjw.v1 import job_worker_pb2 as pb
from tests.cluster import Cluster
from tests.service import CALL_SECONDS, wait_for
from tests.slurm_cluster import SlurmCluster, await_no_places, slurm_cluster


@pytest.fixture(scope="module")
def made() -> Iterator[SlurmCluster]:
    """One Slurm, one gateway and two nodes for all tests here."""
    with slurm_cluster() as made:
        yield made


@pytest.fixture
def two(made: SlurmCluster) -> Iterator[SlurmCluster]:
    """The same, whole again after each test."""
    yield made
    made.idle()


def test_getting_started_through_slurm(two: SlurmCluster) -> None:
    """The session of the seed's first page; Slurm learns no command, and no name but a uuid."""
    gateway = two.gateway
    ids = [
        gateway.ok("start", command).strip()
        for command in ('echo "hello world"', "sleep 300", "trap 'exit 0' TERM; echo ready; sleep 300 & wait")
    ]
    assert ids == ["1", "2", "3"]
    done = json.loads(gateway.ok("wait", "--format", "jsonl", "1"))
    assert (done["exitCode"], done["state"], done["reason"]) == (0, "exited", "completed")
    assert done["node"] in two.nodes
    assert gateway.ok("logs", "1") == "hello world\n"
    with gateway.popen("logs", "3") as logs:
        assert logs.stdout is not None
        assert logs.stdout.readline() == b"ready\n"
        held = two.slurm.ok("squeue", "--noheader", "--format=%j %k %u %T %o")
        stopped = gateway.ok("stop", "3")
        assert (logs.stdout.read(), logs.wait(10)) == (b"", 0)
    assert '"exitCode": 0,' in stopped
    assert '"reason": "stopped"' in gateway.ok("stop", "2")
    assert "sleep" not in held and "hello" not in held
    assert {line.split()[2] for line in held.splitlines()} == {"daemon"}
    assert {line.split()[1] for line in held.splitlines()} == {"1:528:0::"}
    await_no_places(two)
