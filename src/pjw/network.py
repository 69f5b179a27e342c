"""Names on the network: a client's request, an operator's offer, and their addresses in a job. No I/O.

A name is a host, `*.SUFFIX` for all hosts below a suffix, `*` for any, or an address as it is written
canonically; with a port or, without one, with those of the web.
"""

import re
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Self

from pjw.errors import InvalidJobError

ALLOW_MAX: Final = 32
# init takes so many listeners, and one for the proxy (init/init.h, LISTENERS_MAX)
NAMED_MAX: Final = 16
PROXY_PORT: Final = 3128
# those of a name without a port
WEB_PORTS: Final = (443, 80)
_PORT_MAX: Final = 65_535
_HOST_MAX: Final = 253
_LABEL: Final = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
# Forms that a resolver would take for an address: 127.1, 0177.0.0.1, 2130706433, 0x7f.1 (inet_aton(3)).
_NUMBER: Final = re.compile(r"[0-9]+|0x[0-9a-f]*")
# Each job that shares a network with others has its own 64 addresses there.
_FIRST_ADDRESS: Final = 0x7F40_0000
_ADDRESSES_OF_A_JOB: Final = 64
_JOBS_APART: Final = 1 << 16


def host_of(text: str) -> str:
    """Return a host in the one form in which hosts are compared here; empty for a text that is no host.

    An IPv6 address is without brackets. An address that is not written canonically is none, nor is an IPv4
    address in the form of an IPv6 one.
    """
    host = text.lower().removesuffix(".")
    if ":" in host:
        return "" if _canonical(socket.AF_INET6, host) != host or host.startswith("::ffff:") else host
    labels = host.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        return host if _canonical(socket.AF_INET, host) == host else ""
    return host if len(host) <= _HOST_MAX and all(map(_LABEL.fullmatch, labels)) else ""


def is_address(host: str) -> bool:
    """Return whether a host is an address, and no name."""
    return ":" in host or _NUMBER.fullmatch(host.rpartition(".")[2]) is not None


def _canonical(family: socket.AddressFamily, text: str) -> str:
    try:
        return socket.inet_ntop(family, socket.inet_pton(family, text))
    except (OSError, ValueError):
        return ""


@dataclass(frozen=True, slots=True)
class Allowed:
    """A name with its ports; `host` may begin with `*`, `port` is None for those of the web."""

    host: str
    port: int | None = None

    @classmethod
    def of(cls, text: str) -> Self:
        """Parse `HOST[:PORT]`. Raises InvalidJobError."""
        host, port = split_port(text)
        suffix = host.removeprefix("*.") if host.startswith("*.") else ""
        if host == "*":
            name = host
        elif suffix:
            name = f"*.{host_of(suffix)}" if host_of(suffix) and not is_address(suffix) else ""
        else:
            name = host_of(host)
        if not name:
            hint = "HOST[:PORT], as pypi.org, *.example.org or db.example.org:5432"
            if not text.isascii():
                hint = "write a name of another alphabet as DNS has it: xn--..."
            raise InvalidJobError(f"{text[:80]!r} is no name of a host", hint=hint)
        if port is None:
            return cls(name)
        if not re.fullmatch(r"[1-9][0-9]{0,4}", port) or int(port) > _PORT_MAX:
            raise InvalidJobError(f"{text[:80]!r} has no port from 1 to {_PORT_MAX}")
        return cls(name, int(port))

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port is None else f"{host}:{self.port}"

    @property
    def ports(self) -> Sequence[int]:
        """The ports of it."""
        return WEB_PORTS if self.port is None else (self.port,)

    @property
    def is_named(self) -> bool:
        """Whether a job has a listener for it: for one name and one port."""
        return self.port is not None and not self.host.startswith("*") and not is_address(self.host)

    def has(self, host: str, port: int) -> bool:
        """Return whether a host, or a pattern of hosts, at a port is in it."""
        return port in self.ports and _is_below(host, self.host)


def _is_below(host: str, pattern: str) -> bool:
    if pattern == "*":
        # an address is no name: it has to be listed
        return not is_address(host)
    return host == pattern or (
        pattern.startswith("*.") and host.endswith(pattern[1:]) and not is_address(host)
    )


def split_port(text: str) -> tuple[str, str | None]:
    """Split `HOST[:PORT]`: the host without the brackets of an IPv6 address, and the port or None."""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or ":" not in host or (rest and not rest.startswith(":")):
            return "", None
        return host, rest[1:] if rest else None
    if text.count(":") > 1:
        return text, None
    host, colon, port = text.partition(":")
    return host, port if colon else None


def is_offered(wanted: Allowed, offers: Iterable[Allowed]) -> bool:
    """Return whether each port of a requested name is offered."""
    offered = list(offers)
    return all(any(offer.has(wanted.host, port) for offer in offered) for port in wanted.ports)


def check_allow(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names a job asks for, each once and in canonical form. Raises InvalidJobError."""
    found = tuple(dict.fromkeys(map(Allowed.of, names)))
    if len(found) > ALLOW_MAX:
        raise InvalidJobError(f"a job may reach at most {ALLOW_MAX} names, not {len(found)}")
    if sum(each.is_named for each in found) > NAMED_MAX:
        raise InvalidJobError(f"a job may reach at most {NAMED_MAX} names with a port")
    return tuple(map(str, found))


@dataclass(frozen=True, slots=True)
class Listener:
    """An address within a job to which it connects; `host` is empty for the proxy."""

    address: str
    port: int
    host: str = ""

    def __str__(self) -> str:
        """Return the listener as an option of init."""
        return f"{self.address}:{self.port}" + (f"/{self.host}" if self.host else "")


def listeners_of(job_id: int, allow: Iterable[str], *, is_linked: bool) -> list[Listener]:
    """Return the listeners of a job: first the proxy, then one for each name with one port.

    Of jobs that share a network each has its own addresses.
    """
    first = _FIRST_ADDRESS + job_id % _JOBS_APART * _ADDRESSES_OF_A_JOB
    found = [Listener(_dotted(first) if is_linked else "127.0.0.1", PROXY_PORT)]
    # by host, so that several ports of one have one address
    named = sorted((each for each in map(Allowed.of, allow) if each.is_named), key=str)
    numbers: dict[str, int] = {}
    for each in named:
        number = numbers.setdefault(each.host, len(numbers) + 1)
        assert each.port is not None
        found.append(Listener(_dotted(first + number), each.port, each.host))
    return found


def proxy_variables(job_id: int, *, is_linked: bool) -> dict[str, str]:
    """Return the variables by which programs of a job with names on the network find their proxy."""
    proxy = f"http://{listeners_of(job_id, (), is_linked=is_linked)[0]}"
    own = "localhost,127.0.0.1,::1"
    variables = {"HTTP_PROXY": proxy, "HTTPS_PROXY": proxy, "NO_PROXY": own}
    return {**variables, **{name.lower(): value for name, value in variables.items()}}


def _dotted(address: int) -> str:
    return socket.inet_ntop(socket.AF_INET, address.to_bytes(4))
