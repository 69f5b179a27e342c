"""The parts that both clients share: the ways to make one, and the documentation of their methods."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Final, Self, TypeVar

from pjw.client.channel import Options, channel_arguments  # isort: skip  it sets how gRPC is imported

import grpc

from pjw.client.config import ClientSettings
from pjw.client.retry import RECONNECT_SECONDS, Contact

C = TypeVar("C", bound=type)


def documented_by(twin: type) -> Callable[[C], C]:
    """Return a decorator that puts the docstrings of *twin* and its methods before those of its namesakes.

    So help() and the reference have the whole text for both classes, and one class owns it.
    """

    def complete(cls: C) -> C:
        methods = [(vars(twin).get(name), method) for name, method in vars(cls).items() if name[0] != "_"]
        for documented, completed in (twin, cls), *methods:
            # with -OO there are no docstrings
            if documented.__doc__ and completed.__doc__:
                completed.__doc__ = f"{inspect.cleandoc(documented.__doc__)}\n\n{completed.__doc__}"
        return cls

    return complete


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
        """Read the files; the network is not touched yet.

        *server* is HOST:PORT, and the others are paths of PEM files (docs/certificates.md). With
        *all_clients*, jobs that are named or listed may be any client's, if our role allows it. A call tries
        for *reconnect_seconds* to reach a server that went away; 0: not at all. Raises ConfigError for a
        wrong address, and for a file that cannot be read or used.
        """
        settings = ClientSettings(server, ca_crt, client_crt, client_key)
        self._link: Final = Contact(settings, reconnect_seconds)
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
        PJW_CA_CRT, PJW_CLIENT_CRT, PJW_CLIENT_KEY, PJW_BUNDLE, PJW_CONTEXT), then the current context. Raises
        ConfigError for a context that is not there or has a fault.
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
        """Make a client of the bundle's service, or of another *server* (HOST:PORT).

        Raises ConfigError for a file at *path* that is no bundle, or cannot be read.
        """
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
