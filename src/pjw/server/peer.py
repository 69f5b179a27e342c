"""The certificate at the other end of a connection: whose it is, and until when it holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256

from pjw.certs.credentials import check_leaf
from pjw.certs.identity import CACHE_CERTIFICATES, NameRules, identity_of, node_of
from pjw.certs.revocation import RevocationList
from pjw.certs.tls import TLS_VERSION
from pjw.errors import NotAuthenticatedError
from pjw.model import Identity


@dataclass(frozen=True, slots=True)
class Peer:
    """A caller that may be let in until its certificate expires or is revoked."""

    identity: Identity
    fingerprint: bytes
    not_valid_after: datetime

    def seconds_left(self) -> float:
        """Return the seconds for which the certificate still holds; negative when it has expired."""
        return (self.not_valid_after - datetime.now(UTC)).total_seconds()

    def is_revoked(self, revoked: RevocationList) -> bool:
        """Return whether the certificate is in the list."""
        return revoked.revokes(self.identity.serial, self.fingerprint)


def authenticate(properties: Mapping[str, Iterable[bytes]], rules: NameRules) -> Peer:
    """Return the caller from gRPC's facts about its connection, on every call. Raises NotAuthenticatedError.

    The handshake alone does not suffice: a resumed TLS session presents no certificate, even after it has
    expired, and gRPC for Python has no setting that requires TLS 1.3.
    """
    if list(properties.get("ssl_tls_version", ())) != [TLS_VERSION]:
        raise NotAuthenticatedError("TLS 1.3 is required")
    pem = next(iter(properties.get("x509_pem_cert", ())), None)
    if pem is None:
        raise NotAuthenticatedError("a client certificate is required")
    peer = _peer_of(pem, rules)
    if peer.seconds_left() <= 0:
        raise NotAuthenticatedError("the client certificate has expired")
    return peer


def presented(properties: Mapping[str, Iterable[bytes]], rules: NameRules) -> Identity | None:
    """Return the identity the certificate names, acceptable or not: for audit log and port alone."""
    pem = next(iter(properties.get("x509_pem_cert", ())), None)
    if not pem:
        return None
    try:
        return identity_of(pem, rules)
    except NotAuthenticatedError:
        return _presented_node(pem)


def _presented_node(pem: bytes) -> Identity | None:
    """Return the node that a certificate names; a colon is in no name of a client."""
    try:
        return Identity(f"node:{node_of(pem)}", x509.load_pem_x509_certificate(pem).serial_number)
    except NotAuthenticatedError:
        return None


@lru_cache(maxsize=CACHE_CERTIFICATES)  # a call costs 300 us; to parse anew would add 50
def _peer_of(pem: bytes, rules: NameRules) -> Peer:
    identity = identity_of(pem, rules)
    certificate = x509.load_pem_x509_certificate(pem)
    check_leaf(certificate)
    return Peer(identity, certificate.fingerprint(SHA256()), certificate.not_valid_after_utc)
