"""Guards every method for nodes: checks the caller's certificate, and turns errors into answers."""

# The stubs' generic classes are not generic when they run.
from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from google.protobuf.message import DecodeError, Message

from pjw.certs.credentials import check_leaf
from pjw.certs.identity import CACHE_CERTIFICATES, node_of
from pjw.certs.revocation import RevocationList
from pjw.certs.tls import TLS_VERSION
from pjw.errors import InvalidJobError, NotAllowedError, NotAuthenticatedError, PjwError
from pjw.model import Identity
from pjw.rpc.status import status_of
from pjw.server.authz import Peer

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]

log: Final = logging.getLogger(__name__)


class NodeGuard:
    """Wraps the handlers of NodeService."""

    def __init__(self, revoked: Callable[[], RevocationList]) -> None:
        self._revoked: Final = revoked

    def unary(
        self, method: Callable[[Any, str], Awaitable[Message]], request_class: type[Message]
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Return the handler of a method with one answer."""

        async def handle(request: Message | None, context: Context) -> Message | None:
            try:
                return await method(_decoded(request), self.admit(context).identity.client_name)
            except Exception as error:  # noqa: BLE001  the one place where a bug becomes an answer
                await _abort(context, error)
                return None

        return grpc.unary_unary_rpc_method_handler(
            handle,
            request_deserializer=_deserializer(request_class),
            response_serializer=lambda message: message.SerializeToString(),
        )

    def stream(
        self,
        method: Callable[[Any, str], AsyncGenerator[Message, None]],
        request_class: type[Message],
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Return the handler of a method with a stream of answers."""

        async def handle(request: Message | None, context: Context) -> None:
            await self._send(context, lambda name: method(_decoded(request), name))

        return grpc.unary_stream_rpc_method_handler(
            handle,
            request_deserializer=_deserializer(request_class),
            response_serializer=lambda message: message.SerializeToString(),
        )

    def bidi(
        self,
        method: Callable[[AsyncIterator[Any], str, Callable[[], None]], AsyncGenerator[Message, None]],
        request_class: type[Message],
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Return the handler of a method with two streams, which gets a function to check the node again."""

        async def handle(requests: AsyncIterator[Message | None], context: Context) -> None:
            async def decoded() -> AsyncGenerator[Message, None]:
                async for request in requests:
                    yield _decoded(request)

            await self._send(
                context, lambda name: method(decoded(), name, lambda: _ignored(self.admit(context)))
            )

        return grpc.stream_stream_rpc_method_handler(
            handle,
            request_deserializer=_deserializer(request_class),
            response_serializer=lambda message: message.SerializeToString(),
        )

    async def _send(
        self, context: Context, answers_for: Callable[[str], AsyncGenerator[Message, None]]
    ) -> None:
        """Send the answers for the calling node, by its name."""
        try:
            name = self.admit(context).identity.client_name
            # aclosing: without it a session would last until the garbage collector ends it
            async with aclosing(answers_for(name)) as answers:
                async for answer in answers:
                    await context.write(answer)
        except grpc.aio.BaseError:
            # the node has gone while we wrote
            return
        except Exception as error:  # noqa: BLE001  the one place where a bug becomes an answer
            await _abort(context, error)

    def admit(self, context: Context) -> Peer:
        """Return the calling node, by its certificate. Raises NotAuthenticatedError and NotAllowedError."""
        peer = _authenticate(context.auth_context())
        if peer.is_revoked(self._revoked()):
            raise NotAuthenticatedError("the node's certificate has been revoked")
        return peer


def _ignored(_: Peer) -> None:
    return None


def _authenticate(properties: Mapping[str, Iterable[bytes]]) -> Peer:
    if list(properties.get("ssl_tls_version", ())) != [TLS_VERSION]:
        raise NotAuthenticatedError("TLS 1.3 is required")
    pem = next(iter(properties.get("x509_pem_cert", ())), None)
    if pem is None:
        raise NotAuthenticatedError("a node's certificate is required")
    peer = _peer_of(pem)
    if peer.seconds_left() <= 0:
        raise NotAuthenticatedError("the node's certificate has expired")
    return peer


@lru_cache(maxsize=CACHE_CERTIFICATES)
def _peer_of(pem: bytes) -> Peer:
    certificate = x509.load_pem_x509_certificate(pem)
    check_leaf(certificate)
    try:
        name = node_of(pem)
    except NotAuthenticatedError as error:
        # the caller is known: a client, or a gateway
        raise NotAllowedError(str(error), hint=error.hint) from None
    identity = Identity(name, certificate.serial_number)
    return Peer(identity, certificate.fingerprint(SHA256()), certificate.not_valid_after_utc)


async def _abort(context: Context, error: Exception) -> None:
    code, text, metadata = status_of(error)
    if code is grpc.StatusCode.INTERNAL:
        log.error("a call of a node failed", exc_info=None if isinstance(error, PjwError) else error)
    else:
        log.warning("a call of %s is refused: %s", context.peer(), error)
    await context.abort(code, text, metadata)


def _deserializer(request_class: type[Message]) -> Callable[[bytes], Message | None]:
    def deserialize(data: bytes) -> Message | None:
        try:
            return request_class.FromString(data)
        except DecodeError:
            return None

    return deserialize


def _decoded(request: Message | None) -> Message:
    if request is None:
        raise InvalidJobError("the request is not a valid message")
    return request
