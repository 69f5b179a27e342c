"""The options of a channel to pjwd. Sets how gRPC is imported, so it comes before all that imports it."""

import json
import os
from typing import Any, Final

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # gRPC reads it once, when imported

import grpc

from pjw.certs.files import load_client_credentials
from pjw.client.config import ClientSettings, log_ends

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
