"""From the configuration of a pjwd to the node of a gateway that it is. No other pjwd loads this."""

import pwd
from collections.abc import Callable
from pathlib import Path
from typing import Final

from pjw.certs.files import ServerCredentials
from pjw.certs.identity import node_of
from pjw.errors import ConfigError, NotAuthenticatedError
from pjw.node.agent import NodeAgent, NodeSettings
from pjw.node.holds import Holds, listen_for_holds
from pjw.server.authz import FOR_A_CLIENT
from pjw.server.config import ServerConfig
from pjw.version import version
from pjw.worker import Worker, WorkerSettings
from pjw.worker.host import memory_of, resources
from pjw.worker.store import JobStore

_BOOT_ID: Final = "/proc/sys/kernel/random/boot_id"
# hosts of an address on which pjwd listens, but to which no client can connect
_ANY: Final = ("0.0.0.0:", "[::]:")


def holds_of(config: ServerConfig) -> Holds | None:
    """Listen for Slurm's places, as root; None on a node that takes none. Raises ConfigError, KernelError."""
    name = config.cluster.hold_user
    if name is None:
        return None
    try:
        uid = pwd.getpwnam(name).pw_uid
    except KeyError:
        raise ConfigError(
            f"cluster.hold_user names {name!r}, and no user is called so on this host",
            hint="it is the user of the gateway, with the same user id on all nodes",
        ) from None
    return Holds(listen_for_holds(config.cluster.hold_socket, uid), uid)


def node_of_config(
    config: ServerConfig,
    settings: WorkerSettings,
    worker: Worker,
    store: JobStore,
    listening: str,
    credentials: Callable[[], ServerCredentials],
    holds: Holds | None,
) -> NodeAgent:
    """Make the node, which has not called yet. Raises ConfigError for a configuration that is no node's."""
    gateway = config.cluster.gateway
    assert gateway is not None
    try:
        name = node_of(credentials().crt_pem)
    except NotAuthenticatedError as error:
        raise ConfigError(
            f"this pjwd cannot be a node of {gateway}: {error}",
            hint=f"{error.hint}; let server_crt and server_key name it" if error.hint else None,
        ) from error
    if not config.roles.gateways:
        raise ConfigError(
            f"this pjwd cannot be a node of {gateway}: it lets no gateway in",
            hint="name the client of the gateway's certificate in roles.gateways",
        )
    address = config.cluster.address or listening
    if address.startswith(_ANY):
        raise ConfigError(
            f"this pjwd cannot be a node of {gateway}: it listens on all addresses, and a gateway needs one",
            hint="give cluster.address",
        )
    queue = settings.queue
    cpu, memory = queue.cpu_max_millicores, queue.memory_max_bytes
    return NodeAgent(
        worker,
        store,
        NodeSettings(
            name=name,
            gateway=gateway,
            address=address,
            version=version(),
            boot_id=Path(_BOOT_ID).read_text().strip(),
            cpu_max_millicores=resources().cpu_max_millicores if cpu is None else cpu,
            memory_max_bytes=memory_of(settings.sums) if memory is None else memory,
            uid_first=worker.uid_first,
            uid_count=settings.uid_count,
            methods=sorted(FOR_A_CLIENT),
        ),
        credentials,
        holds,
    )
