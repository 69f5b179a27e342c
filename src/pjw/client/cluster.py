"""The nodes of a cluster, for its operators: only a gateway has them."""

from dataclasses import dataclass
from typing import Any, Final, TypeVar

from pjw.client.sync import Client  # isort: skip  it sets how gRPC is imported

import grpc

from pjw.client.channel import Options
from pjw.client.requests import Call
from pjw.cluster.v1 import cluster_pb2 as pb
from pjw.cluster.v1.cluster_pb2_grpc import ClusterServiceStub
from pjw.errors import ServerFailedError

T = TypeVar("T")
_STATES: Final = {
    pb.NODE_STATE_UP: "up",
    pb.NODE_STATE_DRAINED: "drained",
    pb.NODE_STATE_AWAY: "away",
    pb.NODE_STATE_LOST: "lost",
}


@dataclass(frozen=True, slots=True)
class Node:
    """A machine that runs jobs, at one moment. A capacity of 0 means that the node did not report it."""

    name: str
    # up, drained, away, lost; unknown for one that only a newer gateway knows
    state: str
    address: str
    version: str
    jobs: int
    cpu_millicores: int
    cpu_max_millicores: int
    memory_bytes: int
    memory_max_bytes: int
    # since when nothing was heard of it
    silent_seconds: int
    # drained by `pjwd drain` on its own machine
    drained_there: bool


class Cluster(Client):
    """A connection to a gateway, for calls about its nodes. Viewers may look, admins may change."""

    def _connect(self, target: str, credentials: grpc.ChannelCredentials, options: Options) -> None:
        super()._connect(target, credentials, options)
        self._stub: Any = ClusterServiceStub(self._channel)

    def nodes(self) -> list[Node]:
        """Return all nodes, by their names. Raises NotAllowedError for a client without a role."""
        return self._asked(Call("ListNodes", pb.ListNodesRequest(), _nodes_of_answer))

    def drain(self, name: str) -> Node:
        """Have a node get no more jobs. Raises NodeNotFoundError."""
        return self._asked(Call("DrainNode", pb.DrainNodeRequest(name=name), _node_of_answer))

    def resume(self, name: str) -> Node:
        """Have a node get jobs again. Raises NodeNotFoundError."""
        return self._asked(Call("ResumeNode", pb.ResumeNodeRequest(name=name), _node_of_answer))

    def remove(self, name: str) -> None:
        """Forget a node that is gone for good. Raises NodeNotFoundError, JobStateError while it has jobs."""
        self._asked(Call("RemoveNode", pb.RemoveNodeRequest(name=name), lambda _: None))

    def _asked(self, call: Call[T]) -> T:
        try:
            return self._call(call)
        except ServerFailedError as error:
            if "does not know this call" not in str(error):
                raise
            raise ServerFailedError(
                f"{self._link.settings.server} is no gateway of a cluster: it has no nodes"
            ) from None


def _nodes_of_answer(answer: pb.ListNodesResponse) -> list[Node]:
    return [_node(each) for each in answer.nodes]


def _node_of_answer(answer: pb.DrainNodeResponse | pb.ResumeNodeResponse) -> Node:
    return _node(answer.node)


def _node(message: pb.Node) -> Node:
    return Node(
        message.name,
        _STATES.get(message.state, "unknown"),
        message.address,
        message.version,
        message.jobs,
        message.cpu_millicores,
        message.cpu_max_millicores,
        message.memory_bytes,
        message.memory_max_bytes,
        message.silent_seconds,
        message.drained_there,
    )
