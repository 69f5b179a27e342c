"""A gateway that is killed while a thousand jobs run."""

import signal
import time
from typing import Final

from pjw import JobSpec
from tests.outages.cluster import MachineCluster, machine_cluster
from tests.outages.conftest import Measured
from tests.outages.follow import COUNT, Follow, numbered
from tests.outages.network import Switch
from tests.outages.tables import assert_none_ran_twice, rows_of

JOBS: Final = 1000
# with what a job takes by its limits, so many fit on three nodes
LIMITS: Final = {"cpu_max_millicores": 10, "memory_max_bytes": 16 * 1024**2}


class Roomy(MachineCluster):
    """Nodes that take hundreds of small jobs."""

    cpu_max_millicores = 20_000


def running(cluster: MachineCluster) -> int:
    """How many jobs the gateway says are running."""
    with cluster.gateway.client("ann", all_clients=True) as client:
        return sum(1 for _ in client.list(states=["running"]))


def test_a_thousand_jobs(switch: Switch, measured: Measured) -> None:
    """They go on, and so does a follower; the next gateway knows them all, and no node starts one again."""
    del switch
    with machine_cluster(Roomy) as cluster:
        gateway = cluster.gateway
        with gateway.client() as client:
            for _ in range(2):
                client.submit([JobSpec(["sleep", "600"], limits=LIMITS)] * (JOBS // 2))
        written = gateway.start_job(COUNT, client="bob")
        follow = Follow(gateway, written, client="bob")
        begun: set[int] = set()
        with gateway.client("ann", all_clients=True) as client:
            for change in client.watch_jobs():
                if change.job.state == "running":
                    begun.add(change.job.id)
                if len(begun) == JOBS + 1:
                    break
        follow.await_lines(10)
        assert running(cluster) == JOBS + 1
        gateway.stop(signal.SIGKILL)
        began = time.monotonic()
        gateway.start()
        cluster.await_nodes(dict.fromkeys(cluster.nodes, "up"))
        up = time.monotonic() - began
        follow.await_lines(10)
        assert running(cluster) == JOBS + 1
        gateway.ok("stop", str(written), client="bob")
        assert follow.end() == (0, "")
        assert numbered(follow.data)
        assert_none_ran_twice(cluster)
        assert (
            sum(len(rows_of(node.state, "SELECT id FROM jobs")) for node in cluster.nodes.values())
            == JOBS + 1
        )
        measured(
            f"kill -9 of the gateway with {JOBS:,} running jobs",
            f"whole; all nodes back after {up:.1f} s",
            gap=follow.gap,
        )
        # the quickest end for all of them
        for node in cluster.nodes.values():
            node.cut_power()
