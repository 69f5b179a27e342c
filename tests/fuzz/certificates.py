"""Certificates and keys: any bytes, as PEM or DER, give an identity within the rule, or an error of ours."""

import base64
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization

from pjw.certs.credentials import diagnose_client, load_server_credentials
from pjw.certs.identity import NameRules
from pjw.certs.profile import KEY_NAME_HEX_DIGITS, KEY_NAME_PREFIX, name_fault
from pjw.certs.tls import TLS_VERSION
from pjw.errors import ConfigError, NotAuthenticatedError
from pjw.server.authz import authenticate
from tests.fuzz.memory_file import MemoryFile
from tests.support.certs_factory import GOOD_CLIENTS, ODD_CLIENTS, ODD_SUBJECTS, issue, make_ca, server

BEGIN = b"-----BEGIN "


class Call:
    """What `authenticate` asks of a call's context."""

    def __init__(self, pem: bytes) -> None:
        self._pem = pem

    def auth_context(self) -> dict[str, list[bytes]]:
        """What gRPC tells of the connection."""
        return {"ssl_tls_version": [TLS_VERSION], "x509_pem_cert": [self._pem]}


class Files:
    """A good CA, certificate and key, and the files in which one is replaced by what is fuzzed."""

    def __init__(self) -> None:
        ca = make_ca()
        self._directory = tempfile.TemporaryDirectory(prefix="pjw-fuzz-")
        directory = Path(self._directory.name)
        self.good = (ca.write(directory, "ca")[0], *server(ca).write(directory, "server"))
        self.fuzzed = MemoryFile()

    def triples(self) -> list[tuple[str, str, str]]:
        """CA, certificate and key, with the fuzzed file in each place."""
        ca, crt, key = self.good
        return [
            (self.fuzzed.path, crt, key),
            (ca, self.fuzzed.path, key),
            (ca, crt, self.fuzzed.path),
        ]


@cache
def _files() -> Files:
    return Files()


def seeds() -> list[bytes]:
    """Certificates of every kind that tests know, and keys, in DER; some as PEM."""
    ca = make_ca()
    made = [make(ca) for make in (*GOOD_CLIENTS.values(), *ODD_CLIENTS.values())]
    # the mutations of one of 64 KiB would crowd out the others
    made += [issue(ca, subject) for name, subject in ODD_SUBJECTS.items() if name != "64 KiB"]
    made += [ca, server(ca)]
    der, plain = serialization.Encoding.DER, serialization.NoEncryption()
    keys = [one.key.private_bytes(der, serialization.PrivateFormat.PKCS8, plain) for one in made[:3]]
    pems = [made[0].crt_pem, made[0].crt_pem + ca.crt_pem, made[0].key_pem]
    return [one.certificate.public_bytes(der) for one in made] + keys + pems


def one_input(data: bytes) -> None:
    """Use it wherever a certificate or key is used; DER is wrapped first."""
    pem = data if data.startswith(BEGIN) else _pem("CERTIFICATE", data)
    context: Any = Call(pem)
    try:
        name = authenticate(context.auth_context(), NameRules(in_common_name=True)).identity.client_name
    except NotAuthenticatedError as error:
        _printable(error)
    else:
        digits = name.removeprefix(KEY_NAME_PREFIX)
        assert name_fault(name) is None or (len(digits) == KEY_NAME_HEX_DIGITS and int(digits, 16) >= 0)
    files = _files()
    for place, (ca, crt, key) in enumerate(files.triples()):
        files.fuzzed.write(_pem("PRIVATE KEY", data) if place == 2 and pem is not data else pem)
        try:
            load_server_credentials(ca, crt, key)
        except ConfigError as error:
            _printable(error)
        said = diagnose_client(ca, crt, key)
        assert said is None or said.isprintable(), said


def _printable(error: Exception) -> None:
    # they end on a terminal, and as headers of HTTP/2
    assert str(error).isprintable(), error


def _pem(what: str, der: bytes) -> bytes:
    text = base64.encodebytes(der)
    return b"-----BEGIN %s-----\n%s-----END %s-----\n" % (what.encode(), text, what.encode())
