"""A gateway and nodes, each on a machine of its own."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.outages.network import Machine, children
from tests.support.cluster import Cluster, Gateway, NodeService
from tests.support.service import Service

PORT: Final = 50051
# the number of the gateway's machine; nodes have the numbers behind it
GATEWAY: Final = 1
NODES: Final = ("n1", "n2", "n3")


def number_of(node: str) -> int:
    """The number of a node's machine."""
    return GATEWAY + 1 + NODES.index(node)


class OnMachine(Service):
    """A pjwd on a machine."""

    machine: Machine

    def command(self, *extra: str) -> list[str]:
        return [*self.machine.enter, *super().command(*extra)]

    @property
    def pid(self) -> int:
        """The pid of pjwd: what we have started has entered the machine, and waits for it."""
        assert self.process is not None
        [pid] = children(self.process.pid)
        return pid

    def cut_power(self) -> None:
        """Cut the power of its machine."""
        assert self.process is not None
        self.machine.cut_power(self.state)
        self.process.wait(30)
        self.process = None


class GatewayOnMachine(OnMachine, Gateway):
    """The gateway, on its machine."""

    hosts = ("localhost", f"10.77.0.{GATEWAY}")

    def __init__(self, directory: Path, clients: tuple[str, ...]) -> None:
        super().__init__(directory, clients=clients)
        self.machine = Machine("gw", GATEWAY, directory / "gw")
        self.machine.on()
        self.address = f"{self.machine.address}:{PORT}"


class NodeOnMachine(OnMachine, NodeService):
    """A node, on its machine."""

    def __init__(self, directory: Path, certs: Path, name: str, config: str) -> None:
        super().__init__(directory, certs, name, config)
        # the machine has a /run of its own
        self.prefix = ()
        self.machine = Machine(name, number_of(name), directory)
        self.machine.on()
        self.address = f"{self.machine.address}:{PORT}"


class MachineCluster(Cluster):
    """A gateway and nodes on machines, which all have power and cables again when they are idle."""

    nodes: dict[str, NodeOnMachine]  # type: ignore[assignment, misc]
    gateway: GatewayOnMachine  # type: ignore[misc]
    engine = "pool"

    def make_gateway(self, directory: Path) -> Gateway:
        return GatewayOnMachine(directory, tuple(self.clients))

    def make_node(self, directory: Path, name: str, config: str) -> NodeService:
        return NodeOnMachine(directory, self.gateway.certs, name, config)

    def node_of(self, job_id: int, client: str = "alice") -> NodeOnMachine:
        node = super().node_of(job_id, client)
        assert isinstance(node, NodeOnMachine)
        return node

    def boot(self) -> None:
        """Have power and cables again on each machine."""
        for service in (self.gateway, *self.nodes.values()):
            if not service.machine.is_on:
                service.machine.on()
            service.machine.plug()
            service.machine.unmute()

    def whole(self) -> None:
        """Have a pjwd on each machine, too, and all nodes connected."""
        self.boot()
        for service in (self.gateway, *self.nodes.values()):
            if service.process is None:
                service.start()
        self.await_nodes(dict.fromkeys(self.nodes, "up"))

    def idle(self) -> None:
        self.whole()
        super().idle()

    def close(self) -> None:
        try:
            super().close()
        finally:
            for service in (self.gateway, *self.nodes.values()):
                service.machine.off()


@contextmanager
def machine_cluster(kind: type[MachineCluster] = MachineCluster) -> Iterator[MachineCluster]:
    """A cluster on machines."""
    made = kind(Path(tempfile.mkdtemp(dir=os.environ["PJW_APART"])), nodes=len(NODES), engine=kind.engine)
    try:
        yield made
    finally:
        made.close()
