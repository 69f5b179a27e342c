"""A gateway, put together: its services for clients, for nodes, and for the operators of the cluster."""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from socket import socket

import grpc

from pjw.certs.files import Credentials
from pjw.gateway.archive import OutputArchive
from pjw.gateway.backend import GatewayBackend
from pjw.gateway.cluster_service import CLUSTER_SERVICE, ClusterService
from pjw.gateway.dial import Dial
from pjw.gateway.engine import Engine
from pjw.gateway.node_guard import NodeGuard
from pjw.gateway.node_sessions import NODE_SERVICE, NodeSessions
from pjw.gateway.nodes import Nodes
from pjw.gateway.pool import Pool
from pjw.gateway.slurm import Slurm
from pjw.gateway.slurm_port import SlurmPort
from pjw.gateway.state import GatewayState
from pjw.server.config import ServerConfig
from pjw.server.guard import Guard
from pjw.server.serve import Served
from pjw.worker import WorkerSettings
from pjw.worker.tasks import Background


@asynccontextmanager
async def opened(
    config: ServerConfig,
    settings: WorkerSettings,
    state: GatewayState,
    dialling: Credentials,
    slurm: socket | None,
    archive: int | None = None,
) -> AsyncGenerator[Served, None]:
    """Yield a gateway that has taken over the jobs of the one before; *slurm*: to pjwd-slurm, if used."""
    async with AsyncExitStack() as stack:
        background = Background()
        stack.push_async_callback(background.close)
        dial = Dial(lambda: dialling)
        stack.push_async_callback(dial.close)
        nodes = Nodes(
            state.store, background, config.gateway.heartbeat_seconds, config.gateway.lost_after_seconds
        )
        stack.callback(nodes.close)
        engine_of: Callable[[Nodes, Callable[[], int]], Engine] = Pool
        if slurm is not None:
            port = SlurmPort(slurm)
            stack.callback(port.close)
            background.keep("answers of Slurm", port.run(await port.begin()))
            engine_of = partial(Slurm, port=port, settings=config.gateway.slurm, background=background)
        backend = GatewayBackend(
            state, settings, nodes, dial, background, engine_of, config.gateway.choose_node
        )
        if isinstance(backend.engine, Slurm):
            backend.engine.revoked = backend.revoke
            background.keep("the sampler of Slurm", backend.engine.run())
        if archive is not None:
            state.archive = OutputArchive(archive, config.gateway.archive or "")
            stack.callback(state.archive.close)
            backend.keep_in(state.archive)
        await backend.begin()
        sessions = NodeSessions(
            state.store,
            nodes,
            backend.placements,
            backend.engine,
            backend.run_here,
            backend.read_upload,
            backend.keeps_on_node,
        )

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
