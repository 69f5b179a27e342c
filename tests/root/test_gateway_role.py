"""The role of a gateway on a real pjwd: whom it calls for, and what every other certificate is refused."""

from collections.abc import Callable
from typing import Any, Final

import grpc
import pytest

from pjw.certs import authority
from pjw.rpc.status import FOR_CLIENT_KEY
from pjw.v1 import job_worker_pb2 as pb
from tests.support.service import CALL_SECONDS, Service

CONFIG: Final = '[roles]\nadmins = ["ann"]\ngateways = ["gate"]\n'


@pytest.fixture
def node(make_service: Callable[..., Service]) -> Service:
    """A service with a gateway, an admin and two clients; its authority has made a node, too."""
    service = make_service(clients=("alice", "bob", "ann"), config=CONFIG).start()
    authority.write_node(str(service.certs), "n1")
    authority.write_client(str(service.certs), "gate")
    # where the other clients' files are, and not among them
    for name in ("node-n1", "gate"):
        for kind in ("crt", "key"):
            (service.certs / f"{name}.{kind}").rename(service.directory / f"{name}.{kind}")
    return service


def files_of(node: Service, name: str) -> tuple[str, str]:
    """The certificate and key of the gateway, or of the node."""
    return str(node.directory / f"{name}.crt"), str(node.directory / f"{name}.key")


def called_for(client: str) -> tuple[tuple[str, str], ...]:
    """The metadata of a call for a client."""
    return ((FOR_CLIENT_KEY, client),)


def refused(call: Callable[..., Any], request: object, client: str | None) -> tuple[grpc.StatusCode, str]:
    """How a call is refused."""
    metadata = None if client is None else called_for(client)
    with pytest.raises(grpc.RpcError) as caught:
        call(request, timeout=CALL_SECONDS, metadata=metadata)
    return caught.value.code(), caught.value.details() or ""


def test_a_gateway_has_the_jobs_of_the_client_that_it_names(node: Service) -> None:
    """It reads, waits for, stops and removes that client's; another's is none; and it starts nothing."""
    job_id = node.start_job("echo mine; sleep 300")
    with node.stub(files_of(node, "gate")) as stub:
        for_alice: dict[str, Any] = {"metadata": called_for("alice"), "timeout": CALL_SECONDS}
        assert stub.Get(pb.GetRequest(id=job_id), **for_alice).job.client_name == "alice"
        logs = stub.Logs(pb.LogsRequest(id=job_id), **for_alice)
        assert next(logs).data == b"mine\n"
        logs.cancel()
        assert refused(stub.Get, pb.GetRequest(id=job_id), "bob") == (
            grpc.StatusCode.NOT_FOUND,
            f"no job {job_id}",
        )
        for client, words in (
            ("alice", "gate is a gateway: it may not use Start for a client"),
            (None, "gate is a gateway: it may not use Start for itself"),
        ):
            assert refused(stub.Start, pb.StartRequest(command="true"), client) == (
                grpc.StatusCode.PERMISSION_DENIED,
                words,
            )
        everybodys = pb.GetRequest(id=job_id, all_clients=True)
        for client in ("alice", None):
            assert refused(stub.Get, everybodys, client)[0] is grpc.StatusCode.PERMISSION_DENIED
        assert stub.Stop(pb.StopRequest(id=job_id), **for_alice).job.reason == pb.END_REASON_STOPPED
        assert stub.Wait(pb.WaitRequest(id=job_id), **for_alice).job.state == pb.JOB_STATE_EXITED
        stub.Delete(pb.DeleteRequest(id=job_id), **for_alice)
    assert node.refused("get", str(job_id)) == (1, f"pjw: error: no job {job_id}\n")


def test_nobody_else_calls_for_a_client(node: Service) -> None:
    """Neither another client nor an admin; and the certificate of a node is no client's at all."""
    job_id = node.start_job("true")
    request = pb.GetRequest(id=job_id)
    for client in ("alice", "bob", "ann"):
        with node.stub(client) as stub:
            assert refused(stub.Get, request, "alice") == (
                grpc.StatusCode.PERMISSION_DENIED,
                f"{client} may not call for another client: it is no gateway of this server",
            )
    with node.stub(files_of(node, "node-n1")) as stub:
        for asked in ("alice", None):
            assert refused(stub.Get, request, asked) == (
                grpc.StatusCode.UNAUTHENTICATED,
                "cannot name the client: the certificate is that of node 'n1', which is no client",
            )
