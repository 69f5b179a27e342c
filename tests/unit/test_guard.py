"""The guard in front of every method: who calls, until when, and what errors become.

The context is a fake that keeps gRPC's rules; tests/root has the real one.
"""

import asyncio
import datetime as dt
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from pjw import errors
from pjw.certs.revocation import NOBODY_REVOKED, RevocationList
from pjw.rpc.status import ADMITTED_KEY, FOR_CLIENT_KEY, INTERNAL_TEXT, status_of
from pjw.server import calls
from pjw.server.authz import Caller, Roles
from pjw.server.config import ServerConfig
from pjw.server.guard import Guard
from pjw.server.quota import ClientLimits
from pjw.server.service import SERVICE_NAME, JobWorkerService
from pjw.v1 import job_worker_pb2 as pb
from tests.support.certs_factory import CN, issue, make_ca

CA = make_ca()
PEM = issue(CA, [(CN, "john")]).crt_pem
KINDS = ["unary", "stream", "bidi"]


class AbortedError(Exception):
    """What abort() raises, so that nothing runs behind it."""


class Context:
    """As much of a ServicerContext as the guard may use."""

    def __init__(self, pem: bytes | None = PEM, version: bytes = b"TLSv1.3") -> None:
        self.properties = {"ssl_tls_version": [version], **({"x509_pem_cert": [pem]} if pem else {})}
        self.asked: tuple[tuple[str, str | bytes], ...] = ()
        self.written: list[Any] = []
        self.metadata: list[tuple[str, str]] = []
        self.status: tuple[grpc.StatusCode, str, Any] | None = None
        self.on_write: Callable[[], Awaitable[None]] | None = None
        self.on_metadata: Callable[[], Awaitable[None]] | None = None
        self.sending_metadata = False

    def auth_context(self) -> dict[str, list[bytes]]:
        return self.properties

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return self.asked

    async def send_initial_metadata(self, metadata: tuple[tuple[str, str], ...]) -> None:
        self.sending_metadata = True
        if self.on_metadata is not None:
            await self.on_metadata()
        self.sending_metadata = False
        self.metadata += metadata

    async def write(self, message: object) -> None:
        if self.on_write is not None:
            await self.on_write()
        self.written.append(message)

    async def abort(self, code: grpc.StatusCode, text: str, metadata: object) -> NoReturn:
        assert not self.sending_metadata, "gRPC: too many operations"
        self.status = (code, text, metadata)
        raise AbortedError


class Methods:
    """A method of each kind that does what it is told, and tells how it ended."""

    def __init__(self) -> None:
        self.callers: list[Caller] = []
        self.error: BaseException | None = None
        self.wait = False
        self.ended = asyncio.Event()
        self.running = asyncio.Event()

    async def unary(self, request: pb.GetRequest, caller: Caller) -> pb.GetResponse:
        async for _ in self.stream(pb.LogsRequest(), caller):
            pass
        return pb.GetResponse()

    async def stream(self, request: pb.LogsRequest, caller: Caller) -> AsyncGenerator[bytes, None]:
        self.callers.append(caller)
        try:
            yield pb.LogsResponse(data=b"x").SerializeToString()
            if self.error is not None:
                raise self.error
            self.running.set()
            while self.wait:
                await asyncio.Event().wait()
        finally:
            self.ended.set()

    async def bidi(
        self,
        requests: AsyncIterator[pb.WriteInputRequest],
        caller: Caller,
        answer: Callable[[bytes], Awaitable[None]],
    ) -> None:
        await anext(requests)
        async for message in self.stream(pb.LogsRequest(), caller):
            await answer(message)


async def once(request: object) -> AsyncGenerator[object, None]:
    """A stream of one request, and a client that stays."""
    yield request
    await asyncio.Event().wait()


async def call(
    kind: str, methods: Methods, context: Context, guard: Guard | None = None, data: bytes = b""
) -> None:
    """Call as gRPC would: deserialize, handle, serialize."""
    guard = guard or Guard()
    if kind == "unary":
        handler = guard.unary(methods.unary, pb.GetRequest)
        behavior: Any = handler.unary_unary
    elif kind == "bidi":
        handler = guard.bidi(methods.bidi, pb.WriteInputRequest)
        behavior = handler.stream_stream
    else:
        handler = guard.stream(methods.stream, pb.LogsRequest)
        behavior = handler.unary_stream
    assert handler.request_deserializer is not None and handler.response_serializer is not None
    request = handler.request_deserializer(data)
    try:
        answer = await behavior(once(request) if kind == "bidi" else request, context)
    except AbortedError:
        return
    if answer is not None:
        context.written.append(handler.response_serializer(answer))


def test_every_method_of_the_contract_has_its_handler() -> None:
    """The table of handlers is the contract's list of methods, stream for stream."""
    handlers = JobWorkerService(None).handlers(Guard())  # type: ignore[arg-type]
    methods = pb.DESCRIPTOR.services_by_name["JobWorkerService"].methods

    class Call:
        invocation_metadata = ()

        def __init__(self, method: str) -> None:
            self.method = f"/{SERVICE_NAME}/{method}"

    assert len(methods) == 23
    for method in methods:
        handler: Any = handlers.service(Call(method.name))  # type: ignore[arg-type]
        assert handler is not None, method.name
        assert (handler.request_streaming, handler.response_streaming) == (
            method.client_streaming,
            method.server_streaming,
        )
        assert handler.request_deserializer(b"\xff") is None  # through the guard, not past it
    assert handlers.service(Call("Nosuch")) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_good_caller_is_let_in_by_name(kind: str) -> None:
    """The method hears who calls, from the certificate and nothing else."""
    methods, context = Methods(), Context()
    await call(kind, methods, context)
    assert [caller.client_name for caller in methods.callers] == ["john"]
    assert (context.status, len(context.written)) == (None, 1)
    assert context.metadata == ([(ADMITTED_KEY, "1")] if kind != "unary" else [])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("context", "words"),
    [
        (Context(pem=None), "a client certificate is required"),
        (Context(version=b"TLSv1.2"), "TLS 1.3 is required"),
        (Context(version=b""), "TLS 1.3 is required"),
        (Context(pem=b"garbage"), "cannot read the client certificate"),
        (Context(issue(CA, [(CN, "a/b")]).crt_pem), "cannot name the client"),
        (
            Context(issue(CA, end=dt.timedelta(seconds=-1)).crt_pem),
            "cannot accept the client certificate: it expired",
        ),
    ],
    ids=["no certificate", "TLS 1.2", "no TLS", "garbage", "odd name", "expired"],
)
async def test_who_is_not_let_in_reaches_no_method(kind: str, context: Context, words: str) -> None:
    """UNAUTHENTICATED in words, before the method or the request is looked at."""
    methods = Methods()
    await call(kind, methods, context, data=b"\xff")
    assert context.status is not None
    assert context.status[0] is grpc.StatusCode.UNAUTHENTICATED
    assert context.status[1].startswith(words)
    assert (methods.callers, context.written, context.metadata) == ([], [], [])


async def test_a_kept_certificate_expires_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A certificate that was good at its first call, and is cached, is refused when its time has come."""
    pem = issue(CA, end=dt.timedelta(seconds=60)).crt_pem
    methods = Methods()
    for _ in range(2):
        await call("unary", methods, Context(pem))
    later = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=120)

    class Clock(dt.datetime):
        @classmethod
        def now(cls, tz: dt.tzinfo | None = None) -> "Clock":
            return cls.fromtimestamp(later.timestamp(), tz)

    monkeypatch.setattr("pjw.server.authz.datetime", Clock)
    context = Context(pem)
    await call("unary", methods, context)
    assert context.status is not None
    assert context.status[:2] == (grpc.StatusCode.UNAUTHENTICATED, "the client certificate has expired")
    assert len(methods.callers) == 2


@pytest.mark.parametrize("kind", KINDS)
async def test_a_certificate_that_expires_ends_the_call(kind: str) -> None:
    """A call that waits is ended at the certificate's end, and its method cleaned up."""
    methods, context = Methods(), Context(issue(CA, end=dt.timedelta(seconds=1.5)).crt_pem)
    methods.wait = True
    async with asyncio.timeout(20):
        await call(kind, methods, context)
    assert context.status is not None
    assert context.status[:2] == (
        grpc.StatusCode.UNAUTHENTICATED,
        "the client certificate has expired during the call",
    )
    assert methods.ended.is_set()


@pytest.mark.parametrize("kind", ["unary", "stream"])
async def test_who_may_not_touch_every_clients_jobs_reaches_no_method(kind: str) -> None:
    """PERMISSION_DENIED before the method, unary or stream; with the role, the method hears of no owner."""
    asked = pb.GetRequest(all_clients=True) if kind == "unary" else pb.LogsRequest(all_clients=True)
    methods, context = Methods(), Context()
    await call(kind, methods, context, data=asked.SerializeToString())
    assert context.status is not None
    assert context.status[0] is grpc.StatusCode.PERMISSION_DENIED
    assert (methods.callers, context.written, context.metadata) == ([], [], [])
    viewer = Guard(ServerConfig(roles=Roles(viewers=frozenset({"john"}))))
    await call(kind, methods, Context(), viewer, data=asked.SerializeToString())
    await call(kind, methods, Context(), viewer)
    assert methods.callers == [Caller("john", None), Caller("john", "john")]


@pytest.mark.parametrize("kind", ["unary", "stream"])
async def test_a_gateway_is_heard_as_the_client_that_it_names(kind: str) -> None:
    """By one name in the metadata; by none, several or no text the gateway reaches no method."""
    gateway = Guard(ServerConfig(roles=Roles(gateways=frozenset({"john"}))))
    methods = Methods()

    async def asked(*metadata: tuple[str, str | bytes], guard: Guard = gateway) -> Context:
        context = Context()
        context.asked = metadata
        await call(kind, methods, context, guard)
        return context

    assert (await asked(("user-agent", "x"), (FOR_CLIENT_KEY, "alice"))).status is None
    assert methods.callers == [Caller("alice", "alice")]
    # where there are gateways, and this is none of them
    other = Guard(ServerConfig(roles=Roles(gateways=frozenset({"gate"}))))
    for refused in (
        await asked(),
        await asked((FOR_CLIENT_KEY, "")),
        await asked((FOR_CLIENT_KEY, b"alice")),
        await asked((FOR_CLIENT_KEY, "alice"), (FOR_CLIENT_KEY, "bob")),
        await asked((FOR_CLIENT_KEY, "alice"), guard=other),
    ):
        assert refused.status is not None
        assert refused.status[0] is grpc.StatusCode.PERMISSION_DENIED
    assert len(methods.callers) == 1
    # where there are none, nobody looks at it
    assert (await asked((FOR_CLIENT_KEY, "alice"), guard=Guard())).status is None
    assert methods.callers[1:] == [Caller("john", "john")]


async def test_a_gateways_call_counts_as_its_clients() -> None:
    """The limit of one client holds up no other one of the same gateway."""
    limits = ClientLimits(calls_max=1)
    guard = Guard(ServerConfig(roles=Roles(gateways=frozenset({"john"})), clients=limits))
    methods = Methods()
    methods.wait = True

    async def asked(client: str) -> Context:
        context = Context()
        context.asked = ((FOR_CLIENT_KEY, client),)
        await call("unary", methods, context, guard)
        return context

    first = asyncio.ensure_future(asked("alice"))
    await methods.running.wait()
    second = await asked("alice")
    assert second.status is not None
    assert second.status[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    methods.wait = False
    assert (await asked("bob")).status is None
    first.cancel()
    await asyncio.wait({first})


async def test_a_nodes_certificate_is_no_clients() -> None:
    """It is good for TLS as a client's, and reaches no method."""
    node = issue(CA, [(CN, "n1")], sans=["URI:pjw:node:n1"]).crt_pem
    methods, context = Methods(), Context(node)
    await call("unary", methods, context)
    assert context.status is not None
    assert context.status[:2] == (
        grpc.StatusCode.UNAUTHENTICATED,
        "cannot name the client: the certificate is that of node 'n1', which is no client",
    )
    assert methods.callers == []


@pytest.mark.parametrize("kind", KINDS)
async def test_a_message_that_is_none_is_an_invalid_argument(kind: str) -> None:
    """gRPC itself would answer INTERNAL with the parser's text."""
    methods, context = Methods(), Context()
    await call(kind, methods, context, data=b"\xff")
    assert context.status is not None
    assert context.status[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert methods.callers == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "error",
    [ValueError("secret"), errors.KernelError("write", "/secret", 5), TimeoutError("secret")],
    ids=repr,
)
async def test_what_goes_wrong_inside_is_for_the_log(
    caplog: pytest.LogCaptureFixture, kind: str, error: Exception
) -> None:
    """The client is told that it was our fault and no more; the log has the rest."""
    methods, context = Methods(), Context()
    methods.error = error
    with caplog.at_level(logging.ERROR):
        await call(kind, methods, context)
    assert context.status == (grpc.StatusCode.INTERNAL, INTERNAL_TEXT, ())
    assert "secret" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
async def test_an_error_of_the_caller_is_told_and_not_logged(
    caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """A client's mistakes cannot fill the log."""
    methods, context = Methods(), Context()
    methods.error = errors.JobNotFoundError(7)
    await call(kind, methods, context)
    assert context.status == status_of(errors.JobNotFoundError(7))
    assert caplog.text == ""


@pytest.mark.parametrize("kind", KINDS)
async def test_cancellation_passes_through(kind: str) -> None:
    """A call that gRPC cancels is cancelled, not answered; its method is cleaned up."""
    methods, context = Methods(), Context()
    methods.wait = True
    task = asyncio.create_task(call(kind, methods, context))
    await methods.running.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (context.status, methods.ended.is_set()) == (None, True)


@pytest.mark.parametrize("kind", KINDS)
async def test_draining_ends_what_runs_and_refuses_what_comes(kind: str) -> None:
    """Both are UNAVAILABLE, which is what makes pjw come back."""
    guard, methods, context = Guard(), Methods(), Context()
    methods.wait = True
    task = asyncio.create_task(call(kind, methods, context, guard))
    await methods.running.wait()
    guard.drain()
    await task
    late = Context()
    await call(kind, methods, late, guard)
    for each in (context, late):
        assert each.status is not None
        assert each.status[0] is grpc.StatusCode.UNAVAILABLE
        assert each.status[1] == "the server is shutting down; running jobs go on"
    assert len(methods.callers) == 1


def revoking(pem: bytes) -> RevocationList:
    """A list with that certificate in it."""
    return RevocationList(frozenset({x509.load_pem_x509_certificate(pem).serial_number}))


@pytest.mark.parametrize("kind", KINDS)
async def test_who_is_revoked_reaches_no_method(kind: str) -> None:
    """From the start or from a later list on, until a list without it, be the certificate known or not."""
    methods, contexts = Methods(), [Context() for _ in range(4)]
    guard = Guard(revoked=revoking(PEM))
    await call(kind, methods, contexts[0], guard, data=b"\xff")
    assert guard.revoke(NOBODY_REVOKED) == 0
    await call(kind, methods, contexts[1], guard)
    by_fingerprint = x509.load_pem_x509_certificate(PEM).fingerprint(hashes.SHA256())
    assert guard.revoke(RevocationList(fingerprints=frozenset({by_fingerprint}))) == 0
    await call(kind, methods, contexts[2], guard)
    assert guard.revoke(revoking(issue(CA).crt_pem)) == 0
    await call(kind, methods, contexts[3], guard)
    revoked = status_of(errors.NotAuthenticatedError("the client certificate has been revoked"))
    assert [context.status for context in contexts] == [revoked, None, revoked, None]
    assert len(methods.callers) == 2


@pytest.mark.parametrize("kind", KINDS)
async def test_revoking_ends_the_calls_of_that_client_alone(kind: str) -> None:
    """What runs under the certificate ends at once, stuck or not; another client's goes on."""
    guard = Guard()
    methods = [Methods(), Methods()]
    contexts = [Context(), Context(issue(CA, [(CN, "mary")]).crt_pem)]
    tasks = []
    for method, context in zip(methods, contexts, strict=True):
        method.wait = True
        tasks.append(asyncio.create_task(call(kind, method, context, guard)))
        await method.running.wait()
    assert guard.revoke(revoking(PEM)) == 1
    # taken back before the call has had its turn: it was ended all the same, and says why
    assert guard.revoke(NOBODY_REVOKED) == 0
    await tasks[0]
    revoked = status_of(errors.NotAuthenticatedError("the client certificate has been revoked"))
    assert (contexts[0].status, methods[0].ended.is_set()) == (revoked, True)
    assert (contexts[1].status, methods[1].ended.is_set()) == (None, False)
    guard.drain()
    await tasks[1]
    assert contexts[1].status is not None
    assert contexts[1].status[0] is grpc.StatusCode.UNAVAILABLE


async def test_draining_lets_the_first_metadata_out_first() -> None:
    """While they are under way gRPC takes no status: a call that is ended just then is still told why."""
    context, guard, released, reached = Context(), Guard(), asyncio.Event(), asyncio.Event()

    async def slow() -> None:
        reached.set()
        await released.wait()

    context.on_metadata = slow
    calling = asyncio.ensure_future(call("stream", Methods(), context, guard))
    await reached.wait()
    guard.drain()
    for _ in range(5):
        await asyncio.sleep(0)
    assert not calling.done()
    released.set()
    await calling
    assert context.status is not None and context.status[0] is grpc.StatusCode.UNAVAILABLE
    assert (context.metadata, context.written) == ([(ADMITTED_KEY, "1")], [])


async def test_draining_ends_a_write_that_is_stuck() -> None:
    """A follower that does not read holds no shutdown up."""
    guard, methods, context = Guard(), Methods(), Context()
    stuck = asyncio.Event()

    async def never() -> None:
        stuck.set()
        await asyncio.Event().wait()

    context.on_write = never
    task = asyncio.create_task(call("stream", methods, context, guard))
    await stuck.wait()
    guard.drain()
    await task
    assert context.status is not None
    assert context.status[0] is grpc.StatusCode.UNAVAILABLE
    assert methods.ended.is_set()


async def test_a_reader_that_does_not_read_is_dropped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After its time it is let go of with an error, and a line in the log; its method is cleaned up."""
    monkeypatch.setattr(calls, "STALLED_WRITE_SECONDS", 0.05)
    methods, context = Methods(), Context()
    context.on_write = lambda: asyncio.sleep(60)
    await call("stream", methods, context)
    assert context.status is not None
    # no clean end, which would say that the output is whole
    assert context.status[0] is grpc.StatusCode.UNAVAILABLE
    assert methods.ended.is_set()
    assert "dropped ipv4:127.0.0.1:1" in caplog.text


async def test_a_reader_that_vanished_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    """gRPC raises from write() then; nobody is told, and nothing is logged."""
    methods, context = Methods(), Context()

    async def gone() -> None:
        raise grpc.aio.InternalError("failed")

    context.on_write = gone
    await call("stream", methods, context)
    assert (context.status, methods.ended.is_set(), caplog.text) == (None, True, "")
