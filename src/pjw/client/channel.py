"""The options of a channel to pjwd. Sets how gRPC is imported, so it comes before all that imports it."""

import json
import os
from abc import ABC, abstractmethod
from typing import Any, Final, Self

import grpc

from pjw.client.config import ClientSettings
from pjw.client.retry import RECONNECT_SECONDS, Link

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # gRPC reads it once, when imported


from pjw.certs.files import load_client_credentials
from pjw.client.config import log_ends

Options = list[tuple[str, Any]]

# Enough connections, of as many calls as pjwd allows over each, for all that one client may follow at once.
CONNECTIONS_MAX: Final = 20

_OPTIONS: Final[Options] = [
    # A job id is not sent through a web proxy, and loopback has no use for one.
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", 16 * 1024 * 1024),
    # a server that is gone without a word is noticed while we only listen
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # One connection carries as many calls as the server allows. For more gRPC makes another (gRFC A105):
    # else calls would wait for each other, and a program that follows many jobs would never hear of some.
    (
        "grpc.service_config",
        json.dumps({"connectionScaling": {"maxConnectionsPerSubchannel": CONNECTIONS_MAX}}),
    ),
    ("grpc.max_connections_per_subchannel_cap", CONNECTIONS_MAX),
]
_LOOPBACK: Final = ("127.0.0.1:", "[::1]:")


def channel_arguments(settings: ClientSettings) -> tuple[str, grpc.ChannelCredentials, Options]:
    """Return target, credentials and options of a channel. Raises ConfigError for unreadable files."""
    credentials = load_client_credentials(settings.ca_crt, settings.client_crt, settings.client_key)
    log_ends(credentials)
    options = list(_OPTIONS)
    if settings.server.startswith(_LOOPBACK):
        # A loopback address is localhost by definition (RFC 6761, 6.3); the seed's recipe and
        # ours put that name, and not always the address, into a server's certificate.
        options.append(("grpc.ssl_target_name_override", "localhost"))
    return (
        settings.server,
        grpc.ssl_channel_credentials(credentials.ca_pem, credentials.key_pem, credentials.crt_pem),
        options,
    )


# The part that both clients share: the ways to make one.


class BaseClient(ABC):
    """A connection to pjwd, with the certificate that identifies the caller."""

    def __init__(
        self,
        server: str,
        ca_crt: str,
        client_crt: str,
        client_key: str,
        *,
        all_clients: bool = False,
        reconnect_seconds: float = RECONNECT_SECONDS,
    ) -> None:
        """Read the files; the network is not touched yet. Raises ConfigError.

        With *all_clients*, jobs that are named or listed may be any client's, if our role allows it.
        """
        settings = ClientSettings(server, ca_crt, client_crt, client_key)
        self._link: Final = Link(settings, reconnect_seconds)
        self._all_clients: Final = all_clients
        self._connect(*channel_arguments(settings))

    @abstractmethod
    def _connect(self, target: str, credentials: grpc.ChannelCredentials, options: Options) -> None:
        """Make the channel, and the stub on it."""

    @classmethod
    def from_context(
        cls,
        name: str | None = None,
        *,
        all_clients: bool = False,
        reconnect_seconds: float = RECONNECT_SECONDS,
    ) -> Self:
        """Make a client with the settings of a context, as `pjw --context NAME` has them.

        Without a name, the settings are those that `pjw` uses without options: the environment (PJW_SERVER,
        PJW_CA_CRT, PJW_CLIENT_CRT, PJW_CLIENT_KEY, PJW_CONTEXT), then the current context. Raises
        ConfigError.
        """
        from pjw.client.config import find_settings

        settings = find_settings(name)
        return cls(
            settings.server,
            settings.ca_crt,
            settings.client_crt,
            settings.client_key,
            all_clients=all_clients,
            reconnect_seconds=reconnect_seconds,
        )

    @classmethod
    def from_bundle(
        cls,
        path: str,
        *,
        server: str | None = None,
        all_clients: bool = False,
        reconnect_seconds: float = RECONNECT_SECONDS,
    ) -> Self:
        """Make a client of the bundle's service, or of another *server*. Raises ConfigError."""
        from pjw.certs.bundle import read_bundle

        bundle = read_bundle(path)
        return cls(
            server or bundle.server,
            path,
            path,
            path,
            all_clients=all_clients,
            reconnect_seconds=reconnect_seconds,
        )
