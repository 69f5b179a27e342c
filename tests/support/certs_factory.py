"""Certificates of every kind that a test may want: the good, and each odd one alone.

Keys of one kind are made once and then shared where it does not matter whose they are, as
RSA keys take long to make. `issue` takes every knob; `ODD_CLIENTS` names the usual oddities.
`connect` tries pairs of them with the real grpc.
"""

import datetime as dt
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from pjw.certs.profile import CLIENT_NAME_OID

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey
Hash = hashes.SHA256 | hashes.SHA384 | hashes.SHA512
Subject = Sequence[tuple[ObjectIdentifier, str]]

CN: Final = NameOID.COMMON_NAME
OID: Final = ObjectIdentifier(CLIENT_NAME_OID)
CLIENT: Final = (ExtendedKeyUsageOID.CLIENT_AUTH,)
SERVER: Final = (ExtendedKeyUsageOID.SERVER_AUTH,)
ANY: Final = (ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE,)
DAY: Final = dt.timedelta(days=1)
# not john: its second letter is Cyrillic
LOOK_ALIKE: Final = "j\N{CYRILLIC SMALL LETTER O}hn"


@dataclass(frozen=True)
class Made:
    """A certificate with its key; `chain` are the intermediates sent after it."""

    certificate: x509.Certificate
    key: Key = field(repr=False)
    chain: tuple[x509.Certificate, ...] = ()

    @property
    def crt_pem(self) -> bytes:
        return b"".join(c.public_bytes(serialization.Encoding.PEM) for c in (self.certificate, *self.chain))

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    def write(self, directory: Path, name: str) -> tuple[str, str]:
        """Write NAME.crt and NAME.key (0600); return their paths."""
        crt, key = directory / f"{name}.crt", directory / f"{name}.key"
        crt.write_bytes(self.crt_pem)
        key.touch(mode=0o600)
        key.write_bytes(self.key_pem)
        return str(crt), str(key)


def ec_key(curve: ec.EllipticCurve | None = None) -> ec.EllipticCurvePrivateKey:
    """A new key, on P-256 unless told otherwise."""
    return ec.generate_private_key(curve or ec.SECP256R1())


def load(crt_pem: bytes, key_pem: bytes) -> Made:
    """A certificate and key that were made elsewhere."""
    key = serialization.load_pem_private_key(key_pem, None)
    assert isinstance(key, Key)
    return Made(x509.load_pem_x509_certificate(crt_pem), key)


@cache
def rsa_key(bits: int = 2048) -> rsa.RSAPrivateKey:
    """The RSA key of that size: always the same one."""
    return rsa.generate_private_key(65537, bits)


def make_ca(
    name: str = "test-ca",
    *,
    key: Key | None = None,
    start: dt.timedelta = -DAY,
    end: dt.timedelta = DAY,
    algorithm: Hash | None = None,
    ca: bool | None = True,
    cert_sign: bool | None = True,
    parent: "Made | None" = None,
) -> Made:
    """A CA, self-signed or issued by *parent*; None leaves an extension out."""
    return issue(
        parent,
        [(CN, name)],
        key=key,
        eku=None,
        start=start,
        end=end,
        algorithm=algorithm,
        ca=ca,
        key_usage=None if cert_sign is None else _usage(cert_sign=cert_sign),
    )


def issue(
    issuer: Made | None,
    subject: Subject = ((CN, "john"),),
    *,
    key: Key | None = None,
    eku: Sequence[ObjectIdentifier] | None = CLIENT,
    sans: Sequence[str] = (),
    start: dt.timedelta = -DAY,
    end: dt.timedelta = DAY,
    algorithm: Hash | None = None,
    ca: bool | None = False,
    key_usage: x509.KeyUsage | None = None,
    aki: bool = True,
    extensions: Sequence[x509.ExtensionType] = (),
    pss: bool = False,
) -> Made:
    """A certificate: for a client, unless told otherwise; self-signed without *issuer*."""
    key = key or ec_key()
    signer = issuer.key if issuer else key
    now = dt.datetime.now(dt.UTC)
    with warnings.catch_warnings():
        # a name of the wrong length is what some tests want
        warnings.simplefilter("ignore")
        name = x509.Name([x509.NameAttribute(oid, value, _validate=False) for oid, value in subject])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer.certificate.subject if issuer else name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + start)
        .not_valid_after(now + end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    if ca is not None:
        builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    if key_usage is not None:
        builder = builder.add_extension(key_usage, critical=True)
    if eku is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage(eku), critical=False)
    if sans:
        builder = builder.add_extension(
            x509.SubjectAlternativeName([_san(name) for name in sans]), critical=False
        )
    if aki:
        builder = builder.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    chosen = None if isinstance(signer, ed25519.Ed25519PrivateKey) else algorithm or hashes.SHA256()
    padding_ = padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.DIGEST_LENGTH) if pss else None
    return Made(builder.sign(signer, chosen, rsa_padding=padding_), key)


def issue_by_openssl(issuer: Made, digest: str) -> Made:
    """A client's certificate signed with a digest that `cryptography` no longer signs with."""
    key = ec_key()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        issuer.write(directory, "ca")
        request = x509.CertificateSigningRequestBuilder(x509.Name([x509.NameAttribute(CN, "john")]))
        signed = request.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        (directory / "csr").write_bytes(signed)
        (directory / "ext").write_text("authorityKeyIdentifier=keyid\nextendedKeyUsage=clientAuth\n")
        command = (
            f"openssl x509 -req -in csr -extfile ext -CA ca.crt -CAkey ca.key -days 1 -{digest} -out crt"
        )
        subprocess.run([*command.split(), "-set_serial", "7"], cwd=name, check=True, capture_output=True)
        return Made(x509.load_pem_x509_certificate((directory / "crt").read_bytes()), key)


def server(issuer: Made, *hosts: str, key: Key | None = None) -> Made:
    """A good certificate for a server on this machine."""
    names = hosts or ("localhost", "127.0.0.1", "::1")
    return issue(issuer, [(CN, names[0])], key=key, eku=SERVER, sans=names)


def no_signature_usage() -> x509.KeyUsage:
    """A key usage that has everything but what a TLS 1.3 handshake needs."""
    return _usage(key_encipherment=True)


def _usage(*, cert_sign: bool = False, key_encipherment: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=False,
        content_commitment=not (cert_sign or key_encipherment),
        key_encipherment=key_encipherment,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=cert_sign,
        crl_sign=cert_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _san(name: str) -> x509.GeneralName:
    if name.startswith("URI:"):
        return x509.UniformResourceIdentifier(name.removeprefix("URI:"))
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)


# Each is wrong in one way only, and made from a CA that is otherwise fine.
ODD_CLIENTS: Final[Mapping[str, Callable[[Made], Made]]] = {
    "expired": lambda ca: issue(ca, start=-2 * DAY, end=-DAY),
    "not yet valid": lambda ca: issue(ca, start=DAY, end=2 * DAY),
    "other CA": lambda _: issue(make_ca("another CA")),
    "other CA of the same name": lambda ca: issue(make_ca(_common_name(ca))),
    "self-signed": lambda _: issue(None),
    "server only": lambda ca: issue(ca, eku=SERVER),
    "any purpose": lambda ca: issue(ca, eku=ANY),
    "no digital signature": lambda ca: issue(ca, key_usage=no_signature_usage()),
    "RSA 1024": lambda ca: issue(ca, key=rsa_key(1024)),
    "SHA-1": lambda ca: issue_by_openssl(ca, "sha1"),
    "Ed25519": lambda ca: issue(ca, key=ed25519.Ed25519PrivateKey.generate()),
    "P-521": lambda ca: issue(ca, key=ec_key(ec.SECP521R1())),
    "P-224": lambda ca: issue(ca, key=ec_key(ec.SECP224R1())),
    "secp256k1": lambda ca: issue(ca, key=ec_key(ec.SECP256K1())),
    "CA's own name, no key identifier": lambda ca: issue(ca, [(CN, _common_name(ca))], aki=False),
}

GOOD_CLIENTS: Final[Mapping[str, Callable[[Made], Made]]] = {
    "P-256": issue,
    "P-384": lambda ca: issue(ca, key=ec_key(ec.SECP384R1())),
    "RSA 2048": lambda ca: issue(ca, key=rsa_key(2048)),
    "no purpose": lambda ca: issue(ca, eku=None),
    "both purposes": lambda ca: issue(ca, eku=(*SERVER, *CLIENT)),
    "no basic constraints": lambda ca: issue(ca, ca=None),
    "CA's own name": lambda ca: issue(ca, [(CN, _common_name(ca))]),
    "SHA-512": lambda ca: issue(ca, algorithm=hashes.SHA512()),
}

# Subjects whose owner must be refused, not called something else.
ODD_SUBJECTS: Final[Mapping[str, Subject]] = {
    "slash": [(CN, "../john")],
    "newline": [(CN, "john\nmary")],
    "final newline": [(CN, "john\n")],
    "NUL": [(CN, "john\0mary")],
    "space": [(CN, "john ")],
    "64 KiB": [(CN, "j" * 65536)],
    "65 characters": [(CN, "j" * 65)],
    "look-alike": [(CN, LOOK_ALIKE)],
    "full-width": [(CN, "\N{FULLWIDTH LATIN SMALL LETTER J}ohn")],
    "Arabic digit": [(CN, "john\N{ARABIC-INDIC DIGIT ONE}")],
    "emoji": [(CN, "\N{GRINNING FACE}")],
    "empty": [(CN, "")],
    "leading dot": [(CN, ".john")],
    "key name": [(CN, "key-0123456789abcdef")],
    "KEY name": [(CN, "KEY-0123456789abcdef")],
    "two CNs": [(CN, "john"), (CN, "mary")],
    "the same CN twice": [(CN, "john"), (CN, "john")],
    "two attributes": [(CN, "localhost"), (OID, "john"), (OID, "mary")],
    "attribute and tail": [(CN, "localhost/clientName=mary"), (OID, "john")],
    "two tails": [(CN, "localhost/clientName=john/clientName=mary")],
    "empty tail": [(CN, "localhost/clientName=")],
    "empty attribute": [(CN, "localhost"), (OID, "")],
    "attribute with slash": [(CN, "localhost"), (OID, "a/b")],
    "attribute is a key name": [(CN, "localhost"), (OID, "key-0123456789abcdef")],
    "tail is a key name": [(CN, "localhost/clientName=key-0123456789abcdef")],
    "tail in lower case": [(CN, "localhost/clientname=john")],
}


def _common_name(made: Made) -> str:
    return str(made.certificate.subject.get_attributes_for_oid(CN)[0].value)


# One process for all pairs: the environment counts only before grpc is imported.
CONNECT = """
import json, sys
from pathlib import Path
from pjw.certs.files import load_client_credentials
from pjw.certs.tls import TLS_VERSION, require_tls13_environment
require_tls13_environment()
import grpc
from concurrent.futures import ThreadPoolExecutor

class Echo(grpc.GenericRpcHandler):
    def service(self, details):
        return grpc.unary_unary_rpc_method_handler(self.answer)
    def answer(self, request, context):
        seen = context.auth_context()
        assert seen["ssl_tls_version"] == [TLS_VERSION]
        return seen["x509_pem_cert"][0]

def connect(ca, server, client):
    read = lambda name: load_client_credentials(ca + ".crt", name + ".crt", name + ".key")
    end, other = read(server), read(client)
    listener = grpc.server(ThreadPoolExecutor(1))
    listener.add_generic_rpc_handlers((Echo(),))
    try:
        pair = (end.key_pem, end.crt_pem)
        port = listener.add_secure_port("localhost:0", grpc.ssl_server_credentials([pair], end.ca_pem, True))
        listener.start()
        trust = grpc.ssl_channel_credentials(other.ca_pem, other.key_pem, other.crt_pem)
        with grpc.secure_channel(f"localhost:{port}", trust) as channel:
            return channel.unary_unary("/test/Echo")(b"", timeout=20).decode()
    except RuntimeError:
        return None
    except grpc.RpcError as error:
        assert error.code() is grpc.StatusCode.UNAVAILABLE, error
        return None
    finally:
        listener.stop(None).wait()

print(json.dumps([connect(*names) for names in json.load(sys.stdin)]))
"""


def connect(*triples: tuple[str, str, str]) -> list[str | None]:
    """For each CA, server and client (paths without suffix), the certificate that the server saw, or None."""
    done = subprocess.run(
        [sys.executable, "-c", CONNECT],
        input=json.dumps(triples),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "GRPC_VERBOSITY": "NONE"},
        timeout=120,
    )
    answer: list[str | None] = json.loads(done.stdout)
    return answer
