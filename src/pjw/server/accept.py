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
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, Protocol, cast

import grpc
from grpc._cython import cygrpc
from grpc.aio import _server as aio_server

log: Final = logging.getLogger(__name__)
_grpc_log: Final = logging.getLogger(cygrpc.__name__)


class Gate(Protocol):
    """Stands between calls that have come and what is done for them."""

    def admit(
        self, method: bytes, context: grpc.aio.ServicerContext[Any, Any], deliver: Callable[[], None]
    ) -> None:
        """Call *deliver*, now or later; a call that is never delivered is cancelled."""


def make_server(options: Sequence[tuple[str, int]], gate: Gate | None = None) -> grpc.aio.Server:
    """A grpc.aio server for methods that are known by name before it starts."""
    if not any(isinstance(one, _DoneByCallers) for one in _grpc_log.filters):
        _grpc_log.addFilter(_DoneByCallers())
    return cast("grpc.aio.Server", _Server(options, gate))


class _Server(aio_server.Server):
    def __init__(self, options: Sequence[tuple[str, int]], gate: Gate | None) -> None:
        # in place of the base's own, which makes a server with the loop that can be ended
        self._loop = cygrpc.get_working_loop()
        channel_options = aio_server._augment_channel_arguments(options, None)
        self._server = _CoreServer(self._loop, None, (), (), channel_options, None)
        self._server.gate = gate

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Register the methods of a table: what method_handlers_generic_handler() makes."""
        for handler in generic_rpc_handlers:
            self._server.add_registered_method_handlers(handler._method_handlers)


class _CoreServer(cygrpc.AioServer):
    # between calls that gRPC's core has, and the loop that makes tasks of them
    gate: Gate | None = None

    def _make_request_call_future(self, method: bytes | None) -> asyncio.Future[Any]:
        if method is None:
            return asyncio.ensure_future(self._refuse_unknown())
        if self.gate is None:
            return super()._make_request_call_future(method)
        return asyncio.ensure_future(self._admitted(method))

    async def _admitted(self, method: bytes) -> object:
        """The next call of a method that is let go on."""
        queues: dict[bytes, asyncio.Queue[Any]] = self.__dict__.setdefault("_queues", {})
        if method not in queues:
            queues[method] = asyncio.Queue()
            # kept: the event loop itself keeps none of its tasks
            taker = asyncio.ensure_future(self._take(method, queues[method]))
            self.__dict__.setdefault("_takers", []).append(taker)
            taker.add_done_callback(partial(_hand_on_death, queues[method]))
        call = await queues[method].get()
        if isinstance(call, Exception):
            raise call
        return call

    async def _take(self, method: bytes, queue: asyncio.Queue[Any]) -> None:
        """Take calls from the core as they come, until the server shuts down."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                call = await self._request_registered_call(method)
            except Exception as error:  # noqa: BLE001  it goes to whoever takes the call
                queue.put_nowait(error)
                if not (self.is_running() and isinstance(error, cygrpc._RequestCallError)):
                    return
                continue
            context = cygrpc._ServicerContext(call, None, None, loop)
            self._pass_gate(method, context, partial(queue.put_nowait, call))
            # dropped here, and by the gate, it is cancelled
            del call, context

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

    async def _refuse_unknown(self) -> None:
        """Answer what is called by no registered name, until the server shuts down."""
        loop, nothing = asyncio.get_running_loop(), cygrpc._MethodResolver([], {})
        running: set[asyncio.Task[None]] = set()

        def refuse(call: object) -> None:
            # a name that is not its own: there is no way to the right one that cannot raise
            task = loop.create_task(cygrpc._handle_rpc("", nothing, (), call, loop, False))
            running.add(task)
            task.add_done_callback(running.discard)
            task.add_done_callback(_look_at_end)

        while True:
            call = await self._request_call()
            context = cygrpc._ServicerContext(call, None, None, loop)
            self._pass_gate(b"", context, partial(refuse, call))
            del call, context


def _hand_on_death(queue: asyncio.Queue[Any], taker: asyncio.Task[None]) -> None:
    """Tell the one who waits for calls that none will come: gRPC's server ends for that, and with it pjwd."""
    if not taker.cancelled() and (error := taker.exception()) is not None:
        queue.put_nowait(error)


def _look_at_end(task: asyncio.Task[None]) -> None:
    error = None if task.cancelled() else task.exception()
    # BaseError: gRPC's word for a caller that has gone
    if error is not None and not isinstance(error, grpc.aio.BaseError):
        log.error("a call of no method failed", exc_info=error)


class _DoneByCallers(logging.Filter):
    """Drops tracebacks that callers cause, since any client could fill the log with them.

    gRPC logs one for metadata that is not UTF-8, and one when a caller hangs up as gRPC begins to answer.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], cygrpc.ExecuteBatchError):
            return False
        return not str(record.msg).startswith("Invalid encoding on")
