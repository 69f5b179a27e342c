"""From a name to the addresses that a job may reach: resolved once, judged, and used as they are."""

import asyncio
import errno
import ipaddress
import socket
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Any, Final

from pjw.egress.proxy_requests import Failure

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

RESOLVE_SECONDS: Final = 15.0
CONNECT_SECONDS: Final = 15.0
# A name may have many addresses, and each that does not answer takes its time.
ADDRESSES_MAX: Final = 4
# One client may have so many names looked up at once, fewer than there are threads for lookups: a name whose
# servers do not answer takes a thread for longer than its connection waits.
LOOKUPS_OF_CLIENT: Final = 8
# The addresses of the internet; the rest of those that is_global allows lead nowhere, or to a translator.
_INTERNET: Final = ipaddress.IPv6Network("2000::/3")
# Addresses that lead to the IPv4 address in their last 32 bits (RFC 6052), and tunnels with one elsewhere.
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
_TUNNELS: Final = (*map(ipaddress.IPv6Network, ("2002::/16", "2001::/32")),)


class Targets:
    """Judges addresses: jobs may reach those of the internet, and those in ranges that the operator lists."""

    def __init__(self, private: Sequence[str]) -> None:
        self._private: Final[list[Network]] = [ipaddress.ip_network(each) for each in private]
        self._lookups: Final = defaultdict[str, asyncio.Semaphore](
            partial(asyncio.Semaphore, LOOKUPS_OF_CLIENT)
        )

    async def connect(self, host: str, port: int, client: str) -> socket.socket:
        """Connect a client to a host, at one of the addresses that it has now. Raises Failure."""
        addresses = await _resolve(host, port, self._lookups[client])
        # each question for one costs system calls, and a name may lead to thousands
        good = list(islice(filter(self.is_public, addresses), ADDRESSES_MAX))
        if not good:
            shown = addresses[0] if addresses else "nothing"
            raise Failure(
                "private",
                403,
                f"{host} leads to {shown}, which is no address of the internet; the operator can list its"
                " range ([network] private)",
            )
        why: OSError | None = None
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                for address in good:
                    try:
                        return await _connect(address, port)
                    except OSError as error:
                        why = error
        except TimeoutError:
            raise Failure("unreachable", 504, f"{host} port {port} does not answer") from None
        said = why.strerror if why is not None and why.strerror else "no address"
        raise Failure("unreachable", 502, f"cannot connect to {host} port {port}: {said.lower()}")

    def is_public(self, address: Address) -> bool:
        """Return whether jobs may reach an address."""
        if any(address in network for network in self._private if network.version == address.version):
            return True
        if isinstance(address, ipaddress.IPv6Address):
            if address in _NAT64:
                return self.is_public(ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF))
            if address not in _INTERNET or any(address in tunnel for tunnel in _TUNNELS):
                return False
        return address.is_global and not address.is_multicast and not _is_own(address)


def _is_own(address: Address) -> bool:
    """Return whether it is this host's address: only those can be bound to. It counts if unknown."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((str(address), 0))
    except OSError as error:
        # the second: there is no IPv6 here, so nothing is connected to by it either
        return error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
    return True


def _asked(lookups: asyncio.Semaphore, asked: asyncio.Future[Any]) -> None:
    lookups.release()
    # the connection may have given up, and does not look at the result then
    if not asked.cancelled():
        asked.exception()


async def _resolve(host: str, port: int, lookups: asyncio.Semaphore) -> list[Address]:
    """Return the addresses of a host. Raises Failure."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(RESOLVE_SECONDS):
            await lookups.acquire()
            asked = asyncio.ensure_future(loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))
            # its thread is taken until then, whether or not a caller still waits
            asked.add_done_callback(partial(_asked, lookups))
            found = await asyncio.shield(asked)
    except TimeoutError:
        raise Failure("unresolved", 504, f"cannot resolve {host}: no answer in time") from None
    except (OSError, UnicodeError, RuntimeError):
        # RuntimeError: there is no thread for it
        raise Failure("unresolved", 502, f"cannot resolve {host}: no such host, or no resolver") from None
    # an address with a scope is link-local
    return list(dict.fromkeys(ipaddress.ip_address(str(each[4][0]).partition("%")[0]) for each in found))


async def _connect(address: Address, port: int) -> socket.socket:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setblocking(False)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().sock_connect(made, (str(address), port))
    except BaseException:
        made.close()
        raise
    return made
