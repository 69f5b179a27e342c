"""Stands before every method, unary or stream: identifies callers, checks rights, ends calls, maps errors.

Handlers are wrapped here and registered from one table (service.py), so that no method can be forgotten.
Nothing of an exception reaches a client but the parts that `status_of` lets through.
"""

# The stubs' generic classes are not generic when they run.
from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from pjw.certs.identity import OUR_RULES, NameRules
from pjw.certs.revocation import NOBODY_REVOKED, RevocationList
from pjw.errors import (
    InvalidJobError,
    NotAllowedError,
    NotAuthenticatedError,
    PjwError,
    ServerDrainingError,
)
from pjw.rpc.status import ADMITTED_KEY, FOR_CLIENT_KEY, status_of
from pjw.server.accept import Port
from pjw.server.audit import CANCELLED, CallObserver, CallRecord
from pjw.server.authz import Caller, authenticate, presented
from pjw.server.calls import Calls, ClientGoneError, RunningCall, Writer
from pjw.server.config import ServerConfig
from pjw.server.connections import Told
from pjw.server.quota import Quota

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]
Req = TypeVar("Req", bound=Message)
# an answer, or one already serialized where that spares a copy of its data
Res = TypeVar("Res", bound=Message | bytes)
# sends one of a stream of answers
Answer = Callable[[Res], Awaitable[None]]
# answers a call that was let in, with its request (an empty one for a stream of them); gives its only answer
Body = Callable[[CallRecord, Any, Caller, "Context"], Awaitable[Any]]

_DRAINING: Final = "the server is shutting down; running jobs go on"
_REVOKED: Final = "the client certificate has been revoked"
DEFAULT_CONFIG: Final = ServerConfig()

log: Final = logging.getLogger(__name__)


@dataclass(slots=True)
class _Arrived:
    """A call that has come, and the body that answers it if it is let in."""

    context: Context
    method: str
    # None: the bytes are no valid message
    request: Message | None
    body: Body
    stream: bool


class Guard:
    """Wraps handlers, and ends those that run when the server drains or their client is revoked."""

    def __init__(
        self,
        config: ServerConfig = DEFAULT_CONFIG,
        *observers: CallObserver,
        revoked: RevocationList = NOBODY_REVOKED,
        port: Port | None = None,
        names: NameRules = OUR_RULES,
    ) -> None:
        self._port: Final = port
        self._revoked = revoked
        self._names: Final = names
        self._allowed = config.let_in
        self._refused: Final = Told()
        self._roles = config.roles
        self._quota: Final = Quota(config.clients)
        self._observers: Final = observers
        self._draining = False
        self._running: Final = Calls()

    def drain(self) -> None:
        """Refuse new calls and end the running ones with UNAVAILABLE, so that clients come back."""
        self._draining = True
        for call in self._running:
            call.end(ServerDrainingError(_DRAINING))

    def revoke(self, revoked: RevocationList) -> int:
        """Refuse the certificates of this list, end their calls under way, and return the number of these."""
        self._revoked = revoked
        ended = [call for call in self._running if call.peer.is_revoked(revoked)]
        for call in ended:
            call.end(NotAuthenticatedError(_REVOKED))
        return len(ended)

    @property
    def revoked(self) -> RevocationList:
        """The revoked certificates: no client with one is let in."""
        return self._revoked

    def require_role(self, client_name: str, method: str) -> None:
        """Check that this client has the role that a method takes. Raises NotAllowedError."""
        self._roles.require(client_name, method)

    def reconfigure(self, config: ServerConfig) -> None:
        """Take allowed clients, roles and the limits of clients from another configuration.

        A call that is not allowed any more ends: some last for as long as their caller likes.
        """
        self._allowed = config.let_in
        self._roles = config.roles
        self._quota.set_limits(config.clients)
        if self._port is not None:
            self._port.reconfigure(config.clients)
        for call in self._running:
            try:
                self._require_allowed(call.peer.identity.client_name)
                self._caller(call.peer.identity.client_name, call.method, call.request, call.for_client)
            except NotAllowedError as error:
                call.end(error)

    def unary(
        self,
        method: Callable[[Req, Caller], Awaitable[Res]],
        request_class: type[Req],
        name: str | None = None,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Return the handler of a method with one answer."""
        name = name or _method_of(request_class)

        async def body(record: CallRecord, request: Req, caller: Caller, _context: Context) -> Res:
            answer = await method(request, caller)
            record.answered(answer)
            return answer

        async def handle(request: Req | None, context: Context) -> Any:  # noqa: ANN401  Res, as body gives it
            return await self._handle(_Arrived(context, name, request, body, stream=False), request)

        return grpc.unary_unary_rpc_method_handler(
            handle,
            request_deserializer=_deserializer(request_class),
            response_serializer=_serialize,
        )

    def stream(
        self,
        method: Callable[[Req, Caller], AsyncGenerator[Res, None]],
        request_class: type[Req],
        name: str | None = None,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Return the handler of a method with a stream of answers."""
        name = name or _method_of(request_class)

        async def answer_all(answer: Answer[Res], request: Req, caller: Caller) -> None:
            async with aclosing(method(request, caller)) as answers:
                async for each in answers:
                    await answer(each)

        body = partial(_answer_in_stream, answer_all)

        async def handle(request: Req | None, context: Context) -> None:
            await self._handle(_Arrived(context, name, request, body, stream=True), request)

        return grpc.unary_stream_rpc_method_handler(
            handle,
            request_deserializer=_deserializer(request_class),
            response_serializer=_serialize,
        )

    def bidi(
        self,
        method: Callable[[AsyncIterator[Req], Caller, Answer[Res]], Awaitable[None]],
        request_class: type[Req],
        name: str | None = None,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Return the handler of a method with a stream of requests, which gets a function that answers.

        No request is read before the one before was dealt with: requests that a client sends ahead wait at
        its end.
        """
        name = name or _method_of(request_class)

        async def handle(requests: AsyncIterator[Req | None], context: Context) -> None:
            async def body(record: CallRecord, empty: Req, caller: Caller, context: Context) -> None:
                async def decoded() -> AsyncGenerator[Req, None]:
                    async for request in requests:
                        record.asked(request)
                        yield _decoded(request)

                async def answer_all(answer: Answer[Res], _: Req, caller: Caller) -> None:
                    async with aclosing(decoded()) as asked:
                        await method(asked, caller, answer)

                await _answer_in_stream(answer_all, record, empty, caller, context)

            # An empty request: a method of this kind is for one's own jobs alone, so none asks for more.
            await self._handle(_Arrived(context, name, request_class(), body, stream=True), None)

        return grpc.stream_stream_rpc_method_handler(
            handle,
            request_deserializer=_deserializer(request_class),
            response_serializer=_serialize,
        )

    # Every call goes through the next three. They have no generator for each thing that is counted or noted,
    # since a generator costs more than that work.

    async def _handle(self, arrived: _Arrived, first: Message | None) -> Any:  # noqa: ANN401  the result of the body
        """Answer a call, or end it with an error. *first* is the request as the record notes it."""
        context = arrived.context
        try:
            properties = context.auth_context()
            record = CallRecord(arrived.method, first, context.peer())
            record.identity = presented(properties, self._names)
            return await self._observed(arrived, record, properties)
        except Exception as error:
            await _abort(context, error)

    async def _observed(
        self, arrived: _Arrived, record: CallRecord, properties: Mapping[str, Iterable[bytes]]
    ) -> Any:  # noqa: ANN401
        """Tell the observers of the call when it begins, and when it is over, let in or not."""
        for each in self._observers:
            each.call_began(record)
        try:
            return await self._let_in(arrived, record, properties)
        except ClientGoneError:
            record.code = CANCELLED
            return None
        except (asyncio.CancelledError, Exception) as error:
            record.failed(error)
            raise
        finally:
            for each in self._observers:
                each.call_ended(record)

    async def _let_in(
        self, arrived: _Arrived, record: CallRecord, properties: Mapping[str, Iterable[bytes]]
    ) -> Any:  # noqa: ANN401
        """Let the caller in until its certificate expires or is revoked, or the server drains."""
        if self._draining:
            raise ServerDrainingError(_DRAINING)
        peer = authenticate(properties, self._names)
        # On every call: neither an open connection nor a resumed session asks for it again.
        if peer.is_revoked(self._revoked):
            raise NotAuthenticatedError(_REVOKED)
        client_name, method, request = peer.identity.client_name, arrived.method, arrived.request
        self._require_allowed(client_name)
        if self._port is not None:
            self._port.connections.require_room(arrived.context.peer())
        for_client = record.for_client = self._for_client(arrived.context)
        call = RunningCall(peer, method, request, for_client)
        self._running.add(call)
        try:
            async with self._quota.call(for_client or client_name, method, stream=arrived.stream):
                asked = _decoded(request)
                caller = self._caller(client_name, method, request, for_client)
                return await arrived.body(record, asked, caller, arrived.context)
        except asyncio.CancelledError:
            if (error := call.take_end()) is None:
                raise
            raise error from None
        finally:
            self._running.remove(call)

    def _require_allowed(self, client_name: str) -> None:
        """Refuse a client that the operator has not named, and log that. Raises NotAllowedError."""
        if self._allowed is None or client_name in self._allowed:
            return
        if count := self._refused.count(1, time.monotonic()):
            log.warning(
                "client %r is refused: it is not among allowed_clients; calls refused for this since the last"
                " such message: %d",
                client_name,
                count,
            )
        raise NotAllowedError(
            f"{client_name} is not among the clients of this server",
            hint="the operator names them, in the configuration of pjwd",
        )

    def _for_client(self, context: Context) -> str | None:
        """Return the client that the caller names, if there are gateways; other servers ignore the name."""
        if not self._roles.gateways:
            return None
        said = [value for key, value in context.invocation_metadata() or () if key == FOR_CLIENT_KEY]
        # a value in bytes, or several: the name of no client
        return None if not said else said[0] if len(said) == 1 and isinstance(said[0], str) else ""

    def _caller(
        self, client_name: str, method: str, request: Message | None, for_client: str | None
    ) -> Caller:
        all_clients = getattr(request, "all_clients", False)
        return self._roles.caller(client_name, method, all_clients=all_clients, for_client=for_client)


async def _answer_in_stream(
    answer_all: Callable[[Answer[Any], Any, Caller], Awaitable[None]],
    record: CallRecord,
    request: Message,
    caller: Caller,
    context: Context,
) -> None:
    """Say that the caller was let in, then send all answers."""
    await _say_admitted(context)
    async with Writer(context) as writer:

        async def answer(message: Message | bytes) -> None:
            await writer.write(message)
            record.answered(message)

        await answer_all(answer, request, caller)


async def _say_admitted(context: Context) -> None:
    # To its end, also when the call is ended meanwhile: while this is under way gRPC takes no status for the
    # call, which would then hold up the end of the server. It waits for no client.
    sending = asyncio.ensure_future(context.send_initial_metadata(((ADMITTED_KEY, "1"),)))
    try:
        await asyncio.shield(sending)
    except asyncio.CancelledError:
        await asyncio.wait({sending})
        # an error that is never looked at goes to the log, and the log has no use for a client that has gone
        if not sending.cancelled():
            sending.exception()
        raise


async def _abort(context: Context, error: Exception) -> NoReturn:
    code, text, metadata = status_of(error)
    if code is grpc.StatusCode.INTERNAL:
        if isinstance(error, PjwError):
            log.error("%s", error)
        else:
            log.error("a call failed", exc_info=error)
    await context.abort(code, text, metadata)


def _method_of(request_class: type[Message]) -> str:
    # the name that a request has in a contract that buf lint passes
    return request_class.DESCRIPTOR.name.removesuffix("Request")


def _deserializer(request_class: type[Req]) -> Callable[[bytes], Req | None]:
    # gRPC answers INTERNAL when this raises, with the exception's text; None is ours to word.
    def deserialize(data: bytes) -> Req | None:
        try:
            return request_class.FromString(data)
        except DecodeError:
            return None

    return deserialize


def _decoded(request: Req | None) -> Req:
    if request is None:
        raise InvalidJobError("the request is not a valid message (is all of its text UTF-8?)")
    return request


def _serialize(message: Message | bytes) -> bytes:
    return message if isinstance(message, bytes) else message.SerializeToString()
