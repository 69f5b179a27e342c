"""The table of roles and methods, whole, and the rule of whose jobs a call may touch."""

from itertools import product

import msgspec
import pytest

from pjw.errors import NotAllowedError
from pjw.server.authz import ALL_CLIENTS, Caller, Role, Roles
from pjw.v1 import job_worker_pb2 as pb

ROLES = Roles(admins=frozenset({"alice", "key-0123456789abcdef"}), viewers=frozenset({"bob"}))
METHODS = pb.DESCRIPTOR.services_by_name["JobWorkerService"].methods
LOOKING = {
    "Get",
    "List",
    "Logs",
    "Wait",
    "GetUsageHistory",
    "WatchUsage",
    "WatchJobs",
    "GetQuota",
    "ListWorkspaces",
    "ListImages",
}
CHANGING = {"Stop", "Delete", "Hold", "Release"}
# client, and the methods that it may use on the jobs of every client
MAY = {
    "alice": {*LOOKING, *CHANGING},
    "key-0123456789abcdef": {*LOOKING, *CHANGING},
    "bob": LOOKING,
    "carol": set(),
    "Alice": set(),
    "": set(),
}


@pytest.mark.parametrize("client", MAY)
@pytest.mark.parametrize("method", [*(method.name for method in METHODS), "Nosuch"])
def test_the_table_of_roles_and_methods(client: str, method: str) -> None:
    """Every client with every method: all jobs for whom the table names, and for nobody else."""
    if method in MAY[client]:
        assert ROLES.caller(client, method, all_clients=True) == Caller(client, None)
    else:
        with pytest.raises(NotAllowedError) as caught:
            ROLES.caller(client, method, all_clients=True)
        assert str(caught.value) == f"{client} may not use {method} on the jobs of every client"


@pytest.mark.parametrize("client", MAY)
@pytest.mark.parametrize("method", [method.name for method in METHODS])
def test_unasked_everybody_has_their_own_jobs_alone(client: str, method: str) -> None:
    """A role changes nothing for a call that does not name it."""
    assert ROLES.caller(client, method, all_clients=False) == Caller(client, client)


def test_without_a_configuration_nobody_has_a_role() -> None:
    """Not even somebody who is called admin."""
    for client, method in product(("admin", "root", "alice"), ALL_CLIENTS):
        with pytest.raises(NotAllowedError):
            Roles().caller(client, method, all_clients=True)


def test_every_method_on_jobs_is_in_the_table() -> None:
    """A method that names or lists jobs has the field all_clients and a row.

    Start and Submit have neither; nor have WriteInput, Exec, Resize and Forward: what a job reads and runs is
    its owner's alone. So is the removal of a workspace, and an image of its own.
    """
    assert {method.name for method in METHODS if "all_clients" in method.input_type.fields_by_name} == set(
        ALL_CLIENTS
    )
    owners = {
        "Start",
        "Submit",
        "WriteInput",
        "Exec",
        "Resize",
        "Forward",
        "RemoveWorkspace",
        "LoadImage",
        "RemoveImage",
    }
    assert set(ALL_CLIENTS) == {method.name for method in METHODS} - owners
    assert all(Role.ADMIN in roles for roles in ALL_CLIENTS.values())


@pytest.mark.parametrize(
    "name", ["", "a/b", " alice", "al ice", "älice", "key-", "key-0123", "KEY-x", "a" * 65]
)
def test_a_role_of_nobody_is_refused(name: str) -> None:
    """A name that no certificate can give is a slip of the operator's, and is named."""
    for role in ("admins", "viewers"):
        with pytest.raises(msgspec.ValidationError, match="is no client name"):
            msgspec.convert({role: [name]}, Roles)
