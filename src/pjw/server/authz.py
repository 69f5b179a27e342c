"""Who may touch whose jobs: the roles of the configuration, the table of what they may do, the owner rule.

A certificate says who a client is, and nothing of what it may do: roles are the operator's alone.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Final

import msgspec

from pjw.certs.profile import identity_fault
from pjw.errors import NotAllowedError


class Role(StrEnum):
    """What a client may be, beside the owner of its own jobs."""

    VIEWER = "viewer"
    ADMIN = "admin"


# Which roles may use a method on the jobs of every client; a method that is not here nobody may.
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


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, and the owner of the jobs that the call may touch; None is every client."""

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

    def __post_init__(self) -> None:
        for name in sorted(self.admins | self.viewers):
            if fault := identity_fault(name):
                raise ValueError(fault)

    def caller(self, client_name: str, method: str, *, all_clients: bool) -> Caller:
        """Whose jobs a call may touch. Raises NotAllowedError, before anybody has looked for a job.

        Without *all_clients* even an admin has its own jobs only: nobody stops another's by a slip.
        """
        if not all_clients:
            return Caller(client_name, client_name)
        if not self._of(client_name) & ALL_CLIENTS.get(method, frozenset()):
            raise NotAllowedError(
                f"{client_name} may not use {method} on the jobs of every client",
                hint="the operator gives roles, in the configuration of pjwd",
            )
        return Caller(client_name, None)

    def _of(self, client_name: str) -> set[Role]:
        members = {Role.ADMIN: self.admins, Role.VIEWER: self.viewers}
        return {role for role, names in members.items() if client_name in names}
