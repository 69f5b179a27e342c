"""Where to connect to, and with which certificates."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """Where to connect to, and the files that say who we are."""

    server: str
    ca_crt: str
    client_crt: str
    client_key: str
