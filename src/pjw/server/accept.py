"""gRPC's server, whose accept loop no client can end.

grpc.aio decodes the path of every call in the one loop that accepts them all: a path that is no UTF-8, which
any client with a certificate can send, raises there, and the server closes its port for good (seen with
1.85.1). So the methods of the contract are registered with gRPC's core, which compares paths as bytes and
hands each of them its own calls; other calls are answered UNIMPLEMENTED here, its path unread.

This stands on names that gRPC does not promise to keep. root/test_grpc_fuzz.py fails when one of them goes.
"""

# cygrpc has no types, and the server's class is not exported
# mypy: disable-error-code="attr-defined,misc,no-any-return"

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, Protocol, cast

import grpc
from grpc._cython import cygrpc
from grpc.aio import _server as aio_server

log: Final = logging.getLogger(__name__)
_grpc_log: Final = logging.getLogger(cygrpc.__name__)


class Gate(Protocol):
    """Stands between the calls that have come and their handlers."""

    def admit(
        self, method: bytes, context: grpc.aio.ServicerContext[Any, Any], deliver: Callable[[], None]
    ) -> None:
        """Call *deliver*, now or later; a call that is never delivered is cancelled."""


def make_server(options: Sequence[tuple[str, int]], gate: Gate | None = None) -> grpc.aio.Server:
    """Make a grpc.aio server for methods that are known by name before it starts."""
    if not any(isinstance(one, _DoneByCallers) for one in _grpc_log.filters):
        _grpc_log.addFilter(_DoneByCallers())
    return cast("grpc.aio.Server", _Server(options, gate))


class _Server(aio_server.Server):
    def __init__(self, options: Sequence[tuple[str, int]], gate: Gate | None) -> None:
        # in place of the base's own, which makes a server with the loop that can be ended
        self._loop = cygrpc.get_working_loop()
        channel_options = aio_server._augment_channel_arguments(options, None)
        self._server = _CoreServer(self._loop, None, (), (), channel_options, None)
        self._server.gate, self._server.handlers, self._server.answering = gate, {}, set()

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Register the methods of a table that method_handlers_generic_handler() made."""
        for handler in generic_rpc_handlers:
            self._server.add_registered_method_handlers(handler._method_handlers)
            self._server.handlers.update(handler._method_handlers)


class _CoreServer(cygrpc.AioServer):
    # between calls that gRPC's core has, and the tasks that answer them
    gate: Gate | None
    # by the names of their methods
    handlers: dict[str, object]
    # kept: the event loop itself keeps none of its tasks
    answering: set[asyncio.Task[None]]

    def _make_request_call_future(self, method: bytes | None) -> asyncio.Future[Any]:
        """Take all calls of a method, and not only the next one; the future is done when the server ends.

        The base would wait for all methods anew after each call.
        A bug that ends the future ends the server, and with it pjwd.
        """
        return asyncio.ensure_future(self._take(method))

    async def _take(self, method: bytes | None) -> None:
        """Take calls of a method from the core as they come; None is for those of no registered name."""
        loop = asyncio.get_running_loop()
        # a name that is not the call's own: there is no way to the right one that cannot raise
        name, handlers = ("", {}) if method is None else (method.decode(), self.handlers)
        resolver = cygrpc._MethodResolver([], handlers)
        while True:
            try:
                call = await (
                    self._request_call() if method is None else self._request_registered_call(method)
                )
            except cygrpc._RequestCallError:
                if self.is_running():
                    continue
                raise
            context = cygrpc._ServicerContext(call, None, None, loop)
            self._pass_gate(method or b"", context, partial(self._answer, call, name, resolver, loop))
            # dropped here, and by the gate, it is cancelled
            del call, context

    def _answer(self, call: object, name: str, resolver: object, loop: asyncio.AbstractEventLoop) -> None:
        answer = cygrpc._handle_rpc(name, resolver, (), call, loop, False)
        task = loop.create_task(cygrpc._schedule_rpc_coro(answer, call, loop, name))
        self.answering.add(task)
        task.add_done_callback(self.answering.discard)
        task.add_done_callback(_look_at_end)

    def _pass_gate(
        self, method: bytes, context: grpc.aio.ServicerContext[Any, Any], deliver: Callable[[], None]
    ) -> None:
        if self.gate is None:
            deliver()
            return
        try:
            self.gate.admit(method, context, deliver)
        except Exception:
            # a bug of ours must not end the loop that takes calls
            log.exception("a call was not let in")


def _look_at_end(task: asyncio.Task[None]) -> None:
    error = None if task.cancelled() else task.exception()
    # BaseError: gRPC's word for a caller that has gone
    if error is not None and not isinstance(error, grpc.aio.BaseError):
        log.error("a call failed outside of its method", exc_info=error)


class _DoneByCallers(logging.Filter):
    """Drops tracebacks that callers cause, since any client could fill the log with them.

    gRPC logs one for metadata that is not UTF-8, and one when a caller hangs up as gRPC begins to answer.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], cygrpc.ExecuteBatchError):
            return False
        return not str(record.msg).startswith("Invalid encoding on")
