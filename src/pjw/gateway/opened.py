"""A gateway, put together: its services for clients, for nodes, and for the operators of the cluster."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import grpc

from pjw.certs.files import Credentials
from pjw.gateway.backend import GatewayBackend
from pjw.gateway.cluster_service import CLUSTER_SERVICE, ClusterService
from pjw.gateway.dial import Dial
from pjw.gateway.node_guard import NodeGuard
from pjw.gateway.nodes import Nodes
from pjw.gateway.sessions import NODE_SERVICE, Sessions
from pjw.gateway.state import GatewayState
from pjw.server.config import ServerConfig
from pjw.server.guard import Guard
from pjw.server.serve import Served
from pjw.worker import WorkerSettings
from pjw.worker.background import Background


@asynccontextmanager
async def opened(
    config: ServerConfig, settings: WorkerSettings, state: GatewayState, dialling: Credentials
) -> AsyncGenerator[Served, None]:
    """A gateway that has taken over the jobs of the one before."""
    async with AsyncExitStack() as stack:
        background = Background()
        stack.push_async_callback(background.close)
        dial = Dial(lambda: dialling)
        stack.push_async_callback(dial.close)
        nodes = Nodes(
            state.store, background, config.gateway.heartbeat_seconds, config.gateway.lost_after_seconds
        )
        stack.callback(nodes.close)
        backend = GatewayBackend(state, settings, nodes, dial, background)
        await backend.begin()
        sessions = Sessions(state.store, nodes, backend.placements, backend.run_here, backend.read_upload)

        def handlers(guard: Guard) -> Sequence[grpc.GenericRpcHandler]:
            return (
                sessions.handlers(NodeGuard(lambda: guard.revoked)),
                ClusterService(nodes, guard).handlers(),
            )

        known = [name for name, _, _ in await state.store.totals()]
        yield Served(
            backend,
            known,
            more=handlers,
            services=(NODE_SERVICE, CLUSTER_SERVICE),
            draining=nodes.close,
        )
