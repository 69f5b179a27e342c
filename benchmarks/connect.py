"""Connections of clients to a pjwd of the benchmarks, by grpc.aio."""

from pathlib import Path
from typing import Final

import grpc

OPTIONS: Final = [
    ("grpc.ssl_target_name_override", "localhost"),
    ("grpc.max_receive_message_length", 16 * 1024 * 1024),
    # a separate pool: a channel would share the connection of another with the same address
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
]


def secure_channel(address: str, certs: Path, client: str = "alice") -> grpc.aio.Channel:
    """Return a channel with its own connection, as a client; the caller closes it."""
    ca, key, crt = ((certs / name).read_bytes() for name in ("ca.crt", f"{client}.key", f"{client}.crt"))
    return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(ca, key, crt), OPTIONS)
