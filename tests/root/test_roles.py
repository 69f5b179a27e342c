"""Viewers and admins on a real pjwd: who gets, lists, reads and stops whose jobs, by call and by pjw."""

from collections.abc import Callable
from typing import Any, Final

import grpc
import pytest

from pjw.model import JobSpec
from pjw.v1 import job_worker_pb2 as pb
from tests.support.service import Service, ask

CONFIG: Final = '[roles]\nadmins = ["ann"]\nviewers = ["vic"]\n'
CLIENTS: Final = ("alice", "bob", "ann", "vic")
REQUESTS: Final[dict[str, Any]] = {
    "Get": pb.GetRequest,
    "Stop": pb.StopRequest,
    "Logs": pb.LogsRequest,
    "Delete": pb.DeleteRequest,
    "Wait": pb.WaitRequest,
    "GetUsageHistory": pb.GetUsageHistoryRequest,
}
DENIED: Final = """\
pjw: error: {} may not use {} on the jobs of every client
hint: the operator gives roles, in the configuration of pjwd
"""


@pytest.fixture
def staffed(make_service: Callable[..., Service]) -> Service:
    """A service with an admin, a viewer, and two clients without a role."""
    return make_service(clients=CLIENTS, config=CONFIG).start()


def test_a_viewer_looks_and_an_admin_also_stops(staffed: Service) -> None:
    """Each command of pjw with --all, by each role, on a job of somebody else."""
    job_id = staffed.ok("start", "echo mine; sleep 300").strip()
    for client in ("vic", "ann"):
        assert staffed.ok("--all", "list", client=client) == f"{job_id}\n"
        assert '"clientName": "alice"' in staffed.ok("--all", "get", job_id, client=client)
        with staffed.popen("--all", "logs", job_id, client=client) as reader:
            assert reader.stdout is not None
            assert reader.stdout.readline() == b"mine\n"
            reader.terminate()
    assert staffed.refused("--all", "stop", job_id, client="vic") == (1, DENIED.format("vic", "Stop"))
    assert '"state": "running"' in staffed.ok("get", job_id)
    assert '"reason": "stopped"' in staffed.ok("--all", "stop", job_id, client="ann")
    assert staffed.refused("--all", "rm", job_id, client="vic") == (1, DENIED.format("vic", "Delete"))
    assert staffed.ok("--all", "rm", job_id, client="ann") == f"{job_id}\n"
    assert staffed.refused("get", job_id) == (1, f"pjw: error: no job {job_id}\n")


def test_workspaces_of_every_client(staffed: Service) -> None:
    """A role shows names and sizes; it neither removes them nor opens them to jobs of its own."""
    for client in ("alice", "bob", "vic"):
        with staffed.client(client) as library:
            library.wait(library.start(JobSpec("echo secret > file", workspace="work")).id)
    for client in ("vic", "ann"):
        listed = staffed.ok("--all", "workspace", "ls", client=client)
        assert listed == "alice/work\nbob/work\nvic/work\n"
    assert '"clientName": "bob"' in staffed.ok("--all", "workspace", "ls", "--format", "json", client="ann")
    assert staffed.ok("workspace", "ls", client="vic") == "work\n"
    assert staffed.ok("workspace", "ls", client="ann") == ""
    assert staffed.refused("--all", "workspace", "ls") == (1, DENIED.format("alice", "ListWorkspaces"))
    assert staffed.refused("--all", "workspace", "rm", "work", client="ann")[1] == (
        "pjw: error: no workspace work\nhint: pjw workspace ls\n"
    )
    assert staffed.ok("run", "--workspace", "work", "ls", client="ann") == ""
    assert staffed.ok("workspace", "ls") == "work\n"


def test_a_role_that_is_not_asked_for_is_none(staffed: Service) -> None:
    """Without --all an admin and a viewer have their own jobs alone, like everybody."""
    job_id = staffed.start_job("sleep 300")
    own = {client: staffed.start_job("true", client) for client in ("vic", "ann")}
    for client, own_id in own.items():
        assert staffed.ok("list", client=client) == f"{own_id}\n"
        for command in ("get", "stop", "logs", "rm"):
            assert staffed.refused(command, str(job_id), client=client) == (
                1,
                f"pjw: error: no job {job_id}\n",
            )
    assert staffed.job(job_id).state == pb.JOB_STATE_RUNNING


@pytest.mark.parametrize("method", REQUESTS)
def test_a_denial_tells_nothing_of_ids(staffed: Service, method: str) -> None:
    """Without the role, a job of one's own, another's and none are answered alike, to the byte."""
    mine, others = staffed.start_job("sleep 300"), staffed.start_job("sleep 300", "bob")
    with staffed.channel("alice") as alice:
        answers = [
            ask(alice, method, REQUESTS[method](id=number, all_clients=True).SerializeToString())
            for number in (mine, others, 999_999, 0, -1)
        ]
    assert answers[0][:2] == ([], grpc.StatusCode.PERMISSION_DENIED)
    assert all(answer == answers[0] for answer in answers)
    assert staffed.job(mine).state == staffed.job(others, "bob").state == pb.JOB_STATE_RUNNING


def test_without_a_role_pjw_all_is_refused_in_words(staffed: Service) -> None:
    """Every command that takes --all says who may not do what, and whom to ask."""
    for command, method in (
        ("list", "List"),
        ("get", "Get"),
        ("stop", "Stop"),
        ("logs", "Logs"),
        ("rm", "Delete"),
    ):
        arguments = [command] if command == "list" else [command, "1"]
        assert staffed.refused("--all", *arguments) == (1, DENIED.format("alice", method))


def test_a_list_of_all_clients_is_whole_in_pages_and_at_a_terminal(staffed: Service) -> None:
    """Jobs of all clients in the order of their ids; at a terminal with a column that says whose."""
    ids = [staffed.start_job("true", client) for client in ("alice", "bob", "vic", "alice")]
    with staffed.stub("vic") as stub:
        page = stub.List(pb.ListRequest(page_size=3, all_clients=True))
        rest = stub.List(pb.ListRequest(page_token=page.next_page_token, all_clients=True))
    assert [job.id for job in (*page.jobs, *rest.jobs)] == ids
    shown = staffed.at_terminal("--all", "list", client="vic").splitlines()
    assert shown[0].split() == ["ID", "CLIENT", "STATE", "AGE", "DURATION", "EXIT", "COMMAND"]
    assert [line.split()[1] for line in shown[1:]] == ["alice", "bob", "vic", "alice"]
    assert "CLIENT" not in staffed.at_terminal("list", client="vic")
