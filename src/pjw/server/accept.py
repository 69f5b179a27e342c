"""gRPC's server, whose accept loop no client can end.

grpc.aio decodes the path of every call in the one loop that accepts them all: a path that is no UTF-8, which
any client with a certificate can send, raises there, and the server closes its port for good (seen with
1.85.1). So the methods of the contract are registered with gRPC's core, which compares paths as bytes and
hands each of them its own calls; what is left over is answered UNIMPLEMENTED here, its path unread.

This stands on names that gRPC does not promise to keep. root/test_grpc_fuzz.py fails when one of them goes.
"""

# cygrpc has no types, and the server's class is not exported
# mypy: disable-error-code="attr-defined,misc,no-any-return"

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, Final, cast

import grpc
from grpc._cython import cygrpc
from grpc.aio import _server as aio_server

log: Final = logging.getLogger(__name__)
_grpc_log: Final = logging.getLogger(cygrpc.__name__)


def make_server(options: Sequence[tuple[str, int]]) -> grpc.aio.Server:
    """A grpc.aio server for methods that are known by name before it starts."""
    if not any(isinstance(one, _ForeignText) for one in _grpc_log.filters):
        _grpc_log.addFilter(_ForeignText())
    return cast("grpc.aio.Server", _Server(options))


class _Server(aio_server.Server):
    def __init__(self, options: Sequence[tuple[str, int]]) -> None:
        # in place of the base's own, which makes a server with the loop that can be ended
        self._loop = cygrpc.get_working_loop()
        channel_options = aio_server._augment_channel_arguments(options, None)
        self._server = _CoreServer(self._loop, None, (), (), channel_options, None)

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Register the methods of a table: what method_handlers_generic_handler() makes."""
        for handler in generic_rpc_handlers:
            self._server.add_registered_method_handlers(handler._method_handlers)


class _CoreServer(cygrpc.AioServer):
    def _make_request_call_future(self, method: bytes | None) -> asyncio.Future[Any]:
        if method is not None:
            return super()._make_request_call_future(method)
        return asyncio.ensure_future(self._refuse_unknown())

    async def _refuse_unknown(self) -> None:
        """Answer what is called by no registered name, until the server shuts down."""
        loop, nothing = asyncio.get_running_loop(), cygrpc._MethodResolver([], {})
        running: set[asyncio.Task[None]] = set()
        while True:
            # a name that is not its own: there is no way to the right one that cannot raise
            call = cygrpc._handle_rpc("", nothing, (), await self._request_call(), loop, False)
            task = loop.create_task(call)
            running.add(task)
            task.add_done_callback(running.discard)
            task.add_done_callback(_look_at_end)


def _look_at_end(task: asyncio.Task[None]) -> None:
    error = None if task.cancelled() else task.exception()
    # BaseError: gRPC's word for a caller that has gone
    if error is not None and not isinstance(error, grpc.aio.BaseError):
        log.error("a call of no method failed", exc_info=error)


class _ForeignText(logging.Filter):
    """gRPC logs a traceback for metadata that is no UTF-8: a client could fill the log with them."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("Invalid encoding on")
