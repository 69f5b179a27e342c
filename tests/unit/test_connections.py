"""The connections of a port by themselves: real sockets on loopback, without gRPC."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Final

import pytest

from pjw.errors import LimitReachedError
from pjw.server import connections
from pjw.server.connections import CERTIFICATE_BYTES_MIN, Connections, PortLimits, key_of

SECONDS: Final = 30


class Port:
    """A socket that listens, and what has connected to it."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack: Final = stack
        self.listener: Final = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.number: Final = self.listener.getsockname()[1]

    def connect(self, sent: bytes = b"") -> tuple[socket.socket, str]:
        """A client; and what gRPC calls it. The server's end is open as gRPC's would be."""
        client = self._stack.enter_context(socket.create_connection(("127.0.0.1", self.number), SECONDS))
        client.settimeout(SECONDS)
        ours, (host, port) = self.listener.accept()
        self._stack.enter_context(ours)
        if sent:
            client.sendall(sent)
            # so that the kernel has it: as many bytes are there to be looked at
            ours.recv(len(sent), socket.MSG_PEEK | socket.MSG_WAITALL)
        return client, f"ipv4:{host}:{port}"


@pytest.fixture
def port() -> Iterator[Port]:
    """A port of one's own."""
    with ExitStack() as stack:
        yield Port(stack)


def watching(port: Port, per_client: int = 0, **limits: int) -> Connections:
    """What looks at that port."""
    found = Connections(PortLimits(**limits), lambda: per_client)
    found.listens_on(port.number)
    return found


def has_been_closed(client: socket.socket) -> bool:
    """Whether the server has hung up; false at once while it has not."""
    client.setblocking(False)
    try:
        return client.recv(1) == b""
    except BlockingIOError:
        return False


async def test_numbers(port: Port) -> None:
    """What is open, by whether a call has come, and what was accepted; other ports' are not ours."""
    found = watching(port)
    with ExitStack() as stack:
        other = Port(stack)
        other.connect()
        peers = [port.connect()[1] for _ in range(3)]
        for _ in peers:
            found.accepted()
        await asyncio.sleep(0)
        found.call_came(peers[0], "alice")
        found.look()
        numbers = found.numbers()
    assert (numbers.accepted, numbers.open, numbers.unproven) == (3, 3, 2)
    assert numbers.closed == {"unproven": 0, "connections_max": 0, "rate": 0}


async def test_numbers_cost_no_more_than_their_share(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks again at once is told the same, without another look at every descriptor."""
    found, looks = watching(port), []

    def peers() -> Iterator[tuple[int, bytes]]:
        looks.append(1)
        return iter(())

    monkeypatch.setattr(connections, "peers", peers)
    found.numbers()
    found.numbers()
    assert looks == [1]


async def test_the_oldest_without_a_call_are_closed(port: Port) -> None:
    """Of those from one address; one that has sent a certificate, or a call, stays."""
    found = watching(port, unproven_per_address_max=2)
    proven, peer = port.connect()
    found.call_came(peer, "alice")
    handshaking, _ = port.connect(bytes(CERTIFICATE_BYTES_MIN))
    idle = []
    for _ in range(3):
        idle.append(port.connect(b"hello")[0])
        found.look()
    assert [has_been_closed(each) for each in (proven, handshaking, *idle)] == [
        False,
        False,
        True,
        True,
        False,
    ]
    assert found.numbers().closed["unproven"] == 2


async def test_the_sum_of_those_without_a_call_is_bounded(port: Port) -> None:
    """Whatever their addresses."""
    found = watching(port, unproven_max=1)
    clients = []
    for _ in range(3):
        clients.append(port.connect()[0])
        found.look()
    assert [has_been_closed(each) for each in clients] == [True, True, False]


async def test_one_too_many_of_a_client(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its calls are refused, and it is closed in a moment; those before it and other clients are not."""
    monkeypatch.setattr(connections, "LATER_SECONDS", 0.01)
    found = watching(port, per_client=1)
    (first, first_peer), (second, second_peer), (other, other_peer) = (port.connect() for _ in range(3))
    for peer, client in ((first_peer, "alice"), (other_peer, "bob"), (second_peer, "alice")):
        found.call_came(peer, client)
    found.require_room(first_peer)
    found.require_room(other_peer)
    with pytest.raises(LimitReachedError, match="1 connections at once"):
        found.require_room(second_peer)
    assert await asyncio.get_running_loop().sock_recv(nonblocking(second), 1) == b""
    assert [has_been_closed(each) for each in (first, other)] == [False, False]
    assert found.numbers().closed["connections_max"] == 1


async def test_a_client_is_cut_off_everywhere(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that it has, and nobody else's."""
    monkeypatch.setattr(connections, "LATER_SECONDS", 0.01)
    found = watching(port)
    mine, others = [port.connect() for _ in range(2)], [port.connect()]
    for _, peer in mine:
        found.call_came(peer, "mallory")
    found.call_came(others[0][1], "bob")
    assert found.close_client("mallory", "rate") == 2
    for client, _ in mine:
        assert await asyncio.get_running_loop().sock_recv(nonblocking(client), 1) == b""
    assert not has_been_closed(others[0][0])
    assert found.numbers().closed["rate"] == 2


async def test_a_descriptor_that_is_another_s_by_now(port: Port) -> None:
    """gRPC closes its sockets when it likes: whoever has the number then is not hung up on."""
    found = watching(port)
    with ExitStack() as stack:
        gone = Port(stack)
        found.listens_on(gone.number)
        _, peer = gone.connect()
        found.look()
        connection = found.call_came(peer, "alice")
        assert connection is not None
    # the numbers that were free are taken by another connection
    clients = [port.connect()[0] for _ in range(3)]
    found.close(connection, "rate")
    assert not any(has_been_closed(each) for each in clients)
    assert found.numbers().closed["rate"] == 0


@pytest.mark.parametrize(
    ("peer", "key"),
    [
        ("ipv4:1.2.3.4:5", bytes([1, 2, 3, 4, 0, 5])),
        ("ipv6:%5B::1%5D:258", bytes(15) + bytes([1, 1, 2])),
        ("ipv6:[::ffff:1.2.3.4]:5", bytes([1, 2, 3, 4, 0, 5])),
        ("ipv6:%5Bfe80::1%25eth0%5D:5", bytes([0xFE, 0x80]) + bytes(13) + bytes([1, 0, 5])),
        ("unix:/a/b:5", None),
        ("ipv4:1.2.3.4:65536", None),
        ("ipv4:localhost:5", None),
        ("", None),
    ],
)
def test_what_grpc_calls_a_peer(peer: str, key: bytes | None) -> None:
    """The address of a connection's other end, or nothing."""
    assert key_of(peer) == key


def nonblocking(client: socket.socket) -> socket.socket:
    """As asyncio wants it."""
    client.setblocking(False)
    return client
