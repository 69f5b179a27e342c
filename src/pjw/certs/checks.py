"""The faults of a certificate, in words. Imports `cryptography`: not for hot paths.

These checks explain, and refuse certificates that TLS would let through (weak keys). They do not replace the
verification of the chain in the handshake, which has already happened when a client's certificate is seen
here.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Final, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes, PublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, PublicKeyAlgorithmOID, SignatureAlgorithmOID

from pjw.certs.profile import RSA_MIN_BITS, SIGNATURE_HASHES

# BoringSSL, which is in grpc, makes and verifies handshakes with these two only.
LEAF_CURVES: Final = frozenset({"secp256r1", "secp384r1"})
CA_CURVES: Final = LEAF_CURVES | {"secp521r1"}

# Early enough to hand out new certificates, and late enough that users are not warned for months. Every
# warning uses this: pjw's, the library's, pjwd's log, `pjwd check` and `pjwd certs list`. The rules in
# packaging/prometheus repeat it.
EXPIRES_SOON: Final = timedelta(days=14)
HostName = x509.DNSName | x509.IPAddress
T = TypeVar("T", bound=x509.ExtensionType)


class Purpose(Enum):
    """The purpose of a certificate: its extended key usage, and the name of that."""

    CA = (None, "a CA")
    SERVER = (ExtendedKeyUsageOID.SERVER_AUTH, "serverAuth")
    CLIENT = (ExtendedKeyUsageOID.CLIENT_AUTH, "clientAuth")


def parse_certificates(pem: bytes) -> list[x509.Certificate]:
    """Return every certificate of a PEM text, in its order. Raises ValueError when one is broken."""
    try:
        return x509.load_pem_x509_certificates(pem)
    except Exception as error:  # the parser's errors are not documented as a closed set
        raise ValueError("it is no X.509 certificate") from error


def first_end(pem: bytes) -> datetime:
    """Return the earliest end among a PEM text's certificates. Raises ValueError for a broken one."""
    return min(each.not_valid_after_utc for each in parse_certificates(pem))


def ends_soon(end: datetime) -> bool:
    """Return whether a certificate with this end has expired, or will soon: it is time to renew it."""
    return end - datetime.now(UTC) < EXPIRES_SOON


def parse_key(pem: bytes) -> PrivateKeyTypes:
    """Parse the private key of a PEM text. Raises ValueError."""
    try:
        return serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ValueError("it is no private key that can be read") from error


def fault_of(certificate: x509.Certificate, role: Purpose, now: datetime | None = None) -> str | None:
    """Return the fault that bars *certificate* from being *role*, as `it expired on …`; None if none."""
    try:
        return (
            _validity_fault(certificate, now or datetime.now(UTC))
            or _key_fault(certificate, role)
            or _signature_fault(certificate)
            or (_ca_fault(certificate) if role is Purpose.CA else _usage_fault(certificate, role))
        )
    except Exception:  # noqa: BLE001  a malformed extension may raise any error of its parser
        return "its fields cannot be read"


def _validity_fault(certificate: x509.Certificate, now: datetime) -> str | None:
    if now > certificate.not_valid_after_utc:
        return f"it expired on {describe_time(certificate.not_valid_after_utc)}"
    if now < certificate.not_valid_before_utc:
        return f"it is not valid before {describe_time(certificate.not_valid_before_utc)}"
    return None


def describe_time(moment: datetime) -> str:
    """Return a time as in `2026-12-13 22:43:52 UTC`."""
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def _key_fault(certificate: x509.Certificate, role: Purpose) -> str | None:
    key = certificate.public_key()
    if isinstance(key, rsa.RSAPublicKey):
        if key.key_size < RSA_MIN_BITS:
            return f"its RSA key has {key.key_size} bits, and at least {RSA_MIN_BITS} are required"
        plain = certificate.public_key_algorithm_oid == PublicKeyAlgorithmOID.RSAES_PKCS1_v1_5
        return (
            None if plain else "its RSA key is for PSS alone, which gRPC cannot use (a plain RSA key works)"
        )
    if isinstance(key, ec.EllipticCurvePublicKey):
        if key.curve.name not in (CA_CURVES if role is Purpose.CA else LEAF_CURVES):
            return f"its key is on the curve {key.curve.name}, which gRPC cannot use (P-256 and P-384 work)"
        return None
    if isinstance(key, ed25519.Ed25519PublicKey):
        # a CA's key signs certificates; it is in handshakes that grpc knows no Ed25519
        return (
            None if role is Purpose.CA else "it has an Ed25519 key, which gRPC cannot use (ECDSA P-256 works)"
        )
    return "the type of its key is neither ECDSA nor RSA"


def _signature_fault(certificate: x509.Certificate) -> str | None:
    if certificate.signature_algorithm_oid == SignatureAlgorithmOID.ED25519:
        return None
    try:
        algorithm = certificate.signature_hash_algorithm
    except UnsupportedAlgorithm:
        algorithm = None
    if algorithm is None:
        return "it is signed with an algorithm that is not accepted"
    if algorithm.name not in SIGNATURE_HASHES:
        return f"it is signed with {algorithm.name.upper()}, and at least SHA256 is required"
    return None


def _ca_fault(certificate: x509.Certificate) -> str | None:
    constraints = _extension(certificate, x509.BasicConstraints)
    if constraints is None or not constraints.ca:
        return "it is not the certificate of a CA"
    usage = _extension(certificate, x509.KeyUsage)
    if usage is not None and not usage.key_cert_sign:
        return "its key usage does not allow signing certificates"
    return None


def _usage_fault(certificate: x509.Certificate, role: Purpose) -> str | None:
    purpose, name = role.value
    extended = _extension(certificate, x509.ExtendedKeyUsage)
    # without the extension a certificate is for everything: so are those of plain openssl
    if extended is not None and purpose not in extended:
        return f"it is not for {name} (its extended key usage leaves that out)"
    usage = _extension(certificate, x509.KeyUsage)
    if usage is not None and not usage.digital_signature:
        return "its key usage does not allow digital signatures, which TLS 1.3 needs"
    identifier = _extension(certificate, x509.AuthorityKeyIdentifier)
    if certificate.subject == certificate.issuer and identifier is None:
        return (
            "its subject is its issuer's and no authority key identifier tells them apart, "
            "so TLS takes it for self-signed"
        )
    return None


def is_of_server(certificate: x509.Certificate) -> bool:
    """Return whether its extended key usage is for servers."""
    usage = _extension(certificate, x509.ExtendedKeyUsage)
    return usage is not None and ExtendedKeyUsageOID.SERVER_AUTH in usage


def names_of(certificate: x509.Certificate) -> list[str]:
    """Return the host names and addresses that a server's certificate is for."""
    names = _extension(certificate, x509.SubjectAlternativeName)
    return [] if names is None else [str(each.value) for each in names if isinstance(each, HostName)]


def is_for(certificate: x509.Certificate, host: str) -> bool:
    """Return whether a certificate is for this name or address; `*.` stands for one label (RFC 6125)."""
    wild = f"*.{host.partition('.')[2]}".lower()
    # gRPC checks a loopback address as the name localhost
    own = {host.lower(), "localhost"} if host in ("127.0.0.1", "::1") else {host.lower()}
    return any(name.lower() in own or name.lower() == wild for name in names_of(certificate))


def _extension(certificate: x509.Certificate, kind: type[T]) -> T | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def key_matches(certificate: x509.Certificate, key: PrivateKeyTypes) -> bool:
    """Return whether *key* is the private half of the certificate's key."""
    return key_bytes(certificate.public_key()) == key_bytes(key.public_key())


def key_bytes(key: PublicKeyTypes) -> bytes:
    """Return a public key as its SubjectPublicKeyInfo in DER: the same bytes for two equal keys."""
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def issued_by(chain: Sequence[x509.Certificate], authorities: Sequence[x509.Certificate]) -> bool:
    """Return whether the leaf, first in *chain*, leads to an authority through the rest of the chain."""
    current, rest = chain[0], list(chain[1:])
    while True:
        if any(_signed(current, authority) for authority in authorities):
            return True
        following = next((candidate for candidate in rest if _signed(current, candidate)), None)
        if following is None:
            return False
        rest.remove(following)
        current = following


def _signed(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True
