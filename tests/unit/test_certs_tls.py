"""TLS 1.3 only: the environment for grpc, and the probe against real servers."""

import os
import socket
import ssl
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from pjw.certs.tls import probe_tls12
from pjw.errors import ConfigError, KernelError
from tests.support import certs_factory

LOOPBACK = "127.0.0.1"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ca, server and client files."""
    directory = tmp_path_factory.mktemp("tls")
    ca = certs_factory.make_ca()
    ca.write(directory, "ca")
    certs_factory.server(ca).write(directory, "server")
    return directory


@contextmanager
def answering(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """A listener that treats one connection with *answer*; gives its port."""
    with socket.create_server((LOOPBACK, 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                answer(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        thread.join()


GRPC_SERVER = """
import os, sys
from pathlib import Path
if sys.argv[2] == "required":
    from pjw.certs.tls import require_tls13_environment
    require_tls13_environment()
import grpc
from concurrent.futures import ThreadPoolExecutor
files = Path(sys.argv[1])
server = grpc.server(ThreadPoolExecutor(1))
pair = ((files / "server.key").read_bytes(), (files / "server.crt").read_bytes())
credentials = grpc.ssl_server_credentials([pair], (files / "ca.crt").read_bytes(), True)
print(server.add_secure_port("127.0.0.1:0", credentials), flush=True)
server.start()
sys.stdin.read()
"""


@pytest.mark.parametrize("mode", ["required", "not required"])
def test_grpc_server_is_told_apart(files: Path, mode: str) -> None:
    """A real grpc server answers TLS 1.2 as it comes, and no longer once the environment was set."""
    # the value that could bring CBC suites back must be overwritten
    environment = {**os.environ, "GRPC_VERBOSITY": "NONE"}
    if mode == "required":
        environment["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-ECDSA-AES128-SHA"
    else:
        environment.pop("GRPC_SSL_CIPHER_SUITES", None)
    command = [sys.executable, "-c", GRPC_SERVER, str(files), mode]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    ) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        assert probe_tls12(LOOPBACK, port) is (mode == "not required")
        assert ssl_version(port) == "TLSv1.3"
        process.communicate()


def ssl_version(port: int) -> str | None:
    """The version that a handshake agrees on; None when there is none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with socket.create_connection((LOOPBACK, port), 10) as plain, context.wrap_socket(plain) as secure:
        return secure.version()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_openssl_server_is_told_apart(files: Path, version: ssl.TLSVersion) -> None:
    """A server that refuses with an alert, as OpenSSL does, counts as a refusal too."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files / "server.crt", files / "server.key")
    context.minimum_version = version

    def answer(connection: socket.socket) -> None:
        with suppress(OSError):
            context.wrap_socket(connection, server_side=True)

    with answering(answer) as port:
        assert probe_tls12(LOOPBACK, port) is (version == ssl.TLSVersion.TLSv1_2)


def test_closed_connection_is_a_refusal() -> None:
    """A server that closes without a word, as grpc does, has refused."""
    with answering(lambda connection: connection.shutdown(socket.SHUT_RDWR)) as port:
        assert probe_tls12(LOOPBACK, port) is False


def test_reset_connection_is_a_refusal() -> None:
    """A server that resets the connection has refused as well."""

    def reset(connection: socket.socket) -> None:
        connection.recv(1)
        # no lingering: close(2) sends RST at once
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with answering(reset) as port:
        assert probe_tls12(LOOPBACK, port) is False


def test_silence_is_no_refusal() -> None:
    """A server that never answers has not shown that it refuses."""
    release = threading.Event()

    def wait(_: socket.socket) -> None:
        release.wait(30)

    with answering(wait) as port:
        try:
            with pytest.raises(KernelError, match=r"cannot probe TLS 1\.2 at 127\.0\.0\.1:\d+: .*ETIMEDOUT"):
                probe_tls12(LOOPBACK, port, timeout_seconds=0.2)
        finally:
            release.set()


def test_nobody_there_is_no_refusal() -> None:
    """A port on which nobody listens proves nothing."""
    with socket.create_server((LOOPBACK, 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(KernelError, match="ECONNREFUSED"):
        probe_tls12(LOOPBACK, port)


def test_other_protocol_is_an_error() -> None:
    """A server that speaks no TLS at all is not one that refuses TLS 1.2."""
    answer = b"HTTP/1.1 400 Bad Request\r\n\r\n"
    with answering(lambda peer: peer.sendall(answer)) as port, pytest.raises(ConfigError, match="not TLS"):
        probe_tls12(LOOPBACK, port)


@pytest.mark.parametrize("module", ["grpc", "grpc.aio"])
def test_late_call_is_refused(module: str) -> None:
    """Once grpc is imported the variable is ignored, so setting it must fail loudly."""
    code = f"import {module}, pjw.certs.tls as tls\ntls.require_tls13_environment()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "RuntimeError: cannot require TLS 1.3: grpc has already been imported" in done.stderr
