"""Programs that ask for much at once: pjw's clients, and pjwd's guard with its limits on a real port."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import grpc
import pytest

from pjw.certs import authority
from pjw.client.aio import AsyncClient
from pjw.client.retry import CALLS_AT_ONCE, WAITS_AT_ONCE
from pjw.client.sync import Client
from pjw.errors import LimitReachedError, ServerUnreachableError
from pjw.model import Job, JobSpec, JobState, Limits
from pjw.rpc.convert import job_to_message
from pjw.server import quota
from pjw.server.authz import Caller
from pjw.server.config import ServerConfig
from pjw.server.guard import Guard
from pjw.server.quota import ClientLimits
from pjw.server.service import SERVICE_NAME
from pjw.v1 import job_worker_pb2 as pb

JOB: Final = Job(1, "alice", "true", JobState.RUNNING, Limits(), datetime(2026, 11, 29, tzinfo=UTC))


class Crowd:
    """A server whose calls are answered once so many are under way."""

    def __init__(self, at_once: int, limits: ClientLimits) -> None:
        self._at_once: Final = at_once
        self._enough: Final = asyncio.Event()
        self._guard: Final = Guard(ServerConfig(clients=limits))
        self.under_way = self.most = self.answered = 0

    async def start(self, request: pb.StartRequest, caller: Caller) -> pb.StartResponse:
        """As `Start`."""
        await self._meet()
        return pb.StartResponse(job=job_to_message(replace(JOB, id=self.answered)))

    async def wait(self, request: pb.WaitRequest, caller: Caller) -> pb.WaitResponse:
        """As `Wait`."""
        await self._meet()
        return pb.WaitResponse(job=job_to_message(replace(JOB, id=request.id)))

    async def stop(self, request: pb.StopRequest, caller: Caller) -> pb.StopResponse:
        """As `Stop`, of a job that does not end before that."""
        await self._enough.wait()
        return pb.StopResponse(job=job_to_message(replace(JOB, id=request.id)))

    async def _meet(self) -> None:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        if self.under_way >= self._at_once:
            self._enough.set()
        await self._enough.wait()
        self.under_way -= 1
        self.answered += 1

    def handlers(self) -> grpc.GenericRpcHandler:
        """All of these, behind the guard."""
        methods = {
            "Start": self._guard.unary(self.start, pb.StartRequest),
            "Wait": self._guard.unary(self.wait, pb.WaitRequest),
            "Stop": self._guard.unary(self.stop, pb.StopRequest),
        }
        return grpc.method_handlers_generic_handler(SERVICE_NAME, methods)


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, a server, and alice."""
    directory = tmp_path_factory.mktemp("crowd") / "certs"
    authority.init_set(str(directory), ["localhost"], ["alice"])
    return directory


@asynccontextmanager
async def crowd(
    certs: Path, at_once: int, limits: ClientLimits | None = None
) -> AsyncGenerator[tuple[Crowd, Callable[..., Any]], None]:
    """A server, and what makes a client of it."""
    made = Crowd(at_once, limits or ClientLimits())
    pem = {name: (certs / name).read_bytes() for name in ("ca.crt", "server.crt", "server.key")}
    credentials = grpc.ssl_server_credentials(
        [(pem["server.key"], pem["server.crt"])], pem["ca.crt"], require_client_auth=True
    )
    server = grpc.aio.server(options=[("grpc.max_concurrent_streams", 100)])
    server.add_generic_rpc_handlers((made.handlers(),))
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    files = [str(certs / name) for name in ("ca.crt", "alice.crt", "alice.key")]
    try:
        yield made, lambda kind: kind(f"127.0.0.1:{port}", *files)
    finally:
        await server.stop(None)


async def test_a_list_of_hundreds_of_starts_just_works(certs: Path) -> None:
    """The pattern of docs/library.md (U1): the client holds itself below what pjwd allows, and waits."""
    async with crowd(certs, CALLS_AT_ONCE) as (server, connect):
        async with connect(AsyncClient) as client:
            jobs = await asyncio.gather(*(client.start(JobSpec("true")) for _ in range(400)))
        assert {job.id for job in jobs} == set(range(1, 401))
        assert server.most == CALLS_AT_ONCE


async def test_threads_that_share_a_client_wait_for_each_other(certs: Path) -> None:
    """As many as the limit of calls under way does not allow (U1)."""
    async with crowd(certs, CALLS_AT_ONCE) as (server, connect):
        with connect(Client) as client, ThreadPoolExecutor(300) as threads:
            loop = asyncio.get_running_loop()
            starts = [loop.run_in_executor(threads, client.start, JobSpec("true")) for _ in range(400)]
            assert len(await asyncio.gather(*starts)) == 400
        assert server.most == CALLS_AT_ONCE


async def test_thousands_wait_for_the_ends_of_jobs(certs: Path) -> None:
    """They have more room of their own, and a start goes past them."""
    async with crowd(certs, WAITS_AT_ONCE + 1) as (server, connect):
        async with connect(AsyncClient) as client:
            waits = asyncio.gather(*(client.wait(number) for number in range(1, 1101)))
            await asyncio.sleep(0)
            await client.start(JobSpec("true"))
            assert {job.id for job in await waits} == set(range(1, 1101))
        assert server.most == WAITS_AT_ONCE + 1


async def test_a_start_goes_past_jobs_that_do_not_end(certs: Path) -> None:
    """However many are being stopped, whose grace periods or last writes take long (U1)."""
    async with crowd(certs, 1) as (_, connect), connect(AsyncClient) as client:
        stops = asyncio.gather(*(client.stop(number) for number in range(1, 2 * CALLS_AT_ONCE)))
        await asyncio.sleep(0)
        await asyncio.wait_for(client.start(JobSpec("true")), 20)
        assert {job.id for job in await stops} == set(range(1, 2 * CALLS_AT_ONCE))


@pytest.mark.parametrize("kind", [AsyncClient, Client])
async def test_starts_go_on_at_the_rate_that_is_granted(
    certs: Path, kind: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that has been let in waits for its turn; one that never was is told at once (U1)."""
    monkeypatch.setattr(quota, "STARTS_REST_SECONDS", 0.1)
    slow = ClientLimits(starts_per_second=100)
    async with crowd(certs, 1, slow) as (server, connect):
        if kind is AsyncClient:
            async with connect(AsyncClient) as client:
                await client.start(JobSpec("true"))
                await asyncio.gather(*(client.start(JobSpec("true")) for _ in range(30)))
        else:
            with connect(Client) as client, ThreadPoolExecutor(30) as threads:
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(threads, client.start, JobSpec("true"))
                starts = [loop.run_in_executor(threads, client.start, JobSpec("true")) for _ in range(30)]
                await asyncio.gather(*starts)
        assert server.answered == 31
    async with crowd(certs, 1, ClientLimits(starts_per_second=0.001)) as (_, connect):
        async with connect(AsyncClient) as client:
            await client.start(JobSpec("true"))
        async with connect(AsyncClient) as client:
            with pytest.raises(LimitReachedError):
                await client.start(JobSpec("true"))


async def test_who_waits_for_a_turn_is_told_of_the_end(certs: Path) -> None:
    """A client that is closed starts nothing any more."""
    async with crowd(certs, CALLS_AT_ONCE + 1) as (server, connect):
        client = connect(AsyncClient)
        starts = [asyncio.ensure_future(client.start(JobSpec("true"))) for _ in range(CALLS_AT_ONCE + 1)]
        while server.under_way < CALLS_AT_ONCE:
            await asyncio.sleep(0.001)
        await client.close()
        ends = await asyncio.gather(*starts, return_exceptions=True)
    assert {type(end) for end in ends} <= {ServerUnreachableError, asyncio.CancelledError}
    assert isinstance(ends[-1], ServerUnreachableError)
