"""The names on the network that jobs may reach: the operator's table, and the user of the egress process."""

import ipaddress
import pwd
from importlib.util import find_spec
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from pjw.certs.profile import identity_fault
from pjw.errors import ConfigError
from pjw.network import Allowed
from pjw.worker.network import Network

DEFAULT_USER: Final = "pjw-egress"
# of all offers together: the launcher gets them in one message
_OFFERED_BYTES_MAX: Final = 24_576
_OFFERED_MAX: Final = 400
_PRIVATE_MAX: Final = 100

_Names = Annotated[tuple[str, ...], Meta(max_length=_OFFERED_MAX)]


class NamedNetwork(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The names that jobs of one client may reach in addition to those of all."""

    hosts: Annotated[_Names, Meta(description="what its jobs may reach as well")] = ()


class NetworkOffers(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Names that jobs may reach when their clients ask for them; without any no job has a network."""

    hosts: Annotated[
        _Names,
        Meta(
            description="what jobs of every client may reach: HOST[:PORT] and *.SUFFIX[:PORT];"
            " without a port 80 and 443"
        ),
    ] = ()
    by_name: Annotated[
        dict[str, NamedNetwork], Meta(description="more names for single clients, by their names")
    ] = {}
    private: Annotated[
        tuple[str, ...],
        Meta(
            max_length=_PRIVATE_MAX,
            description="ranges of addresses that a name may lead to though they are private, loopback,"
            " link-local or this host's own",
        ),
    ] = ()
    user: Annotated[
        Annotated[str, Meta(pattern=r"\A[^\0]+\Z")] | None,
        Meta(description="whom pjwd-egress becomes, never root; without it pjw-egress, or nobody"),
    ] = None
    connections_max: Annotated[int, Meta(ge=1, le=10_000, description="connections of one job at once")] = 64
    connections_total_max: Annotated[
        int, Meta(ge=2, le=50_000, description="connections of all jobs at once, and twice those of a client")
    ] = 1024

    def __post_init__(self) -> None:
        try:
            offered = self.offers().offered
            for each in offered:
                Allowed.of(each)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        if sum(len(each) + 4 for each in offered) > _OFFERED_BYTES_MAX or len(offered) > _OFFERED_MAX:
            raise ValueError(
                f"[network] offers more than {_OFFERED_MAX} names, or {_OFFERED_BYTES_MAX} bytes of names"
            )
        for name in sorted(self.by_name):
            if fault := identity_fault(name):
                raise ValueError(fault)
        for each in self.private:
            try:
                ipaddress.ip_network(each)
            except ValueError as error:
                raise ValueError(f"[network] private: {error}") from None

    def offers(self) -> Network:
        """Return the worker's part of the settings. Raises ConfigError."""
        return Network(
            self.hosts,
            {name: named.hosts for name, named in self.by_name.items()},
            self.private,
            connections_max=self.connections_max,
            connections_total_max=self.connections_total_max,
        )


def egress_uid(offers: NetworkOffers, server: int, ids: range, nobody: int) -> int:
    """Return the user of pjwd-egress; 0 where no names are offered. Raises ConfigError.

    *server* is the server's user id, *ids* are those of jobs where they are known, *nobody* is a user id that
    no user has, for a host without a user of that name.
    """
    if not offers.offers().offered:
        return 0
    if find_spec("h11") is None:
        raise ConfigError(
            "[network] needs the library h11, and it is not installed",
            hint="install pjw as a package: make install, or pip install",
        )
    try:
        uid = pwd.getpwnam(offers.user or DEFAULT_USER).pw_uid
    except KeyError:
        if offers.user is not None:
            raise ConfigError(
                f"no user is called {offers.user!r} on this host",
                hint=f"useradd --system --shell /usr/sbin/nologin {offers.user}",
            ) from None
        uid = nobody
    if uid in (0, server) or uid in ids:
        raise ConfigError(
            f"pjwd-egress must not run as user id {uid}, which is root, the server or one of jobs",
            hint="name another user in the configuration (network.user)",
        )
    return uid
