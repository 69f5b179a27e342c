"""pjw's client and a server that goes away: one that answers as pjwd does, with the words of gRPC's core."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import grpc
import pytest

from pjw.certs import authority
from pjw.client.sync import Client
from pjw.errors import ServerFailedError, ServerUnreachableError
from pjw.rpc.status import ADMITTED_KEY
from pjw.v1 import job_worker_pb2 as pb
from pjw.v1.job_worker_pb2_grpc import JobWorkerServiceServicer, add_JobWorkerServiceServicer_to_server

GONE: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


class Leaving(JobWorkerServiceServicer):
    """Ends every call with one code, but for a stream that is taken up again."""

    def __init__(self, code: grpc.StatusCode) -> None:
        self._code: Final = code

    def Get(self, request: pb.GetRequest, context: Any) -> pb.GetResponse:  # noqa: N802  the contract's name
        context.abort(self._code, "")
        raise AssertionError

    def Logs(self, request: pb.LogsRequest, context: Any) -> Iterator[pb.LogsResponse]:  # noqa: N802
        context.send_initial_metadata(((ADMITTED_KEY, "1"),))
        if request.offset == 0:
            yield pb.LogsResponse(data=b"four")
            context.abort(self._code, "")
        yield pb.LogsResponse(data=b" from %d on" % request.offset)


@pytest.fixture(params=GONE, ids=lambda code: code.name)
def server(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[str, str, str, str]]:
    """Such a server: its address, and the files of a client."""
    certs = str(tmp_path / "certs")
    authority.init_set(certs, ["localhost"], ["alice"])
    pem = {name: (tmp_path / "certs" / name).read_bytes() for name in ("ca.crt", "server.crt", "server.key")}
    credentials = grpc.ssl_server_credentials(
        [(pem["server.key"], pem["server.crt"])], pem["ca.crt"], require_client_auth=True
    )
    with ThreadPoolExecutor(2) as threads:
        server = grpc.server(threads)
        add_JobWorkerServiceServicer_to_server(
            Leaving(request.param),  # type: ignore[abstract]  # the methods that are not called here
            server,
        )
        port = server.add_secure_port("127.0.0.1:0", credentials)
        server.start()
        yield f"127.0.0.1:{port}", f"{certs}/ca.crt", f"{certs}/alice.crt", f"{certs}/alice.key"
        server.stop(None).wait()


@pytest.fixture
def client(server: tuple[str, str, str, str]) -> Iterator[Client]:
    """A client of such a server."""
    with Client(*server, reconnect_seconds=5) as client:
        yield client


def test_a_stream_is_taken_up_again(client: Client) -> None:
    """At the exact byte, whatever the word for a server that went away."""
    assert b"".join(client.logs(1)) == b"four from 4 on"


def test_a_call_says_that_nobody_answered(server: tuple[str, str, str, str]) -> None:
    """Exit code 125 and not 1: nothing was refused."""
    with Client(*server, reconnect_seconds=0.5) as client, pytest.raises(ServerUnreachableError):
        client.get(1)


def test_a_server_that_does_not_know_times_is_not_believed(client: Client) -> None:
    """It sends all of the output; that is no answer to what was asked (U13)."""
    with pytest.raises(ServerFailedError, match="this server is older than its client"):
        next(client.logs(1, since=datetime.now(UTC)))
