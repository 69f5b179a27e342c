"""TLS 1.3 and nothing older, at both ends. Standard library only.

grpcio has no argument for the version. Three layers stand in for one: the environment
that is set here, the self-test below, and the server's look at `ssl_tls_version` of each
call.
"""

import errno
import ipaddress
import os
import socket
import ssl
import sys
from contextlib import suppress
from typing import Any, Final

from pjw.errors import ConfigError, KernelError

# No PSK callback exists, so the suites that this names can never be agreed on: TLS 1.2 is
# left with nothing. The suites of TLS 1.3 are not governed by the variable.
CIPHER_SUITES_VARIABLE: Final = "GRPC_SSL_CIPHER_SUITES"
CIPHER_SUITES: Final = "PSK"
# The server compares `auth_context()["ssl_tls_version"]` with this.
TLS_VERSION: Final = b"TLSv1.3"

PROBE_TIMEOUT_SECONDS: Final = 10.0
RECORD_ALERT: Final = 21
RECORD_HANDSHAKE: Final = 22


def require_tls13_environment() -> None:
    """Leave grpc no suite of TLS 1.2; call this before anything imports grpc.

    grpc reads the variable once, at its import, and silently ignores it afterwards: so a late call is a bug
    in our order of imports, and raises RuntimeError. A value in the caller's environment is overwritten,
    because the same variable could bring CBC suites back.
    """
    if any(name == "grpc" or name.startswith("grpc.") for name in sys.modules):
        raise RuntimeError("cannot require TLS 1.3: grpc has already been imported")
    os.environ[CIPHER_SUITES_VARIABLE] = CIPHER_SUITES


def probe_tls12(host: str, port: int, *, timeout_seconds: float = PROBE_TIMEOUT_SECONDS) -> bool:
    """Tell whether host:port answers a ClientHello that offers TLS 1.2 at the most.

    No certificate is needed: the first byte of the answer decides. Any other outcome (no server there, no
    answer in time, no TLS) raises, so that a server that tests itself never takes silence for safety.
    Blocking: call it in a thread.
    """
    try:
        with socket.create_connection((host, port), timeout_seconds) as connection:
            connection.sendall(_client_hello())
            try:
                first = connection.recv(1)
            except ConnectionResetError:
                return False
    except TimeoutError:
        raise KernelError("probe", f"TLS 1.2 at {host}:{port}", errno.ETIMEDOUT) from None
    except OSError as error:
        raise KernelError("probe", f"TLS 1.2 at {host}:{port}", error.errno or 0) from error
    if not first or first[0] == RECORD_ALERT:
        return False
    if first[0] == RECORD_HANDSHAKE:
        return True
    raise ConfigError(f"cannot probe TLS 1.2 at {host}:{port}: the answer is not TLS")


def names_of_server(host: str, port: int, ca_pem: str, timeout_seconds: float = 2.0) -> list[str]:
    """Return the names in host:port's certificate if this authority signed it; else an empty list.

    It needs no client certificate: in TLS 1.3 the server sends its certificate first. Blocking.
    """
    try:
        context = ssl.create_default_context(cadata=ca_pem)
        context.check_hostname = False
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.set_alpn_protocols(["h2"])
        with (
            socket.create_connection((host, port), timeout_seconds) as connection,
            context.wrap_socket(connection, server_hostname=None) as tls,
        ):
            certificate = tls.getpeercert() or {}
        names: Any = certificate.get("subjectAltName", ())
        # OpenSSL writes ::1 as 0:0:0:0:0:0:0:1
        return [
            str(ipaddress.ip_address(name) if kind == "IP Address" else name)
            for kind, name in names
            if kind in ("DNS", "IP Address")
        ]
    except (OSError, ValueError):
        return []


def _client_hello() -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    # As much as this OpenSSL can offer: a refusal must be about the version, not about a
    # suite that the probe happened to leave out.
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.set_alpn_protocols(["h2"])
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing).do_handshake()
    return outgoing.read()
