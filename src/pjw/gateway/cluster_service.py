"""ClusterService: the nodes, for the operators of a cluster."""

import asyncio
from typing import Final

import grpc

from pjw.cluster.v1 import cluster_pb2 as pb
from pjw.gateway.nodes import Node, Nodes, NodeState
from pjw.server.authz import Caller
from pjw.server.guard import Guard

CLUSTER_SERVICE: Final = pb.DESCRIPTOR.services_by_name["ClusterService"].full_name


class ClusterService:
    """One method for each RPC."""

    def __init__(self, nodes: Nodes, guard: Guard) -> None:
        self._nodes: Final = nodes
        self._guard: Final = guard

    def handlers(self) -> grpc.GenericRpcHandler:
        """The table of all methods, each behind the guard."""
        guard = self._guard
        return grpc.method_handlers_generic_handler(
            CLUSTER_SERVICE,
            {
                "ListNodes": guard.unary(self.list_nodes, pb.ListNodesRequest),
                "DrainNode": guard.unary(self.drain_node, pb.DrainNodeRequest),
                "ResumeNode": guard.unary(self.resume_node, pb.ResumeNodeRequest),
                "RemoveNode": guard.unary(self.remove_node, pb.RemoveNodeRequest),
            },
        )

    async def list_nodes(self, request: pb.ListNodesRequest, caller: Caller) -> pb.ListNodesResponse:
        """Show every node."""
        self._guard.require_role(caller.client_name, "ListNodes")
        return pb.ListNodesResponse(nodes=[_message(node) for _, node in sorted(self._nodes.known.items())])

    async def drain_node(self, request: pb.DrainNodeRequest, caller: Caller) -> pb.DrainNodeResponse:
        """Give a node no more jobs."""
        self._guard.require_role(caller.client_name, "DrainNode")
        return pb.DrainNodeResponse(node=_message(await self._nodes.drain(request.name, drained=True)))

    async def resume_node(self, request: pb.ResumeNodeRequest, caller: Caller) -> pb.ResumeNodeResponse:
        """Give a node jobs again."""
        self._guard.require_role(caller.client_name, "ResumeNode")
        return pb.ResumeNodeResponse(node=_message(await self._nodes.drain(request.name, drained=False)))

    async def remove_node(self, request: pb.RemoveNodeRequest, caller: Caller) -> pb.RemoveNodeResponse:
        """Forget a node that is gone for good."""
        self._guard.require_role(caller.client_name, "RemoveNode")
        await self._nodes.remove(request.name)
        return pb.RemoveNodeResponse()


_STATES: Final = {
    NodeState.UP: pb.NODE_STATE_UP,
    NodeState.DRAINED: pb.NODE_STATE_DRAINED,
    NodeState.AWAY: pb.NODE_STATE_AWAY,
    NodeState.LOST: pb.NODE_STATE_LOST,
}


def _message(node: Node) -> pb.Node:
    row, used = node.row, node.used()
    silent = 0.0 if node.session is not None else asyncio.get_running_loop().time() - node.heard
    return pb.Node(
        name=row.name,
        state=_STATES[node.state],
        address=row.address,
        version=row.version,
        jobs=len(node.jobs),
        cpu_millicores=used.millicores,
        cpu_max_millicores=row.cpu_max_millicores,
        memory_bytes=used.memory,
        memory_max_bytes=row.memory_max_bytes,
        silent_seconds=int(silent),
        drained_there=node.session is not None and node.drained_there,
    )
