"""Calls of the gateway to the pjwd of a node, each for the client whose job it is about."""

import json
from collections.abc import Callable
from typing import Any, Final

import grpc
from google.protobuf.message import Message

from pjw.certs.files import Credentials
from pjw.certs.profile import NODE_HOST_SUFFIX
from pjw.errors import PjwError, ServerUnreachableError
from pjw.gateway.nodes import Node
from pjw.gateway.skew import require_method
from pjw.rpc.status import FOR_CLIENT_KEY, error_of
from pjw.v1 import job_worker_pb2 as pb

_SERVICE: Final = pb.DESCRIPTOR.services_by_name["JobWorkerService"].full_name
_ANSWERS: Final[dict[str, type[Message]]] = {
    "Get": pb.GetResponse,
    "Stop": pb.StopResponse,
    "Delete": pb.DeleteResponse,
    "GetUsageHistory": pb.GetUsageHistoryResponse,
    "Wait": pb.WaitResponse,
    "Exec": pb.ExecResponse,
    "Resize": pb.ResizeResponse,
    "GetQuota": pb.GetQuotaResponse,
}
# How many connections the gateway has to one node. Each carries as many calls as the node's pjwd allows, and
# each follower is one call.
_CONNECTIONS_MAX: Final = 50
_GONE: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)


class Dial:
    """A channel to each node, and calls over it."""

    def __init__(self, credentials: Callable[[], Credentials]) -> None:
        self._credentials: Final = credentials
        self._channels: Final[dict[str, tuple[str, grpc.aio.Channel]]] = {}

    async def close(self) -> None:
        """End all connections, and the calls over them."""
        for _, channel in self._channels.values():
            await channel.close()

    async def drop(self, node: Node) -> None:
        """End the connection to a lost node, whose calls would wait until its network is back."""
        if (known := self._channels.pop(node.row.name, None)) is not None:
            await known[1].close()

    def _channel(self, node: Node) -> grpc.aio.Channel:
        name, address = node.row.name, node.row.address
        known = self._channels.get(name)
        if known is not None and known[0] == address:
            return known[1]
        credentials = self._credentials()
        channel = grpc.aio.secure_channel(
            address,
            grpc.ssl_channel_credentials(credentials.ca_pem, credentials.key_pem, credentials.crt_pem),
            [
                # The handshake fails unless this very node answers there.
                ("grpc.ssl_target_name_override", f"{name}{NODE_HOST_SUFFIX}"),
                ("grpc.enable_http_proxy", 0),
                ("grpc.max_receive_message_length", 16 * 1024 * 1024),
                # gRPC widens the window of a fast node. With a fixed one of 1 MiB output came a third slower,
                # and a client that does not read held 2 MB here instead of 5.
                ("grpc.keepalive_time_ms", 20_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.initial_reconnect_backoff_ms", 50),
                ("grpc.max_reconnect_backoff_ms", 1_000),
                (
                    "grpc.service_config",
                    json.dumps({"connectionScaling": {"maxConnectionsPerSubchannel": _CONNECTIONS_MAX}}),
                ),
                ("grpc.max_connections_per_subchannel_cap", _CONNECTIONS_MAX),
            ],
        )
        self._channels[name] = address, channel
        return channel

    async def call(
        self, node: Node, method: str, request: Message, client_name: str, seconds: float | None = None
    ) -> Any:  # noqa: ANN401  the answer of the method
        """Make a call. Raises what the node answers, and ServerUnreachableError when it does not."""
        _require(node, method)
        made: Any = self._channel(node).unary_unary(
            f"/{_SERVICE}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=_ANSWERS[method].FromString,
        )
        try:
            return await made(request, timeout=seconds, metadata=((FOR_CLIENT_KEY, client_name),))
        except grpc.aio.AioRpcError as error:
            raise error_from(error, node) from None

    def stream(self, node: Node, method: str, request: Message, client_name: str) -> Any:  # noqa: ANN401
        """A stream of a node's answers, each as its bytes. Reading raises AioRpcError: see `error_from`."""
        _require(node, method)
        made: Any = self._channel(node).unary_stream(
            f"/{_SERVICE}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=None,
        )
        return made(request, metadata=((FOR_CLIENT_KEY, client_name),))

    def duplex(self, node: Node, method: str, client_name: str) -> Any:  # noqa: ANN401
        """Two streams with a node, each message as its bytes. Reading and writing raise as in `stream`."""
        made: Any = self._channel(node).stream_stream(
            f"/{_SERVICE}/{method}", request_serializer=None, response_deserializer=None
        )
        return made(metadata=((FOR_CLIENT_KEY, client_name),))


def _require(node: Node, method: str) -> None:
    # one that is not connected does not answer, whatever it knows
    if node.session is not None:
        require_method(node.row.name, node.session.hello, method)


def error_from(error: grpc.aio.AioRpcError, node: Node) -> PjwError:
    """The error to raise for a call that failed."""
    if error.code() in _GONE:
        return ServerUnreachableError(f"node {node.row.name} does not answer now; its jobs go on")
    metadata = {key: value for key, value in error.trailing_metadata() or () if isinstance(value, str)}
    return error_of(error.code(), error.details() or "", metadata, {})
