"""The rules of access to jobs: the roles of the configuration, the methods of each role, the owner rule.

A certificate names a client, and gives it no rights: roles are the operator's alone.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Final

import msgspec

from pjw.certs.profile import identity_fault
from pjw.errors import NotAllowedError


class Role(StrEnum):
    """A role that a client may have, beside owning its own jobs."""

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
