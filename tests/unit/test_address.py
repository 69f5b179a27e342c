"""A name is listened on whole, or not at all (B3)."""

import socket
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from pjw.errors import ConfigError
from pjw.server.address import held_addresses

FIRST, SECOND, THIRD = "127.0.1.1", "127.0.1.2", "127.0.1.3"
Resolved = tuple[socket.AddressFamily, int, int, str, tuple[object, ...]]


@pytest.fixture
def name(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """A name with these addresses."""

    def resolve(*addresses: str) -> str:
        def getaddrinfo(host: str, port: int, **_: object) -> list[Resolved]:
            assert host == "name"
            family = {True: socket.AF_INET6, False: socket.AF_INET}
            rest = {True: (0, 0), False: ()}
            return [
                (family[":" in each], socket.SOCK_STREAM, 6, "", (each, port, *rest[":" in each]))
                for each in addresses
            ]

        monkeypatch.setattr("pjw.server.address.socket.getaddrinfo", getaddrinfo)
        return "name"

    return resolve


def test_one_port_at_every_address(name: Callable[..., str]) -> None:
    """Of port 0, too; a line of the file of hosts that is there twice is one."""
    with held_addresses(name(FIRST, SECOND, FIRST), 0) as held:
        (first, port), (second, other) = held
    assert (first, second, port > 0) == (FIRST, SECOND, True)
    assert port == other


def test_a_port_that_is_free_at_the_first_address_alone(
    name: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Port 0 takes the next; a port that was named is refused, with the address that somebody has."""
    host = name(FIRST, SECOND)
    bind = socket.socket.bind
    with ExitStack() as others:

        def bind_after_somebody(self: socket.socket, address: tuple[str, int]) -> None:
            # who takes at the second address the first port that we get at the first one
            bind(self, address)
            if address == (FIRST, 0) and not taken:
                taken.append(self.getsockname()[1])
                others.enter_context(socket.create_server((SECOND, taken[0])))

        taken: list[int] = []
        monkeypatch.setattr(socket.socket, "bind", bind_after_somebody)
        with held_addresses(host, 0) as held:
            assert held[0][1] == held[1][1] != taken[0]
        with (
            pytest.raises(ConfigError) as refused,
            held_addresses(host, taken[0]),
        ):
            pass
    assert str(refused.value) == (
        f"cannot listen on name:{taken[0]}: address already in use:"
        f" {SECOND}:{taken[0]}, one of the 2 addresses of this name"
    )
    assert refused.value.hint


def test_what_this_host_does_not_have(name: Callable[..., str]) -> None:
    """An address of another host is refused; of loopback, which nobody else has, it is left out."""
    with (
        pytest.raises(ConfigError, match=r"192\.0\.2\.1:\d+, one of the 2 addresses of this name"),
        held_addresses(name(FIRST, "192.0.2.1"), 0),
    ):
        pass
    with pytest.raises(ConfigError, match="cannot listen on name:0: "), held_addresses(name("192.0.2.1"), 0):
        pass


def test_loopback_without_ipv6(name: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A container often has none, and a line for it in its file of hosts all the same."""
    made = socket.socket

    def without_ipv6(family: socket.AddressFamily, kind: socket.SocketKind) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(97, "Address family not supported by protocol")
        return made(family, kind)

    host = name("::1", FIRST)
    monkeypatch.setattr("pjw.server.address.socket.socket", without_ipv6)
    with held_addresses(host, 0) as held:
        assert [address for address, _ in held] == [FIRST]
    with (
        pytest.raises(ConfigError, match="address family not supported by protocol"),
        held_addresses(name("::1"), 0),
    ):
        pass
