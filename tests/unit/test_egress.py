"""The proxy of jobs, in this process and over real sockets; a stand-in resolver says what leads where."""

import asyncio
import contextlib
import errno
import ipaddress
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import pytest

from pjw.egress import proxy as proxies
from pjw.egress import targets
from pjw.egress.proxy import HEAD_BYTES_MAX, Proxy
from pjw.egress.targets import Targets

ALLOWED: Final = ("good.test", "good.test:5432", "two.test", "bad.test", "gone.test")
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Internet:
    """A host on loopback, a resolver that counts, a proxy for jobs 1 and 2 (alice), 3 (bob), 4 (carol)."""

    def __init__(self) -> None:
        self.told: Final[list[tuple[int, str, str, int, str]]] = []
        self.names: Final[dict[str, list[str]]] = {"good.test": ["127.1.0.1"], "bad.test": ["127.2.0.1"]}
        self.asked: Final[list[str]] = []
        self.ports: Final[dict[int, int]] = {}
        self.seen = b""
        self.proxy: Proxy
        self.addresses: Final[dict[tuple[int, str], Any]] = {}

    async def getaddrinfo(self, host: str, port: int, **_: object) -> list[Any]:
        """As the loop's."""
        self.asked.append(host)
        if host not in self.names:
            raise socket.gaierror(socket.EAI_NONAME, "no such host")
        found = self.names[host]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in found]

    def results(self) -> list[str]:
        """What was told of connections."""
        return [result for *_, result in self.told]

    async def ask(self, data: bytes, job: int = 1, host: str = "", *, end: bool = True) -> bytes:
        """Send this to a listener of a job; all that comes back."""
        reader, writer = await asyncio.open_connection(*self.addresses[job, host])
        with contextlib.suppress(ConnectionError):
            writer.write(data)
            await writer.drain()
            if end:
                writer.write_eof()
        try:
            with contextlib.suppress(ConnectionResetError):
                return await asyncio.wait_for(reader.read(), 20)
            return b""
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers with the head of the request, and with its body."""
    head = await reader.readuntil(b"\r\n\r\n")
    body = b""
    if b"chunked" in head:
        while size := int(await reader.readline(), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readline()
    else:
        length = next(
            (line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")), b":0"
        )
        body = await reader.readexactly(int(length.partition(b":")[2]))
    said = head + body
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(said))
    writer.write(b"" if head.startswith(b"HEAD") else said)
    # it stays open: who asked for one answer gets one
    await reader.read()
    writer.close()


@contextlib.asynccontextmanager
async def opened(serve: Serve = answer, most: int = 3, total: int = 8) -> AsyncIterator[Internet]:
    """All of it, with one host that serves so."""
    internet = Internet()
    loop = asyncio.get_running_loop()
    served: list[asyncio.Task[None] | None] = []

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.append(asyncio.current_task())
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await serve(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    sock_connect = loop.sock_connect

    async def connect(made: socket.socket, address: tuple[str, int]) -> None:
        # the ports of the web are somebody else's here
        await sock_connect(made, (address[0], host_port) if address[0].startswith("127.1.") else address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "getaddrinfo", internet.getaddrinfo)
        patch.setattr(loop, "sock_connect", connect)
        server = await asyncio.start_server(serve_one, "127.1.0.1", 0)
        host_port = server.sockets[0].getsockname()[1]
        internet.proxy = Proxy(
            Targets(["127.1.0.0/16"]), lambda *each: internet.told.append(each), most, total
        )
        for job, client in ((1, "alice"), (2, "alice"), (3, "bob"), (4, "carol")):
            listeners = []
            for host, port in (("", 3128), ("good.test", 5432)):
                listener = socket.create_server(("127.0.0.1", 0))
                listener.setblocking(False)
                internet.addresses[job, host] = listener.getsockname()
                listeners.append((listener, host, port))
            internet.proxy.add(job, client, ALLOWED, listeners)
        try:
            yield internet
        finally:
            for job in (1, 2, 3, 4):
                internet.proxy.remove(job)
            server.close()
            await asyncio.gather(*filter(None, served))


GET: Final = (
    b"GET http://good.test/a?b HTTP/1.1\r\nHost: other.test\r\nProxy-Authorization: x\r\nX-Own: 1\r\n\r\n"
)


async def test_a_request() -> None:
    """The host gets it in its own form, and what is for the proxy alone is left out."""
    async with opened() as internet:
        got = await internet.ask(GET, end=False)
        head, _, body = got.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK")
        assert b"connection: close" in head.lower()
        assert body.lower().splitlines() == [
            *(b"get /a?b http/1.1", b"host: good.test", b"x-own: 1", b"connection: close", b""),
        ]
        assert internet.told == [(1, "alice", "good.test", 80, "connected")]


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        (b"Content-Length: 4\r\n", b"body"),
        (b"Transfer-Encoding: chunked\r\n", b"2\r\nbo\r\n2\r\ndy\r\n0\r\n\r\n"),
        # which of the two counts is not left to the host
        (b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n", b"2\r\nbo\r\n2\r\ndy\r\n0\r\n\r\n"),
    ],
)
async def test_a_body(headers: bytes, body: bytes) -> None:
    """Whole; what follows is no second request."""
    async with opened() as internet:
        request = b"POST http://good.test/ HTTP/1.1\r\nHost: good.test\r\n" + headers + b"\r\n" + body
        got = await internet.ask(request + b"GET /second HTTP/1.1\r\nHost: good.test\r\n\r\n", end=False)
        sent = got.partition(b"\r\n\r\n")[2]
        assert sent.endswith(b"\r\n\r\nbody")
        assert b"second" not in sent
        assert not (b"content-length" in sent.lower() and b"transfer-encoding" in sent.lower())


async def test_a_head_has_no_body() -> None:
    """Nor does the proxy wait for one; and an old client gets what it can read."""
    async with opened() as internet:
        got = await internet.ask(b"HEAD http://good.test/ HTTP/1.0\r\n\r\n", end=False)
        assert got.startswith(b"HTTP/1.1 200")
        assert got.endswith(b"\r\n\r\n")


async def test_a_tunnel() -> None:
    """To the byte, what came with the request included; each end is passed on."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = await reader.read()
        writer.write(data[::-1])
        writer.close()

    async with opened(echo) as internet:
        data = bytes(range(256)) * 4096
        for job, host, first in ((1, "", b"CONNECT good.test:443 HTTP/1.0\r\n\r\n"), (2, "good.test", b"")):
            got = await internet.ask(first + data, job, host)
            assert got.removeprefix(b"HTTP/1.1 200 Connection established\r\n\r\n") == data[::-1]
        assert internet.results() == ["connected", "connected"]


@pytest.mark.parametrize(
    ("request_", "status", "result"),
    [
        (b"CONNECT other.test:443 HTTP/1.0\r\n\r\n", 403, "not_allowed"),
        (b"CONNECT good.test:22 HTTP/1.0\r\n\r\n", 403, "not_allowed"),
        (b"CONNECT bad.test:443 HTTP/1.0\r\n\r\n", 403, "private"),
        (b"CONNECT gone.test:443 HTTP/1.0\r\n\r\n", 502, "unresolved"),
        (b"CONNECT 127.1.0.1:80 HTTP/1.0\r\n\r\n", 403, "not_allowed"),
        (b"CONNECT [::1]:80 HTTP/1.0\r\n\r\n", 403, "not_allowed"),
        (b"CONNECT 0.0.0.0:80 HTTP/1.0\r\n\r\n", 403, "not_allowed"),
        (b"CONNECT [::ffff:127.1.0.1]:80 HTTP/1.0\r\n\r\n", 400, "invalid"),
        (b"CONNECT 2130771969:80 HTTP/1.0\r\n\r\n", 400, "invalid"),
        (b"CONNECT 0177.1.0.1:80 HTTP/1.0\r\n\r\n", 400, "invalid"),
        (b"CONNECT 0x7f.1.0.1:80 HTTP/1.0\r\n\r\n", 400, "invalid"),
        (b"CONNECT 127.1:80 HTTP/1.0\r\n\r\n", 400, "invalid"),
        (b"CONNECT ::1:80 HTTP/1.0\r\n\r\n", 400, "invalid"),
        (b"CONNECT good.test HTTP/1.0\r\n\r\n", 400, "invalid"),
        (b"CONNECT good.test:0 HTTP/1.0\r\n\r\n", 400, "invalid"),
        (b"CONNECT good.test@other.test:443 HTTP/1.0\r\n\r\n", 400, "invalid"),
        (b"CONNECT good.test:443 HTTP/1.0\r\nContent-Length: 5\r\n\r\n12345", 400, "invalid"),
        (b"GET http://good.test@other.test/ HTTP/1.1\r\nHost: a\r\n\r\n", 400, "invalid"),
        (b"GET http://other.test/ HTTP/1.1\r\nHost: good.test\r\n\r\n", 403, "not_allowed"),
        (b"GET https://good.test/ HTTP/1.1\r\nHost: a\r\n\r\n", 400, "invalid"),
        (b"GET / HTTP/1.1\r\nHost: good.test\r\n\r\n", 400, "invalid"),
        (b"GET ftp://good.test/ HTTP/1.1\r\nHost: a\r\n\r\n", 400, "invalid"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", 505, "invalid"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, "invalid"),
        (b"GET http://good.test/ HTTP/1.1\r\nX: " + b"x" * 4 * HEAD_BYTES_MAX + b"\r\n\r\n", 431, "invalid"),
        (b"GET http://good.test/ HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400, "invalid"),
        (b"GET http://good.test/ HTTP/1.1\r\nHost: a\r\nX : b\r\n\r\n", 400, "invalid"),
    ],
)
async def test_what_is_refused(request_: bytes, status: int, result: str) -> None:
    """With a status, whole; nobody is connected to."""

    async def unwanted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raise AssertionError("somebody was connected to the host")

    async with opened(unwanted) as internet:
        got = await internet.ask(request_, end=False)
        assert got.startswith(b"HTTP/1.1 %d " % status), got
        assert internet.results() == [result]


async def test_a_request_that_comes_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then does not keep a connection."""
    monkeypatch.setattr(proxies, "HEAD_SECONDS", 0.1)
    async with opened() as internet:
        got = await internet.ask(b"GET http://good.test/ HTTP/1.1\r\nX-", end=False)
        assert got.startswith(b"HTTP/1.1 408 ")
        assert internet.results() == ["slow"]
        # one that says nothing and goes is nobody
        assert await internet.ask(b"") == b""
        assert internet.results() == ["slow"]


async def test_a_name_is_resolved_once() -> None:
    """What it leads to a moment later does not count, and of several addresses only those that may."""
    async with opened() as internet:
        internet.names["two.test"] = ["127.2.0.1", "127.1.0.1", "169.254.169.254"]
        request = b"GET http://two.test/ HTTP/1.1\r\nHost: a\r\n\r\n"
        assert (await internet.ask(request, end=False)).startswith(b"HTTP/1.1 200 ")
        assert internet.asked == ["two.test"]
        internet.names["two.test"] = ["127.2.0.1"]
        assert (await internet.ask(request, end=False)).startswith(b"HTTP/1.1 403 ")
        assert internet.asked == ["two.test"] * 2


@pytest.mark.parametrize(
    ("address", "public"),
    [
        *(("11.0.0.1", True), ("2600::1", True), ("64:ff9b::b00:1", True), ("10.1.2.3", True)),
        *(
            (each, False)
            for each in ("10.2.0.1", "192.168.0.1", "172.16.0.1", "100.64.0.1", "169.254.169.254")
        ),
        *((each, False) for each in ("127.0.0.1", "0.0.0.1", "255.255.255.255", "224.0.0.1", "198.18.0.1")),
        *(
            (each, False)
            for each in ("::1", "::", "fe80::1", "fd00::1", "ff02::1", "::ffff:11.0.0.1", "::11.0.0.1")
        ),
        *(
            (each, False)
            for each in ("64:ff9b::7f00:1", "64:ff9b:1::1", "2002:7f00:1::", "2001::1", "fec0::1")
        ),
        # translated to IPv4 (RFC 2765), and what nobody has
        *((each, False) for each in ("::ffff:0:7f00:1", "5f00::1", "4000::1")),
    ],
)
def test_which_addresses_are_the_internet_s(address: str, public: bool) -> None:
    """None of a private network, of this host, of a tunnel to one; and those that the operator lists."""
    assert Targets(["10.1.0.0/16"]).is_public(ipaddress.ip_address(address)) == public


def test_this_host_s_own_address_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is called on the internet."""
    loopback = ipaddress.ip_address("127.0.0.1")
    monkeypatch.setattr(ipaddress.IPv4Address, "is_global", True)
    assert not Targets([]).is_public(loopback)
    assert Targets([]).is_public(ipaddress.ip_address("11.0.0.1"))


async def test_a_name_with_thousands_of_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs as much as one with some."""
    asked: list[Any] = []
    judge = Targets.is_public

    def is_public(self: Targets, address: Any) -> bool:
        asked.append(address)
        return judge(self, address)

    monkeypatch.setattr(Targets, "is_public", is_public)
    async with opened() as internet:
        internet.names["good.test"] = [f"127.1.{number // 250}.{1 + number % 250}" for number in range(5000)]
        assert (await internet.ask(GET, end=False)).startswith(b"HTTP/1.1 200 ")
        assert len(asked) == targets.ADDRESSES_MAX


def test_an_address_of_which_nobody_can_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Is this host's own: where descriptors or ports are short, no job reaches the host by that."""

    def fail(*_: object) -> None:
        raise OSError(errno.EMFILE, "too many")

    monkeypatch.setattr("pjw.egress.targets.socket.socket", fail)
    assert not Targets([]).is_public(ipaddress.ip_address("11.0.0.1"))


async def test_names_that_nobody_answers_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take some of the threads that look names up, also when nobody waits for them; others have the rest."""
    monkeypatch.setattr(targets, "RESOLVE_SECONDS", 0.2)
    hanging = asyncio.Event()
    asked: list[str] = []
    async with opened(most=40, total=80) as internet:

        async def look_up(host: str, port: int, **more: object) -> list[Any]:
            asked.append(host)
            if host == "gone.test":
                await hanging.wait()
            return await internet.getaddrinfo(host, port, **more)

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", look_up)
        request = b"CONNECT gone.test:443 HTTP/1.0\r\n\r\n"
        for _ in range(2):
            got = await asyncio.gather(*(internet.ask(request, job) for job in (1, 2) for _ in range(6)))
            assert {each.split(b" ")[1] for each in got} == {b"504"}
            assert asked.count("gone.test") == targets.LOOKUPS_OF_CLIENT
        assert (await internet.ask(GET, 3, end=False)).startswith(b"HTTP/1.1 200 ")
        hanging.set()
        assert (await internet.ask(GET, 1, end=False)).startswith(b"HTTP/1.1 200 ")


async def test_how_many_connections_there_may_be() -> None:
    """Of one job, of one client, of all; more are told so, and one that ends makes room."""
    held: list[asyncio.StreamWriter] = []

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held.append(writer)
        await reader.read()
        writer.close()

    connect = b"CONNECT good.test:443 HTTP/1.0\r\n\r\n"
    async with opened(hold, most=3, total=8) as internet:
        streams = []

        async def tunnel(job: int) -> bytes:
            reader, writer = await asyncio.open_connection(*internet.addresses[job, ""])
            streams.append(writer)
            with contextlib.suppress(ConnectionError):
                writer.write(connect)
                return await reader.readline()
            return b""

        for job, told in ((1, 3), (2, 1), (3, 2)):
            for _ in range(told):
                assert b" 200 " in await tunnel(job)
        busy = len(internet.results())
        for job in (1, 2, 3):
            assert b" 200 " not in await tunnel(job)
        assert internet.results()[busy:] == ["busy"] * 3
        # two clients together do not have all
        assert b" 200 " in await tunnel(4)
        # the end of a job is that of its connections
        internet.proxy.remove(1)
        async with asyncio.timeout(10):
            while b" 200 " not in await tunnel(2):
                pass
        for each in streams:
            each.close()


@pytest.mark.parametrize(
    "request_", [GET, b"CONNECT good.test:443 HTTP/1.0\r\n\r\n"], ids=["request", "tunnel"]
)
async def test_a_job_that_hangs_up_on_a_host_without_an_answer(request_: bytes) -> None:
    """Has room for others at once."""
    came, over = asyncio.Event(), asyncio.Event()

    async def say_nothing(_: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
        came.set()
        await over.wait()

    async with opened(say_nothing, most=1) as internet:
        before = len(os.listdir("/proc/self/fd"))
        with socket.create_connection(internet.addresses[1, ""]) as peer:
            peer.sendall(request_)
            await asyncio.wait_for(came.wait(), 10)
            # a reset
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        try:
            async with asyncio.timeout(10):
                # what is left is the host's own end
                while len(os.listdir("/proc/self/fd")) > before + 1:
                    await asyncio.sleep(0)
        finally:
            over.set()


async def test_a_host_that_speaks_something_else() -> None:
    """Is told as such, before there is an answer; one that breaks off in mid-answer ends the connection."""

    async def odd(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(said)
        writer.close()

    for said, got in (
        (b"SSH-2.0-OpenSSH\r\n\r\n", b"HTTP/1.1 502 "),
        (b"", b"HTTP/1.1 502 "),
        (b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\n", b"HTTP/1.1 502 "),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc", b"HTTP/1.1 200 "),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No\r\n\r\n", b"HTTP/1.1 100 "),
    ):
        async with opened(odd) as internet:
            assert (await internet.ask(GET, end=False)).startswith(got), said
