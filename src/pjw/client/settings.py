"""The address of a server, and the client's certificates."""

from dataclasses import dataclass

from pjw.certs.address import server_address
from pjw.given import require_value


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """The address to connect to, and the files that identify the client."""

    server: str
    ca_crt: str
    client_crt: str
    client_key: str

    def __post_init__(self) -> None:
        """Add the default port to the address. Raises ConfigError for a wrong address or an empty value."""
        for name in self.__slots__:
            require_value(name, getattr(self, name))
        object.__setattr__(self, "server", server_address(self.server))
