"""A gateway and a node of different versions: the first commit that had them, and this one.

tests/data/earlier-cluster-commit names that commit. Raise it when a release no longer works with it.
"""

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from pjw.cluster.v1 import cluster_pb2 as cpb
from pjw.errors import JobStateError
from pjw.gateway.skew import require_method, require_no_newer
from tests.support.cluster import Cluster
from tests.support.service import BIN, CALL_SECONDS, wait_for

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def earlier() -> Path:
    """pjwd of the earlier commit, with the libraries of this one."""
    commit = (ROOT / "tests/data/earlier-cluster-commit").read_text().strip()
    done = subprocess.run(
        ["scripts/install-revision", commit], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return ROOT / "build/revisions" / commit / "bin/pjwd"


@pytest.fixture(scope="module", params=["node", "gateway"])
def skewed(request: pytest.FixtureRequest, earlier: Path) -> Iterator[Cluster]:
    """A gateway and a node, one of the two of the earlier commit."""
    newest = BIN / "pjwd"
    made = Cluster(
        Path(tempfile.mkdtemp(prefix="pjw-test-", dir="/var/lib")),
        nodes=1,
        gateway_pjwd=earlier if request.param == "gateway" else newest,
        node_pjwd=earlier if request.param == "node" else newest,
    )
    with ExitStack() as stack:
        stack.callback(made.close)
        yield made


def test_jobs_run_and_survive_a_kill(skewed: Cluster) -> None:
    """Start, follow, stop, usage and removal; a job outlives the gateway, and its end is told later."""
    gateway = skewed.gateway
    with gateway.client() as client:
        done = client.run(["sh", "-c", "echo out; echo err >&2; exit 7"])
        assert (done.output, done.job.node) == (b"out\nerr\n", "n1")
        stopped = client.start("echo begun; sleep 300")
        wait_for(lambda: client.get(stopped.id).state == "running")
        assert client.usage_history(stopped.id).job.id == stopped.id
        ending = client.start("sleep 1; echo late")
        wait_for(lambda: client.get(ending.id).state == "running")
    assert gateway.process is not None
    gateway.process.kill()
    gateway.process.wait()
    gateway.start()
    with gateway.client() as client:
        assert client.wait(ending.id).exit_status is not None
        assert b"".join(client.logs(ending.id)) == b"late\n"
        assert client.stop(stopped.id, grace=0).reason == "stopped"
        assert b"".join(client.logs(stopped.id)) == b"begun\n"
        client.delete(ending.id)
    with skewed.operator() as stub:
        [node] = stub.ListNodes(cpb.ListNodesRequest(), timeout=CALL_SECONDS).nodes
    assert node.version


def test_which_versions_a_gateway_takes() -> None:
    """Older ones, and other patches of its own minor version; a newer minor version is refused in words."""
    for theirs in ("1.2.3", "1.2.9", "1.1.0", "0.9", "", "unknown"):
        require_no_newer(cpb.Hello(node="n1", version=theirs), "1.2.3")
    for theirs in ("1.3.0", "2.0.0", "1.10.0.dev1"):
        with pytest.raises(
            JobStateError, match=f"node n1 has version {theirs}, and its gateway has 1.2.3"
        ) as caught:
            require_no_newer(cpb.Hello(node="n1", version=theirs), "1.2.3")
        assert caught.value.hint == "upgrade the gateway first, then its nodes"


def test_what_an_older_node_does_not_know_is_refused_in_words() -> None:
    """With the node's version; one that says nothing has what the first nodes had."""
    require_method("n1", cpb.Hello(version="0.1.0"), "Logs")
    require_method("n1", cpb.Hello(version="0.2.0", methods=["Logs", "Exec"]), "Exec")
    with pytest.raises(JobStateError, match="which does not know Exec of a gateway"):
        require_method("n1", cpb.Hello(version="0.1.0"), "Exec")
