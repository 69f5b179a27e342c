"""A cluster on machines whose engine is a real Slurm: slurmctld on the gateway's, slurmd on each node's."""

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Final

from pjw.node import holds
from tests.outages.cluster import NODES, MachineCluster, NodeOnMachine, number_of
from tests.outages.network import children
from tests.support.cluster import NodeService
from tests.support.service import CALL_SECONDS, wait_for
from tests.support.slurm import USER, Slurm, SlurmNode
from tests.support.slurm_cluster import WARM_SECONDS

_THERE: Final = ("idle", "mixed", "allocated", "completing")


class SlurmMachineCluster(MachineCluster):
    """A gateway, nodes, and the Slurm that gives their places. All machines share one munged."""

    engine = "slurm"
    slurm: Slurm

    def change_gateway(self, config: str) -> str:
        """Start the controller, and have the gateway ask it for places."""
        machine = self.gateway.machine
        address, prefix = machine.address, machine.enter
        there = address.rpartition(".")[0]
        nodes = [SlurmNode(name, f"{there}.{number_of(name)}") for name in NODES]
        self.slurm = Slurm(nodes, address=address, prefix=prefix)
        # where every user finds it
        hold = self.slurm.directory / "pjw-hold"
        shutil.copyfile(Path(holds.__file__).with_name("pjw-hold"), hold)
        hold.chmod(0o755)
        self.slurm.start_munge()
        self.slurm.start_controller()
        return (
            f'user = "{USER}"\n{config}[gateway.slurm]\nbin = "{self.slurm.bin}"\n'
            f'conf = "{self.slurm.conf}"\nhold = "{hold}"\nwarm_seconds = {WARM_SECONDS}\n'
        )

    def prepare(self, node: NodeService) -> None:
        """Start the slurmd of a node, and have the node take Slurm's places."""
        assert node.config is not None
        assert isinstance(node, NodeOnMachine)
        node.config = node.config.replace("[cluster]\n", f'[cluster]\nhold_user = "{USER}"\n')
        self._start_slurmd(node)

    def _start_slurmd(self, node: NodeOnMachine) -> None:
        known = self.slurm.nodes[node.name]
        self.slurm.nodes[node.name] = replace(known, prefix=node.machine.enter)
        self.slurm.start_node(node.name)

    def kill_slurm(self, what: str) -> None:
        """kill -9 of "slurmctld" or "slurmd-NODE"; `whole` starts it again."""
        process = self.slurm.running[what]
        [pid] = children(process.pid)
        os.kill(pid, signal.SIGKILL)
        process.wait(CALL_SECONDS)

    def whole(self) -> None:
        """Have Slurm on each machine again, too."""
        self.boot()
        self.slurm.prefix = self.gateway.machine.enter
        if not self.slurm.is_running("slurmctld"):
            self.slurm.start_controller()
        for name, node in self.nodes.items():
            if not self.slurm.is_running(f"slurmd-{name}"):
                self._start_slurmd(node)
        super().whole()
        # "mixed" with jobs, and "completing" for a moment
        wait_for(lambda: all(state in _THERE for state in self.slurm.states().values()))

    def close(self) -> None:
        """End all."""
        try:
            super().close()
        finally:
            self.slurm.close()
