"""Stands before gRPC's handlers: notes the client and connection of each call, and gives it its turn."""

import logging
import time
from typing import Any, Final

import grpc

from pjw.certs.identity import NameRules
from pjw.server.connections import Connections, PortLimits, Told
from pjw.server.peer import presented
from pjw.server.quota import ClientLimits
from pjw.server.turns import Deliver, Turns

# Stands for clients whose certificate gives no name: the guard refuses their calls, and here they are one
# client.
NOBODY: Final = ""
# Calls that a client may begin at once, after a rest.
CALLS_AT_ONCE: Final = 200

Context = grpc.aio.ServicerContext[Any, Any]

log: Final = logging.getLogger(__name__)


class Port:
    """Holds each client to its limits at the port."""

    def __init__(self, limits: PortLimits, clients: ClientLimits, names: NameRules) -> None:
        self._clients = clients
        self._names: Final = names
        self.connections: Final = Connections(limits, lambda: self._clients.connections_max)
        self.turns: Final = Turns(lambda: (self._clients.calls_per_second, CALLS_AT_ONCE), self._cut_off)
        self._told: Final = Told()

    def reconfigure(self, clients: ClientLimits) -> None:
        """Apply these limits from now on; open connections stay."""
        self._clients = clients

    def admit(self, method: bytes, context: Context, deliver: Deliver) -> None:
        """Have a call delivered in its turn, or hang up on a client that makes too many."""
        identity = presented(context.auth_context(), self._names)
        client = identity.client_name if identity else NOBODY
        connection = self.connections.call_came(context.peer(), client)
        if self.turns.is_banned(client):
            if connection is not None:
                self.connections.close_later(connection, "rate")
        elif not self.turns.came(client, method, context, deliver):
            self._cut_off(client)

    def _cut_off(self, client: str) -> None:
        seconds = self.turns.ban(client)
        count = self.connections.close_client(client, "rate")
        if times := self._told.count(1, time.monotonic()):
            log.warning(
                "client %r begins calls and cancels them faster than it may: pjwd closes its connections (%d)"
                " and drops its calls for %d s; clients cut off since the last such message: %d",
                client,
                count,
                seconds,
                times,
            )
