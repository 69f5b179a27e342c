"""The credentials of each end of a connection, judged before they are used.

grpc says nothing of use about a bad certificate: a server with one starts, and refuses every client without
an alert. So the server's files are judged before anything listens, and the client's are when a connection has
failed.
"""

from collections.abc import Callable
from datetime import datetime
from typing import Final, TypeVar

from cryptography import x509

from pjw.certs.checks import Purpose, fault_of, issued_by, key_matches, parse_certificates, parse_key
from pjw.certs.files import (
    ClientCredentials,
    Read,
    ServerCredentials,
    load_client_credentials,
    read_certificates,
    read_key,
    read_path,
)
from pjw.errors import ConfigError, NotAuthenticatedError

__all__ = [
    "ClientCredentials",
    "ServerCredentials",
    "check_leaf",
    "diagnose_client",
    "load_client_credentials",
    "load_server_credentials",
]

T = TypeVar("T")

HINT: Final = "`pjwd certs` makes a CA, server and client certificates that work"


def load_server_credentials(
    ca_crt: str, server_crt: str, server_key: str, *, read: Read = read_path
) -> ServerCredentials:
    """Read and judge the server's files. Raises ConfigError, which names the file and the fault.

    A certificate that the CA has not issued is refused: no client that trusts this CA could
    connect. Nothing is cached; call it again to reload.
    """
    credentials = ServerCredentials(
        ca_pem=read_certificates(ca_crt, read),
        crt_pem=read_certificates(server_crt, read),
        key_pem=read_key(server_key, read),
    )
    _check(credentials, (ca_crt, server_crt, server_key), Purpose.SERVER)
    return credentials


def diagnose_client(ca_crt: str, client_crt: str, client_key: str) -> str | None:
    """Describe the fault of a client's files in one sentence; None when none is found.

    For a connection that the server has closed: it gives no reason, because grpc sends no alert.
    """
    try:
        credentials = load_client_credentials(ca_crt, client_crt, client_key)
        _check(credentials, (ca_crt, client_crt, client_key), Purpose.CLIENT)
    except ConfigError as error:
        return str(error)
    return None


def check_leaf(certificate: x509.Certificate, now: datetime | None = None) -> None:
    """Refuse a client's certificate that TLS let through: expired since, or weak.

    A resumed session brings no certificate, so a connection outlives it: call this for
    each request. Raises NotAuthenticatedError, whose text is fit for the client.
    """
    fault = fault_of(certificate, Purpose.CLIENT, now)
    if fault:
        raise NotAuthenticatedError(f"cannot accept the client certificate: {fault}")


def _check(
    credentials: ServerCredentials | ClientCredentials, paths: tuple[str, str, str], role: Purpose
) -> None:
    ca_path, crt_path, key_path = paths
    end = role.name.lower()
    authorities = _parsed(parse_certificates, credentials.ca_pem, f"CA certificate {ca_path}")
    chain = _parsed(parse_certificates, credentials.crt_pem, f"{end} certificate {crt_path}")
    key = _parsed(parse_key, credentials.key_pem, f"private key {key_path}")
    # grpc trusts every certificate of the file, so each of them has to be worth it
    for authority in authorities:
        _refuse(f"CA certificate {ca_path}", fault_of(authority, Purpose.CA))
    for intermediate in chain[1:]:
        _refuse(f"{end} certificate {crt_path}, in its chain", fault_of(intermediate, Purpose.CA))
    _refuse(f"{end} certificate {crt_path}", fault_of(chain[0], role))
    if not key_matches(chain[0], key):
        raise ConfigError(
            f"cannot use private key {key_path}: it does not belong to the certificate {crt_path}",
            hint="give the key that the certificate was made for",
        )
    if not issued_by(chain, authorities):
        raise ConfigError(
            f"cannot use {end} certificate {crt_path}: it was not issued by the CA in {ca_path}",
            hint="give both ends the CA that signed their certificates",
        )


def _parsed(parse: Callable[[bytes], T], pem: bytes, subject: str) -> T:
    try:
        return parse(pem)
    except ValueError as error:
        raise ConfigError(f"cannot read {subject}: {error}") from error


def _refuse(subject: str, fault: str | None) -> None:
    if fault:
        raise ConfigError(f"cannot use {subject}: {fault}", hint=HINT)
