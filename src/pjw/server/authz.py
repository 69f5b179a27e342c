"""The caller and its rights: its certificate, its roles, the methods of each role, the owner rule.

A certificate names a client, and gives it no rights: roles are the operator's alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from functools import lru_cache
from typing import Annotated, Final

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256

from pjw.certs.credentials import check_leaf
from pjw.certs.identity import CACHE_CERTIFICATES, NameRules, identity_of, node_of
from pjw.certs.profile import identity_fault
from pjw.certs.revocation import RevocationList
from pjw.certs.tls import TLS_VERSION
from pjw.errors import NotAllowedError, NotAuthenticatedError
from pjw.model import Identity

# The certificate at the other end of a connection: its owner, and the end of its validity.


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


class Role(StrEnum):
    """A role that a client may have, besides owning its own jobs."""

    VIEWER = "viewer"
    ADMIN = "admin"
    # of another kind: it has no jobs of its own, and calls for the clients of a cluster
    GATEWAY = "gateway"


# The roles that may use a method on the jobs of every client; no role may use a method that is not here.
ALL_CLIENTS: Final[dict[str, frozenset[Role]]] = {
    "Get": frozenset({Role.VIEWER, Role.ADMIN}),
    "List": frozenset({Role.VIEWER, Role.ADMIN}),
    "Logs": frozenset({Role.VIEWER, Role.ADMIN}),
    "Wait": frozenset({Role.VIEWER, Role.ADMIN}),
    "GetUsageHistory": frozenset({Role.VIEWER, Role.ADMIN}),
    "WatchUsage": frozenset({Role.VIEWER, Role.ADMIN}),
    "WatchJobs": frozenset({Role.VIEWER, Role.ADMIN}),
    "GetQuota": frozenset({Role.VIEWER, Role.ADMIN}),
    "ListWorkspaces": frozenset({Role.VIEWER, Role.ADMIN}),
    "ListImages": frozenset({Role.VIEWER, Role.ADMIN}),
    "Stop": frozenset({Role.ADMIN}),
    "Hold": frozenset({Role.ADMIN}),
    "Release": frozenset({Role.ADMIN}),
    "Delete": frozenset({Role.ADMIN}),
}

# The roles that may use a method of ClusterService, whichever clients own the jobs there.
OF_A_CLUSTER: Final[dict[str, frozenset[Role]]] = {
    "ListNodes": frozenset({Role.VIEWER, Role.ADMIN}),
    "DrainNode": frozenset({Role.ADMIN}),
    "ResumeNode": frozenset({Role.ADMIN}),
    "RemoveNode": frozenset({Role.ADMIN}),
}

# The methods that a gateway may use for the client that it names. It starts no job with them: a job comes to
# a node by a claim, which brings the client's number along.
FOR_A_CLIENT: Final = frozenset(
    {
        "Get",
        "Wait",
        "Stop",
        "Logs",
        "Delete",
        "GetUsageHistory",
        "GetQuota",
        "WatchUsage",
        # into a job of the client's that a claim has brought
        "WriteInput",
        "Exec",
        "Resize",
        "Forward",
    }
)
# The methods that it may use without a client: they reveal no job.
_FOR_NOBODY: Final = frozenset({"HealthCheck", "HealthWatch"})


@dataclass(frozen=True, slots=True)
class Caller:
    """The caller, and the owner of the jobs that the call may touch; None is every client."""

    client_name: str
    owner: str | None


class Roles(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The clients with a role, by the names that their certificates give them."""

    admins: Annotated[
        frozenset[str], msgspec.Meta(description="clients that may also stop and remove them")
    ] = frozenset()
    viewers: Annotated[
        frozenset[str], msgspec.Meta(description="clients that may look at the jobs of every client")
    ] = frozenset()
    gateways: Annotated[
        frozenset[str],
        msgspec.Meta(description="gateways of a cluster, which call for their own clients and start nothing"),
    ] = frozenset()

    def __post_init__(self) -> None:
        for name in sorted(self.admins | self.viewers | self.gateways):
            if fault := identity_fault(name):
                raise ValueError(fault)
        if both := sorted(self.gateways & (self.admins | self.viewers)):
            raise ValueError(f"{both[0]} is a gateway, and so can have no other role")

    def caller(
        self, client_name: str, method: str, *, all_clients: bool, for_client: str | None = None
    ) -> Caller:
        """Return the caller with the owner whose jobs it may touch. Raises NotAllowedError.

        That error comes before any job is looked up. Without *all_clients* even an admin has its own jobs
        only: no admin stops another's job by a slip. A gateway calls for a client, and has that client's
        jobs.
        """
        if for_client is not None or client_name in self.gateways:
            return self._for_client(client_name, method, for_client, all_clients=all_clients)
        if not all_clients:
            return Caller(client_name, client_name)
        if not self._of(client_name) & ALL_CLIENTS.get(method, frozenset()):
            raise NotAllowedError(
                f"{client_name} may not use {method} on the jobs of every client",
                hint="the operator gives roles, in the configuration of pjwd",
            )
        return Caller(client_name, None)

    def require(self, client_name: str, method: str) -> None:
        """Check that this client's role has a method of a cluster. Raises NotAllowedError."""
        if not self._of(client_name) & OF_A_CLUSTER[method]:
            raise NotAllowedError(
                f"{client_name} may not use {method}",
                hint="the operator gives roles, in the configuration of the gateway",
            )

    def _for_client(self, gateway: str, method: str, client_name: str | None, *, all_clients: bool) -> Caller:
        if gateway not in self.gateways:
            raise NotAllowedError(
                f"{gateway} may not call for another client: it is no gateway of this server",
                hint="the operator names gateways, in the configuration of pjwd (roles.gateways)",
            )
        if client_name is None and method in _FOR_NOBODY and not all_clients:
            return Caller(gateway, gateway)
        if client_name is None or method not in FOR_A_CLIENT:
            whom = "for itself" if client_name is None else "for a client"
            raise NotAllowedError(f"{gateway} is a gateway: it may not use {method} {whom}")
        if all_clients:
            raise NotAllowedError(
                f"{gateway} is a gateway: it may not use {method} on the jobs of every client"
            )
        if fault := identity_fault(client_name):
            raise NotAllowedError(f"{gateway} may not call for nobody: {fault}")
        return Caller(client_name, client_name)

    def _of(self, client_name: str) -> set[Role]:
        members = {Role.ADMIN: self.admins, Role.VIEWER: self.viewers}
        return {role for role, names in members.items() if client_name in names}
