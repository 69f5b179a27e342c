"""A gateway and nodes of an earlier commit, with running jobs and a live reader, are upgraded in place.

tests/data/upgraded-cluster-commit names that commit: the last one whose clusters people may run.
"""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pjw.v1 import job_worker_pb2 as pb
from tests.support.cluster import Cluster, cluster
from tests.support.service import BIN, CALL_SECONDS, Running, wait_for

ROOT = Path(__file__).parents[2]
# each number on a line, until somebody stops it
COUNT = "trap 'exit 7' TERM; n=0; while :; do n=$((n+1)); echo $n; sleep 0.02; done"


@pytest.fixture(scope="module")
def earlier() -> Path:
    """pjwd of the earlier commit, with the libraries of this one."""
    commit = (ROOT / "tests/data/upgraded-cluster-commit").read_text().strip()
    done = subprocess.run(
        ["scripts/install-revision", commit], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return ROOT / "build/revisions" / commit / "bin/pjwd"


@pytest.fixture
def upgraded(earlier: Path) -> Iterator[Cluster]:
    """A cluster that began on the earlier commit; the next start of each part is of this one."""
    with cluster(gateway_pjwd=earlier, node_pjwd=earlier) as made:
        for service in (made.gateway, *made.nodes.values()):
            service.pjwd = BIN / "pjwd"
        yield made


def numbers(logs: Running, count: int) -> list[int]:
    """So many further lines of the reader."""
    assert logs.stdout is not None
    return [int(logs.stdout.readline()) for _ in range(count)]


def test_the_gateway_first_and_then_one_node_after_the_other(upgraded: Cluster) -> None:
    """Jobs go on, the reader misses no line, what waits gets its turn, and ends meanwhile are told."""
    gateway = upgraded.gateway
    followed, other = (int(gateway.ok("start", "--cpus", "2", COUNT)) for _ in range(2))
    names = {upgraded.node_of(each).name for each in (followed, other)}
    assert names == {"n1", "n2"}
    waiting = int(gateway.ok("start", "--cpus", "2", "echo waited"))
    ending = int(gateway.ok("start", "--cpus", "0.5", "sleep 2; echo done; exit 3"))
    upgraded.node_of(ending)
    with gateway.popen("logs", str(followed)) as logs:
        seen = numbers(logs, 20)
        gateway.stop()
        gateway.start()
        seen += numbers(logs, 50)
        for name, node in upgraded.nodes.items():
            node.stop()
            node.start()
            upgraded.await_nodes({name: "up"})
            seen += numbers(logs, 50)
        # what was running before obeys what came after
        with gateway.stub() as stub:
            ended = stub.Stop(pb.StopRequest(id=followed), timeout=CALL_SECONDS).job
        assert (ended.reason, ended.exit_code) == (pb.END_REASON_STOPPED, 7)
        assert logs.stdout is not None
        # the shell says at its end what became of its last child
        seen += [int(line) for line in logs.stdout.read().split() if line.isdigit()]
        assert logs.wait(CALL_SECONDS) == 0
    assert seen == list(range(1, len(seen) + 1))
    done = json.loads(gateway.ok("wait", "--format", "jsonl", str(waiting)))
    assert (done["exitCode"], gateway.ok("logs", str(waiting))) == (0, "waited\n")
    wait_for(lambda: gateway.job(ending).HasField("end"))
    assert (gateway.job(ending).exit_code, gateway.ok("logs", str(ending))) == (3, "done\n")
    assert gateway.job(other).state == pb.JOB_STATE_RUNNING
    assert gateway.job(other).node in names
    # and what only this version knows
    assert gateway.refused("nodes", "rm", "n1", client="ann")[1].startswith(
        "pjw: error: cannot remove node n1: it is connected\n"
    )
