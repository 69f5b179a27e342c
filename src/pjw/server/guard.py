"""Stands before every method, unary or stream: who calls, what it may, until when, and what errors become.

Handlers are wrapped here and registered from one table (service.py), so that no method can
be forgotten. Nothing of an exception reaches a client but what `status_of` lets through.
"""

# The stubs' generic classes are not generic when they run.
from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from pjw.certs.identity import OUR_RULES, NameRules
from pjw.certs.revocation import NOBODY_REVOKED, RevocationList
from pjw.errors import (
    InvalidJobError,
    LauncherGoneError,
    NotAllowedError,
    NotAuthenticatedError,
    PjwError,
)
from pjw.rpc.status import ADMITTED_KEY, status_of
from pjw.server.audit import CANCELLED, CallObserver, CallRecord
from pjw.server.authz import Caller
from pjw.server.config import ServerConfig
from pjw.server.connections import Told
from pjw.server.peer import Peer, authenticate, presented
from pjw.server.port import Port
from pjw.server.quota import Quota
from pjw.server.writer import ReaderGoneError, Writer

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]
Req = TypeVar("Req", bound=Message)
# an answer, or one that was serialized where that spares a copy of what is in it
Res = TypeVar("Res", bound=Message | bytes)
# sends one of a stream of answers
Answer = Callable[[Res], Awaitable[None]]

_DRAINING: Final = "the server is shutting down; running jobs go on"
_REVOKED: Final = "the client certificate has been revoked"
DEFAULT_CONFIG: Final = ServerConfig()

log: Final = logging.getLogger(__name__)


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
        self._allowed = config.allowed_clients
        self._refused: Final = Told()
        self._roles = config.roles
        self._quota: Final = Quota(config.clients)
        self._observers: Final = observers
        self._draining = False
        self._running: Final[set[_Call]] = set()

    def drain(self) -> None:
        """Refuse new calls and end the running ones with UNAVAILABLE, so that clients come back."""
        self._draining = True
        for call in self._running:
            call.end(LauncherGoneError(_DRAINING))

    def revoke(self, revoked: RevocationList) -> int:
        """Let nobody in who is in this list, and end what such clients have running: so many calls."""
        self._revoked = revoked
        ended = [call for call in self._running if call.peer.is_revoked(revoked)]
        for call in ended:
            call.end(NotAuthenticatedError(_REVOKED))
        return len(ended)

    def reconfigure(self, config: ServerConfig) -> None:
        """Take allowed clients, roles and the limits of clients from another configuration.

        A call that is not allowed any more ends: some last for as long as their caller likes.
        """
        self._allowed = config.allowed_clients
        self._roles = config.roles
        self._quota.set_limits(config.clients)
        if self._port is not None:
            self._port.reconfigure(config.clients)
        for call in self._running:
            try:
                self._require_allowed(call.peer.identity.client_name)
                self._caller(call.peer.identity.client_name, call.method, call.request)
            except NotAllowedError as error:
                call.end(error)

    def unary(
        self,
        method: Callable[[Req, Caller], Awaitable[Res]],
        request_class: type[Req],
        name: str | None = None,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """The handler of a method with one answer."""
        name = name or _method_of(request_class)

        async def handle(request: Req | None, context: Context) -> Res:
            try:
                with self._recorded(context, name, request) as record:
                    async with self._admitted(context, name, request, stream=False) as caller:
                        answer = await method(_decoded(request), caller)
                        record.answered(answer)
                        return answer
            except Exception as error:
                await _abort(context, error)

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
        """The handler of a method with a stream of answers."""
        name = name or _method_of(request_class)

        async def handle(request: Req | None, context: Context) -> None:
            async def body(record: CallRecord, caller: Caller, answer: Answer[Res]) -> None:
                async with aclosing(method(_decoded(request), caller)) as answers:
                    async for each in answers:
                        await answer(each)

            await self._stream(context, name, request, request, body)

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
        """The handler of a method with a stream of requests, which gets a function that answers.

        None is read before the one before was dealt with: what a client sends ahead waits at its end.
        """
        name = name or _method_of(request_class)

        async def handle(requests: AsyncIterator[Req | None], context: Context) -> None:
            async def body(record: CallRecord, caller: Caller, answer: Answer[Res]) -> None:
                async def decoded() -> AsyncGenerator[Req, None]:
                    async for request in requests:
                        record.asked(request)
                        yield _decoded(request)

                async with aclosing(decoded()) as asked:
                    await method(asked, caller, answer)

            # a method of this kind is for one's own jobs alone: no request of it asks for more
            await self._stream(context, name, None, request_class(), body)

        return grpc.stream_stream_rpc_method_handler(
            handle,
            request_deserializer=_deserializer(request_class),
            response_serializer=_serialize,
        )

    async def _stream(
        self,
        context: Context,
        name: str,
        first: Message | None,
        request: Message | None,
        body: Callable[[CallRecord, Caller, Answer[Res]], Awaitable[None]],
    ) -> None:
        try:
            with self._recorded(context, name, first) as record:
                try:
                    async with self._admitted(context, name, request, stream=True) as caller:
                        await _say_admitted(context)
                        async with Writer(context) as writer:

                            async def answer(message: Res) -> None:
                                await writer.write(message)
                                record.answered(message)

                            await body(record, caller, answer)
                except ReaderGoneError:
                    record.code = CANCELLED
        except Exception as error:
            await _abort(context, error)

    @contextmanager
    def _recorded(self, context: Context, method: str, request: Message | None) -> Iterator[CallRecord]:
        """Tell the observers of the call when it is over, let in or not."""
        record = CallRecord(method, request, context.peer())
        if not self._observers:
            yield record
            return
        record.identity = presented(context, self._names)
        for each in self._observers:
            each.call_began(record)
        try:
            with record.ended():
                yield record
        finally:
            for each in self._observers:
                each.call_ended(record)

    @asynccontextmanager
    async def _admitted(
        self, context: Context, method: str, request: Message | None, *, stream: bool
    ) -> AsyncGenerator[Caller, None]:
        """Let the caller in until its certificate expires or is revoked, or the server drains."""
        if self._draining:
            raise LauncherGoneError(_DRAINING)
        peer = authenticate(context, self._names)
        # On every call: neither an open connection nor a resumed session asks for it again.
        if peer.is_revoked(self._revoked):
            raise NotAuthenticatedError(_REVOKED)
        self._require_allowed(peer.identity.client_name)
        if self._port is not None:
            self._port.connections.require_room(context.peer())
        timeout = asyncio.timeout(peer.seconds_left())
        call = _Call(peer, timeout, method, request)
        client_name = peer.identity.client_name
        try:
            async with timeout:
                self._running.add(call)
                try:
                    async with self._quota.call(client_name, method, stream=stream):
                        _decoded(request)
                        yield self._caller(client_name, method, request)
                finally:
                    self._running.discard(call)
        except TimeoutError:
            if call.ended_by is not None:
                raise call.ended_by from None
            if peer.seconds_left() <= 0:
                raise NotAuthenticatedError("the client certificate has expired during the call") from None
            raise

    def _require_allowed(self, client_name: str) -> None:
        """Raises NotAllowedError, and says so in the log, for a client that the operator has not named."""
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

    def _caller(self, client_name: str, method: str, request: Message | None) -> Caller:
        return self._roles.caller(client_name, method, all_clients=getattr(request, "all_clients", False))


@dataclass(eq=False, slots=True)
class _Call:
    """A call that runs, and why it was ended if it was."""

    peer: Peer
    timeout: asyncio.Timeout
    method: str
    request: Message | None
    ended_by: PjwError | None = None

    def end(self, error: PjwError) -> None:
        """End it with *error*; one that is ending already is left to that."""
        if not self.timeout.expired():
            self.ended_by = self.ended_by or error
            self.timeout.reschedule(asyncio.get_running_loop().time())


async def _say_admitted(context: Context) -> None:
    # To its end, also when the call is ended meanwhile: while this is under way gRPC takes no status for the
    # call, which would then hold up the end of the server. It waits for no client.
    sending = asyncio.ensure_future(context.send_initial_metadata(((ADMITTED_KEY, "1"),)))
    try:
        await asyncio.shield(sending)
    except asyncio.CancelledError:
        await asyncio.wait({sending})
        # an error that nobody looks at goes to the log, and a client that has gone is no matter of the log's
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
