"""gRPC's server, whose accept loop no client can end, and the turns of calls before their handlers.

grpc.aio decodes the path of every call in the one loop that accepts them all: a path that is no UTF-8, which
any client with a certificate can send, raises there, and the server closes its port for good (seen with
1.85.1). So the methods of the contract are registered with gRPC's core, which compares paths as bytes and
hands each of them its own calls; other calls are answered UNIMPLEMENTED here, its path unread.

This stands on names that gRPC does not promise to keep. root/test_grpc_fuzz.py fails when one of them goes.
"""

from __future__ import annotations

# cygrpc has no types, and the server's class is not exported
# mypy: disable-error-code="attr-defined,misc,no-any-return"
import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, Protocol, cast

import grpc
from grpc._cython import cygrpc
from grpc.aio import _server as aio_server

from pjw.certs.identity import NameRules
from pjw.server.authz import presented
from pjw.server.connections import Connections, PortLimits, Told
from pjw.server.quota import ClientLimits

# In which order, and how fast, calls go on to their handlers: before anything else is done for them.
#
# Calls of one client wait for each other, and not for those of others. Calls beyond a client's rate are held
# here. That costs the server little, and HTTP/2's own bound of streams then holds the client up. A
# client that goes on all the same, by cancelling held calls (CVE-2023-44487), is cut off.

# Calls that need only our processor, or a moment of the launcher's. Of one client only one is under way at a
# time, so others wait for one call, and not for a burst of thousands.
QUICK: Final = frozenset(
    {
        b"/pjw.v1.JobWorkerService/Get",
        b"/pjw.v1.JobWorkerService/List",
        b"/pjw.v1.JobWorkerService/GetUsageHistory",
        b"/pjw.v1.JobWorkerService/GetQuota",
        b"/pjw.v1.JobWorkerService/ListWorkspaces",
        b"/pjw.v1.JobWorkerService/ListImages",
        b"/grpc.health.v1.Health/Check",
    }
)
QUICK_AT_ONCE: Final = 1
# Calls of one client that are held, of 20 KiB each: as many as twenty full connections have.
HELD_MAX: Final = 2000
# A call that its client cancels so soon counts as taken back. A client that loses its connection takes back
# all that it follows, so it may take back that many at once; beyond that, only some a second.
EARLY_NS: Final = 10**9
TAKEN_BACK_BURST: Final = 1000
TAKEN_BACK_PER_SECOND: Final = 50
# For how long the calls of a client that was cut off are dropped; doubled each time that it goes on.
PENALTY_SECONDS: Final = 5
PENALTY_SECONDS_MAX: Final = 60
FORGET_ABOVE: Final = 64

_SECOND_NS: Final = 10**9

Context = grpc.aio.ServicerContext[Any, Any]
Deliver = Callable[[], None]


class _Line:
    """The calls of one client."""

    __slots__ = (
        "banned_until",
        "client",
        "full_at",
        "penalty",
        "quick",
        "taken_back_full_at",
        "timer",
        "under_way",
        "waiting",
    )

    def __init__(self, client: str) -> None:
        self.client: Final = client
        self.waiting: Final[deque[tuple[int, int, Context, Deliver]]] = deque()
        self.under_way = self.quick = 0
        # a token bucket is one number: when it is full again
        self.full_at = self.taken_back_full_at = 0
        self.timer: asyncio.TimerHandle | None = None
        self.banned_until = 0
        self.penalty = 0

    def is_forgotten(self, now: int) -> bool:
        """Return whether its state is that of a client that never came."""
        busy = self.waiting or self.under_way or self.timer
        last = self.banned_until + PENALTY_SECONDS_MAX * _SECOND_NS if self.penalty else 0
        return not busy and now > max(self.full_at, self.taken_back_full_at, last)


class Turns:
    """Holds calls until it is their turn."""

    def __init__(
        self,
        rate: Callable[[], tuple[float, int]],
        cut_off: Callable[[str], None],
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        # called with a client that cancels the calls that it begins
        self._cut_off: Final = cut_off
        # calls a second, 0 for no bound, and how many at once after a rest
        self._rate: Final = rate
        self._clock_ns: Final = clock_ns
        self._lines: Final[dict[str, _Line]] = {}
        self._forget_above = FORGET_ABOVE
        self._open = False

    def came(self, client: str, method: bytes, context: Context, deliver: Deliver) -> bool:
        """Have *deliver* called when it is the call's turn; false when it never will be."""
        line = self._lines.get(client)
        if line is None:
            self._forget()
            line = self._lines[client] = _Line(client)
        if len(line.waiting) >= HELD_MAX:
            return False
        line.waiting.append((int(method in QUICK), self._clock_ns(), context, deliver))
        self._go_on(line)
        return True

    def ban(self, client: str) -> int:
        """Forget *client*'s waiting calls, and ban it for a while; return the seconds of the ban."""
        line, now = self._lines[client], self._clock_ns()
        line.waiting.clear()
        line.taken_back_full_at = 0
        again = line.penalty and now < line.banned_until + PENALTY_SECONDS_MAX * _SECOND_NS
        line.penalty = min(2 * line.penalty, PENALTY_SECONDS_MAX) if again else PENALTY_SECONDS
        line.banned_until = now + line.penalty * _SECOND_NS
        return line.penalty

    def is_banned(self, client: str) -> bool:
        """Return whether the client is banned."""
        line = self._lines.get(client)
        return line is not None and self._clock_ns() < line.banned_until

    def open(self) -> None:
        """Let all go at once from now on, for the server ends and answers none of it."""
        self._open = True
        for line in self._lines.values():
            self._go_on(line)

    def _go_on(self, line: _Line) -> None:
        if line.timer is not None and not self._open:
            return
        while line.waiting:
            quick, came, context, deliver = line.waiting[0]
            if not self._open:
                if quick and line.quick >= QUICK_AT_ONCE:
                    return
                if (nanoseconds := self._take(line)) > 0:
                    loop = asyncio.get_running_loop()
                    line.timer = loop.call_later(nanoseconds / 1e9, self._timed, line)
                    return
            line.waiting.popleft()
            line.under_way += 1
            line.quick += quick
            context.add_done_callback(partial(self._ended, line, quick, came))  # type: ignore[arg-type]
            deliver()

    def _take(self, line: _Line) -> int:
        """Take a token; 0, or after how many nanoseconds there is one."""
        rate, burst = self._rate()
        if not rate:
            return 0
        now, step = self._clock_ns(), round(1e9 / rate)
        full_at = max(now, line.full_at) + step
        if (too_early := full_at - now - burst * step) > 0:
            return too_early
        line.full_at = full_at
        return 0

    def _timed(self, line: _Line) -> None:
        line.timer = None
        self._go_on(line)

    def _ended(self, line: _Line, quick: int, came: int, context: Context) -> None:
        line.under_way -= 1
        line.quick -= quick
        # no status was sent: the caller has gone, or has cancelled the call
        if not context.done() and not self._open:
            now = self._clock_ns()
            if now - came < EARLY_NS and now >= line.banned_until:
                self._note_taken_back(line, now)
        self._go_on(line)

    def _note_taken_back(self, line: _Line, now: int) -> None:
        step = _SECOND_NS // TAKEN_BACK_PER_SECOND
        line.taken_back_full_at = max(now, line.taken_back_full_at) + step
        if line.taken_back_full_at - now > TAKEN_BACK_BURST * step:
            self._cut_off(line.client)

    def _forget(self) -> None:
        if len(self._lines) <= self._forget_above:
            return
        now = self._clock_ns()
        for client in [name for name, line in self._lines.items() if line.is_forgotten(now)]:
            del self._lines[client]
        # doubled, so that the clients that came since the last look pay for the next one
        self._forget_above = max(FORGET_ABOVE, 2 * len(self._lines))


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


# Stands before gRPC's handlers: notes the client and connection of each call, and gives it its turn.

# Stands for clients whose certificate gives no name: the guard refuses their calls, and here they are one
# client.
NOBODY: Final = ""
# Calls that a client may begin at once, after a rest.
CALLS_AT_ONCE: Final = 200


class Port:
    """Holds each client to its limits at the port."""

    def __init__(self, limits: PortLimits, clients: ClientLimits, names: NameRules) -> None:
        self._clients = clients
        self._names: Final = names
        self.connections: Final = Connections(limits, lambda: self._clients.connections_max)
        self.turns: Final = Turns(lambda: (self._clients.calls_per_second, CALLS_AT_ONCE), self._cut_off)
        self._told: Final = Told()

    def reconfigure(self, clients: ClientLimits) -> None:
        """Apply these limits from now on; open connections stay."""
        self._clients = clients

    def admit(self, method: bytes, context: Context, deliver: Deliver) -> None:
        """Have a call delivered in its turn, or hang up on a client that makes too many."""
        identity = presented(context.auth_context(), self._names)
        client = identity.client_name if identity else NOBODY
        connection = self.connections.call_came(context.peer(), client)
        if self.turns.is_banned(client):
            if connection is not None:
                self.connections.close_later(connection, "rate")
        elif not self.turns.came(client, method, context, deliver):
            self._cut_off(client)

    def _cut_off(self, client: str) -> None:
        seconds = self.turns.ban(client)
        count = self.connections.close_client(client, "rate")
        if times := self._told.count(1, time.monotonic()):
            log.warning(
                "client %r begins calls and cancels them faster than it may: pjwd closes its connections (%d)"
                " and drops its calls for %d s; clients cut off since the last such message: %d",
                client,
                count,
                seconds,
                times,
            )
