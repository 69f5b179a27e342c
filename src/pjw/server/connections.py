"""The connections to the port: whose each is, how many there may be, and how one is closed.

gRPC accepts connections by itself, and has no call that closes one. But it asks for certificates at the
beginning of each handshake, so this notices accepted connections. And any descriptor of a socket can shut it
down (shutdown(2)): gRPC then sees that its peer has hung up, and ends all that belongs to the connection. So
this looks through the descriptors of the process for the sockets whose other end is known.

An unproven connection is one over which no call has come yet. Of too many, this first closes those that have
sent too little for a certificate, and of these the oldest. An honest client makes its first call within
milliseconds, so during a flood from its own address its connection is not the first to be closed.
"""

import asyncio
import ctypes
import logging
import os
import socket
import struct
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Final
from urllib.parse import unquote

import msgspec
from msgspec import Meta

from pjw.errors import LimitReachedError

# One customer of an IPv6 network has a whole /64: a host that has one of its addresses has all of them.
_PREFIX_BYTES: Final = 8
_MAPPED: Final = bytes(10) + b"\xff\xff"
# A look takes a microsecond for each descriptor; looks may take a fifth of the event loop's time.
LOOK_SHARE: Final = 5
LOOK_SECONDS_MIN: Final = 0.01
# Seconds until a connection is closed that need not close at once.
LATER_SECONDS: Final = 5.0
CLOSED_SECONDS: Final = 1.0
TELL_SECONDS: Final = 60
# Why we close a connection: see docs/monitoring.md.
CAUSES: Final = ("unproven", "connections_max", "rate")
# The bytes that a client sends at least before its handshake ends: a hello, its certificate, a signature.
CERTIFICATE_BYTES_MIN: Final = 1024
# Where struct tcp_info has tcpi_bytes_received (linux/tcp.h), and where that ends.
_RECEIVED_AT: Final = 128
_INFO_BYTES: Final = 136
_SOCKADDR_BYTES: Final = 128

log: Final = logging.getLogger(__name__)

_Seconds = Annotated[float, Meta(ge=0.1, le=600)]
_Bound = Annotated[int, Meta(ge=1, le=1_000_000)]


class PortLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bounds on connections to the port, all of them fixed when the server starts."""

    handshake_seconds: Annotated[
        _Seconds, Meta(description="how long a connection may take to show a certificate")
    ] = 5.0
    connections_max: Annotated[
        _Bound,
        Meta(description="connections in all; never more than half of the descriptors a process may have"),
    ] = 4096
    unproven_max: Annotated[
        _Bound,
        Meta(description="connections over which no call has come yet; of more, pjwd closes the oldest"),
    ] = 512
    unproven_per_address_max: Annotated[
        _Bound, Meta(description="such connections from one address, or one /64 of IPv6")
    ] = 128
    streams_per_connection_max: Annotated[
        _Bound, Meta(description="calls under way over one connection; gRPC clients hold back more")
    ] = 100


class Connection:
    """One of them. `client` is None until a call has come over it."""

    __slots__ = ("client", "closed_at", "closing", "descriptor", "key", "refused", "since")

    def __init__(self, key: bytes, since: float) -> None:
        self.key: Final = key
        self.since: Final = since
        self.descriptor = -1
        self.closed_at = 0.0
        self.closing = False
        self.client: str | None = None
        self.refused = False


@dataclass(frozen=True, slots=True)
class ConnectionNumbers:
    """The numbers of connections, open and since the server began. `closed`: by us, by cause."""

    accepted: int
    open: int
    unproven: int
    closed: Mapping[str, int]


class Connections:
    """The open connections, as of the last look; belongs to the event loop that makes it."""

    def __init__(
        self,
        limits: PortLimits,
        per_client_max: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits: Final = limits
        self._per_client_max: Final = per_client_max
        self._clock: Final = clock
        self._loop: Final = asyncio.get_running_loop()
        self._port = 0
        self._open: dict[bytes, Connection] = {}
        self._of_client: Counter[str] = Counter()
        self._accepted = self._accepted_before = 0
        self._look_above = 0
        self._next_look = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._told = Told()
        self._closed: Final[Counter[str]] = Counter(dict.fromkeys(CAUSES, 0))

    def listens_on(self, port: int) -> None:
        """Set the port of the service: connections to other ports are not ours to look at."""
        self._port = port

    def accepted(self) -> None:
        """Note one more connection; call it from any thread."""
        # RuntimeError: the loop has ended, and all connections do
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._note_accepted)

    def call_came(self, peer: str, client: str) -> Connection | None:
        """Note a call of *client* over the connection from *peer*; return the connection, if there is one."""
        key = key_of(peer)
        if key is None:
            return None
        connection = self._open.get(key)
        if connection is None:
            connection = self._open[key] = Connection(key, self._clock())
        if connection.client != client:
            # its first call; or another client's connection had this peer before, and has ended unnoticed
            if connection.client is not None:
                self._of_client[connection.client] -= 1
            connection.client, connection.refused = client, False
            self._of_client[client] += 1
            self._check_client(connection, client)
            if len(self._open) > self._look_above:
                self._ask_for_look()
        return connection

    def require_room(self, peer: str) -> None:
        """Check that the connection is not one too many for its client. Raises LimitReachedError."""
        key = key_of(peer)
        connection = self._open.get(key) if key is not None else None
        if connection is not None and connection.refused:
            raise LimitReachedError(
                f"a client may have {self._per_client_max()} connections at once",
                hint="close some, or ask the operator for more (clients.connections_max)",
                limit="connections_max",
                most=self._per_client_max(),
            )

    def close(self, connection: Connection, cause: str) -> None:
        """Hang up. Until gRPC has seen that, which takes a moment, further calls have no effect."""
        now = self._clock()
        if now < connection.closed_at + CLOSED_SECONDS:
            return
        if self._with_socket(connection, _shut_down):
            connection.closed_at = now
            self._closed[cause] += 1

    def close_later(self, connection: Connection, cause: str) -> None:
        """Hang up in some seconds, and until then have it send next to nothing.

        A client that we hang up on at once makes another connection. That costs a handshake, and the calls
        that gRPC reads from it before its client is known.
        """
        if not connection.closing:
            connection.closing = True
            self._with_socket(connection, _slow_down)
            self._loop.call_later(LATER_SECONDS, self._close_late, connection, cause)

    def _close_late(self, connection: Connection, cause: str) -> None:
        connection.closing = False
        self.close(connection, cause)

    def close_client(self, client: str, cause: str) -> int:
        """Hang up on a client everywhere; return the number of connections it had."""
        self.look()
        mine = [each for each in self._open.values() if each.client == client]
        for each in mine:
            self.close_later(each, cause)
        return len(mine)

    def numbers(self) -> ConnectionNumbers:
        """Return the numbers of now, or of a moment ago, so that asking often does not mean looking often."""
        if self._clock() >= self._next_look:
            self.look()
        return ConnectionNumbers(
            self._accepted_before + self._accepted, len(self._open), self._unproven(), dict(self._closed)
        )

    def look(self) -> None:
        """Learn which connections there are now, and close those without a call that are too many."""
        begun = self._clock()
        found: dict[bytes, Connection] = {}
        for descriptor, key in peers():
            connection = self._open.get(key)
            if connection is None:
                if _local_port(descriptor) != self._port:
                    continue
                connection = Connection(key, begun)
            connection.descriptor = descriptor
            found[key] = connection
        self._open = found
        self._of_client = Counter(each.client for each in found.values() if each.client is not None)
        self._accepted_before += self._accepted
        self._accepted = 0
        self._look_above = 2 * len(found) + self._limits.unproven_per_address_max
        self._close_unproven()
        now = self._clock()
        self._next_look = now + max(LOOK_SECONDS_MIN, LOOK_SHARE * (now - begun))

    def _note_accepted(self) -> None:
        self._accepted += 1
        if self._accepted + self._unproven() > self._limits.unproven_per_address_max:
            self._ask_for_look()

    def _unproven(self) -> int:
        return len(self._open) - self._of_client.total()

    def _ask_for_look(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(max(0.0, self._next_look - self._clock()), self._timed_look)

    def _timed_look(self) -> None:
        self._timer = None
        self.look()

    def _check_client(self, connection: Connection, client: str) -> None:
        most = self._per_client_max()
        if not most or self._of_client[client] <= most:
            return
        # some may have ended since
        self.look()
        if self._of_client[client] > most and connection.key in self._open:
            connection.refused = True
            self.close_later(connection, "connections_max")

    def _close_unproven(self) -> None:
        by_address: defaultdict[bytes, list[Connection]] = defaultdict(list)
        now = self._clock()
        for each in self._open.values():
            # one that was closed just now is still there until gRPC has seen it
            if each.client is None and now >= each.closed_at + CLOSED_SECONDS:
                by_address[_network(each.key)].append(each)
        too_many: list[Connection] = []
        left: list[Connection] = []
        for connections in by_address.values():
            over = max(0, len(connections) - self._limits.unproven_per_address_max)
            if over:
                connections.sort(key=_last_to_go)
            too_many += connections[:over]
            left += connections[over:]
        over = len(left) - self._limits.unproven_max
        if over > 0:
            left.sort(key=_last_to_go)
            too_many += left[:over]
        for each in too_many:
            self.close(each, "unproven")
        if too_many and (count := self._told.count(len(too_many), now)):
            busiest = max(by_address, key=lambda address: len(by_address[address]))
            log.warning(
                "too many connections show no certificate: %d were closed, most of them from %s",
                count,
                _shown(by_address[busiest][0].key),
            )

    def _with_socket(self, connection: Connection, act: Callable[[socket.socket], None]) -> bool:
        if connection.descriptor < 0:
            self.look()
        try:
            # a descriptor of our own: gRPC closes its own when it likes, and the number may be another's then
            descriptor = os.dup(connection.descriptor)
        except OSError:
            return False
        with socket.socket(fileno=descriptor) as ours, suppress(OSError):
            if _peer_key(descriptor) == connection.key:
                act(ours)
                return True
        return False


def _last_to_go(connection: Connection) -> tuple[bool, float]:
    """Return the key that sorts connections without a call; those in front are closed first."""
    return _bytes_received(connection.descriptor) >= CERTIFICATE_BYTES_MIN, connection.since


class Told:
    """Counts events that the log tells of once a minute at most."""

    def __init__(self) -> None:
        self._untold = 0
        self._next = 0.0

    def count(self, more: int, now: float) -> int:
        """Add *more*; return the number to tell of now, or 0."""
        self._untold += more
        if now < self._next:
            return 0
        self._next, told, self._untold = now + TELL_SECONDS, self._untold, 0
        return told


def _shut_down(ours: socket.socket) -> None:
    ours.shutdown(socket.SHUT_RDWR)


def _slow_down(ours: socket.socket) -> None:
    # The least that the kernel takes (socket(7)): it then tells the other end of a window that small, which
    # is a few hundred calls a second instead of tens of thousands.
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, 1)


# a connection has the same text for each of its calls
@lru_cache(maxsize=1024)
def key_of(peer: str) -> bytes | None:
    """Return a connection's key from gRPC's text for its peer: `ipv4:1.2.3.4:5`, `ipv6:%5B::1%5D:5`."""
    family, _, place = peer.partition(":")
    host, _, port = unquote(place).rpartition(":")
    try:
        if family == "ipv4":
            return socket.inet_pton(socket.AF_INET, host) + struct.pack(">H", int(port))
        if family == "ipv6":
            address = socket.inet_pton(socket.AF_INET6, host.strip("[]").partition("%")[0])
            return address.removeprefix(_MAPPED) + struct.pack(">H", int(port))
    except (OSError, ValueError, struct.error):
        pass
    return None


def _network(key: bytes) -> bytes:
    return key[:-2] if len(key) == 6 else key[:_PREFIX_BYTES]


def _shown(key: bytes) -> str:
    if len(key) == 6:
        return socket.inet_ntop(socket.AF_INET, key[:4])
    return socket.inet_ntop(socket.AF_INET6, key[:_PREFIX_BYTES] + bytes(8)) + "/64"


# Not the socket module's, which takes four system calls to make an object of a descriptor. PyDLL: it is
# quicker to keep the interpreter's lock for a call that never waits.
_libc: Final = ctypes.PyDLL(None)
_address: Final = ctypes.create_string_buffer(_SOCKADDR_BYTES)
_info: Final = ctypes.create_string_buffer(_INFO_BYTES)
_length: Final = ctypes.c_uint32()
_length_at: Final = ctypes.byref(_length)


def peers() -> Iterator[tuple[int, bytes]]:
    """Yield each descriptor of ours that is an internet socket with another end, and that end's key."""
    for descriptor in range(_table_size()):
        if (key := _peer_key(descriptor)) is not None:
            yield descriptor, key


def _peer_key(descriptor: int) -> bytes | None:
    return _key(_libc.getpeername, descriptor)


def _local_port(descriptor: int) -> int:
    key = _key(_libc.getsockname, descriptor)
    return int.from_bytes(key[-2:], "big") if key else 0


def _key(ask: Callable[..., int], descriptor: int) -> bytes | None:
    _length.value = _SOCKADDR_BYTES
    if ask(descriptor, _address, _length_at) != 0:
        return None
    raw = _address.raw
    family = int.from_bytes(raw[:2], "little" if _LITTLE else "big")
    if family == socket.AF_INET:
        return raw[4:8] + raw[2:4]
    if family == socket.AF_INET6:
        return raw[8:24].removeprefix(_MAPPED) + raw[2:4]
    return None


def _bytes_received(descriptor: int) -> int:
    _length.value = _INFO_BYTES
    # tcp(7), TCP_INFO: an older kernel, or a socket that has gone, gives less
    if _libc.getsockopt(descriptor, socket.IPPROTO_TCP, socket.TCP_INFO, _info, _length_at) != 0:
        return 0
    if _length.value < _INFO_BYTES:
        return 0
    return int.from_bytes(_info.raw[_RECEIVED_AT:_INFO_BYTES], sys.byteorder)


_LITTLE: Final = struct.pack("=H", 1) == b"\1\0"


def _table_size() -> int:
    """Return the size of our descriptor table in the kernel: all open ones are below (proc(5))."""
    with open("/proc/self/status", "rb") as status:
        return int(status.read().partition(b"FDSize:")[2].split(None, 1)[0])
