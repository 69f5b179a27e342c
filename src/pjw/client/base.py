"""The part that both clients share: the ways to make one."""

from abc import ABC, abstractmethod
from typing import Final, Self

from pjw.client.channel import Options, channel_arguments  # isort: skip  it sets how gRPC is imported

import grpc

from pjw.client.config import ClientSettings
from pjw.client.retry import RECONNECT_SECONDS, Link


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
