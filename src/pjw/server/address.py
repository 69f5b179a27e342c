"""The addresses pjwd listens on: their syntax, whether they are free, and which hosts could reach them."""

import errno
import ipaddress
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final

from pjw.errors import ConfigError
from pjw.given import DEFAULT_ADDRESS

# Ports that are tried for one that is free at every address of a name.
PORTS_TRIED: Final = 16
_ABSENT: Final = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)

# family and address, as getaddrinfo(3) gives them
_Resolved = tuple[socket.AddressFamily, tuple[Any, ...]]


def parse_address(text: str) -> tuple[str, int]:
    """Split HOST:PORT; an IPv6 address is in brackets. Raises ConfigError."""
    host, colon, port = text.rpartition(":")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ConfigError(
            f"{text!r} is not HOST:PORT", hint="an address of IPv6 is in brackets, for example [::1]:50051"
        )
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isascii() or not port.isdecimal():
        raise ConfigError(
            f"{text!r} is not HOST:PORT", hint=f"for example {DEFAULT_ADDRESS}, or [::1]:0 for any free port"
        )
    if len(port) > len("65535") or int(port) > 65_535:
        raise ConfigError(f"{text!r} is not HOST:PORT", hint="a port is a number from 0 to 65535")
    return host, int(port)


def shown_address(host: str, port: int) -> str:
    """Format HOST:PORT, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def metrics_exposure(host: str, port: int) -> str | None:
    """Return a warning when other hosts may reach the address of metrics."""
    if _is_loopback(host):
        return None
    return (
        f"other hosts may reach the metrics at {shown_address(host, port)}, without TLS or a password;"
        " names of clients are among them"
    )


def _is_loopback(host: str) -> bool:
    # a name has the address that the resolver gives today; localhost is loopback by definition (RFC 6761)
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextmanager
def held_addresses(host: str, port: int, purpose: str = "") -> Iterator[list[tuple[str, int]]]:
    """Hold every address of a name, at one port, so that only we can listen there; port 0 is any free one.

    *purpose* follows the address in errors. Raises ConfigError, which names the address that pjwd cannot
    have. pjwd takes all addresses of a name or none: another process at the others would get some clients.
    """
    shown = f"{shown_address(host, port)}{purpose}"
    addresses = _resolve(host, port, shown)
    for attempt in range(PORTS_TRIED):
        with ExitStack() as stack:
            try:
                held = _hold(stack, addresses, shown)
            except _TakenError as error:
                if port != 0 or attempt == PORTS_TRIED - 1:
                    raise error.worded from None
                # another address lacks the port that was free at the first: try another port
                continue
            yield held
            return


class _TakenError(Exception):
    """Another process has one of the addresses."""

    def __init__(self, worded: ConfigError) -> None:
        super().__init__()
        self.worded: Final = worded


def _resolve(host: str, port: int, shown: str) -> list[_Resolved]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise ConfigError(f"cannot listen on {shown}: {why}") from None
    # without repetitions: a hosts file may have a line twice
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


def _hold(stack: ExitStack, addresses: Sequence[_Resolved], shown: str) -> list[tuple[str, int]]:
    held: list[tuple[str, int]] = []
    absent: list[ConfigError] = []
    for family, address in addresses:
        host, port = str(address[0]), held[0][1] if held else int(address[1])
        try:
            # It does not listen, so gRPC, which also sets SO_REUSEADDR, may bind it as well (socket(7)).
            holder = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind((host, port, *address[2:]))
        except OSError as error:
            worded = _no_address(shown, shown_address(host, port), len(addresses), error)
            if error.errno == errno.EADDRINUSE and held:
                raise _TakenError(worded) from None
            # No other process can have a loopback address that this host lacks, such as ::1 without IPv6.
            if not (error.errno in _ABSENT and ipaddress.ip_address(host.partition("%")[0]).is_loopback):
                raise worded from None
            absent.append(worded)
            continue
        held.append((host, int(holder.getsockname()[1])))
    if not held:
        raise absent[0]
    return held


def _no_address(shown: str, address: str, count: int, error: OSError) -> ConfigError:
    why = (error.strerror or str(error)).lower()
    if count == 1:
        return ConfigError(f"cannot listen on {shown}: {why}")
    return ConfigError(
        f"cannot listen on {shown}: {why}: {address}, one of the {count} addresses of this name",
        hint="listen on the one address that clients reach, or make it free",
    )
