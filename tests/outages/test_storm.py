"""Random faults of everything while forty clients start and follow jobs."""

import os
import random
from collections import Counter
from typing import Final

import pytest

from tests.outages.cluster import MachineCluster, machine_cluster
from tests.outages.network import Switch
from tests.outages.storm import Storm
from tests.outages.tables import assert_none_ran_twice

SECONDS: Final = float(os.environ.get("STORM_SECONDS") or 40)
CLIENTS: Final = [f"c{number}" for number in range(1, 41)]


class Busy(MachineCluster):
    """A cluster with forty clients."""

    clients = (*MachineCluster.clients, *CLIENTS)
    # no fault that is not meant to be longer is, even on a busy machine
    lost_after_seconds = 15.0


@pytest.mark.timeout(300 + SECONDS)
def test_a_storm(switch: Switch, capsys: pytest.CaptureFixture[str]) -> None:
    """None ran twice or is forgotten, or is LOST without its node; each byte is there or its loss is told."""
    del switch
    seed = os.environ.get("STORM_SEED") or str(random.randrange(10**6))
    with capsys.disabled():
        print(f"\nstorm: STORM_SECONDS={SECONDS:g} STORM_SEED={seed}", flush=True)
    with machine_cluster(Busy) as cluster:
        storm = Storm(cluster, seed, CLIENTS)
        storm.run(SECONDS)
        storm.check()
        results = [result for each in storm.results.values() for result in each]
        ends = Counter(str(result.job.reason) for result in results)
        with capsys.disabled():
            print(f"storm: {len(results)} jobs: {dict(ends)}; faults: {dict(storm.faults)}", flush=True)
        assert not storm.findings, f"STORM_SEED={seed}:\n" + "\n".join(storm.findings)
        assert_none_ran_twice(cluster)
