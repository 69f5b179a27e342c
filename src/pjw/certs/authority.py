"""A development CA: its own certificate, and those that it issues to servers and clients.

ECDSA P-256 with SHA-256 throughout. A certificate is for one end only: a server's cannot
be used as a client's, nor the other way round. A node's is for both: it serves its gateway, and calls it.
"""

import ipaddress
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from pjw.certs.bundle import BUNDLE_SUFFIX, Bundle, bundle_bytes
from pjw.certs.checks import Purpose, fault_of, key_matches, parse_certificates, parse_key
from pjw.certs.files import ClientCredentials, NewFile, read_certificates, read_key, write_new
from pjw.certs.profile import (
    CLIENT_NAME_OID,
    NODE_HOST_SUFFIX,
    NODE_URI_PREFIX,
    name_fault,
    node_name_fault,
    quoted,
)
from pjw.errors import ConfigError

CA_DAYS: Final = 3650
LEAF_DAYS: Final = 365
DAYS_MAX: Final = 36_500
# The clock of the other end may be a little behind ours.
BACKDATE: Final = timedelta(minutes=5)

CA_CRT: Final = "ca.crt"
CA_KEY: Final = "ca.key"
# A client of this name would need the file names of something else.
RESERVED_NAMES: Final = frozenset({"ca", "server"})
# Before the name of a node, in the names of its files.
NODE_FILE_PREFIX: Final = "node-"

COMMON_NAME_MAX: Final = 64
HOST_MAX: Final = 253
# An underscore is in no host name by the book, but in those of container networks.
HOST_LABEL: Final = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")

SigningKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its private key, as PEM. The key stays out of repr()."""

    crt_pem: bytes
    key_pem: bytes = field(repr=False)


def make_authority(*, days: int = CA_DAYS) -> Pair:
    """Make a CA. Its subject carries a piece of its key, so that two CAs can be distinguished."""
    key = ec.generate_private_key(ec.SECP256R1())
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"pjw CA {identifier.digest.hex()[:8]}")])
    start, end = _validity(days)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(ca=True), critical=True)
        .add_extension(identifier, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return _pair(certificate, key)


def make_server(authority: Pair, hosts: Sequence[str], *, days: int = LEAF_DAYS) -> Pair:
    """Issue a certificate to the server that clients reach as *hosts* (names and addresses)."""
    if not hosts:
        raise ConfigError("cannot make a server certificate: no host is named")
    names = [_general_name(host) for host in dict.fromkeys(hosts)]
    # only for people to read: names are matched with the SAN
    common_name = hosts[0] if len(hosts[0]) <= COMMON_NAME_MAX else "pjw server"
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    return _issue(
        authority, subject, [ExtendedKeyUsageOID.SERVER_AUTH], days, x509.SubjectAlternativeName(names)
    )


def make_client(authority: Pair, name: str, *, days: int = LEAF_DAYS) -> Pair:
    """Issue a certificate to the client *name*."""
    _check_name(name)
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, name),
            x509.NameAttribute(x509.ObjectIdentifier(CLIENT_NAME_OID), name),
        ]
    )
    return _issue(authority, subject, [ExtendedKeyUsageOID.CLIENT_AUTH], days)


def make_node(authority: Pair, name: str, hosts: Sequence[str] = (), *, days: int = LEAF_DAYS) -> Pair:
    """Issue a certificate to the node *name* of a cluster, good for *hosts* as well.

    A URI among its names makes it a node's. Its CN is one of its host names: so a pjwd that knows nothing of
    nodes takes no client's name from it.
    """
    if fault := node_name_fault(name):
        raise ConfigError(f"cannot make a node's certificate: {fault}")
    host = f"{name}{NODE_HOST_SUFFIX}"
    names = [
        x509.UniformResourceIdentifier(f"{NODE_URI_PREFIX}{name}"),
        *map(_general_name, dict.fromkeys([host, *hosts])),
    ]
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    return _issue(authority, subject, purposes, days, x509.SubjectAlternativeName(names))


def init_directory(directory: str) -> list[str]:
    """Write a new CA to *directory*, as ca.crt and ca.key; return the paths."""
    return write_new(directory, _files("ca", make_authority()))


def init_set(
    directory: str,
    hosts: Sequence[str],
    names: Sequence[str],
    *,
    days: int = LEAF_DAYS,
    bundle_server: str | None = None,
) -> list[str]:
    """Write a new CA with a server's and some clients' certificates, all or none; return the paths.

    With *bundle_server*, where clients connect to, each client's also as a bundle.
    """
    authority = make_authority()
    files = _files("ca", authority) + _files("server", make_server(authority, hosts, days=days))
    for name in dict.fromkeys(names):
        _check_file_name(name)
        files += _client_files(name, make_client(authority, name, days=days), authority, bundle_server)
    return write_new(directory, files)


def write_server(directory: str, hosts: Sequence[str], *, days: int = LEAF_DAYS) -> list[str]:
    """Write server.crt and server.key, issued by the CA in *directory*; return the paths."""
    return write_new(directory, _files("server", make_server(load_authority(directory), hosts, days=days)))


def write_client(
    directory: str, name: str, *, days: int = LEAF_DAYS, bundle_server: str | None = None
) -> list[str]:
    """Write NAME.crt and NAME.key, issued by the CA in *directory*; return the paths.

    With *bundle_server*, where clients connect to, also NAME.pjw, which holds all that a client needs.
    """
    _check_file_name(name)
    authority = load_authority(directory)
    pair = make_client(authority, name, days=days)
    return write_new(directory, _client_files(name, pair, authority, bundle_server))


def write_node(directory: str, name: str, hosts: Sequence[str] = (), *, days: int = LEAF_DAYS) -> list[str]:
    """Write node-NAME.crt and node-NAME.key, issued by the CA in *directory*; return the paths."""
    pair = make_node(load_authority(directory), name, hosts, days=days)
    return write_new(directory, _files(NODE_FILE_PREFIX + name, pair))


def load_authority(directory: str) -> Pair:
    """Read ca.crt and ca.key. Raises ConfigError when they are no CA that can issue anything."""
    crt_path, key_path = os.path.join(directory, CA_CRT), os.path.join(directory, CA_KEY)
    if not os.path.lexists(crt_path):
        raise ConfigError(
            f"cannot find a CA in {directory}: it has no {CA_CRT}", hint="make one with `pjwd certs init`"
        )
    pair = Pair(read_certificates(crt_path), read_key(key_path))
    _signer(pair, crt_path, key_path)
    return pair


def _signer(
    authority: Pair, crt_path: str = CA_CRT, key_path: str = CA_KEY
) -> tuple[x509.Certificate, SigningKey]:
    try:
        certificate = parse_certificates(authority.crt_pem)[0]
    except ValueError as error:
        raise ConfigError(f"cannot read CA certificate {crt_path}: {error}") from error
    try:
        key = parse_key(authority.key_pem)
    except ValueError as error:
        raise ConfigError(f"cannot read private key {key_path}: {error}") from error
    fault = fault_of(certificate, Purpose.CA)
    if fault:
        raise ConfigError(f"cannot use CA certificate {crt_path}: {fault}")
    if not isinstance(key, SigningKey) or not key_matches(certificate, key):
        raise ConfigError(
            f"cannot use private key {key_path}: it does not belong to the certificate {crt_path}"
        )
    return certificate, key


def reissued(authority: Pair, old: x509.Certificate, *, days: int = LEAF_DAYS) -> bytes:
    """Return a new certificate, as PEM, for the key, subject, purpose and names of an *old* one.

    Raises ConfigError when the old certificate does not name its purpose.
    """
    try:
        purposes = list(old.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
        names: x509.SubjectAlternativeName | None = None
        if ExtendedKeyUsageOID.SERVER_AUTH in purposes:
            names = old.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        key = old.public_key()
    except (x509.ExtensionNotFound, ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"cannot renew a certificate that is not one of `pjwd certs`: {error}") from error
    certificate = _signed(authority, old.subject, purposes, days, names, key)
    return certificate.public_bytes(serialization.Encoding.PEM)


def _issue(
    authority: Pair,
    subject: x509.Name,
    purposes: Sequence[x509.ObjectIdentifier],
    days: int,
    names: x509.SubjectAlternativeName | None = None,
) -> Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    return _pair(_signed(authority, subject, purposes, days, names, key.public_key()), key)


def _signed(
    authority: Pair,
    subject: x509.Name,
    purposes: Sequence[x509.ObjectIdentifier],
    days: int,
    names: x509.SubjectAlternativeName | None,
    key: CertificatePublicKeyTypes,
) -> x509.Certificate:
    issuer, issuer_key = _signer(authority)
    start, end = _validity(days)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        # a certificate that outlives its CA is of no use after that, and only hides when it ends
        .not_valid_after(min(end, issuer.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(_authority_identifier(issuer, issuer_key), critical=False)
    )
    if names is not None:
        builder = builder.add_extension(names, critical=False)
    # Ed25519 brings its own hash
    algorithm = None if isinstance(issuer_key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(issuer_key, algorithm)


def _authority_identifier(issuer: x509.Certificate, key: SigningKey) -> x509.AuthorityKeyIdentifier:
    try:
        # the CA's own word for its key, which need not be the usual hash of it
        own = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound:
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own)


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _validity(days: int) -> tuple[datetime, datetime]:
    if not 1 <= days <= DAYS_MAX:
        raise ConfigError(f"cannot make a certificate for {days} days: 1 to {DAYS_MAX} are possible")
    now = datetime.now(UTC).replace(microsecond=0)
    return now - BACKDATE, now + timedelta(days=days)


def _general_name(host: str) -> x509.GeneralName:
    # a zone (fe80::1%eth0) would be dropped in silence: a certificate has no place for it
    if "%" not in host:
        with suppress(ValueError):
            return x509.IPAddress(ipaddress.ip_address(host))
    labels = host.split(".")
    # a last label of digits alone is a mistyped address
    if len(host) > HOST_MAX or not all(map(HOST_LABEL.fullmatch, labels)) or labels[-1].isdigit():
        raise ConfigError(
            f"cannot make a server certificate for {quoted(host)}: it is neither a host name nor an address",
            hint="a name with other letters than ASCII goes in its xn-- form",
        )
    return x509.DNSName(host)


def _check_name(name: str) -> None:
    fault = name_fault(name)
    if fault:
        raise ConfigError(f"cannot make a client certificate: {fault}")


def _check_file_name(name: str) -> None:
    _check_name(name)
    if name.lower() in RESERVED_NAMES:
        raise ConfigError(f"cannot make a client {name}: {name}.crt is the name of another certificate")


def _pair(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Pair:
    return Pair(
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
    )


def _files(name: str, pair: Pair) -> list[NewFile]:
    return [NewFile(f"{name}.key", pair.key_pem, 0o600), NewFile(f"{name}.crt", pair.crt_pem, 0o644)]


def _client_files(name: str, pair: Pair, authority: Pair, bundle_server: str | None) -> list[NewFile]:
    files = _files(name, pair)
    if bundle_server is not None:
        credentials = ClientCredentials(authority.crt_pem, pair.crt_pem, pair.key_pem)
        data = bundle_bytes(Bundle(bundle_server, credentials))
        files.append(NewFile(name + BUNDLE_SUFFIX, data, 0o600))
    return files
