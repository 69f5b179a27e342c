"""A cluster on loopback: a real gateway and real nodes, each a pjwd of its own, with real certificates."""

import os
import re
import shutil
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Final

from pjw.certs import authority
from pjw.cluster.v1 import cluster_pb2 as cpb
from pjw.cluster.v1.cluster_pb2_grpc import ClusterServiceStub
from pjw.v1 import job_worker_pb2 as pb
from tests.support.service import BIN, CALL_SECONDS, Service, end_all, instance_cgroups, wait_for
from tests.support.worker_harness import UIDS, uid_range

# Longer than a pjwd takes to start again on a busy machine.
LOST_AFTER_SECONDS: Final = 8.0
# Nodes have the same user ids, which two pjwd on one host cannot: each sees a /run/pjw of its own.
_APART: Final = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs /run/pjw && exec "$@"', "sh")


class Gateway(Service):
    """`pjwd gateway`; its directory has the certificates of all."""

    def command(self, *extra: str) -> list[str]:
        command = super().command(*extra)
        command[command.index("serve")] = "gateway"
        return command

    def metrics(self) -> str:
        """What a Prometheus would get, where the configuration has metrics at any free port."""
        [*_, address] = re.findall(r"^pjwd: metrics on (\S+)$", self.log.read_text(), re.MULTILINE)
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=CALL_SECONDS) as answer:
            text: str = answer.read().decode()
        return text

    def metric(self, name: str) -> float:
        """One number of these, by its name and labels."""
        [value] = re.findall(rf"^{re.escape(name)} (\S+)$", self.metrics(), re.MULTILINE)
        return float(value)


class NodeService(Service):
    """pjwd as a node."""

    def __init__(self, directory: Path, certs: Path, name: str, config: str) -> None:
        super().__init__(directory, config=config, certs=certs)
        self.name: Final = name
        # what comes before its command line
        self.prefix: Sequence[str] = _APART

    def command(self, *extra: str) -> list[str]:
        command = super().command(*extra)
        for option, kind in (("--server-crt", "crt"), ("--server-key", "key")):
            command[command.index(option) + 1] = str(self.certs / f"node-{self.name}.{kind}")
        return [*self.prefix, *command]


class Cluster:
    """A gateway, nodes, and the proof that nothing stays behind."""

    clients: Sequence[str] = ("alice", "bob", "ann", "gate")
    # of each node, whatever the host has
    cpu_max_millicores = 3000
    lost_after_seconds = LOST_AFTER_SECONDS

    def __init__(
        self,
        directory: Path,
        *,
        nodes: int = 2,
        gateway_config: str = "",
        lost_after_seconds: float | None = None,
        # in the table of that name
        gateway_keys: str = "",
        gateway_change: Callable[[], None] | None = None,
        node_config: str = "",
        node_configs: Mapping[str, str] = MappingProxyType({}),
        engine: str = "pool",
        gateway_pjwd: Path = BIN / "pjwd",
        node_pjwd: Path = BIN / "pjwd",
    ) -> None:
        """*node_config*: more of the configuration of all nodes; *node_configs*: of some, by their names."""
        self._directory: Final = directory
        if lost_after_seconds is not None:
            self.lost_after_seconds = lost_after_seconds
        self._node_config: Final = node_config
        self._node_configs: Final = node_configs
        self._node_pjwd: Final = node_pjwd
        self.gateway: Final = self.make_gateway(directory)
        self.gateway.pjwd, self.gateway.change = gateway_pjwd, gateway_change
        certs = self.gateway.certs
        self.gateway.config = (
            f'[gateway]\ncrt = "{certs / "gate.crt"}"\nkey = "{certs / "gate.key"}"\n'
            f"heartbeat_seconds = 0.3\nlost_after_seconds = {self.lost_after_seconds}\n{gateway_keys}"
            f'engine = "{engine}"\n'
            f'[roles]\nadmins = ["ann"]\n{gateway_config}'
        )
        self.gateway.config = self.change_gateway(self.gateway.config)
        self.gateway.start()
        self.uid_first: Final = uid_range()
        self.nodes: Final[dict[str, NodeService]] = {}
        for number in range(nodes):
            self.add_node(f"n{number + 1}")
        self.await_nodes(dict.fromkeys(self.nodes, "up"))

    def make_gateway(self, directory: Path) -> Gateway:
        """The gateway, which has not started."""
        return Gateway(directory, clients=self.clients)

    def make_node(self, directory: Path, name: str, config: str) -> NodeService:
        """A node, which has not started."""
        return NodeService(directory, self.gateway.certs, name, config)

    def add_node(self, name: str, gateway: str = "") -> NodeService:
        """Start one more node; *gateway*: through which it calls."""
        # tests connect to it by this name, as no client does
        authority.write_node(str(self.gateway.certs), name, ["localhost"])
        directory = self._directory / name
        directory.mkdir()
        os.makedirs("/run/pjw", exist_ok=True)
        node = self.nodes[name] = self.make_node(
            directory,
            name,
            f'[cluster]\ngateway = "{gateway or self._named(name)}"\n[roles]\ngateways = ["gate"]\n'
            f"[job_users]\nuid_first = {self.uid_first}\nuid_count = {UIDS}\n[queue]\nrunning_max = 0\n"
            f"cpu_max_millicores = {self.cpu_max_millicores}\n[ceilings]\ncpu_max_millicores = 0\n"
            f"{self._node_config}{self._node_configs.get(name, '')}",
        )
        node.pjwd = self._node_pjwd
        self.prepare(node)
        node.start()
        return node

    def change_gateway(self, config: str) -> str:
        """The configuration of the gateway, changed; here it stays."""
        return config

    def prepare(self, node: NodeService) -> None:
        """Change a node that is about to be started for the first time; nothing here."""

    def _named(self, name: str) -> str:
        """Where a node finds the gateway: by its address, or by a name that has to be looked up."""
        address = self.gateway.address
        return address.replace("127.0.0.1", "localhost") if name == "n2" else address

    @contextmanager
    def operator(self, client: str = "ann") -> Iterator[ClusterServiceStub]:
        """Typed calls of an admin."""
        with self.gateway.channel(client) as channel:
            yield ClusterServiceStub(channel)

    def states(self) -> dict[str, str]:
        """The states of all nodes, by their names."""
        with self.operator() as stub:
            answer = stub.ListNodes(cpb.ListNodesRequest(), timeout=CALL_SECONDS)
        return {
            node.name: cpb.NodeState.Name(node.state).removeprefix("NODE_STATE_").lower()
            for node in answer.nodes
        }

    def await_nodes(self, wanted: dict[str, str]) -> None:
        """Wait until the nodes are in these states."""
        wait_for(lambda: wanted.items() <= self.states().items())

    def node_of(self, job_id: int, client: str = "alice") -> NodeService:
        """The node that has a job, once one has started it."""
        running = (pb.JOB_STATE_RUNNING, pb.JOB_STATE_STOPPING, pb.JOB_STATE_EXITED)
        wait_for(lambda: self.gateway.job(job_id, client).state in running)
        return self.nodes[self.gateway.job(job_id, client).node]

    def idle(self) -> None:
        """Stop every job, and have all nodes there: for the next test."""
        for service in (self.gateway, *self.nodes.values()):
            if service.process is None:
                service.start()
        self.await_nodes(dict.fromkeys(self.nodes, "up"))
        for client in ("alice", "bob"):
            with self.gateway.stub(client) as stub:
                for job in stub.List(pb.ListRequest()).jobs:
                    if not job.HasField("end"):
                        request = pb.StopRequest(id=job.id)
                        request.grace.FromSeconds(0)
                        stub.Stop(request, timeout=CALL_SECONDS)

    def close(self) -> None:
        """End all; nothing may be left, and no log shows a bug of ours."""
        with ExitStack() as stack:
            stack.callback(shutil.rmtree, self._directory)
            for service in (self.gateway, *self.nodes.values()):
                stack.callback(self._end, service)
            self.idle()

    @staticmethod
    def _end(service: Service) -> None:
        code = service.stop() if service.process is not None else 0
        if isinstance(service, NodeService):
            with suppress(AssertionError):
                wait_for(lambda: not instance_cgroups(service.state), 10)
            left = service.job_cgroups()
            end_all(service.state)
            assert left == []
        log = service.log.read_text()
        assert "Traceback" not in log, log
        assert code == 0, log


@contextmanager
def cluster(**options: object) -> Iterator[Cluster]:
    """A cluster in a directory of its own."""
    made = Cluster(Path(tempfile.mkdtemp(prefix="pjw-test-", dir="/var/lib")), **options)  # type: ignore[arg-type]
    try:
        yield made
    finally:
        made.close()
