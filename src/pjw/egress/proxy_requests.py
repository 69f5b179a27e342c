"""Requests to a proxy: CONNECT, or a request for an absolute http address. Bytes in, values out."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import h11

from pjw.network import host_of, split_port

# The reason why a connection of a job fails.


class Failure(Exception):  # noqa: N818  the name of a result, not of an error class
    """A result as the server counts it (worker/egress.py), a status of HTTP, and words for the client."""

    def __init__(self, result: str, status: int, words: str) -> None:
        super().__init__(words)
        self.result: Final = result
        self.status: Final = status


_PORT_MAX: Final = 65_535
_HTTP: Final = b"http://"
# headers of one connection, which a proxy does not pass on (RFC 9110, 7.6.1); for transfer-encoding see below
_OF_A_CONNECTION: Final = frozenset(
    {b"connection", b"proxy-connection", b"keep-alive", b"te", b"trailer", b"upgrade", b"proxy-authorization"}
    | {b"proxy-authenticate", b"http2-settings"}
)
Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Wanted:
    """The host and port of a request; `path` is its path there, empty for a tunnel (CONNECT)."""

    host: str
    port: int
    path: bytes = b""


def wanted_of(request: h11.Request) -> Wanted:
    """Return the host, port and path of a request. Raises Failure for one that is not for a proxy."""
    if request.http_version not in (b"1.0", b"1.1"):
        raise _invalid("this proxy speaks HTTP/1.1", 505)
    if request.method == b"CONNECT":
        host, port = _host_and_port(request.target)
        if port is None:
            raise _invalid("CONNECT takes HOST:PORT")
        return Wanted(host, port)
    target = request.target
    if target[: len(_HTTP)].lower() != _HTTP:
        raise _invalid("this is a proxy: it takes CONNECT, and addresses that begin with http://")
    rest = target[len(_HTTP) :]
    end = min((at for mark in (b"/", b"?", b"#") if (at := rest.find(mark)) >= 0), default=len(rest))
    authority, path = rest[:end], rest[end:].partition(b"#")[0]
    host, port = _host_and_port(authority)
    return Wanted(host, port or 80, path if path.startswith(b"/") else b"/" + path)


def _host_and_port(authority: bytes) -> tuple[str, int | None]:
    text = authority.decode("ascii", "replace")
    host, port = split_port(text)
    # an IPv6 address without brackets could also be an address with a port
    name = "" if ":" in host and not text.startswith("[") else host_of(host)
    if not name:
        raise _invalid(f"{text[:80]!a} is neither HOST nor HOST:PORT", 400)
    if port is None:
        return name, None
    if not (port.isascii() and port.isdecimal() and len(port) <= 5 and 1 <= int(port) <= _PORT_MAX):
        raise _invalid(f"{text[:80]!a} has no port from 1 to {_PORT_MAX}")
    return name, int(port)


def passed_on(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """Return the headers that go on to the other side; one says that no other message follows."""
    listed = [(bytes(name), bytes(value)) for name, value in headers]
    named = {
        word.strip().lower() for name, value in listed if name == b"connection" for word in value.split(b",")
    }
    dropped = _OF_A_CONNECTION | named - {b"transfer-encoding", b"content-length", b"host"}
    if any(name == b"transfer-encoding" for name, _ in listed):
        # With both, the other side would decide which of the two counts.
        dropped |= {b"content-length"}
    return [*((name, value) for name, value in listed if name not in dropped), (b"connection", b"close")]


def request_for(request: h11.Request, wanted: Wanted) -> h11.Request:
    """Return the request that the host gets."""
    named = f"[{wanted.host}]" if ":" in wanted.host else wanted.host
    authority = named if wanted.port == 80 else f"{named}:{wanted.port}"
    # the host that we judged, whatever host the job's header names
    headers = [
        (b"host", authority.encode()),
        *(each for each in passed_on(request.headers) if each[0] != b"host"),
    ]
    return h11.Request(method=request.method, target=wanted.path, headers=headers)


def _invalid(words: str, status: int = 400) -> Failure:
    return Failure("invalid", status, words)
